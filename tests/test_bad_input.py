"""What people do wrong gets one line that says what, where, and what helps; nothing is written or
lost. Where the advice can be followed in seconds, it is followed, and has to help."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
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
    start,
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
@pytest.mark.parametrize("size", [[42], [64, 42]])
def test_size(name, size, refused):
    """The line has a number whose multiples the network takes."""
    number = int(re.search(r"multiples of (\d+)", refused(name, "--size", *size))[1])
    H, W = 2 * number, 3 * number
    args = load(name).parse_args(["--size", str(H), str(W), *SMALL[name][2:]])
    answer = network(name).eval()(torch.zeros(1, 3, *args.size))
    logits = answer[0] if NETWORKS[name][0] == "VQVAE" else answer
    assert logits.shape[2:] == (H, W)


@pytest.mark.parametrize("name", ["pretrain", *SEGMENTERS])
@pytest.mark.parametrize("share", ["0", "1.5"])
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


# --- folders -------------------------------------------------------------------------------------


def test_no_such_folder(here):
    """As typed in a shell: one line on stderr, and 1."""
    child = start("unet", "--data", "nowhere", cwd=here)
    _, error = child.communicate()
    assert child.returncode == 1
    assert error.startswith("nowhere: wanted pairs in images/ and masks/")
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_file_without_its_partner(kind, folder, refused):
    """The line names it; with the partner the folder is read."""
    next(Path(folder, kind).glob("004.*")).unlink()
    line = refused("unet", "--data", folder)
    assert "mine" in line and "004" in line
    write_folder(folder, 1, first=4)
    read(folder)


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_photos(n, refused):
    """One to train with, one to validate with and one to test with are the least, and enough."""
    assert "train, validate and test" in refused("unet", "--data", write_folder("mine", n))
    read(write_folder("mine", 3))


def test_too_few_images(refused):
    """One to train with and one to validate with are the least, and enough."""
    assert "mine: too few photos" in refused("vqvae", "--data", "mine")  # no such folder
    assert "mine: too few photos" in refused("vqvae", "--data", write_folder("mine", 1))
    small_run("vqvae", write_folder("mine", 2))


# --- files ---------------------------------------------------------------------------------------


def cut_off(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def half_a_photo(folder):
    cut_off(folder / "images/004.jpg", 0.5)


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


CURABLE = {
    "0 and 38": (lambda labels: labels * 38, "[0, 38]"),
    "0, 1 and 7": (lambda labels: np.where(np.arange(64) < 32, labels, 7 * labels), "[0, 1, 7]"),
    "no 0": (lambda labels: labels + 1, "[1, 2]"),
    "a grey rim": (lambda labels: np.vstack([labels[:2] + 128, labels[2:] * 255]), "[0, 128]"),
}
LABELS = CURABLE | {
    "black": (lambda labels: labels * 0, "[0]"),
    "white": (lambda labels: labels * 0 + 255, "[1]"),
    "red and blue": (lambda labels: np.uint8([[0, 0, 200], [200, 0, 0]])[labels], "labels [2"),
    "noise": (lambda labels: np.random.randint(0, 256, labels.shape, np.uint8), "[0, 1, 2, 3, "),
}


@pytest.mark.parametrize("mistake", LABELS)
def test_labels(mistake, folder, refused):
    """The line has the labels that were found, and those that are wanted; with them it is read."""
    values, word = LABELS[mistake]
    change(folder, values)
    line = refused("unet", "--data", folder)
    assert "mine" in line and word in line and "wanted 0 and 255, or 0 to C-1" in line
    read(write_folder(folder, 18))


@pytest.mark.parametrize("mistake", CURABLE)
def test_the_cure_of_the_readme(mistake, folder):
    """The line says "see README", which has a few lines that close gaps."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (cure,) = [block for block in blocks if "mask.png" in block]
    change(folder, CURABLE[mistake][0])
    for path in (folder / "masks").iterdir():
        path.rename("mask.png")
        exec(cure, {})
        Path("mask.png").rename(path)
    (_, masks), _ = read(folder)
    assert masks.unique().tolist() in ([0, 1], [0, 1, 2])


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINING)
def test_resume_of_no_run(name, refuse):
    line = refuse(name, "--resume")
    assert f"checkpoints/{name}/last.pt" in line and f"python {name}.py" in line


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


def test_evaluate_of_no_program(refuse):
    assert "nowhere: no such file" in refuse("evaluate", "nowhere")
    Path("empty").mkdir()
    line = refuse("evaluate", "empty")
    assert "empty/model.pt2: no such file: run python finetune.py" in line


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_init_that_is_cut_off(share, refused):
    state = {"script": "pretrain.py", "args": {}, "model": {"weight": torch.zeros(9999)}}
    torch.save(state, "bad.pt")
    cut_off(Path("bad.pt"), share)
    assert "bad.pt" in refused("finetune", "--init", "bad.pt")


def test_init_of_another_script(folder, refuse):
    """The line says whose it is, and which script to run."""
    small_run("vqvae", folder)
    line = refuse("finetune", "--init", "checkpoints/vqvae/best.pt")
    assert "checkpoints/vqvae/best.pt: " in line
    assert "it was written by vqvae.py" in line and "run python pretrain.py" in line


def test_init_from_elsewhere(refused):
    """A .pt file of somebody else's, without a script's name."""
    torch.save({"weight": torch.zeros(3)}, "foreign.pt")
    assert "foreign.pt: KeyError('script')" in refused("finetune", "--init", "foreign.pt")


def test_resume_with_other_photos(folder, refuse):
    """Photos, labels or sizes. Trained anew, as the line says, the old run moves aside."""
    small_run("unet", folder, "--out", "run")
    assert "or sizes" in refuse("unet", "--resume", "--out", "run", "--width", "8")
    change(folder, lambda labels: 255 - 255 * labels)
    line = refuse("unet", "--resume", "--out", "run")
    assert "other photos" in line and "without --resume" in line
    before = checkpoint("run/last.pt")["args"]["checksum"]
    small_run("unet", folder, "--out", "run")
    assert checkpoint("run/last.pt")["args"]["checksum"] != before
    assert checkpoint("run.prev/last.pt")["args"]["checksum"] == before


@pytest.mark.parametrize("name", ["vqvae", "pretrain", "finetune"])
def test_resume_with_another_codebook(name, folder, refuse):
    """Codes are no parameters."""
    small_run(name, folder, "--out", "run")
    sizes = checkpoint("run/last.pt")["args"]["net"]
    more = ["--resume", "--out", "run", "--net", *map(str, sizes[:4]), str(sizes[4] // 2)]
    assert "or sizes" in refuse(name, *more)


def test_a_folder_with_folders_is_moved_nowhere(folder):
    """--out on a folder of photos, typed three times: nothing but the run is written over."""
    photos = {path: path.read_bytes() for path in folder.rglob("*.*")}
    for _ in range(3):
        small_run("unet", folder, "--out", str(folder))
    assert {path: path.read_bytes() for path in photos} == photos
    assert (folder / "model.pt2").exists() and not Path("mine.prev").exists()


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
    assert "no route to host" in line and "www.robots.ox.ac.uk/~vgg/data/pets" in line
    base = Path(re.search(r" in (\S+) by hand", line)[1])
    write_pets(base.parent)
    small_run(name, "pets", "--root", "here")


def test_no_cats_and_dogs(here, refused):
    assert "--download fetches" in refused("pretrain", "--data", "catdog")


@pytest.mark.parametrize(
    "module, folder, url",
    [
        ("utils", "PetImages", "kagglecatsanddogs"),
        ("cifar", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ],
)
def test_a_collection_that_cannot_be_downloaded(module, folder, url, catdog, monkeypatch, refused):
    """Unpacked by hand where the line says, it is taken."""
    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", no_route)
    (catdog / folder).rename("elsewhere")
    line = refused("pretrain", "--data", "catdog", "--root", catdog, "--download")
    assert "no route to host" in line and url in line
    root = Path(re.search(r" in (\S+)", line)[1])
    Path("elsewhere").rename(root / folder)
    small_run("pretrain", "catdog", "--root", str(catdog), "--download")


def test_weights_that_cannot_be_downloaded(here, folder):
    """torch says which file of which address goes where, and one line what to do. Done by hand,
    with weights of the right shapes, it trains."""
    blocked = os.environ | {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": "weights"}
    flags = ["--data", folder, "--size", "32", "--epochs", "1", "--imagenet"]
    said = "".join(start("linknet", *flags, cwd=here, env=blocked).communicate())
    assert "Traceback" not in said and "fetch the file named above by hand and put it there" in said
    url, path = re.search(r'"(https://\S+resnet18\S+)" to (\S+)', said).groups()
    assert path.startswith(str(here / "weights")) or path.startswith("weights/")
    assert Path(path).name == Path(url).name
    Path(here, path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(torchvision.models.resnet18().state_dict(), Path(here, path))
    child = start("linknet", *flags, cwd=here, env=blocked)
    child.communicate()
    assert child.returncode == 0


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


# --- programs from elsewhere ---------------------------------------------------------------------


def test_a_program_that_names_no_data(refuse):
    net, x = torch.nn.Conv2d(3, 2, 1).eval(), torch.zeros(2, 3, 32, 32)
    free = ({0: torch.export.Dim("B", min=1)},)
    program = torch.export.export(net, (x,), dynamic_shapes=free)
    meta = '{"classes": ["background", "foreground"], "size": 32, "ignore": null}'
    torch.export.save(program, "foreign.pt2", extra_files={"meta.json": meta})
    assert "give --data" in refuse("evaluate", "foreign.pt2")
