"""What the tests share: the scripts as modules, and tiny data sets in the layouts of the real ones."""
import functools, importlib.util, json, os, pickle, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
NAMES = "vqvae linknet segnet unet pretrain finetune evaluate experiments".split()
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").exists()]
TRAINING = [name for name in SCRIPTS if name not in ("evaluate", "experiments")]
SEGMENTERS = [name for name in ("finetune", "linknet", "segnet", "unet") if name in SCRIPTS]
LIGHT = [name for name in TRAINING if name != "linknet"]      # it saves 100 MB an epoch; the text is the same
BASELINES = [name for name in ("linknet", "segnet", "unet") if name in SCRIPTS]
CODED = [name for name in ("vqvae", "pretrain", "finetune") if name in SCRIPTS]   # with a quantiser

# The smallest network of each script at the smallest size it takes.
SMALL = {name: flags.split() for name, flags in {
    "vqvae": "--size 16", "pretrain": "--size 16", "finetune": "--init none --size 16",
    "linknet": "--encoder resnet18 --weights none --size 32", "segnet": "--width 4 --stages 2 --size 16",
    "unet": "--width 4 --size 16"}.items()}

# One thread: the nets here are tiny, and two threads wait for each other on a busy machine.
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

@functools.cache
def load(name):
    """A script as a module, imported by its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def start(script, *argv, cwd, **options):
    """A script as a child process, as typed."""
    return subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)], cwd=cwd,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

def run(script, *argv, cwd, timeout=240):
    """A script as a child process that must succeed -> what it prints."""
    child = start(script, *argv, cwd=cwd)
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        raise
    assert child.returncode == 0, out + err
    return out

def rows(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]

def checkpoint(path):
    return torch.load(path, weights_only=True)

def interrupt(monkeypatch, at):
    """KeyboardInterrupt in the optimiser's step number `at` -> the counter of steps."""
    step, count = torch.optim.AdamW.step, [0]
    def counted(self, *args, **kwargs):
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return count

@pytest.fixture(autouse=True)
def signals():
    """The scripts change what SIGTERM does; every test begins as a fresh process would."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder: data/ and checkpoints/ are made in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def refuse(capsys):
    """refuse(script, *argv): main must end with exit code 2 and one line on stderr -> that line."""
    def call(script, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            load(script).main([str(word) for word in argv])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith(f"{script}.py: error: ") and error.count("\n") == 1, error
        return error
    return call

# --- tiny data sets -------------------------------------------------------------------------------

def drawn(seed, size=(48, 40), classes=3):
    """A photo of size (W, H) with a bright ellipse, and its labels: 0 ellipse, 1 ground, 2 border;
    with 2 classes 1 ellipse, 0 ground."""
    g = np.random.default_rng(seed)
    W, H = size
    box = [int(W * g.uniform(0.1, 0.3)), int(H * g.uniform(0.1, 0.3)),
           int(W * g.uniform(0.6, 0.9)), int(H * g.uniform(0.6, 0.9))]
    labels = Image.new("L", size, 1 if classes == 3 else 0)
    ImageDraw.Draw(labels).ellipse(box, 0 if classes == 3 else 1, 2 if classes == 3 else 1, 2)
    inside = np.asarray(labels) != (1 if classes == 3 else 0)
    pixels = g.integers(0, 90, (H, W, 3)) + 160 * inside[..., None]
    return Image.fromarray(pixels.astype(np.uint8)), labels

def write_folder(base, n, size=(48, 40), paint=lambda labels: labels * 255, classes=2, first=0):
    """images/*.jpg and masks/*.png under base; paint turns the labels into the values of the file."""
    for name in ("images", "masks"):
        Path(base, name).mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        photo, labels = drawn(i, size, classes)
        photo.save(Path(base, f"images/{i:03}.jpg"))
        Image.fromarray(paint(np.asarray(labels))).save(Path(base, f"masks/{i:03}.png"))
    return Path(base)

@pytest.fixture
def flat(tmp_path):
    """A flat folder, binary, 0 and 255."""
    return write_folder(tmp_path / "flat", 30)

@pytest.fixture
def parted(tmp_path):
    """train/, val/ and test/, three classes, and 9 as a label that does not count."""
    def paint(labels):
        labels = labels.copy()
        labels[:3] = 9
        return labels
    for first, (part, n) in zip((0, 100, 200), (("train", 16), ("val", 5), ("test", 6))):
        write_folder(tmp_path / "parted" / part, n, (64, 40), paint, 3, first)
    return tmp_path / "parted"

BREEDS = ("Abyssinian", "Maine_Coon", "Siamese", "basset_hound", "beagle")      # 3 cats, 2 dogs

def write_pets(root, trainval=8, test=2):
    """Oxford-IIIT Pet as it unpacks: photos, trimaps 1 2 3, lists without a header."""
    base = Path(root, "oxford-iiit-pet")
    (base / "images").mkdir(parents=True)
    (base / "annotations/trimaps").mkdir(parents=True)
    lines = {"trainval": [], "test": []}
    for b, breed in enumerate(BREEDS):
        for i in range(1, trainval + test + 1):
            photo, labels = drawn(100 * b + i, (40 + i, 50 - i))
            photo.save(base / f"images/{breed}_{i}.jpg")
            Image.fromarray(np.asarray(labels) + 1).save(base / f"annotations/trimaps/{breed}_{i}.png")
            kind = 1 if breed[0].isupper() else 2
            lines["trainval" if i <= trainval else "test"].append(f"{breed}_{i} {b + 1} {kind} {b + 1}")
    (base / "images/Abyssinian_1.mat").write_bytes(b"a stray file, as in the real archive")
    for name, text in (lines | {"list": lines["trainval"] + lines["test"]}).items():
        (base / f"annotations/{name}.txt").write_text("\n".join(text) + "\n")
    return Path(root)

@pytest.fixture
def pets(tmp_path):
    """A root with 40 trainval and 10 test photos of 5 breeds."""
    return write_pets(tmp_path / "root")

def write_cifar(root, each=4):
    """CIFAR-10 as it unpacks: five pickles and batches.meta, `each` photos of each class in one."""
    base, g = Path(root, "cifar-10-batches-py"), np.random.default_rng(0)
    base.mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        labels = [i % 10 for i in range(10 * each)]
        data = g.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))

@pytest.fixture
def catdog(tmp_path, monkeypatch):
    """A root with the four collections as they unpack: 20 + 20 from CIFAR-10, 13 Stanford dogs, 3 + 2
    of Google's, 5 + 4 of Microsoft's, of which Cat/666.jpg is broken and Dog/3.jpg is Dog/0.jpg."""
    root = tmp_path / "four"
    write_cifar(root)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: Path(path).exists())
    files = [f"Images/n02085620-Chihuahua/n02085620_{i}.jpg" for i in range(7)] \
        + [f"Images/n02085782-Japanese_spaniel/n02085782_{i}.jpg" for i in range(6)] \
        + [f"cats_and_dogs_filtered/train/cats/cat.{i}.jpg" for i in range(3)] \
        + [f"cats_and_dogs_filtered/train/dogs/dog.{i}.jpg" for i in range(2)] \
        + [f"PetImages/Cat/{i}.jpg" for i in range(4)] + [f"PetImages/Dog/{i}.jpg" for i in range(3)]
    for i, file in enumerate(files):
        Path(root, file).parent.mkdir(parents=True, exist_ok=True)
        drawn(1000 + i)[0].save(root / file)
    (root / "PetImages/Cat/666.jpg").write_bytes(b"not a photo")
    shutil.copy(root / "PetImages/Dog/0.jpg", root / "PetImages/Dog/3.jpg")
    return root
