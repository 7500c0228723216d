"""evaluate.py --photos: a mask in the size of the photo and an overlay beside it. The program
is known: the first class where a photo is dark, the second where it is red, the third where it is
blue, so that the right answer is known too."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load
from PIL import Image

m = load("evaluate")
NAMES = {2: '["background", "foreground"]', 3: '["pet", "background", "border"]'}
COLOURS = {2: [(0, 0, 0), (255, 120, 0)], 3: [(255, 120, 0), (0, 0, 0), (255, 255, 255)]}


@pytest.fixture(params=[2, 3], ids=["two", "three"])
def program(request, here):
    """red.pt2, and its number of classes."""
    net = torch.nn.Conv2d(3, request.param, 1)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([0.5, 0, 0])[: request.param])
        net.weight[1, 0] = 1
        if request.param == 3:
            net.weight[2, 2] = 1
    free = ({0: torch.export.Dim("B", min=1)},)
    program = torch.export.export(net.eval(), (torch.zeros(2, 3, 64, 32),), dynamic_shapes=free)
    meta = f'{{"classes": {NAMES[request.param]}, "size": [64, 32], "ignore": null}}'
    torch.export.save(program, "red.pt2", extra_files={"meta.json": meta})
    return request.param


def photo(size, mode="RGB"):
    """Dark, but red in its left and blue in its lower right quarter; and its labels."""
    W, H = size
    pixels, labels = np.zeros((H, W, 3), np.uint8), np.zeros((H, W), np.uint8)
    pixels[:, : W // 4, 0], labels[:, : W // 4] = 255, 1
    pixels[H // 2 :, W // 2 :, 2], labels[H // 2 :, W // 2 :] = 255, 2
    return Image.fromarray(pixels).convert(mode), labels


def predicted(path, classes, labels):
    """What stands in the PNG agrees with the labels, but for the seams."""
    image = Image.open(path)
    assert image.mode == "P"
    got = np.asarray(image)
    assert got.shape == labels.shape
    assert (got == labels * (labels < classes)).mean() > 0.97
    for label in range(classes):  # and it looks right in any viewer
        shown = np.asarray(image.convert("RGB"))[got == label]
        assert (shown == COLOURS[classes][label]).all()


@pytest.mark.parametrize("size, name", [((4000, 3000), "large.jpg"), ((60, 90), "small.png")])
def test_a_mask_has_the_size_of_its_photo(program, size, name, capsys):
    image, labels = photo(size)
    image.save(name)
    m.main(["red.pt2", "--photos", name])
    stem = Path(name).stem
    predicted(f"{stem}_predicted.png", program, labels)
    overlay = Image.open(f"{stem}_overlay.jpg")
    assert overlay.size == size and f"{stem}_predicted.png" in capsys.readouterr().out
    half = np.asarray(image) // 2 + np.asarray(COLOURS[program])[labels * (labels < program)] // 2
    assert abs(np.asarray(overlay).astype(int) - half).mean() < 4


def test_a_portrait_of_a_phone_is_upright(program):
    """Its pixels lie on the side, and EXIF says so."""
    image, labels = photo((90, 160))
    exif = Image.Exif()
    exif[274] = 6
    image.transpose(Image.ROTATE_90).save("phone.jpg", exif=exif)
    m.main(["red.pt2", "--photos", "phone.jpg"])
    predicted("phone_predicted.png", program, labels)
    assert Image.open("phone_overlay.jpg").size == (90, 160)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_other_kinds_of_photos(program, mode):
    image, labels = photo((80, 80), mode)
    image.save("kind.png")
    m.main(["red.pt2", "--photos", "kind.png"])
    predicted("kind_predicted.png", program, labels)


def test_a_grey_photo(program):
    Image.new("L", (50, 40), 255).save("grey.jpg")
    m.main(["red.pt2", "--photos", "grey.jpg"])
    predicted("grey_predicted.png", program, np.ones((40, 50), np.uint8))


def test_a_folder_with_a_broken_file(program, capsys):
    """The rest is drawn, a mask is no photo, and a second call draws the same."""
    for i in range(50):
        photo((40, 40))[0].save(f"{i:02}.jpg")
    Path("07.jpg").write_bytes(b"no photo")
    Path("notes.txt").write_text("no photo either")
    Image.new("L", (40, 40)).save("03_mask.png")
    for _ in range(2):
        m.main(["red.pt2", "--photos", ".", "--out", "drawn"])
        assert "skipped  07.jpg" in capsys.readouterr().out
        assert len(list(Path("drawn").iterdir())) == 2 * 49
        m.main(["red.pt2", "--photos", "."])
        assert len(list(Path(".").glob("*_predicted.png"))) == 49
    assert not np.asarray(Image.open("03_mask.png")).any()  # which nothing has written over


def test_a_photo_in_the_place_of_a_run(program, refuse):
    photo((40, 40))[0].save("cat.png")
    line = refuse("evaluate", "cat.png")
    assert "python evaluate.py RUN --photos cat.png" in line
    m.main(["red.pt2", "--photos", "cat.png"])
    assert Path("cat_predicted.png").exists()


def test_photos_take_one_run(program, refuse):
    assert "name one run" in refuse("evaluate", "red.pt2", "red.pt2", "--photos", "cat.png")


def test_a_photo_that_is_not_there(program, capsys):
    m.main(["red.pt2", "--photos", "nowhere.jpg"])
    assert "skipped  nowhere.jpg" in capsys.readouterr().out
