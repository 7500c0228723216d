"""The chain as it is typed: pretrain, finetune, evaluate; what it leaves, and what fits together.
Then every other script, one epoch each, and other data than drawn pets."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import BASELINES, SMALL, checkpoint, load, rows, run, write_folder
from PIL import Image

FILES = {"best.pt", "last.pt", "log.jsonl", "result.json"}
FEW = ["--frac", "0.05", "--epochs", "1"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder after the chain, and what evaluate.py printed."""
    cwd, steps = tmp_path_factory.mktemp("chain"), ["--size", "32", "--batch-size", "8"]
    flags = ["--frac", "0.2", "--epochs", "4", "--net", "64", "16", "1", "2", "512"]
    run("pretrain", "--mask", "0.05-0.25", *flags, *steps, cwd=cwd)
    run("finetune", "--frac", "0.4", "--epochs", "8", "--lr", "2e-3", *steps, cwd=cwd)
    return cwd, run("evaluate", "--json", "scores.json", cwd=cwd)


@pytest.fixture
def inside(chain, monkeypatch):
    """The folder after the chain, as the current one."""
    monkeypatch.chdir(chain[0])


def evaluated(folder, *flags):
    """evaluate.py's record of one run."""
    load("evaluate").main([*map(str, flags), "--json", str(folder / "scores.json")])
    (record,) = json.loads((folder / "scores.json").read_text())
    return record


def names_in(folder):
    return {file.name for file in Path(folder).iterdir()}


def share_of_ground(size):
    """What the best constant answer scores on the drawn photos of the test."""
    masks = load("evaluate").draw_toy(256, [size, size], seed=2)[1]
    return (masks == 1).float().mean().item()


# --- the chain -----------------------------------------------------------------------------------


def test_files(inside):
    assert names_in("checkpoints/pretrain") == FILES | {"samples.png"}
    assert names_in("checkpoints/finetune") == FILES | {"model.pt2", "overlay.png"}
    assert names_in(".") == {"checkpoints", "scores.json"}


def test_pretraining_learns(inside):
    log = rows("checkpoints/pretrain")
    assert [row["epoch"] for row in log] == [1, 2, 3, 4]
    assert log[-1]["loss"] < log[0]["loss"] / 2 and log[-1]["val_loss"] < log[0]["val_loss"]
    assert log[-1]["val_hidden"] < log[-1]["val_mean_fill"]
    assert log[-1]["val_perplexity"] > 50 and log[-1]["val_used"] > 128


def test_the_network_beats_the_baselines(inside, chain):
    (record,) = json.loads(Path("scores.json").read_text())
    assert record["data"] == "toy" and record["photos"] == 256
    assert record["scores"]["accuracy"] > share_of_ground(32)
    assert record["scores"]["miou"] > share_of_ground(32) / 3 + 0.1
    for word in ["toy", "all pet", "all background", "all border"]:
        assert word in chain[1]
    log = rows("checkpoints/finetune")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["val_miou"] > log[0]["val_miou"]


@pytest.mark.parametrize(
    "name, key, choose", [("pretrain", "loss", min), ("finetune", "miou", max)]
)
def test_the_best_epoch_is_kept(name, key, choose, inside):
    folder = Path("checkpoints", name)
    best = choose(rows(folder), key=lambda row: row[f"val_{key}"])
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"] == best == checkpoint(folder / "best.pt")["metrics"]
    assert result["args"]["size"] == [32, 32] and result["args"]["net"] == [64, 16, 1, 2, 512]
    assert result["script"] == f"{name}.py" and result["torch"] == torch.__version__


def test_pictures(inside):
    for file in ["pretrain/samples.png", "finetune/overlay.png"]:
        with Image.open(Path("checkpoints", file)) as picture:
            assert len(picture.convert("RGB").getcolors(10**6)) > 1000


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_checkpoints_hold_plain_types(name, inside):
    """checkpoint() reads with weights_only=True."""
    best, last = [checkpoint(f"checkpoints/{name}/{file}") for file in ("best.pt", "last.pt")]
    assert best.keys() == {"script", "args", "model", "metrics"}
    assert last.keys() == {*best, "optimizer", "history"}
    assert best["script"] == f"{name}.py" and last["history"] == rows(f"checkpoints/{name}")


def test_meta(inside):
    with zipfile.ZipFile("checkpoints/finetune/model.pt2") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("extra/meta.json")]
        meta = json.loads(archive.read(name))
    assert meta == json.loads(Path("checkpoints/finetune/result.json").read_text())
    assert meta["script"] == "finetune.py" and meta["args"]["data"] == "toy"
    assert meta["args"]["classes"] == ["pet", "background", "border"]


def test_scores_do_not_hang_on_the_batch_size(inside, tmp_path):
    few = evaluated(tmp_path, "--batch-size", 7)["scores"]["classes"]
    many = evaluated(tmp_path)["scores"]["classes"]
    for name, values in few.items():
        assert values == pytest.approx(many[name], abs=5e-5)


def test_blur_costs_accuracy(inside, tmp_path):
    sharp, soft, softer = [
        evaluated(tmp_path, "--blur", percent)["scores"] for percent in (0, 50, 100)
    ]
    for key in ["accuracy", "miou", "dice"]:
        assert sharp[key] > soft[key] > softer[key]


def test_the_head_is_never_taken_over(inside, capsys):
    m, path = load("finetune"), "checkpoints/pretrain/best.pt"
    net, state = m.Segmenter(3, 64, 16, 1, 2, 512), checkpoint(path)["model"]
    head = net.head.weight.clone()
    m.take_over(net, path)
    assert net.state_dict().keys() == state.keys()
    for name, tensor in net.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, state[name]), name
    assert torch.equal(net.head.weight, head)
    assert "all tensors but the head's are those of" in capsys.readouterr().out


def test_typed_again(inside, tmp_path, monkeypatch, capsys):
    """In a copy of the folder: the old run stands beside the new one, and is not evaluated."""
    shutil.copytree("checkpoints", tmp_path / "checkpoints")
    before = Path("checkpoints/finetune/result.json").read_text()
    monkeypatch.chdir(tmp_path)
    load("finetune").main(["--size", "32", *FEW])
    assert Path("checkpoints/finetune.prev/result.json").read_text() == before
    assert len(rows("checkpoints/finetune")) == 1
    capsys.readouterr()
    load("evaluate").main([])
    out = capsys.readouterr().out
    assert "checkpoints/finetune" in out and ".prev" not in out


# --- each of the others --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["finetune", *BASELINES])
def test_a_segmenter(name, here, monkeypatch):
    """One epoch: the files, the program equal to the network, and the validation score again."""
    m, kept = load(name), []
    finish = m.finish

    def finish_and_keep(model, args):
        finish(model, args)
        kept.append(model)

    monkeypatch.setattr(m, "finish", finish_and_keep)
    m.main([*SMALL[name], *FEW, "--out", "run"])
    assert names_in("run") == FILES | {"model.pt2"}
    program = torch.export.load("run/model.pt2").module()
    for B in [1, 2, 7]:
        x = torch.rand(B, 3, 32, 32)
        torch.testing.assert_close(program(x), kept[0](x), rtol=1e-4, atol=1e-4)
    record, best = evaluated(here, "run", "--split", "val"), checkpoint("run/best.pt")
    assert record["photos"] == 110 and record["parameters"] == best["args"]["parameters"]
    for key in ["accuracy", "miou", "dice"]:
        assert record["scores"][key] == pytest.approx(best["metrics"][f"val_{key}"], abs=5e-5)


def test_vqvae(flat, here):
    data = ["--data", str(flat), "--epochs", "8", "--batch-size", "4"]
    data += ["--net", "128", "32", "2", "2", "64"]
    load("vqvae").main([*SMALL["vqvae"], *data])
    assert names_in("checkpoints/vqvae") == FILES | {"samples.png"}
    log = rows("checkpoints/vqvae")
    assert log[-1]["val_error"] < log[0]["val_error"] / 2 and 8 < log[-1]["val_used"] <= 64


@pytest.mark.parametrize(
    "flags",
    [
        ["--distort", "rotate", "jitter", "grey", "--mask", "0.0025-0.0625"],
        ["--patch", "5", "--mask", "0.5-0.75", "--size", "32", "48"],
        ["--net", "32", "8", "1", "3", "64"],
        ["--net", "32", "8", "1", "2", "0"],
    ],
)
def test_pretraining_with_flags_and_finetuning_from_it(flags, flat, here):
    data = ["--size", "32", "--data", str(flat), "--epochs", "2", "--batch-size", "4"]
    load("pretrain").main([*data, *flags])
    log, args = rows("checkpoints/pretrain"), checkpoint("checkpoints/pretrain/best.pt")["args"]
    assert log[1]["loss"] < log[0]["loss"] and 0 < log[1]["val_used"] <= 512
    load("finetune").main(data)
    best = checkpoint("checkpoints/finetune/best.pt")
    assert best["args"]["net"] == args["net"]  # the sizes come from the checkpoint


# --- other data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout, flags", [("flat", []), ("parted", ["--ignore", "9"])])
def test_a_folder_from_end_to_end(layout, flags, here, request):
    """Black and white, or three classes and a label that does not count, at a rectangular size."""
    data = ["--data", str(request.getfixturevalue(layout)), "--width", "4", "--batch-size", "4"]
    longer = ["--epochs", "8", "--lr", "1e-2", "--out", "run"]
    load("unet").main([*data, *flags, "--size", "32", "64", *longer])
    scores = evaluated(here, "run", "--split", "val", "--as-published")["scores"]
    assert scores["miou"] == pytest.approx(
        checkpoint("run/best.pt")["metrics"]["val_miou"], abs=5e-5
    )
    want = {"flat": ["background", "foreground"], "parted": ["0", "1", "2"]}[layout]
    assert list(scores["classes"]) == want
    assert 0 < scores["classes"][want[1]]["iou"] < scores["D4_accuracy"] <= 1


@pytest.fixture
def unpacked(monkeypatch):
    """torchvision finds the pets whole."""
    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet.__init__", lambda *_, **__: None)


def test_pets_from_end_to_end(here, pets, unpacked, capsys):
    """Two cats of the five breeds are left out of the fine-tuning."""
    root = ["--data", "pets", "--root", str(pets), "--batch-size", "4", "--epochs", "1"]
    load("pretrain").main([*root, "--size", "32"])
    m, words = load("finetune"), [*root, "--size", "32"]
    train = [photo.name for photo, _ in m.list_photos(m.parse_args(words))["train"]]
    dogs = [name for name in train if name[0].islower()]
    siamese = [name for name in train if name.startswith("Siamese")]
    m.main([*words, "--cats", "Siamese"])
    assert f"Siamese, and all dogs: {len(dogs) + len(siamese)} photos" in capsys.readouterr().out
    record = evaluated(here)
    assert record["photos"] == 10 and record["data"] == "pets"
    assert {"cat_miou", "dog_miou"} <= record["scores"].keys()


CATDOG = ["--data", "catdog", *SMALL["pretrain"], "--epochs", "1", "--root"]


def test_catdog_from_end_to_end(here, catdog, capsys):
    """Of 28 cats one is broken, of 39 dogs one is a copy, and 27 of each are taken."""
    load("pretrain").main([*CATDOG, str(catdog)])
    out = capsys.readouterr().out
    for line in ["Images: 13\n", "cats_and_dogs_filtered: 5\n", "PetImages: 9\n"]:
        assert f"photos   {line}" in out
    assert "28, of which 27" in out and "39, of which 38" in out
    assert "data     catdog: train 48  val 6 " in out
    assert names_in("checkpoints/pretrain") == FILES | {"samples.png"}


def test_catdog_has_as_many_cats_as_dogs(catdog):
    m = load("pretrain")
    args = m.parse_args([*CATDOG, str(catdog)])
    images = torch.cat(m.load_photos(args))
    photos = {image.numpy().tobytes() for image in images}
    cats, dogs = [
        {image.numpy().tobytes() for image in m.read_images(found, args)}
        for found in m.list_catdog(args)
    ]
    assert len(photos) == len(images) == 54
    assert len(photos & cats) == len(photos & dogs) == 27


def test_catdog_of_one_collection(here, catdog, capsys):
    for folder in ["cifar-10-batches-py", "Images", "PetImages"]:
        shutil.rmtree(catdog / folder)
    load("pretrain").main([*CATDOG, str(catdog)])
    assert "data     catdog: train 3  val 1 " in capsys.readouterr().out


def test_download_fetches_what_is_missing(catdog, monkeypatch):
    """It unpacks beside the others, and counts only when it is whole. torchvision would take half a
    file, of a download that was stopped, for a whole one: it is gone before."""
    m, fetched = load("pretrain"), []

    def fetch(url, folder, remove_finished):
        fetched.append(url)
        assert not (folder / "images.tar").exists()
        shutil.copytree(catdog / "PetImages", folder / "Images")

    shutil.rmtree(catdog / "Images")
    (catdog / "unpacking").mkdir()
    (catdog / "unpacking/images.tar").write_text("half of it")
    monkeypatch.setattr(m.datasets.utils, "download_and_extract_archive", fetch)
    cats, dogs = m.list_catdog(m.parse_args([*CATDOG, str(catdog), "--download"]))
    assert fetched == [m.COLLECTIONS["Images"]]
    assert len(cats) == 20 + 3 + 5 + 5 and len(dogs) == 20 + 2 + 4 + 4


class Foreign(torch.nn.Module):
    """A network of another house, with one channel."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 1, 1)

    def forward(self, x):
        return self.conv(x)


def test_a_foreign_program_is_scored(here):
    """Three entries in its meta.json are enough; one channel is a sigmoid, 1 where it is above 0:
    this network looks for what is bright, as the ellipses are."""
    folder, net = write_folder(here / "photos", 24), Foreign().eval()
    net.conv.weight.data.fill_(1.0)
    net.conv.bias.data.fill_(-1.4)
    free = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(net, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=free)
    meta = {"classes": ["foreground"], "size": 32, "ignore": None}
    torch.export.save(program, "foreign.pt2", extra_files={"meta.json": json.dumps(meta)})
    record = evaluated(here, "foreign.pt2", "--data", folder)
    assert list(record["scores"]["classes"]) == ["background", "foreground"]
    assert record["scores"]["miou"] > 0.9


# --- long ----------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_cuda_trains_and_scores_like_the_cpu(inside, tmp_path):
    cpu, gpu = [evaluated(tmp_path, "--device", name) for name in ("cpu", "cuda")]
    assert gpu["scores"]["miou"] == pytest.approx(cpu["scores"]["miou"], abs=2e-3)
    load("finetune").main(
        ["--size", "32", *FEW, "--device", "cuda", "--out", str(tmp_path / "run")]
    )


@pytest.mark.slow
def test_the_two_commands_as_typed(tmp_path):
    """With nothing but their one argument each, the network ends 0.2 above the best baseline."""
    run("pretrain", "--mask", "0.05-0.25", cwd=tmp_path, timeout=1200)
    run("finetune", "--frac", "0.5", cwd=tmp_path, timeout=1200)
    run("evaluate", "--json", "s.json", cwd=tmp_path)
    (record,) = json.loads((tmp_path / "s.json").read_text())
    assert record["scores"]["miou"] > share_of_ground(64) / 3 + 0.2
