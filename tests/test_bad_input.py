"""What people do wrong gets one line that says what, and where; nothing is written or lost. Where
the line has advice, the advice is followed, and has to help."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    NETWORKS,
    ROOT,
    SEGMENTERS,
    SMALL,
    TRAINING,
    checkpoint,
    drawn,
    load,
    network,
    rows,
    same,
    start,
    write_cifar,
    write_folder,
    write_pets,
)
from PIL import Image

m = load("unet")  # reading and checkpoints are the same text in every script (test_copies.py)


@pytest.fixture
def folder(here):
    """18 photos and black-and-white masks, in the current folder."""
    return write_folder("mine", 18)


@pytest.fixture
def refused(refuse):
    """refused(script, *flags) -> the line; no run was begun."""

    def call(name, *flags):
        line = refuse(name, *SMALL[name], "--epochs", "1", *flags)
        assert not Path("checkpoints").exists()
        return line

    return call


def read(folder, *flags):
    """What unet.py reads of a folder, without an exit."""
    return m.load_data(m.parse_args([*SMALL["unet"], "--data", str(folder), *flags]))


def small_run(name, folder, *flags):
    load(name).main([*SMALL[name], "--data", str(folder), "--epochs", "1", *flags])


def change(folder, mistake):
    """Every mask through mistake(labels 0 and 1 as uint8) -> its pixels."""
    for path in Path(folder, "masks").iterdir():
        labels = np.asarray(Image.open(path)) // 255
        Image.fromarray(mistake(labels)).save(path)


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("flags", ["--size 42", "--size 64 42", "--epochs many", "--colour red"])
def test_flag(name, flags, refused):
    assert flags.split()[0] in refused(name, *flags.split())


@pytest.mark.parametrize("name", TRAINING)
def test_the_size_that_is_advised(name, refused):
    """The line has a number whose multiples the network takes."""
    number = int(re.search(r"multiples of (\d+)", refused(name, "--size", "42"))[1])
    H, W = 2 * number, 3 * number
    args = load(name).parse_args(["--size", str(H), str(W), *SMALL[name][2:]])
    answer = network(name).eval()(torch.zeros(1, 3, *args.size))
    logits = answer[0] if NETWORKS[name][0] == "VQVAE" else answer
    assert logits.shape[2:] == (H, W)


@pytest.mark.parametrize("name", ["pretrain", *SEGMENTERS])
@pytest.mark.parametrize("share", ["0", "1.5", "-0.5"])
def test_frac(name, share, refused):
    assert "more than 0, at most 1" in refused(name, f"--frac={share}")
    for right in [0.001, 1.0]:
        assert load(name).parse_args([*SMALL[name], f"--frac={right}"]).frac == right


@pytest.mark.parametrize("share", ["0.9-0.1", "0.1-1.5", "0-0", "a-b", "0.1", "-0.1-0.5", ""])
def test_mask_of_pretrain(share, refused):
    advice = refused("pretrain", f"--mask={share}").split()[-1]
    assert load("pretrain").parse_args(["--mask", advice]).mask == advice


def test_names_of_experiments(refuse):
    line = refuse("experiments", "nonsense")
    names = line.partition("wanted ")[2].replace(", or all or quick alone", "").split(", ")
    assert len(names) > 1
    for words in [names, ["all"], ["quick"]]:
        assert load("experiments").parse_args([word.strip() for word in words]).names


def test_as_typed_in_a_shell(here):
    """One line on stderr, and 1 for the shell."""
    child = start("unet", "--data", "nowhere", cwd=here)
    _, error = child.communicate()
    assert child.returncode == 1
    assert error.startswith("nowhere: ") and error.count("\n") == 1


# --- folders -------------------------------------------------------------------------------------


def test_no_such_folder(refused):
    line = refused("unet", "--data", "nowhere")
    assert "nowhere" in line and "images/" in line and "masks/" in line


@pytest.mark.parametrize("name", ["vqvae", "pretrain"])
def test_no_such_folder_of_images(name, refused):
    assert "nowhere: too few photos" in refused(name, "--data", "nowhere")


def test_an_empty_folder(refused):
    """The line says what belongs there; with that it runs."""
    Path("mine/images").mkdir(parents=True)
    line = refused("unet", "--data", "mine")
    assert line.startswith("mine: wanted pairs in images/ and masks/")
    write_folder("mine", 3)
    read("mine")


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_file_without_its_partner(kind, folder, refused):
    """The line names it; with the partner the folder is read."""
    next(Path(folder, kind).glob("004.*")).unlink()
    line = refused("unet", "--data", folder)
    assert "mine" in line and "004" in line
    write_folder(folder, 1, first=4)
    read(folder)


def test_a_part_without_masks(parted, refused):
    for path in (parted / "test/masks").iterdir():
        path.unlink()
    line = refused("unet", "--data", parted, "--ignore", 9)
    assert "test" in line and "200" in line


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_photos(n, refused):
    """One to train with, one to validate with and one to test with are the least, and enough."""
    assert "train, validate and test" in refused("unet", "--data", write_folder("mine", n))
    read(write_folder("mine", 3))


def test_too_few_images(folder, refused):
    for path in sorted(Path(folder, "images").iterdir())[1:]:
        path.unlink()
    assert "mine: too few photos to train and validate" in refused("vqvae", "--data", folder)
    write_folder("mine", 2)
    vqvae = load("vqvae")
    train, val = vqvae.load_images(vqvae.parse_args([*SMALL["vqvae"], "--data", "mine"]))
    assert len(train) == len(val) == 1


# --- files ---------------------------------------------------------------------------------------


def cut_off(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def half_a_photo(folder):
    cut_off(folder / "images/004.jpg", 0.5)


def empty_mask(folder):
    cut_off(folder / "masks/004.png", 0)


def all_broken(folder):
    for path in (folder / "images").iterdir():
        path.write_bytes(b"no photo")


def small_mask(folder):
    drawn(4, (20, 30), 2)[1].save(folder / "masks/004.png")


def jpeg_masks(folder):
    """JPEG blurs: labels become many others."""
    for path in list((folder / "masks").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()


def sixteen_bits(folder):
    (folder / "images/004.jpg").unlink()
    pixels = np.asarray(drawn(4)[0].convert("L")).astype(np.uint16)
    Image.fromarray(pixels).save(folder / "images/004.tif")


FILES = [
    (half_a_photo, "images/004.jpg"),
    (empty_mask, "masks/004.png"),
    (all_broken, "images/0"),
    (small_mask, "(64, 48) RGB with (20, 30)"),
    (jpeg_masks, "JPEG"),
    (sixteen_bits, "images/004.tif"),
]


@pytest.mark.parametrize("mistake, words", FILES)
def test_files(mistake, words, folder, refused):
    """The line names the pair and what is wanted; made so, the folder is read."""
    mistake(folder)
    line = refused("unet", "--data", folder)
    assert words in line and "wanted an 8-bit photo, a PNG mask of its size" in line
    for path in [*folder.glob("images/*.tif"), *folder.glob("masks/*.jpg")]:
        path.unlink()
    read(write_folder(folder, 18))


# --- labels --------------------------------------------------------------------------------------


def with_a_rim(labels):
    """Grey between black and white, as drawing programs leave it."""
    grey = labels * 255
    grey[:2] = 128
    return grey


def in_colours(labels):
    red, blue = np.uint8([200, 0, 0]), np.uint8([0, 0, 200])
    return np.where(labels[..., None] == 1, red, blue)


GAPS = {
    "0 and 38": (lambda labels: labels * 38, "[0, 38]"),
    "0, 1 and 7": (lambda labels: labels + 6 * (labels * np.arange(64) > 32).astype(np.uint8), "7"),
    "no 0": (lambda labels: labels + 1, "[1, 2]"),
    "black, grey and white": (with_a_rim, "128"),
    "colours": (in_colours, "labels [2"),
}
ONE = {
    "black": (lambda labels: labels * 0, "[0]"),
    "white": (lambda labels: labels * 0 + 255, "[1]"),
}


@pytest.mark.parametrize("mistake", GAPS | ONE)
def test_labels(mistake, folder, refused):
    """The line has the labels that were found, and those that are wanted; with them it is read."""
    values, word = (GAPS | ONE)[mistake]
    change(folder, values)
    line = refused("unet", "--data", folder)
    assert "mine" in line and word in line and "wanted 0 and 255, or 0 to C-1" in line
    read(write_folder(folder, 18))
    change(folder, same)
    read(folder)


@pytest.mark.parametrize("mistake", sorted(set(GAPS) - {"colours"}))
def test_the_cure_of_the_readme(mistake, folder, monkeypatch):
    """The line says "see README", which has a few lines that close gaps."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (cure,) = [block for block in blocks if "mask.png" in block]
    change(folder, GAPS[mistake][0])
    with pytest.raises(SystemExit):
        read(folder)
    for path in (folder / "masks").iterdir():
        path.rename("mask.png")
        exec(cure, {})
        Path("mask.png").rename(path)
    (_, masks), _ = read(folder)
    assert masks.unique().tolist() in ([0, 1], [0, 1, 2])


def test_white_that_is_ignored(folder, refused):
    """--ignore 255 on black and white leaves nothing but background."""
    assert "[0]" in refused("unet", "--data", folder, "--ignore", 255)


def test_grey_masks_of_every_value(here):
    """Soft masks have no gap in their labels, and are no 256 classes."""
    g = np.random.default_rng(0)

    def soft(labels):
        return g.integers(0, 256, labels.shape).astype(np.uint8)

    write_folder("mine", 12, paint=soft)
    with pytest.raises(SystemExit, match="mine: labels"):
        read("mine")


# --- checkpoints ---------------------------------------------------------------------------------


def follow(line, folder, *flags):
    """Run what the line says after "run python", on the folder -> the scripts' names."""
    names = re.findall(r"python (\w+)\.py", line)
    for name in names:
        small_run(name, folder, *flags)
    return names


@pytest.mark.parametrize("name", TRAINING)
def test_resume_of_no_run(name, refuse):
    line = refuse(name, "--resume")
    assert f"checkpoints/{name}/last.pt" in line and f"python {name}.py" in line


@pytest.mark.parametrize("name, last", [("pretrain", "missing"), ("vqvae", "bad")])
def test_a_run_to_resume_is_made_by_the_command_in_the_line(name, last, folder, refuse):
    """Where there was none, and where it was cut short."""
    out = Path("checkpoints", name)
    if last == "bad":
        out.mkdir(parents=True)
        (out / "last.pt").write_bytes(b"PK" + bytes(99))
    line = refuse(name, "--resume")
    assert follow(line, folder) == [name]
    load(name).main(["--resume", "--epochs", "2"])
    assert [row["epoch"] for row in rows(out)] == [1, 2]


def test_finetune_and_evaluate_before_pretrain(folder, refuse, capsys):
    """Each line has the command to run first; one after the other they lead to scores."""
    line = refuse("finetune", "--size", "32")
    assert "checkpoints/pretrain/best.pt" in line and "python pretrain.py" in line
    line = refuse("evaluate")
    assert "no finished run" in line
    pretrain, finetune = re.findall(r"python (\w+)\.py", line)
    flags = ["--size", "32", "--data", "mine", "--epochs", "1"]
    load(pretrain).main(flags)
    load(finetune).main(flags)
    load("evaluate").main([])
    assert "miou" in capsys.readouterr().out


def test_evaluate_of_no_program(folder, refuse):
    """The line has a command that trains; then the same command scores."""
    assert "nowhere: no such file" in refuse("evaluate", "nowhere")
    Path("empty").mkdir()
    line = refuse("evaluate", "empty")
    assert "empty/model.pt2: no such file" in line
    assert follow(line, folder, "--out", "empty") == ["finetune"]
    load("evaluate").main(["empty"])


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_init_that_is_cut_off(share, refused):
    state = {"script": "pretrain.py", "args": {}, "model": {"weight": torch.zeros(9999)}}
    torch.save(state, "bad.pt")
    cut_off(Path("bad.pt"), share)
    assert "bad.pt" in refused("finetune", "--init", "bad.pt")


def test_init_of_another_script(folder, refuse):
    """The line says whose it is and which script to run; what that writes is taken."""
    small_run("vqvae", folder, "--out", "run")
    line = refuse("finetune", "--init", "run/best.pt")
    assert "run/best.pt: was written by vqvae.py" in line
    assert follow(line, folder, "--out", "run") == ["pretrain"]
    load("finetune").parse_args(["--init", "run/best.pt"])


@pytest.mark.parametrize("name", ["vqvae", "pretrain", "finetune"])
def test_resume_with_other_photos(name, folder, refuse):
    """Trained anew, as the line says, the old run moves aside."""
    small_run(name, folder, "--out", "run")
    write_folder(folder, 9, first=50)
    line = refuse(name, "--resume", "--out", "run")
    assert "other photos" in line and "without --resume" in line
    before = checkpoint("run/last.pt")["args"]["checksum"]
    small_run(name, folder, "--out", "run")
    assert checkpoint("run/last.pt")["args"]["checksum"] != before
    assert checkpoint("run.prev/last.pt")["args"]["checksum"] == before


def test_resume_with_another_width(folder, refuse):
    small_run("unet", folder, "--out", "run")
    line = refuse("unet", "--resume", "--out", "run", "--width", "8")
    assert "sizes" in line


def test_a_refusal_leaves_the_old_run(folder, refuse):
    small_run("finetune", folder, "--out", "run")
    for flags in ["--data nowhere", "--data mine --frac 0", "--data mine --init nowhere/best.pt"]:
        refuse("finetune", *SMALL["finetune"], *flags.split(), "--out", "run")
    assert checkpoint("run/last.pt")["script"] == "finetune.py"
    assert not Path("run.prev").exists()


# --- downloads -----------------------------------------------------------------------------------


def no_route(*_, **__):
    raise OSError("no route to host")


@pytest.mark.parametrize("name", ["finetune", "pretrain"])
def test_pets_that_cannot_be_downloaded(name, monkeypatch, refused):
    """Unpacked by hand where the line says, they are taken."""
    monkeypatch.setattr(
        "torchvision.datasets.oxford_iiit_pet.download_and_extract_archive", no_route
    )
    line = refused(name, "--data", "pets", "--root", "here")
    assert "no route to host" in line and "https://www.robots.ox.ac.uk/~vgg/data/pets" in line
    base = Path(re.search(r"in (\S+)$", line)[1])
    write_pets(base.parent)
    small_run(name, "pets", "--root", "here")


def test_a_collection_that_cannot_be_downloaded(catdog, monkeypatch, refused):
    """Unpacked by hand where the line says, it is taken."""
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", no_route)
    (catdog / "PetImages").rename("elsewhere")
    line = refused("pretrain", "--data", "catdog", "--root", catdog, "--download")
    assert "no route to host" in line and "kagglecatsanddogs" in line
    root = Path(re.search(r"in (\S+)$", line)[1])
    Path("elsewhere").rename(root / "PetImages")
    small_run("pretrain", "catdog", "--root", str(catdog), "--download")


def test_cifar_that_cannot_be_downloaded(monkeypatch, refused):
    """Unpacked by hand where the line says, it is taken."""
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_route)
    flags = ["--data", "catdog", "--root", "four"]
    line = refused("pretrain", *flags, "--download")
    assert "no route to host" in line and "cifar-10-python.tar.gz" in line
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, *_: Path(path).exists()
    )
    write_cifar(re.search(r"in (\S+)$", line)[1])
    small_run("pretrain", "catdog", "--root", "four")


def test_weights_that_cannot_be_downloaded(here):
    """torch says which file of which address goes where, before its own error."""
    blocked = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": "weights"}
    child = start("linknet", "--size", "32", "--imagenet", cwd=here, env=os.environ | blocked)
    error = child.communicate()[1]
    assert "https://" in error and "resnet18" in error and "weights/hub/checkpoints" in error


# --- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINING)
def test_a_loss_that_is_not_finite(name, folder, refuse):
    """The line has the epoch and advice; the epochs before are kept."""
    flags = [*SMALL[name], "--data", folder, "--out", "run", "--epochs", "9", "--lr", "1e30"]
    line = refuse(name, *flags)
    assert "not finite" in line and "try --lr 3e+29" in line
    kept = []
    if Path("run/last.pt").exists():
        kept = checkpoint("run/last.pt")["history"]
    assert f"epoch {len(kept) + 1} " in line
    assert all(np.isfinite(row["loss"]) for row in kept)


def test_the_learning_rate_that_is_advised(folder, refuse):
    """Followed as often as it is given, the advice ends in a run of finite losses."""
    flags = [*SMALL["vqvae"], "--data", folder, "--epochs", "3", "--batch-size", "4"]
    first = refuse("vqvae", *flags, "--lr", "10").split()[-1]
    second = refuse("vqvae", *flags, "--lr", first).split()[-1]
    load("vqvae").main([*map(str, flags), "--lr", second])
    losses = [row["loss"] for row in rows("checkpoints/vqvae")]
    assert len(losses) == 3 and np.isfinite(losses).all()


# --- programs from elsewhere ---------------------------------------------------------------------


def test_a_program_that_names_no_data(folder, refuse, capsys):
    program = torch.export.export(
        torch.nn.Conv2d(3, 2, 1).eval(),
        (torch.zeros(2, 3, 32, 32),),
        dynamic_shapes=({0: torch.export.Dim("B", min=1)},),
    )
    meta = '{"classes": ["background", "foreground"], "size": 32, "ignore": null}'
    torch.export.save(program, "foreign.pt2", extra_files={"meta.json": meta})
    assert "give --data" in refuse("evaluate", "foreign.pt2")
    load("evaluate").main(["foreign.pt2", "--data", "mine"])
    assert "miou" in capsys.readouterr().out
