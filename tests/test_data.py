"""Toy pictures, pets, folders, the four collections, augmentation and the cache."""
import os, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import BREEDS, SCRIPTS, SEGMENTERS, drawn, load, write_cifar, write_folder, write_pets

m = load(SEGMENTERS[0])
pytestmark = pytest.mark.usefixtures("here")

# --- toy ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", ((32, 32), (32, 48), (96, 64)))
def test_toy(size):
    images, masks, breeds = m.draw_toy(74, size, 5)
    again, same, _ = m.draw_toy(74, size, 5)
    other, _, _ = m.draw_toy(74, size, 6)
    assert images.shape == (74, 3, *size) and masks.shape == (74, *size)
    assert images.dtype == masks.dtype == torch.uint8
    assert torch.equal(images, again) and torch.equal(masks, same) and not torch.equal(images, other)
    share = masks.flatten().bincount() / masks.numel()
    assert len(share) == 3 and 0.08 < share[0] < 0.5 and 0.35 < share[1] < 0.8 and 0.05 < share[2] < 0.35
    assert all((masks == label).flatten(1).any(1).all() for label in range(3))
    assert len(set(breeds)) == 37 and sum(breed[0].isupper() for breed in set(breeds)) == 12

def test_toy_border_lies_between():
    """Off the picture's edge, pet and background touch nowhere."""
    masks = m.draw_toy(37, (64, 64), 5)[1][:, 2:-2, 2:-2]
    for a, b in ((masks[:, 1:], masks[:, :-1]), (masks[:, :, 1:], masks[:, :, :-1])):
        assert not ((a == 0) & (b == 1) | (a == 1) & (b == 0)).any()

def test_toy_colour_alone_does_not_tell():
    """The mean colours of pet and background differ by less than they vary between pictures."""
    images, masks, _ = m.draw_toy(256, (32, 32), 5)
    x = images.float() / 255
    mean = [torch.stack([x[i][:, masks[i] == label].mean(1) for i in range(256)]) for label in (0, 1)]
    assert (mean[0] - mean[1]).mean(0).abs().max() < 0.25 * mean[0].std(0).min()

def test_toy_parts():
    train, val, test = (m.load_split("toy", "data", part, [16, 16], None) for part in ("train", "val", "test"))
    assert len(train[0]) + len(val[0]) == 1110 and len(val[0]) == 111 and len(test[0]) == 256
    assert [len(part[2]) for part in (train, val, test)] == [len(part[0]) for part in (train, val, test)]
    seen = {image.numpy().tobytes() for image in train[0]}
    assert not any(image.numpy().tobytes() in seen for part in (val, test) for image in part[0])
    assert train[3] == ["pet", "background", "border"]

# --- subsets --------------------------------------------------------------------------------------

def test_subsets_are_nested_and_by_breed():
    breeds = [breed for i, breed in enumerate(BREEDS) for _ in range(10 * (i + 1))]
    parts = {share: set(m.subset(breeds, share)[0]) for share in (0.01, 0.1, 0.25, 0.5, 0.75, 1)}
    shares = sorted(parts)
    assert all(parts[a] <= parts[b] for a, b in zip(shares, shares[1:]))
    assert len(parts[1]) == len(breeds) and m.subset(breeds, 1)[1] == []
    for share, part in parts.items():
        for i, breed in enumerate(BREEDS):
            own = sum(breeds[j] == breed for j in part)
            assert abs(own - share * 10 * (i + 1)) < 1 and own >= 1, (share, breed)
    kept, rest = m.subset(breeds, 0.25)
    assert sorted(kept + rest) == list(range(len(breeds)))

def test_subset_is_at_random_and_the_same_every_time():
    breeds = ["a"] * 100
    kept = m.subset(breeds, 0.5)[0]
    assert kept == m.subset(breeds, 0.5)[0] and kept != list(range(50))
    torch.manual_seed(9)
    assert kept == m.subset(breeds, 0.5)[0]

# --- pets -----------------------------------------------------------------------------------------

def test_pets(pets):
    parts = {part: m.load_split("pets", pets, part, [24, 32], None) for part in ("train", "val", "test")}
    assert [len(part[0]) for part in parts.values()] == [35, 5, 10]
    for images, masks, breeds, names in parts.values():
        assert images.shape[1:] == (3, 24, 32) and masks.shape[1:] == (24, 32)
        assert masks.unique().tolist() == [0, 1, 2] and names == ["pet", "background", "border"]
        assert set(breeds) == set(BREEDS)
    assert all(parts["train"][2].count(b) == 7 and parts["val"][2].count(b) == 1 for b in BREEDS)
    pairs = [set(m.pet_files(pets, part)[0]) for part in ("train", "val", "test")]
    assert len(set.union(*pairs)) == 50
    assert all(int(photo.stem.rsplit("_", 1)[1]) > 8 for photo, _ in pairs[2])      # the official test
    images, masks, *_ = parts["train"]
    bright = images.float().mean(1)
    assert bright[masks == 0].mean() > bright[masks == 1].mean() + 100              # label 0 is the pet

def test_a_failed_download_names_the_steps(refuse, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no route\nto host")
    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet", broken)
    line = refuse(SEGMENTERS[0], "--data", "pets", *(["--init", "none"] if SEGMENTERS[0] == "finetune" else []))
    for word in ("no route", "images.tar.gz", "annotations", "robots.ox.ac.uk", "--data toy"):
        assert word in line

def test_download_of_the_pets(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet", lambda root, download: write_pets(root))
    assert len(m.load_split("pets", "data", "train", [16, 16], None)[0]) == 35

# --- folders --------------------------------------------------------------------------------------

def parts_of(folder, ignore=None, size=(24, 24)):
    return {part: m.load_split(str(folder), "data", part, list(size), ignore) for part in ("train", "val", "test")}

@pytest.mark.parametrize("paint", (lambda x: x * 255, lambda x: x, lambda x: x.astype(bool)))
def test_flat_binary_folder(tmp_path, paint):
    """0 and 255, 0 and 1, and pictures of one bit are all one class."""
    parts = parts_of(write_folder(tmp_path / "f", 30, paint=paint))
    assert [len(part[0]) for part in parts.values()] == [24, 3, 3]
    for images, masks, _, names in parts.values():
        assert names == ["foreground"] and masks.unique().tolist() == [0, 1]
        assert images.float().mean(1)[masks == 1].mean() > images.float().mean(1)[masks == 0].mean() + 100
    files = [m.folder_files(tmp_path / "f", part)[0] for part in ("train", "val", "test")]
    assert len({pair for part in files for pair in part}) == 30

def test_parted_folder(parted):
    parts = parts_of(parted, 9, (20, 32))
    assert [len(part[0]) for part in parts.values()] == [16, 5, 6]
    for images, masks, _, names in parts.values():
        assert images.shape[2:] == (20, 32) and names == ["0", "1", "2"]
        assert masks.unique().tolist() == [0, 1, 2, m.IGNORE] and (masks[:, 0] == m.IGNORE).all()

def test_missing_val_is_cut_from_train(parted):
    for file in sorted((parted / "val").rglob("*.*")):
        file.unlink()
    for folder in ("val/images", "val/masks", "val"):
        (parted / folder).rmdir()
    files = {part: m.folder_files(parted, part)[0] for part in ("train", "val", "test")}
    assert len(files["val"]) == 2 and len(files["train"]) == 14 and len(files["test"]) == 6
    assert not set(files["train"]) & set(files["val"])

def test_ignored_255_beside_labels(tmp_path):
    def paint(labels):
        labels = labels.copy()
        labels[:3] = 255
        return labels
    images, masks, _, names = parts_of(write_folder(tmp_path / "f", 12, paint=paint, classes=3), 255)["train"]
    assert names == ["0", "1", "2"] and masks.unique().tolist() == [0, 1, 2, m.IGNORE]

def test_palette_masks_are_labels(tmp_path):
    folder = write_folder(tmp_path / "f", 12, paint=lambda x: x, classes=3)
    for file in (folder / "masks").iterdir():
        mask = Image.open(file)
        mask.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        mask.save(file)
    assert parts_of(folder)["train"][1].unique().tolist() == [0, 1, 2]

def test_stray_files_are_left_alone(tmp_path):
    folder = write_folder(tmp_path / "f", 12)
    (folder / "images/.DS_Store").write_bytes(b"x")
    assert len(parts_of(folder)["train"][0]) > 0

# --- photos upright, masks aligned ----------------------------------------------------------------

@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """The photo lies as its camera stored it, the mask upright: read, they fit."""
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}       # the inverse, as PIL's Transpose
    photo, labels = drawn(3, (64, 40), 2)
    if orientation > 1:
        photo = photo.transpose(Image.Transpose(turn[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    photo.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    labels.save(tmp_path / "mask.png")
    pixels = m.read_pair((tmp_path / "photo.jpg", tmp_path / "mask.png"), [40, 64])
    seen = pixels[:3].mean(0) > 125
    assert (seen == (pixels[3] == 1)).mean() > 0.97

def test_masks_are_resized_without_new_labels(tmp_path):
    photo, _ = drawn(1, (63, 41))
    photo.save(tmp_path / "photo.png")
    Image.fromarray(np.random.default_rng(0).choice([0, 7, 30], (41, 63)).astype(np.uint8)).save(tmp_path / "mask.png")
    assert set(np.unique(m.read_pair((tmp_path / "photo.png", tmp_path / "mask.png"), [24, 24])[3])) == {0, 7, 30}

def test_augmentation_moves_photo_and_mask_together():
    """The mask painted into the photo, in black and white, is still the mask."""
    torch.manual_seed(0)
    masks = m.draw_toy(64, (48, 64), 5)[1]
    masks = (masks == 1).byte()
    images = (masks * 255)[:, None].repeat(1, 3, 1, 1)
    before = images.clone(), masks.clone()
    x, y = m.augment(images, masks)
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])
    assert x.shape == (64, 3, 48, 64) and x.min() >= 0 and x.max() <= 1
    assert y.dtype == torch.uint8 and set(y.unique().tolist()) <= {0, 1}
    grey = x.mean(1)
    middle = (grey.amax((1, 2), True) + grey.amin((1, 2), True)) / 2
    mixed = y.float().mean((1, 2))
    both = (mixed > 0.05) & (mixed < 0.95)
    assert both.sum() > 40
    assert ((grey > middle) == (y == 1))[both].float().mean() > 0.985
    assert (y != masks).flatten(1).any(1).float().mean() > 0.9

def test_augmentation_keeps_labels_and_hangs_on_the_seed():
    images, masks, _ = m.draw_toy(8, (32, 32), 5)
    masks[:, :4] = m.IGNORE
    torch.manual_seed(1)
    x, y = m.augment(images, masks)
    torch.manual_seed(1)
    again, same = m.augment(images, masks)
    assert torch.equal(x, again) and torch.equal(y, same)
    assert set(y.unique().tolist()) <= {0, 1, 2, m.IGNORE}
    assert not torch.equal(x, m.augment(images, masks)[0])

# --- the cache ------------------------------------------------------------------------------------

@pytest.fixture
def reads(monkeypatch):
    """The pairs that were decoded from their files."""
    seen, read = [], m.read_pair
    monkeypatch.setattr(m, "read_pair", lambda pair, size: seen.append(pair) or read(pair, size))
    return seen

def caches():
    return sorted(Path("data/cache").glob("*"))

def test_second_start_reads_the_cache(flat, reads, capsys):
    first = m.load_split(str(flat), "data", "train", [24, 24], None)
    assert len(reads) == 24 and "decoded" in capsys.readouterr().out and len(caches()) == 1
    second = m.load_split(str(flat), "data", "train", [24, 24], None)
    assert len(reads) == 24 and capsys.readouterr().out == ""
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2]))

def test_deleting_the_cache_changes_nothing(flat, reads):
    first = m.load_split(str(flat), "data", "train", [24, 24], None)
    caches()[0].unlink()
    second = m.load_split(str(flat), "data", "train", [24, 24], None)
    assert len(reads) == 48 and all(torch.equal(a, b) for a, b in zip(first[:2], second[:2]))

def test_the_key_hangs_on_files_and_size(flat, reads):
    m.load_split(str(flat), "data", "train", [24, 24], None)
    m.load_split(str(flat), "data", "train", [16, 24], None)
    assert len(reads) == 48 and len(caches()) == 2
    photo, mask = reads[0]
    images = m.load_split(str(flat), "data", "train", [24, 24], None)[0].clone()
    Image.fromarray(255 - np.asarray(Image.open(photo))).save(photo)       # other pixels
    os.utime(photo, ns=(1, photo.stat().st_mtime_ns + 10**9))
    changed = m.load_split(str(flat), "data", "train", [24, 24], None)[0]
    assert len(caches()) == 3 and (images != changed).flatten(1).any(1).sum() == 1

@pytest.mark.parametrize("share", (0, 3, 60, 0.5, 0.999))
def test_a_cut_cache_is_built_again(flat, reads, share):
    first = m.load_split(str(flat), "data", "train", [24, 24], None)[0].clone()
    file, = caches()
    whole = file.read_bytes()
    file.write_bytes(whole[:share if isinstance(share, int) else int(share * len(whole))])
    assert torch.equal(first, m.load_split(str(flat), "data", "train", [24, 24], None)[0])
    assert len(reads) == 48 and file.read_bytes() == whole and caches() == [file]

def test_writing_into_the_tensors_leaves_the_cache(flat):
    for _ in range(2):           # as decoded, then as mapped
        images, masks, *_ = m.load_split(str(flat), "data", "train", [24, 24], None)
        whole = caches()[0].read_bytes()
        images[:], masks[:] = 0, 0
        assert caches()[0].read_bytes() == whole

# --- the four collections, for pre-training -------------------------------------------------------

if "pretrain" in SCRIPTS:
    p = load("pretrain")

    def photos(*flags, size=(16, 16)):
        args = p.parse_args(["--size", *map(str, size), *map(str, flags)])
        args.size = list(size)
        return p.load_photos(args)

    def table(out):
        """{source: [numbers]} of the printed table."""
        rows = [line.rsplit(maxsplit=6) for line in out.splitlines()]
        return {row[0]: [int(n) for n in row[1:]] for row in rows if len(row) == 7 and row[1].isdigit()}

    def test_catdog(catdog, capsys):
        """33 dogs, of which one is a copy, and 28 cats, of which one is broken: 27 of each."""
        images, taken = photos("--data", "catdog", "--root", catdog)
        out = capsys.readouterr().out
        assert images.shape[1:] == (3, 16, 16) and images.dtype == torch.uint8
        assert len(taken) == len(set(taken.tolist())) == 54
        found = table(out)
        assert [row[:2] for row in found.values()] == [[20, 20], [0, 13], [3, 2], [5, 4]]
        assert [sum(column) for column in zip(*found.values())] == [28, 39, 0, 1, 1, 54]
        assert found[next(name for name in found if "CIFAR" in name)][5] > 20       # from all sources
        line, = [line for line in out.splitlines() if "666.jpg" in line]
        assert line.startswith("skipped")
        again, same = photos("--data", "catdog", "--root", catdog)
        assert torch.equal(taken, same) and torch.equal(images, again)
        assert table(capsys.readouterr().out) == found

    def test_catdog_takes_no_broken_photo_and_no_copy(catdog):
        images, taken = photos("--data", "catdog", "--root", catdog)
        pixels = [images[i].numpy().tobytes() for i in taken]
        assert len(set(pixels)) == len(pixels)
        assert all(images[i].any() for i in taken)

    def test_catdog_with_some_of_the_four(catdog, capsys):
        images, taken = photos("--data", "catdog", "--root", catdog)
        for file in sorted((catdog / "cifar-10-batches-py").iterdir()):
            file.unlink()
        (catdog / "cifar-10-batches-py").rmdir()
        capsys.readouterr()
        _, taken = photos("--data", "catdog", "--root", catdog)
        assert not any("CIFAR" in name for name in table(capsys.readouterr().out)) and len(taken) == 14

    def test_pets_without_labels(pets):
        images, taken = photos("--data", "pets", "--root", pets)
        assert len(taken) == 40                # trainval alone, never the test photos

    def test_a_folder_of_photos(tmp_path):
        for i in range(7):
            Path(tmp_path, f"mine/{i % 2}").mkdir(parents=True, exist_ok=True)
            drawn(i)[0].save(tmp_path / f"mine/{i % 2}/{i}.{('jpg', 'png')[i % 2]}")
        (tmp_path / "mine/notes.txt").write_text("no photo")
        assert len(photos("--data", tmp_path / "mine")[1]) == 7

    def test_masks_are_no_photos(tmp_path):
        assert len(photos("--data", write_folder(tmp_path / "mine", 9))[1]) == 9

    def test_kinds_join(catdog, tmp_path, capsys):
        write_pets(catdog)
        images, taken = photos("--data", "catdog+pets", "--root", catdog)
        assert len(taken) == 54 + 40
        assert table(capsys.readouterr().out)["pets"] == [0, 0, 40, 0, 0, 40]

    def test_masks_are_no_photos_for_vqvae(here, capsys):
        write_folder(here / "mine", 9)
        load("vqvae").main("--data mine --size 16 --epochs 1 --batch-size 4".split())
        assert "train 8  val 1" in capsys.readouterr().out

    def test_download_fetches_what_lacks(tmp_path, monkeypatch):
        asked = []
        def archive(url, _, root, **__):
            asked.append(url)
            for i, kind in enumerate(("PetImages/Cat", "PetImages/Dog") if "kagglecats" in url else
                                     ("Images/n1-x", ) if "ImageNetDogs" in url else
                                     ("cats_and_dogs_filtered/train/cats", "cats_and_dogs_filtered/train/dogs")):
                Path(root, kind).mkdir(parents=True, exist_ok=True)
                drawn(len(asked) * 10 + i)[0].save(Path(root, kind, "0.jpg"))
        monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", archive)
        monkeypatch.setattr("torchvision.datasets.CIFAR10.download", lambda self: asked.count("cifar") or
                            (asked.append("cifar"), write_cifar(self.root)))
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: Path(path).exists())
        monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
        def stopped(url, _, root, **__):
            archive(url, None, root)
            Path(root, "PetImages/Dog/0.jpg").unlink(missing_ok=True)
            if "kagglecats" in url:
                raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr("torchvision.datasets.utils.download_and_extract_archive", stopped)
            with pytest.raises(KeyboardInterrupt):
                photos("--data", "catdog", "--root", tmp_path / "new", "--download")
        assert len(asked) == 4 and not (tmp_path / "new/PetImages").exists()      # whole or not at all
        asked[:] = asked[:3]
        _, taken = photos("--data", "catdog", "--root", tmp_path / "new", "--download")
        assert len(asked) == 4 and len(taken) == 2 * 22
        photos("--data", "catdog", "--root", tmp_path / "new", "--download")
        assert len(asked) == 4                 # nothing is fetched twice

    def test_a_download_that_was_cut_begins_again(tmp_path, monkeypatch, refuse):
        """Torchvision takes any file of the right name for the archive, and so would go on failing."""
        root, asked = tmp_path / "new", []
        for folder in ("Images", "cats_and_dogs_filtered"):
            (root / folder).mkdir(parents=True)
        write_cifar(root)
        with zipfile.ZipFile(tmp_path / "whole.zip", "w") as whole:
            for i, kind in enumerate(("Cat", "Dog")):
                drawn(i)[0].save(tmp_path / "0.jpg")
                whole.write(tmp_path / "0.jpg", f"PetImages/{kind}/0.jpg")
        content = (tmp_path / "whole.zip").read_bytes()
        def retrieve(_, path, *__):
            asked.append(path)
            Path(path).write_bytes(content[:-30] if len(asked) == 1 else content)
        monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", retrieve)
        monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: Path(path).exists())
        monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
        assert "not a zip file" in refuse("pretrain", "--data", "catdog", "--download", "--root", root)
        _, taken = photos("--data", "catdog", "--root", root, "--download")
        assert len(asked) == 2 and len(taken) == 2 * 21
        assert (root / "PetImages/Cat/0.jpg").exists() and not [*root.rglob("*.zip")]

    def test_download_that_fails(refuse, monkeypatch, tmp_path):
        def broken(*_, **__):
            raise OSError("no route to host")
        monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", broken)
        monkeypatch.setattr("torchvision.datasets.CIFAR10.download", lambda self: None)
        monkeypatch.setattr("torchvision.datasets.CIFAR10.__init__", lambda self, *_, **__: vars(self).update(data=[], targets=[]))
        line = refuse("pretrain", "--data", "catdog", "--download", "--root", tmp_path)
        assert "no route to host" in line and "by hand" in line and not Path("checkpoints").exists()

    def test_a_cut_cache_of_photos_is_built_again(catdog):
        images, taken = photos("--data", "catdog", "--root", catdog)
        images = images.clone()
        for file in caches():
            for size in (0, 5, file.stat().st_size // 2):
                file.write_bytes(file.read_bytes()[:size])
                again, same = photos("--data", "catdog", "--root", catdog)
                assert torch.equal(images, again) and torch.equal(taken, same)

# --- what the flags select ------------------------------------------------------------------------

@pytest.fixture
def chosen(monkeypatch, pets):
    """chosen(*flags) -> images and masks that finetune trains on, images and masks of validation."""
    if "finetune" not in SCRIPTS:
        pytest.skip("no finetune.py")
    class Enough(Exception):
        pass
    def call(*flags):
        seen = []
        def epoch(model, images, masks, *_):
            seen.extend((images, masks))
            return 0.0, torch.ones(3, 3), 1.0
        def stop(model, images, masks, *_):
            seen.extend((images, masks))
            raise Enough
        monkeypatch.setattr(m, "finetune_epoch", epoch)
        monkeypatch.setattr(m, "validate", stop)
        with pytest.raises(Enough):
            m.main(["--data", "pets", "--root", str(pets), "--init", "none", "--size", "16", *flags])
        return seen
    return call

def test_frac_and_seed_never_move_val(chosen):
    train, _, val, val_masks = chosen()
    half, _, val_half, masks_half = chosen("--frac", "0.5", "--seed", "7")
    assert len(train) == 35 and len(half) == 20 and len(val) == 5      # 4 of 7 of each breed
    assert torch.equal(val, val_half) and torch.equal(val_masks, masks_half)
    whole = {image.numpy().tobytes() for image in train}
    assert {image.numpy().tobytes() for image in half} <= whole
    assert not any(image.numpy().tobytes() in whole for image in val)

def test_cats_acts_on_training_photos_alone(chosen):
    train, _, val, _ = chosen("--cats", "Maine_Coon")
    assert len(train) == 21 and len(val) == 5            # one breed of cats, two of dogs
