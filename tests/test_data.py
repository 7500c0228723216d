"""What the scripts read: drawn pets, the real ones, folders, masks of all kinds, photos alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawn, load, write_folder
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
    assert images.shape == (8, 3, 32, 64) and masks.shape == (8, 32, 64)
    assert images.dtype == masks.dtype == torch.uint8
    assert torch.equal(images, again[0]) and torch.equal(masks, again[1])
    assert not torch.equal(images, m.draw_toy(8, (32, 64), seed=6)[0])


def test_toy_has_pet_and_ground_and_between_them_a_border():
    masks = m.draw_toy(64, (64, 64), seed=5)[1]
    for label, low, high in [(0, 0.05, 0.5), (1, 0.3, 0.9), (2, 0.02, 0.3)]:
        share = (masks == label).flatten(1).float().mean(1)
        assert share.min() > 0 and low < share.mean() < high
    for a, b in [(masks[:, 1:], masks[:, :-1]), (masks[:, :, 1:], masks[:, :, :-1])]:
        touching = (a == 0) & (b == 1) | (a == 1) & (b == 0)
        assert touching.float().mean() < 0.002


def test_colour_alone_does_not_segment_the_toy():
    """Who knows the pet's colour, and paints every pixel that is near it, paints the ball too."""
    images, masks = m.draw_toy(64, (32, 32), seed=5)
    ious = []
    for photo, pet in zip(images / 255, masks == 0):
        coat = photo[:, pet].median(1).values
        near = (photo - coat[:, None, None]).abs().amax(0) < 0.3
        ious.append((near & pet).sum() / (near | pet).sum())
    assert torch.stack(ious).mean() < 0.75


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


def test_a_share_of_the_pets_is_of_all_breeds(pets):
    """Names sort by breed: the first half of them would lack some."""
    args = m.parse_args(["--data", "pets", "--root", str(pets)])
    breeds = [photo.stem.rsplit("_", 1)[0] for photo, _ in m.list_photos(args)["train"]]
    half = len(breeds) // 2
    assert set(sorted(breeds)[:half]) < set(breeds) == set(breeds[:half])


# --- parts of a folder ---------------------------------------------------------------------------


def names_only(folder, numbers):
    """Empty files: enough for what looks at names only."""
    for kind, ending in [("images", "jpg"), ("masks", "png")]:
        Path(folder, kind).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            Path(folder, kind, f"{number:03}.{ending}").touch()
    return folder


@pytest.mark.parametrize("n", [3, 60])
def test_a_flat_folder_is_parted(tmp_path, n):
    found = parts(names_only(tmp_path / "f", range(n)))
    names = found["train"] + found["val"] + found["test"]
    assert sorted(names) == [f"{i:03}" for i in range(n)]
    for part in ["val", "test"]:
        assert 1 <= len(found[part]) <= max(1, n // 5)


def test_a_photo_that_is_added_moves_no_other(tmp_path):
    """None from train to test, and from 40 photos on none at all."""
    before = parts(names_only(tmp_path / "f", range(3)))
    for i in range(3, 100):
        after = parts(names_only(tmp_path / "f", [i]))
        assert not set(before["train"]) & set(after["test"])
        for part, names in before.items():
            assert i < 40 or set(names) <= set(after[part])
        before = after


@pytest.mark.parametrize("name", ["val", "valid"])
def test_official_parts(parted, name):
    (parted / "val").rename(parted / name)
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


def test_two_photos_of_one_name_are_refused(flat, refuse):
    """One of them would be left out without a word."""
    drawn(5)[0].save(flat / "images/003.png")
    assert "['003']" in refuse("unet", "--size", "32", "--data", flat)


def test_masks_may_be_named_after_their_photos(flat):
    """x_mask.png and x_gt.png belong to x.jpg; files that are no pictures do not count."""
    want = parts(flat)
    for i, mask in enumerate(sorted((flat / "masks").iterdir())):
        mask.rename(mask.with_stem(mask.stem + ["_mask", "_gt"][i % 2]))
    for name in [".DS_Store", "Thumbs.db", "000.mat", "_classes.csv"]:
        (flat / "images" / name).write_bytes(b"no picture")
    assert parts(flat) == want


# --- masks ---------------------------------------------------------------------------------------


def white_is_index_0(mask):
    """Two colours in a palette, of which white comes first."""
    flipped = Image.fromarray((np.asarray(mask) == 0).astype(np.uint8), "P")
    flipped.putpalette([255, 255, 255, 0, 0, 0])
    return flipped


BLACK_AND_WHITE = {
    "grey 0 and 255": ("png", lambda mask: mask),
    "labels 0 and 1": ("png", lambda mask: mask.point(lambda value: value // 255)),
    "one bit": ("tif", lambda mask: mask.convert("1")),
    "RGB": ("bmp", lambda mask: mask.convert("RGB")),
    "RGBA": ("png", lambda mask: mask.convert("RGBA")),
    "grey and alpha": ("png", lambda mask: mask.convert("LA")),
    "a palette": ("gif", lambda mask: mask.convert("P")),
    "a palette, white first": ("png", white_is_index_0),
}


@pytest.mark.parametrize("kind", BLACK_AND_WHITE)
def test_black_and_white(flat, kind):
    """However they are saved, the bright ellipses of the photos are the foreground."""
    ending, convert = BLACK_AND_WHITE[kind]
    for path in sorted((flat / "masks").iterdir()):
        mask = convert(Image.open(path))
        path.unlink()
        mask.save(path.with_suffix(f".{ending}"))
    (images, masks), _, args = read("--data", flat)
    assert args.classes == ["background", "foreground"] and masks.unique().tolist() == [0, 1]
    bright = images.float().mean(1) > 125
    assert (bright == (masks == 1)).float().mean() > 0.97


def test_labels_are_classes(parted):
    """0, 1, 2, and 9, which --ignore leaves out."""
    (_, masks), _, args = read("--data", parted, "--ignore", 9)
    assert args.classes == ["0", "1", "2"]
    assert masks.unique().tolist() == [0, 1, 2, m.IGNORE]
    assert (masks[:, 0] == m.IGNORE).all()


def test_a_rare_label_may_be_missing(tmp_path):
    """Of 150 labels one has so few pixels that none is left at a small size."""
    every = np.random.default_rng(0).integers(0, 150, (48, 64)).astype(np.uint8)
    every[every == 75] = 74
    every[0, 0] = 75  # and 32 x 32 pixels are read elsewhere
    folder = write_folder(tmp_path / "many", 12, lambda labels: every)
    args = m.parse_args(["--data", str(folder), "--size", "32", "--device", "cpu"])
    _, (_, masks) = m.load_data(args)
    assert args.classes == [str(label) for label in range(150)] and 75 not in masks


def test_a_mask_that_shows_two_colours_of_a_palette_keeps_its_numbers(tmp_path):
    """evaluate.py --photos has black for 1 and white for 2: alone, they look black and white."""
    drawn(1, (16, 16))[0].save(tmp_path / "photo.png")
    labels = np.ones((16, 16), np.uint8)
    labels[:4] = 2
    mask = Image.fromarray(labels, "P")
    mask.putpalette([255, 120, 0, 0, 0, 0, 255, 255, 255])
    mask.save(tmp_path / "mask.png")
    args = m.parse_args(["--size", "16"])
    pixels = m.read_pair((tmp_path / "photo.png", tmp_path / "mask.png"), args)
    assert np.array_equal(pixels[..., 3], labels)


def test_255_among_labels_does_not_count(tmp_path):
    """The void of Pascal VOC, whose masks are indices into a palette of colours."""
    colours = np.random.default_rng(0).integers(0, 256, 768).tolist()
    folder = write_folder(tmp_path / "f", 16, lambda labels: labels, 3)
    for i, path in enumerate(sorted((folder / "masks").iterdir())):
        labels = np.array(Image.open(path))
        if i % 4 == 0:  # in some files nothing but 0 and void is there
            labels[:] = 0
        labels[:4] = 255
        indices = Image.fromarray(labels, "P")
        indices.putpalette(colours)
        indices.save(path)
    (_, masks), _, args = read("--data", folder)
    assert args.classes == ["0", "1", "2"]
    assert masks.unique().tolist() == [0, 1, 2, m.IGNORE]


def test_the_shares_of_the_labels_are_printed(parted, capsys):
    """And what one answer everywhere scores: 1 is the commonest."""
    train, val, _ = read("--data", parted, "--ignore", 9)
    masks = torch.cat([train[1], val[1]])
    void = (masks == m.IGNORE).float().mean()
    share = (masks == 1).float().mean() / (1 - void)
    out = capsys.readouterr().out
    assert f" 1 {share:.1%}" in out and f"ignored {void:.1%}" in out
    assert f"accuracy {share:.4f}  mIoU {share / 3:.4f}" in out


def test_masks_are_resized_without_new_labels(tmp_path):
    drawn(1, (63, 41))[0].save(tmp_path / "photo.png")
    labels = np.random.default_rng(0).choice([0, 7, 30], (41, 63)).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "mask.png")
    args = m.parse_args(["--size", "16", "32"])
    pixels = m.read_pair((tmp_path / "photo.png", tmp_path / "mask.png"), args)
    assert pixels.shape == (16, 32, 4) and set(np.unique(pixels[..., 3])) == {0, 7, 30}


def test_a_turned_photo_fits_its_upright_mask(tmp_path):
    """A phone stores the photo as its sensor saw it, and in EXIF how to turn it."""
    photo, labels = drawn(3, (64, 48), 2)
    exif = Image.Exif()
    exif[274] = 6  # a quarter to the right
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    labels.save(tmp_path / "mask.png")
    args = m.parse_args(["--size", "48", "64"])
    pixels = m.read_pair((tmp_path / "photo.jpg", tmp_path / "mask.png"), args)
    bright = pixels[..., :3].mean(2) > 125
    assert (bright == (pixels[..., 3] == 1)).mean() > 0.97


# --- photos alone --------------------------------------------------------------------------------


def photos(*flags, script="pretrain"):
    """Images to train on and to validate with, for these flags."""
    s = load(script)
    args = s.parse_args(["--size", "32", "--device", "cpu", *map(str, flags)])
    if script == "vqvae":
        return s.load_images(args)
    return s.load_photos(args)


@pytest.mark.parametrize("script", ["pretrain", "vqvae"])
def test_a_folder_of_images(flat, capsys, script):
    """Whatever lies under it: no masks, no hidden files, nothing broken, nothing twice."""
    (flat / "images/more").mkdir()
    drawn(77)[0].save(flat / "images/more/deep.png")
    drawn(78)[0].save(flat / "images/.hidden.png")
    (flat / "images/broken.jpg").write_bytes(b"no photo")
    shutil.copy(flat / "images/003.jpg", flat / "images/again.jpg")
    train, val = photos("--data", flat, script=script)
    out = capsys.readouterr().out
    assert f"{flat}/images: 26\n" in out and f"{flat}/images/more: 1\n" in out
    assert "27, of which 25 can be read" in out
    assert train.shape == (22, 3, 32, 32) and len(val) == 3


def test_a_share_of_the_photos_is_nested_and_leaves_val_alone(flat):
    train, val = photos("--data", flat)
    half, val_of_half = photos("--data", flat, "--frac", 0.5, "--seed", 7)
    assert torch.equal(half, train[: len(half)]) and len(half) == -(-len(train) // 2)
    assert torch.equal(val, val_of_half)


@pytest.mark.parametrize("script", ["pretrain", "vqvae"])
def test_pretraining_sees_no_pet_that_is_validated_or_tested_on(pets, script):
    flags = ["--data", "pets", "--root", str(pets)]
    seen = load(script).list_images(load(script).parse_args(flags))
    found = m.list_photos(m.parse_args(flags))
    assert sorted(seen) == sorted(photo for photo, _ in found["train"])
