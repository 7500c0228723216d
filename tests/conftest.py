"""The scripts as modules or child processes, and tiny data sets in the layouts of the real ones."""

import functools
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
SEGMENTERS = ["finetune", "linknet", "segnet", "unet"]
BASELINES = ["linknet", "segnet", "unet"]
CODED = ["vqvae", "pretrain", "finetune"]  # with a quantiser
TRAINING = ["vqvae", "pretrain", "finetune", "linknet", "segnet", "unet"]
LIGHT = ["vqvae", "pretrain", "finetune", "segnet", "unet"]  # linknet saves 100 MB an epoch
NAMES = [*TRAINING, "evaluate", "experiments"]

# The smallest network of each script at the smallest size that all of them take.
SMALL = {
    "vqvae": ["--size", "32"],
    "pretrain": ["--size", "32"],
    "finetune": ["--size", "32", "--init", "none"],
    "linknet": ["--size", "32"],
    "segnet": ["--size", "32", "--width", "4"],
    "unet": ["--size", "32", "--width", "4"],
}

# What network() makes: the class and its sizes, two classes for those that segment.
NETWORKS = {
    "vqvae": ("VQVAE", [3, 8, 4, 1, 2, 512]),
    "pretrain": ("VQVAE", [3, 8, 4, 1, 2, 512]),
    "finetune": ("Segmenter", [2, 8, 4, 1, 2, 512]),
    "linknet": ("LinkNet", [2]),
    "segnet": ("SegNet", [2, 2]),
    "unet": ("UNet", [2, 2]),
}

# One thread: the networks here are tiny, and two threads wait for each other on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow only")
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; give --slow"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


# --- scripts -------------------------------------------------------------------------------------


@functools.cache
def load(name):
    """A script as a module, imported by its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(name):
    """A tiny network of a script."""
    kind, sizes = NETWORKS[name]
    return getattr(load(name), kind)(*sizes)


def typed(script, argv):
    """The words of a command line that runs a script."""
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)]


def start(script, *argv, cwd, **options):
    """A script as a child process, as typed, in the folder cwd."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(typed(script, argv), cwd=cwd, **pipes, **options)


def run(script, *argv, cwd, timeout=240):
    """A script as a child process that must succeed -> what it prints."""
    done = subprocess.run(
        typed(script, argv), cwd=cwd, timeout=timeout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(folder):
    """The epochs of a run."""
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def checkpoint(path):
    return torch.load(path, weights_only=True)


def interrupt(monkeypatch, at):
    """Ctrl-C in the optimizer's step number `at` -> the list that holds the number of steps."""
    step, count = torch.optim.AdamW.step, [0]

    def counted(self, *args, **kwargs):
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return count


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder: data/ and checkpoints/ are made in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(here, capsys):
    """refuse(script, *argv): main must end with one line, by sys.exit or p.error -> that line."""

    def call(script, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            load(script).main([str(word) for word in argv])
        line = stop.value.code
        if line == 2:  # p.error: usage, then the line
            line = capsys.readouterr().err.partition("error: ")[2]
        assert isinstance(line, str) and len(line.strip().splitlines()) == 1, line
        return line

    return call


# --- tiny data sets ------------------------------------------------------------------------------


def drawn(seed, size=(64, 48), classes=3):
    """A photo of size (W, H) with a bright ellipse, and its labels: 0 ellipse, 1 ground, 2 border;
    with 2 classes 1 ellipse, 0 ground."""
    g = np.random.default_rng(seed)
    W, H = size
    left, top = W * g.uniform(0.1, 0.3), H * g.uniform(0.1, 0.3)
    right, bottom = W * g.uniform(0.6, 0.9), H * g.uniform(0.6, 0.9)
    pet, ground, border = (0, 1, 2) if classes == 3 else (1, 0, 1)
    labels = Image.new("L", size, ground)
    ImageDraw.Draw(labels).ellipse([left, top, right, bottom], pet, border, 2)
    inside = np.asarray(labels) != ground
    pixels = g.integers(0, 90, (H, W, 3)) + 160 * inside[..., None]
    return Image.fromarray(pixels.astype(np.uint8)), labels


def white(labels):
    """0 and 1 -> black and white."""
    return labels * 255


def write_folder(base, n, paint=white, classes=2, first=0):
    """images/*.jpg and masks/*.png under base; paint turns labels into the values of the file."""
    base = Path(base)
    (base / "images").mkdir(parents=True, exist_ok=True)
    (base / "masks").mkdir(exist_ok=True)
    for i in range(first, first + n):
        photo, labels = drawn(i, classes=classes)
        photo.save(base / f"images/{i:03}.jpg")
        Image.fromarray(paint(np.asarray(labels))).save(base / f"masks/{i:03}.png")
    return base


@pytest.fixture
def flat(tmp_path):
    """A flat folder of 24 photos, black and white."""
    return write_folder(tmp_path / "flat", 24)


@pytest.fixture
def parted(tmp_path):
    """train/, val/ and test/, three classes, and 9 as a label that does not count."""

    def paint(labels):
        return np.vstack([np.full_like(labels[:3], 9), labels[3:]])

    for part, n, first in [("train", 16, 0), ("val", 5, 100), ("test", 6, 200)]:
        write_folder(tmp_path / "parted" / part, n, paint, 3, first)
    return tmp_path / "parted"


BREEDS = ["Abyssinian", "Maine_Coon", "Siamese", "basset_hound", "beagle"]  # 3 cats, 2 dogs


def write_pets(root):
    """Oxford-IIIT Pet as it unpacks: photos, trimaps 1 2 3, lists."""
    base = Path(root, "oxford-iiit-pet")
    (base / "images").mkdir(parents=True)
    (base / "annotations/trimaps").mkdir(parents=True)
    lists = {"trainval": [], "test": []}
    for b, breed in enumerate(BREEDS):
        species = 1 if breed[0].isupper() else 2
        for i in range(1, 11):
            name = f"{breed}_{i}"
            photo, labels = drawn(100 * b + i, (40 + i, 50 - i))
            photo.save(base / f"images/{name}.jpg")
            Image.fromarray(np.asarray(labels) + 1).save(base / f"annotations/trimaps/{name}.png")
            part = "trainval" if i <= 8 else "test"
            lists[part].append(f"{name} {b + 1} {species} {b + 1}\n")
    for name, lines in lists.items():
        (base / f"annotations/{name}.txt").write_text("".join(lines))
    return Path(root)


@pytest.fixture
def pets(tmp_path):
    """A root with 40 trainval and 10 test photos of 5 breeds; torchvision downloads no others."""
    return write_pets(tmp_path / "root")


def write_cifar(root):
    """CIFAR-10 as it unpacks: six pickles with four photos of a class, and batches.meta."""
    base, g = Path(root, "cifar-10-batches-py"), np.random.default_rng(0)
    base.mkdir(parents=True)
    labels = list(range(10)) * 4
    for name in ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]:
        data = g.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list(range(10))}))


@pytest.fixture
def catdog(tmp_path, monkeypatch):
    """The four collections as they unpack: 20 cats and 20 dogs of CIFAR-10, 13 dogs of Stanford,
    3 and 2 of Google, 5 and 4 of Microsoft. Cat/666.jpg is broken, Dog/3.jpg is Dog/0.jpg."""
    root = tmp_path / "four"
    write_cifar(root)
    integrity = "torchvision.datasets.cifar.check_integrity"  # it knows the real files' sums
    monkeypatch.setattr(integrity, lambda path, _: Path(path).exists())
    files = [f"Images/n02085620-Chihuahua/n02085620_{i}.jpg" for i in range(13)]
    files += [f"cats_and_dogs_filtered/train/cats/cat.{i}.jpg" for i in range(3)]
    files += [f"cats_and_dogs_filtered/train/dogs/dog.{i}.jpg" for i in range(2)]
    files += [f"PetImages/Cat/{i}.jpg" for i in range(4)]
    files += [f"PetImages/Dog/{i}.jpg" for i in range(3)]
    for i, file in enumerate(files):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn(1000 + i)[0].save(path)
    (root / "PetImages/Cat/666.jpg").write_bytes(b"not a photo")
    shutil.copy(root / "PetImages/Dog/0.jpg", root / "PetImages/Dog/3.jpg")
    return root
