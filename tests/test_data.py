"""What the segmenters read: drawn pets, the real ones, folders, masks of all kinds, the cache."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawn, load, same, white, write_folder
from PIL import Image

m = load("unet")  # the data section is the same text in every segmenter (test_copies.py)
pytestmark = pytest.mark.usefixtures("here")


def read(*flags):
    """load_data for these flags -> ((images, masks) to train on, those to validate with), args."""
    args = m.parse_args(["--size", "32", "--device", "cpu", *map(str, flags)])
    return (*m.load_data(args), args)


def parts(folder):
    """{"train", "val", "test": names of photos}"""
    args = m.parse_args(["--data", str(folder)])
    found = m.list_photos(args)
    return {part: [photo.stem for photo, _ in pairs] for part, pairs in found.items()}


# --- drawn pets ----------------------------------------------------------------------------------


def test_toy_hangs_on_its_seed():
    images, masks = m.draw_toy(8, (32, 64), seed=5)
    again = m.draw_toy(8, (32, 64), seed=5)
    other = m.draw_toy(8, (32, 64), seed=6)
    assert images.shape == (8, 3, 32, 64) and masks.shape == (8, 32, 64)
    assert images.dtype == masks.dtype == torch.uint8
    assert torch.equal(images, again[0]) and torch.equal(masks, again[1])
    assert not torch.equal(images, other[0])


def test_toy_has_three_labels_in_every_picture():
    _, masks = m.draw_toy(64, (32, 32), seed=5)
    for label, low, high in [(0, 0.05, 0.5), (1, 0.3, 0.9), (2, 0.02, 0.3)]:
        share = (masks == label).flatten(1).float().mean(1)
        assert share.min() > 0 and low < share.mean() < high


def test_toy_border_lies_between_pet_and_ground():
    _, masks = m.draw_toy(32, (64, 64), seed=5)
    for a, b in [(masks[:, 1:], masks[:, :-1]), (masks[:, :, 1:], masks[:, :, :-1])]:
        touching = (a == 0) & (b == 1) | (a == 1) & (b == 0)
        assert touching.float().mean() < 0.002


def test_colour_alone_does_not_segment_the_toy():
    """Nearly nowhere is the pet's colour the pet's alone: whoever paints every pixel whose colour
    is near that of the pet loses a good part to the ball. And no colour is a pet's in general."""
    images, masks = m.draw_toy(64, (32, 32), seed=5)
    x = images / 255
    ious, coats, grounds = [], [], []
    for photo, mask in zip(x, masks):
        coat = photo[:, mask == 0].median(1).values
        near = (photo - coat[:, None, None]).abs().amax(0) < 0.3
        pet = mask == 0
        ious.append((near & pet).sum() / (near | pet).sum())
        coats.append(coat)
        grounds.append(photo[:, mask == 1].median(1).values)
    assert torch.stack(ious).mean() < 0.75
    difference = torch.stack(coats).mean(0) - torch.stack(grounds).mean(0)
    assert difference.abs().max() < torch.stack(coats).std(0).min()


def test_toy_has_no_photo_in_both_parts():
    train, val, _ = read("--data", "toy")
    assert len(train[0]) == 1000 and len(val[0]) == 110
    seen = {image.numpy().tobytes() for image in train[0]}
    assert not any(image.numpy().tobytes() in seen for image in val[0])


# --- the real pets -------------------------------------------------------------------------------


def test_pets(pets):
    """The official test photos stay away; trimaps 1, 2, 3 are pet, background, border."""
    train, val, args = read("--data", "pets", "--root", pets)
    assert args.classes == ["pet", "background", "border"]
    assert len(train[0]) + len(val[0]) == 40 and len(val[0]) > 0
    assert train[1].unique().tolist() == [0, 1, 2]
    brightness = train[0].float().mean(1)
    assert brightness[train[1] == 0].mean() > brightness[train[1] == 1].mean() + 100
    found = m.list_photos(args)
    assert len(found["test"]) == 10
    assert all(int(photo.stem.rsplit("_", 1)[1]) > 8 for photo, _ in found["test"])


# --- parts of a folder ---------------------------------------------------------------------------


def test_a_flat_folder_is_parted(tmp_path):
    found = parts(write_folder(tmp_path / "f", 60, (8, 8)))
    names = found["train"] + found["val"] + found["test"]
    assert sorted(names) == [f"{i:03}" for i in range(60)]
    assert 1 <= len(found["val"]) <= 12 and 1 <= len(found["test"]) <= 12


@pytest.mark.parametrize("n", [3, 10, 40])
def test_a_photo_that_is_added_moves_none_from_train_to_test(tmp_path, n):
    folder = write_folder(tmp_path / "f", n, (8, 8))
    before = parts(folder)
    for i in range(n, n + 30):
        write_folder(folder, 1, (8, 8), first=i)
        after = parts(folder)
        assert not set(before["train"]) & set(after["test"])
        before = after


@pytest.mark.parametrize("name", ["val", "valid"])
def test_official_parts(parted, name):
    shutil.move(parted / "val", parted / "moved")
    shutil.move(parted / "moved", parted / name)
    found = parts(parted)
    assert {part: len(names) for part, names in found.items()} == {"train": 16, "val": 5, "test": 6}
    assert min(found["val"]) == "100" and min(found["test"]) == "200"


def test_a_missing_val_is_cut_from_train(parted):
    shutil.rmtree(parted / "val")
    found = parts(parted)
    assert len(found["val"]) >= 1 and len(found["test"]) == 6
    assert sorted(found["train"] + found["val"]) == [f"{i:03}" for i in range(16)]


def test_frac_is_nested_and_leaves_val_alone(flat):
    train, val, _ = read("--data", flat)
    half, val_of_half, _ = read("--data", flat, "--frac", 0.5, "--seed", 7)
    quarter, _, _ = read("--data", flat, "--frac", 0.25)
    assert len(half[0]) == -(-len(train[0]) // 2)
    assert torch.equal(half[0], train[0][: len(half[0])])
    assert torch.equal(quarter[0], half[0][: len(quarter[0])])
    assert torch.equal(val[0], val_of_half[0])


def test_masks_may_be_named_after_their_photos(flat):
    """x_mask.png and x_gt.png belong to x.jpg; files that are no pictures do not count."""
    want = parts(flat)
    for i, mask in enumerate(sorted((flat / "masks").iterdir())):
        mask.rename(mask.with_stem(mask.stem + ["_mask", "_gt"][i % 2]))
    for name in [".DS_Store", "Thumbs.db", "000.mat", "_classes.csv"]:
        (flat / "images" / name).write_bytes(b"no picture")
    found = parts(flat)
    assert {part: sorted(names) for part, names in found.items()} == {
        part: sorted(names) for part, names in want.items()
    }


# --- masks ---------------------------------------------------------------------------------------


def rewrite(folder, convert, ending="png"):
    """Every mask of the folder through convert(PIL image) -> image, saved with that ending."""
    for path in sorted(Path(folder, "masks").iterdir()):
        mask = convert(Image.open(path))
        path.unlink()
        mask.save(path.with_suffix(f".{ending}"))


def white_is_index_0(mask):
    """Two colours in a palette, of which white comes first."""
    flipped = Image.fromarray((np.asarray(mask) == 0).astype(np.uint8), "P")
    flipped.putpalette([255, 255, 255, 0, 0, 0])
    return flipped


BLACK_AND_WHITE = {
    "grey 0 and 255": lambda mask: mask,
    "labels 0 and 1": lambda mask: mask.point(lambda value: value // 255),
    "one bit": lambda mask: mask.convert("1"),
    "RGB": lambda mask: mask.convert("RGB"),
    "RGBA": lambda mask: mask.convert("RGBA"),
    "grey and alpha": lambda mask: mask.convert("LA"),
    "a palette": lambda mask: mask.convert("P"),
    "a palette, white first": white_is_index_0,
}


@pytest.mark.parametrize("kind", BLACK_AND_WHITE)
def test_black_and_white_in_any_mode(flat, kind):
    """However they are saved, the bright ellipses of the photos are the foreground."""
    rewrite(flat, BLACK_AND_WHITE[kind])
    (images, masks), _, args = read("--data", flat)
    assert args.classes == ["background", "foreground"] and masks.unique().tolist() == [0, 1]
    bright = images.float().mean(1) > 125
    assert (bright == (masks == 1)).float().mean() > 0.97


@pytest.mark.parametrize("kind", ["grey 0 and 255", "a palette, white first"])
@pytest.mark.parametrize("ending", ["gif", "bmp", "tif"])
def test_black_and_white_in_other_formats(flat, kind, ending):
    rewrite(flat, BLACK_AND_WHITE[kind], ending)
    (images, masks), _, _ = read("--data", flat)
    bright = images.float().mean(1) > 125
    assert (bright == (masks == 1)).float().mean() > 0.97


def test_labels_are_classes(parted):
    """0, 1, 2, and 9, which --ignore leaves out."""
    (_, masks), _, args = read("--data", parted, "--ignore", 9)
    assert args.classes == ["0", "1", "2"]
    assert masks.unique().tolist() == [0, 1, 2, m.IGNORE]
    assert (masks[:, 0] == m.IGNORE).all()


def test_labels_as_gif_keep_their_numbers(tmp_path):
    """A GIF's writer may renumber the indices, but not the grey values."""
    folder = write_folder(tmp_path / "f", 16, paint=same, classes=3)
    for i, path in enumerate(sorted((folder / "masks").iterdir())):
        if i % 2 == 0:  # half of the masks have no border
            Image.open(path).point(lambda label: label % 2).save(path)
    want = read("--data", folder)[0][1]
    rewrite(folder, lambda mask: mask, "gif")
    assert torch.equal(read("--data", folder)[0][1], want)


def test_a_line_shows_the_share_of_each_label(flat, capsys):
    train, val, _ = read("--data", flat)
    share = torch.cat([train[1], val[1]]).float().mean()
    line = capsys.readouterr().out.partition("masks")[2].splitlines()[0]
    assert "background" in line and f"foreground {share:.1%}" in line


def test_masks_are_resized_without_new_labels(tmp_path):
    drawn(1, (63, 41))[0].save(tmp_path / "photo.png")
    labels = np.random.default_rng(0).choice([0, 7, 30], (41, 63)).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "mask.png")
    pixels = m.read_pair((tmp_path / "photo.png", tmp_path / "mask.png"), [24, 24])
    assert pixels.shape == (24, 24, 4) and set(np.unique(pixels[..., 3])) == {0, 7, 30}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_fits_its_upright_mask(tmp_path, orientation):
    """A phone stores the photo as its sensor saw it, and in EXIF how to turn it."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's Transpose that the viewer undoes
    photo, labels = drawn(3, (64, 40), 2)
    if orientation > 1:
        photo = photo.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    photo.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    labels.save(tmp_path / "mask.png")
    pixels = m.read_pair((tmp_path / "photo.jpg", tmp_path / "mask.png"), [40, 64])
    bright = pixels[..., :3].mean(2) > 125
    assert (bright == (pixels[..., 3] == 1)).mean() > 0.97


# --- the cache -----------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The pairs that were read from their files."""
    seen, read_pair = [], m.read_pair

    def counted(pair, size):
        seen.append(pair)
        return read_pair(pair, size)

    monkeypatch.setattr(m, "read_pair", counted)
    return seen


def test_the_second_start_reads_the_cache(flat, decoded):
    first, _, _ = read("--data", flat)
    once = len(decoded)
    second, _, _ = read("--data", flat)
    assert len(decoded) == once > 0
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("flags", [["--frac", 0.5], ["--seed", 3]])
def test_the_cache_serves_every_share_and_seed(flat, decoded, flags):
    read("--data", flat)
    once = len(decoded)
    read("--data", flat, *flags)
    assert len(decoded) == once


def test_another_size_is_read_anew(flat, decoded):
    read("--data", flat)
    once = len(decoded)
    read("--data", flat, "--size", 32, 64)
    assert len(decoded) == 2 * once


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_file_that_changed_is_read_anew(flat, kind):
    before, _, _ = read("--data", flat)
    path = next(path for path in (flat / kind).iterdir() if path.stem in parts(flat)["train"])
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(path)
    os.utime(path, (1, 1))
    after, _, _ = read("--data", flat)
    which = ["images", "masks"].index(kind)
    assert (before[which] != after[which]).flatten(1).any(1).sum() == 1


def test_deleting_the_cache_changes_nothing(flat, decoded):
    first, _, _ = read("--data", flat)
    shutil.rmtree("data/cache")
    second, _, _ = read("--data", flat)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_labels_of_pets_survive_the_cache(pets):
    for _ in range(2):
        (_, masks), _, _ = read("--data", "pets", "--root", pets)
        assert masks.unique().tolist() == [0, 1, 2]


def test_white_stays_white(tmp_path):
    """White masks are foreground on the first reading and from the cache."""
    folder = write_folder(tmp_path / "f", 12, paint=white)
    first, second = read("--data", folder)[0][1], read("--data", folder)[0][1]
    assert first.max() == 1 and torch.equal(first, second)
