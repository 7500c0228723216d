"""The chain as it is typed: pretrain, finetune, evaluate; what it leaves, and what fits together.
Then every other script, one epoch each."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SEGMENTERS, SMALL, checkpoint, load, rows, run, write_folder
from PIL import Image

FILES = {"best.pt", "last.pt", "log.jsonl", "result.json", "samples.png"}
FEW = ["--frac", "0.05", "--epochs", "1"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder after the chain, and what each script printed."""
    cwd, size = tmp_path_factory.mktemp("chain"), ["--size", "32"]
    pretraining = ["--mask", "0.05-0.25", "--frac", "0.3", "--epochs", "3"]
    finetuning = ["--frac", "0.5", "--epochs", "8", "--batch-size", "16", "--lr", "2e-3"]
    said = {
        "pretrain": run("pretrain", *pretraining, *size, cwd=cwd),
        "finetune": run("finetune", *finetuning, *size, cwd=cwd),
        "evaluate": run("evaluate", "--json", "scores.json", cwd=cwd),
    }
    return cwd, said


@pytest.fixture
def inside(chain, monkeypatch):
    """The folder after the chain, as the current one."""
    monkeypatch.chdir(chain[0])
    return chain[0]


def meta_of(path):
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("extra/meta.json")]
        return json.loads(archive.read(name))


def evaluated(folder, *flags):
    """evaluate.py's record of one run."""
    load("evaluate").main([*map(str, flags), "--json", str(folder / "scores.json")])
    (record,) = json.loads((folder / "scores.json").read_text())
    return record


def names_in(folder):
    return {file.name for file in Path(folder).iterdir()}


# --- the chain -----------------------------------------------------------------------------------


def test_files(inside):
    assert names_in("checkpoints/pretrain") == FILES
    assert names_in("checkpoints/finetune") - {"overlay.png", "curves.png"} == FILES | {"model.pt2"}
    assert names_in(".") <= {"checkpoints", "data", "scores.json"}


def test_pretraining_learns(inside):
    log = rows("checkpoints/pretrain")
    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert log[-1]["loss"] < log[0]["loss"] / 2 and log[-1]["val_loss"] < log[0]["val_loss"]
    assert log[-1]["val_perplexity"] > 50 and log[-1]["val_used"] > 128


def test_the_network_beats_the_baselines(inside, chain):
    (record,) = json.loads(Path("scores.json").read_text())
    assert record["data"] == "toy" and record["photos"] == 256
    masks = load("evaluate").draw_toy(256, [32, 32], seed=1)[1]
    background = (masks == 1).float().mean().item()
    assert record["scores"]["accuracy"] > background
    assert record["scores"]["miou"] > background / 3 + 0.1
    for word in ["toy", "all pet", "all background", "all border"]:
        assert word in chain[1]["evaluate"]
    log = rows("checkpoints/finetune")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["val_miou"] > log[0]["val_miou"]


@pytest.mark.parametrize("name, key", [("pretrain", "val_loss"), ("finetune", "val_miou")])
def test_the_best_epoch_is_kept(name, key, inside):
    folder = Path("checkpoints", name)
    values = [row[key] for row in rows(folder)]
    best = max(values)
    if key == "val_loss":
        best = min(values)
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"] == rows(folder)[values.index(best)]
    assert result["args"]["size"] == [32, 32] and result["args"]["parameters"] > 600_000
    assert result["script"] == f"{name}.py" and result["torch"] == torch.__version__
    assert checkpoint(folder / "best.pt")["metrics"] == result["metrics"]


def test_pictures(inside):
    for file in Path("checkpoints").glob("*/*.png"):
        with Image.open(file) as picture:
            picture.load()
            assert len(picture.convert("RGB").getcolors(10**6)) > 10, file


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_checkpoints_hold_plain_types(name, inside):
    """checkpoint() reads with weights_only=True."""
    best, last = [checkpoint(f"checkpoints/{name}/{file}") for file in ("best.pt", "last.pt")]
    assert best.keys() == {"script", "args", "model", "metrics"}
    assert last.keys() == {"script", "args", "model", "optimizer", "history"}
    assert best["script"] == f"{name}.py" and last["history"] == rows(f"checkpoints/{name}")


def test_names_are_equal_across_the_stages(inside):
    one, two = [
        checkpoint(f"checkpoints/{name}/best.pt")["model"] for name in ("pretrain", "finetune")
    ]
    assert one.keys() == two.keys()


def test_meta(inside):
    meta = meta_of("checkpoints/finetune/model.pt2")
    assert meta["classes"] == ["pet", "background", "border"]
    assert meta["size"] == [32, 32] and meta["ignore"] is None
    assert meta["script"] == "finetune.py" and meta["args"]["data"] == "toy"
    assert meta == json.loads(Path("checkpoints/finetune/result.json").read_text())


def test_scores_do_not_hang_on_the_batch_size(inside, tmp_path):
    few = evaluated(tmp_path, "--as-published", "--batch-size", 7)["scores"]
    many = evaluated(tmp_path, "--as-published")["scores"]
    few, many = few["classes"], many["classes"]
    for name, values in few.items():
        assert values == pytest.approx(many[name], abs=5e-5)


def test_blur_costs_accuracy(inside, tmp_path):
    sharp, blurred = evaluated(tmp_path), evaluated(tmp_path, "--blur", 100)
    assert blurred["scores"]["miou"] < sharp["scores"]["miou"] - 0.05


def test_typed_again(inside, capsys):
    before = Path("checkpoints/finetune/result.json").read_text()
    load("finetune").main(["--size", "32", *FEW])
    assert Path("checkpoints/finetune.prev/result.json").read_text() == before
    assert len(rows("checkpoints/finetune")) == 1
    capsys.readouterr()
    load("evaluate").main([])
    out = capsys.readouterr().out
    assert "checkpoints/finetune" in out and ".prev" not in out
    for file in Path("checkpoints/finetune").iterdir():  # as it was, for the other tests
        file.unlink()
    Path("checkpoints/finetune").rmdir()
    Path("checkpoints/finetune.prev").rename("checkpoints/finetune")


# --- what is taken over --------------------------------------------------------------------------


def test_the_head_is_never_taken_over(inside, capsys):
    m, path = load("finetune"), "checkpoints/pretrain/best.pt"
    net, state = m.Segmenter(3, m.NET), checkpoint(path)["model"]
    head = net.head.weight.clone()
    m.take_over(net, path, "pretrain.py")
    for name, tensor in net.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, state[name]), name
    assert torch.equal(net.head.weight, head)
    assert f"{len(state) - 2} of {len(state)} tensors" in capsys.readouterr().out


def test_widths_come_from_the_checkpoint(here):
    load("pretrain").main(["--net", "32", "8", "1", "3", "--size", "32", *FEW])
    load("finetune").main(["--size", "32", *FEW])
    best = checkpoint("checkpoints/finetune/best.pt")
    assert best["args"]["net"] == [32, 8, 1, 3]
    assert best["model"]["encoder.0.weight"].shape == (8, 3, 4, 4)


# --- each of the others --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter(name, here, tmp_path, monkeypatch, capsys):
    """One epoch: the files, the program equal to the network, the validation score again, and
    --init from it."""
    m, kept = load(name), []
    finish = m.finish

    def finish_and_keep(model, *rest):
        finish(model, *rest)
        kept.append(model)

    monkeypatch.setattr(m, "finish", finish_and_keep)
    m.main([*SMALL[name], *FEW, "--out", "run"])
    assert names_in("run") == FILES | {"model.pt2"}
    program = torch.export.load("run/model.pt2").module()
    for B in [1, 2, 7]:
        x = torch.rand(B, 3, 32, 32)
        torch.testing.assert_close(program(x), kept[0](x), rtol=1e-4, atol=1e-4)
    record, best = evaluated(tmp_path, "run", "--split", "val"), checkpoint("run/best.pt")
    assert record["photos"] == 110
    for key in ["accuracy", "miou", "dice"]:
        assert record["scores"][key] == pytest.approx(best["metrics"][f"val_{key}"], abs=5e-5)
    assert record["parameters"] == best["args"]["parameters"]
    capsys.readouterr()
    m.main([*SMALL[name], *FEW, "--init", "run/best.pt", "--out", "next"])
    assert f"of {len(best['model'])} tensors are those of run/best.pt" in capsys.readouterr().out


def test_vqvae(here):
    load("vqvae").main([*SMALL["vqvae"], *FEW])
    assert names_in("checkpoints/vqvae") == FILES | {"codes.png"}
    (row,) = rows("checkpoints/vqvae")
    assert row["val_loss"] > 0 and 0 < row["val_used"] <= 512


def test_segnet_after_its_own_pretraining(here, capsys):
    m = load("segnet")
    m.main([*SMALL["segnet"], "--pretrain", "--frac", "0.2", "--epochs", "3", "--out", "pre"])
    log = rows("pre")
    assert log[-1]["val_loss"] < log[0]["val_loss"] and not Path("pre/model.pt2").exists()
    capsys.readouterr()
    m.main([*SMALL["segnet"], *FEW, "--init", "pre/best.pt"])
    assert "tensors are those of pre/best.pt" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--distort", "rotate", "jitter", "grey", "--mask", "0.0025-0.0625"],
        ["--mask-style", "patches", "--patch", "5", "--mask", "0.5-0.75"],
    ],
)
def test_pretraining_flags(flags, here):
    load("pretrain").main([*SMALL["pretrain"], *FEW, *flags])
    (row,) = rows("checkpoints/pretrain")
    assert row["loss"] > 0 and 0 < row["val_used"] <= 512


# --- other data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout, flags", [("flat", []), ("parted", ["--ignore", "9"])])
def test_a_folder_from_end_to_end(layout, flags, here, request, tmp_path):
    """Black and white, or three classes and a label that does not count, at a rectangular size."""
    data = ["--data", str(request.getfixturevalue(layout))]
    words = ["--size", "32", "64", "--epochs", "2", "--batch-size", "4", "--loss", "bce+dice+iou"]
    load("unet").main(["--width", "4", *data, *words, *flags, "--out", "run"])
    record, best = evaluated(tmp_path, "run", "--split", "val"), checkpoint("run/best.pt")
    assert record["scores"]["miou"] == pytest.approx(best["metrics"]["val_miou"], abs=5e-5)
    classes = list(evaluated(tmp_path, "run", "--as-published")["scores"]["classes"])
    if layout == "flat":
        assert classes == ["background", "foreground"]
    else:
        assert classes == ["0", "1", "2"]


def test_pets_from_end_to_end(here, pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet.__init__", lambda *_, **__: None)
    root = ["--data", "pets", "--root", str(pets), "--batch-size", "4", "--epochs", "1"]
    load("pretrain").main([*root, "--size", "32"])
    load("finetune").main([*root, "--size", "32", "--cats", "Siamese"])
    record = evaluated(tmp_path)
    assert record["photos"] == 10 and record["data"] == "pets"
    assert {"cat_miou", "dog_miou", "pet_iou_without_border"} <= record["scores"].keys()


class Foreign(torch.nn.Module):
    """A network of another house, with one channel."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 1, 1)

    def forward(self, x):
        return self.conv(x)


def test_a_foreign_program_is_scored(here, tmp_path):
    """Three entries in its meta.json are enough; one channel is a sigmoid."""
    folder, net = write_folder(here / "photos", 24), Foreign().eval()
    free = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(net, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=free)
    meta = {"classes": ["foreground"], "size": 32, "ignore": None}
    torch.export.save(program, "foreign.pt2", extra_files={"meta.json": json.dumps(meta)})
    record = evaluated(tmp_path, "foreign.pt2", "--data", folder)
    assert list(record["scores"]["classes"]) == ["background", "foreground"]


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
    masks = load("evaluate").draw_toy(256, [64, 64], seed=1)[1]
    assert record["scores"]["miou"] > (masks == 1).float().mean().item() / 3 + 0.2
