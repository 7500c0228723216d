"""What people do wrong gets one line that says what, and where; nothing is written or lost."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEGMENTERS, SMALL, TRAINING, checkpoint, drawn, load, same, start, write_folder
from PIL import Image

each = pytest.mark.parametrize("name", SEGMENTERS)


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


def change(folder, mistake):
    """Every mask through mistake(labels 0 and 1 as uint8) -> its pixels."""
    for path in Path(folder, "masks").iterdir():
        labels = np.asarray(Image.open(path)) // 255
        Image.fromarray(mistake(labels)).save(path)


# --- flags ---------------------------------------------------------------------------------------

FLAGS = [
    ("--size 42", "--size"),
    ("--size 64 42", "--size"),
    ("--frac 0", "--frac"),
    ("--frac 1.5", "--frac"),
    ("--frac -0.5", "--frac"),
    ("--epochs many", "--epochs"),
    ("--colour red", "--colour"),
]


@each
@pytest.mark.parametrize("flags, word", FLAGS)
def test_flag(name, flags, word, refused):
    assert word in refused(name, *flags.split())


@pytest.mark.parametrize("share", ["0.9-0.1", "0.1-1.5", "0-0", "a-b", "0.1", "-0.1-0.5", ""])
def test_mask_of_pretrain(share, refused):
    assert "--mask" in refused("pretrain", f"--mask={share}")


def test_exit_codes(here):
    """As typed in a shell: 1 or 2, one line on stderr (after the usage, where a flag is wrong)."""
    children = [
        start("unet", "--data", "nowhere", cwd=here),
        start("unet", "--frac", "2", cwd=here),
    ]
    errors = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [1, 2]
    assert errors[0].startswith("nowhere: ") and errors[0].count("\n") == 1
    assert errors[1].splitlines()[-1].startswith("unet.py: error: --frac 2.0")


# --- folders -------------------------------------------------------------------------------------


@each
def test_no_such_folder(name, refused):
    line = refused(name, "--data", "nowhere")
    assert "nowhere" in line and "images/" in line and "masks/" in line


@each
def test_an_empty_folder(name, refused):
    Path("mine/images").mkdir(parents=True)
    assert "mine" in refused(name, "--data", "mine")


@each
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_file_without_its_partner(name, kind, folder, refused):
    next(Path(folder, kind).glob("004.*")).unlink()
    line = refused(name, "--data", folder)
    assert "mine" in line and "004" in line


@each
def test_a_part_without_masks(name, parted, refused):
    for path in (parted / "test/masks").iterdir():
        path.unlink()
    line = refused(name, "--data", parted, "--ignore", 9)
    assert "test" in line and "200" in line


@each
def test_two_photos_of_one_name(name, folder, refused):
    """004.jpg and 004.png: which of them does the mask belong to?"""
    drawn(4)[0].save(folder / "images/004.png")
    assert "mine" in refused(name, "--data", folder)


@each
@pytest.mark.parametrize("n", [1, 2])
def test_too_few_photos(name, n, here, refused):
    """One to train with, one to validate with and one to test with is the least."""
    assert "mine" in refused(name, "--data", write_folder("mine", n))


# --- files ---------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("file", ["images/004.jpg", "masks/004.png"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_file_that_is_cut_off(name, file, share, folder, refused):
    path = folder / file
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert file in refused(name, "--data", folder)


@each
def test_many_broken_files_are_one_line(name, folder, refused):
    for path in (folder / "images").iterdir():
        path.write_bytes(b"no photo")
    assert "images/0" in refused(name, "--data", folder)


@each
def test_a_mask_of_another_size(name, folder, refused):
    drawn(4, (20, 30), 2)[1].save(folder / "masks/004.png")
    line = refused(name, "--data", folder)
    assert "masks/004.png" in line and "(64, 48)" in line and "size" in line


@each
@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int32])
def test_a_photo_of_more_than_8_bits(name, dtype, folder, refused):
    (folder / "images/004.jpg").unlink()
    pixels = np.asarray(drawn(4)[0].convert("L")).astype(dtype)
    Image.fromarray(pixels).save(folder / "images/004.tif")
    line = refused(name, "--data", folder)
    assert "images/004.tif" in line and "8-bit" in line


@each
def test_masks_as_jpeg(name, folder, refused):
    """JPEG blurs: labels become many others."""
    for path in list((folder / "masks").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    line = refused(name, "--data", folder)
    assert "masks/0" in line and ".jpg" in line and "PNG" in line


# --- labels --------------------------------------------------------------------------------------


def with_a_rim(labels):
    """Grey between black and white, as drawing programs leave it."""
    grey = labels * 255
    grey[:2] = 128
    return grey


def in_colours(labels):
    red, blue = np.uint8([200, 0, 0]), np.uint8([0, 0, 200])
    return np.where(labels[..., None] == 1, red, blue)


LABELS = {
    "0 and 38": (lambda labels: labels * 38, "[0, 38]"),
    "0, 1 and 7": (lambda labels: labels + 6 * (labels * np.arange(64) > 32).astype(np.uint8), "7"),
    "no 0": (lambda labels: labels + 1, "[1, 2]"),
    "black": (lambda labels: labels * 0, "[0]"),
    "white": (lambda labels: labels * 0 + 255, "255"),
    "black, grey and white": (with_a_rim, "128"),
    "colours": (in_colours, "labels"),
}


@each
@pytest.mark.parametrize("mistake", LABELS)
def test_labels(name, mistake, folder, refused):
    """The line has the labels that were found, and those that are wanted."""
    values, word = LABELS[mistake]
    change(folder, values)
    line = refused(name, "--data", folder)
    assert "mine" in line and word in line and "255" in line and "C-1" in line


@each
def test_white_that_is_ignored(name, folder, refused):
    """--ignore 255 on black and white leaves nothing but background."""
    assert "[0]" in refused(name, "--data", folder, "--ignore", 255)


@each
def test_a_mixture_of_0_1_and_0_255(name, folder, refused):
    drawn(4, classes=2)[1].save(folder / "masks/004.png")
    assert "255" in refused(name, "--data", folder)


@each
def test_grey_masks_of_every_value(name, here, refused):
    """Soft masks have no gap in their labels, and are no 256 classes."""
    g = np.random.default_rng(0)

    def soft(labels):
        return g.integers(0, 256, labels.shape).astype(np.uint8)

    assert "mine" in refused(name, "--data", write_folder("mine", 12, paint=soft))


# --- checkpoints ---------------------------------------------------------------------------------


@each
def test_init_that_is_not_there(name, refused):
    line = refused(name, "--init", "nowhere/best.pt")
    assert "nowhere/best.pt" in line and "run python" in line


def test_finetune_before_pretrain(refuse):
    line = refuse("finetune", "--size", "32")
    assert "checkpoints/pretrain/best.pt" in line and "python pretrain.py" in line


@each
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_init_that_is_cut_off(name, share, refused):
    state = {"script": f"{name}.py", "args": {}, "model": {"weight": torch.zeros(9999)}}
    torch.save(state, "bad.pt")
    whole = Path("bad.pt").read_bytes()
    Path("bad.pt").write_bytes(whole[: int(share * len(whole))])
    assert "bad.pt" in refused(name, "--init", "bad.pt")


@each
@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, Path("a class")])
def test_init_that_is_something_else(name, content, refused):
    torch.save(content, "bad.pt")
    assert "bad.pt" in refused(name, "--init", "bad.pt")


@each
def test_init_of_another_script(name, refused):
    torch.save({"script": "evaluate.py", "args": {}, "model": {}}, "bad.pt")
    line = refused(name, "--init", "bad.pt")
    assert "bad.pt" in line and "evaluate.py" in line and f"{name}.py" in line


@pytest.mark.parametrize("name", TRAINING)
def test_resume_of_no_run(name, refused):
    line = refused(name, "--resume")
    assert f"checkpoints/{name}/last.pt" in line and f"python {name}.py" in line


def small_run(name, folder, *flags):
    load(name).main([*SMALL[name], "--data", str(folder), "--epochs", "1", "--out", "run", *flags])


@each
def test_resume_with_other_photos(name, folder, refuse):
    small_run(name, folder)
    write_folder(folder, 9, first=50)
    assert "photos" in refuse(name, "--resume", "--out", "run")


def test_resume_with_another_width(folder, refuse):
    small_run("unet", folder)
    line = refuse("unet", "--resume", "--out", "run", "--width", "8")
    assert "run/last.pt" in line or "width" in line


@each
def test_a_refusal_leaves_the_old_run(name, folder, refuse):
    small_run(name, folder)
    refuse(name, *SMALL[name], "--data", "nowhere", "--out", "run")
    refuse(name, *SMALL[name], "--data", folder, "--out", "run", "--init", "nowhere/best.pt")
    assert checkpoint("run/last.pt")["script"] == f"{name}.py"
    assert not Path("run.prev").exists()


@each
def test_init_of_another_class_count(name, folder, capsys):
    """All tensors but the head's come along, whatever the number of classes."""
    small_run(name, folder)
    two = checkpoint("run/best.pt")["model"]
    write_folder("three", 18, paint=same, classes=3)
    capsys.readouterr()
    small_run(name, "three", "--init", "run/best.pt", "--out", "other")
    init = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("init"))
    taken = int(init.split()[1])
    assert len(two) - 4 <= taken < len(two)
    assert checkpoint("other/best.pt")["args"]["classes"] == ["0", "1", "2"]


# --- downloads and divergence --------------------------------------------------------------------


@each
def test_a_download_that_fails(name, monkeypatch, refused):
    def broken(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet", broken)
    line = refused(name, "--data", "pets")
    for word in ["no route to host", "images.tar.gz", "annotations.tar.gz", "robots.ox.ac.uk"]:
        assert word in line


def test_weights_that_cannot_be_downloaded(folder, monkeypatch, refused):
    def broken(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", broken)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", broken)
    line = refused("unet", "--data", folder, "--encoder", "resnet34", "--init", "imagenet")
    assert "no route to host" in line and "resnet34" in line and "by hand" in line


@each
def test_a_loss_that_is_not_finite(name, folder, refuse):
    """The line has the epoch and advice; the epochs before are kept."""
    flags = [*SMALL[name], "--data", folder, "--out", "run", "--epochs", "9", "--lr", "1e30"]
    line = refuse(name, *flags)
    assert "not finite" in line and "epoch" in line and "--lr" in line
    kept = checkpoint("run/last.pt")["history"]
    assert f"epoch {len(kept) + 1} " in line
    assert all(np.isfinite(row["loss"]) for row in kept)


# --- evaluate.py ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["nowhere", "empty"])
def test_evaluate_of_no_program(run, refuse):
    Path("empty").mkdir()
    line = refuse("evaluate", run)
    assert run in line and "python" in line
