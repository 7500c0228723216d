"""The chain as it is typed: pretrain, finetune, evaluate; what it leaves, and what fits together."""
import json, shutil, zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import SCRIPTS, checkpoint, load, rows, run

if not {"pretrain", "finetune", "evaluate"} <= set(SCRIPTS):
    pytest.skip("the chain is not whole", allow_module_level=True)
PRETRAIN = "--mask 0.05-0.25 --size 32 --frac 0.3 --epochs 3".split()
FINETUNE = "--frac 0.5 --size 32 --epochs 8 --batch-size 16 --lr 2e-3".split()

@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder after the chain, and what each script printed."""
    cwd = tmp_path_factory.mktemp("chain")
    return cwd, [run("pretrain", *PRETRAIN, cwd=cwd), run("finetune", *FINETUNE, cwd=cwd),
                 run("evaluate", "--json", "scores.json", cwd=cwd)]

@pytest.fixture
def inside(chain, monkeypatch):
    monkeypatch.chdir(chain[0])
    return chain[0]

def meta_of(path):
    with zipfile.ZipFile(path) as archive:
        name, = [n for n in archive.namelist() if n.endswith("extra/meta.json")]
        return json.loads(archive.read(name))

def evaluated(path, *flags):
    load("evaluate").main([*map(str, flags), "--json", str(path)])
    return json.loads(Path(path).read_text())

def test_files(chain):
    common = {"best.pt", "last.pt", "log.jsonl", "result.json", "samples.png"}
    found = {stage: {file.name for file in (chain[0] / "checkpoints" / stage).iterdir()}
             for stage in ("pretrain", "finetune")}
    assert found == {"pretrain": common, "finetune": common | {"model.pt2", "overlay.png", "curves.png"}}
    assert sorted(file.name for file in chain[0].iterdir()) in (["checkpoints", "scores.json"],
                                                                 ["checkpoints", "data", "scores.json"])

def test_pretraining_learns(chain):
    log = rows(chain[0] / "checkpoints/pretrain")
    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert log[-1]["loss"] < log[0]["loss"] / 2 and log[-1]["val_loss"] < log[0]["val_loss"]
    assert log[-1]["val_perplexity"] > 100 and log[-1]["val_used"] > 256
    for row in log:
        assert {"lr", "images_per_second", "seconds", "memory_gb", "val_masked"} <= set(row)

def test_the_network_beats_the_baseline(chain):
    record, = json.loads((chain[0] / "scores.json").read_text())
    assert record["run"] == "checkpoints/finetune" and record["data"] == "toy" and record["photos"] == 256
    scores, table = record["scores"], chain[1][2]
    best, = [float(line.split()[3]) for line in table.splitlines() if line.startswith("all background")][:1]
    assert 0.15 < best < 0.35
    assert scores["miou"] > best + 0.2 and scores["accuracy"] > 0.7
    for label in ("all pet", "all background", "all border", "toy"):
        assert label in table
    log = rows(chain[0] / "checkpoints/finetune")
    assert log[-1]["loss"] < 0.75 * log[0]["loss"] and log[-1]["miou"] > log[0]["miou"] + 0.1

def test_result(chain):
    for stage, key in (("pretrain", "val_loss"), ("finetune", "val_miou")):
        folder = chain[0] / "checkpoints" / stage
        result, log = json.loads((folder / "result.json").read_text()), rows(folder)
        best = (min if key == "val_loss" else max)(log, key=lambda row: row[key])
        assert result["epoch"] == best["epoch"] and result[key] == best[key]
        assert result["args"]["size"] == [32, 32] and result["parameters"] > 600_000
        assert result["total_seconds"] == pytest.approx(sum(row["seconds"] for row in log))
        assert checkpoint(folder / "best.pt")["epoch"] == best["epoch"]
    assert len(result["train_masks"]) == 16

def test_pictures(chain):
    for name, wide in (("pretrain/samples", 3), ("finetune/samples", 3), ("finetune/overlay", 4),
                       ("finetune/curves", None)):
        with Image.open(chain[0] / f"checkpoints/{name}.png") as picture:
            picture.load()
            assert picture.mode == "RGB" and len(picture.getcolors(10**6)) > 5
            if wide:
                assert picture.width % (32 * wide) == 0 and picture.height >= 6 * 32

def test_output(chain):
    pretrain, finetune, _ = chain[1]
    for out, stage in ((pretrain, "pretrain"), (finetune, "finetune")):
        assert out.splitlines()[0].startswith(f"{stage}.py  torch {torch.__version__}  cpu  ")
        assert "\r" not in out and "toy" in out and "baseline" in out and "\nbest " in out
        assert "  1/" in out and " *\n" in out
    assert "/512" in pretrain and "masked" in pretrain

def test_checkpoints(chain):
    for stage in ("pretrain", "finetune"):
        best, last = (checkpoint(chain[0] / f"checkpoints/{stage}/{name}.pt") for name in ("best", "last"))
        assert set(best) == {"format", "script", "args", "epoch", "model", "metrics"}
        assert set(last) == {"format", "script", "args", "epoch", "model", "optimizer", "best", "history"}
        assert best["script"] == last["script"] == f"{stage}.py"
        assert last["epoch"] == len(last["history"]) == len(rows(chain[0] / f"checkpoints/{stage}"))
        assert not any("_orig_mod" in name or name.startswith("module.") for name in best["model"])
    net = load("finetune").VQVAE(3, 128, 32, 2, 2)
    assert set(best["model"]) == set(net.state_dict())

def test_program_is_the_network(inside):
    finetune, g = load("finetune"), torch.Generator().manual_seed(0)
    net = finetune.VQVAE(3, 128, 32, 2, 2)
    net.load_state_dict(checkpoint("checkpoints/finetune/best.pt")["model"])
    net.eval()
    program = torch.export.load("checkpoints/finetune/model.pt2").module()
    for B in (1, 2, 7):
        x = torch.rand(B, 3, 32, 32, generator=g)
        torch.testing.assert_close(program(x), net(x)[0], rtol=1e-4, atol=1e-4)

def test_meta(inside):
    meta = meta_of("checkpoints/finetune/model.pt2")
    assert meta["classes"] == ["pet", "background", "border"] and meta["ignore"] is None
    assert meta["size"] in (32, [32, 32]) and meta["script"] == "finetune.py" and meta["format"] == 1
    assert meta["args"]["data"] == "toy" and meta["torch"] == torch.__version__

def test_validation_gives_the_stored_scores(inside, tmp_path):
    record, = evaluated(tmp_path / "val.json", "checkpoints/finetune", "--split", "val")
    stored = meta_of("checkpoints/finetune/model.pt2")["metrics"]
    assert record["photos"] == 111
    for key in ("accuracy", "miou", "dice"):
        assert record["scores"][key] == pytest.approx(stored[key], abs=5e-5)
    each = [record["scores"]["classes"][name]["iou"] for name in ("pet", "background", "border")]
    assert each == pytest.approx(stored["iou"], abs=5e-5)
    result = json.loads(Path("checkpoints/finetune/result.json").read_text())
    assert result["metrics"]["miou"] == stored["miou"]

def test_batch_size_changes_no_score(inside, tmp_path):
    def flatten(value):
        return sum(map(flatten, value.values() if isinstance(value, dict) else value), []) \
            if isinstance(value, (dict, list)) else [value]
    scores = [flatten(evaluated(tmp_path / "s.json", "--as-published", "--batch-size", size)[0]["scores"])
              for size in (1, 7, 64)]
    assert len(scores[0]) > 30
    assert scores[1] == pytest.approx(scores[0], abs=5e-5) and scores[2] == pytest.approx(scores[0], abs=5e-5)

def test_blur_costs_accuracy(inside, tmp_path):
    sharp, = json.loads((inside / "scores.json").read_text())
    blurred, = evaluated(tmp_path / "b.json", "--blur", 100)
    assert Path("checkpoints/finetune/overlay-blur100.png").exists()
    assert blurred["blur"] == 100 and blurred["scores"]["miou"] < sharp["scores"]["miou"] - 0.05

def test_typed_again(chain):
    cwd = chain[0]
    before = (cwd / "checkpoints/finetune/result.json").read_text()
    out = run("pretrain", *PRETRAIN[:-1], "1", cwd=cwd)
    assert "checkpoints/pretrain.prev" in out
    out = run("finetune", *FINETUNE, "--epochs", "1", cwd=cwd)
    assert (cwd / "checkpoints/finetune.prev/result.json").read_text() == before
    assert len(rows(cwd / "checkpoints/finetune")) == 1
    out = run("evaluate", cwd=cwd)
    assert "checkpoints/finetune " in out and ".prev" not in out
    shutil.rmtree(cwd / "checkpoints/finetune")                 # as it was, for the other tests
    (cwd / "checkpoints/finetune.prev").rename(cwd / "checkpoints/finetune")

# --- what is taken over ---------------------------------------------------------------------------

@pytest.mark.parametrize("take", ("encoder", "all", "none"))
def test_take(inside, take, capsys, tmp_path):
    """The output layer never; the number that is printed is the number of equal tensors."""
    finetune, state = load("finetune"), checkpoint("checkpoints/pretrain/best.pt")["model"]
    net = finetune.VQVAE(3, 128, 32, 2, 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    count = finetune.take_over(net, state, take, 1e4)
    parts = {"encoder": {"encoder", "quantiser"}, "all": {"encoder", "quantiser", "decoder"}, "none": set()}[take]
    for name, tensor in net.state_dict().items():
        if name != "quantiser.counts":
            assert torch.equal(tensor, (state if name.split(".")[0] in parts else before)[name]), name
    counts = net.quantiser.counts                       # in the old shares, of as many vectors as a step has now
    assert counts.sum().item() == pytest.approx(1e4 * (take != "none"))
    assert take == "none" or torch.allclose(counts / 1e4, state["quantiser.counts"] / state["quantiser.counts"].sum())
    assert count == sum(name.split(".")[0] in parts for name in state)
    finetune.main(["--take", take, "--size", "16", "--frac", "0.05", "--epochs", "1", "--out", str(tmp_path / "run")])
    assert f" {count} of {len(state)} tensors" in capsys.readouterr().out

def test_codes_in_use_outlive_a_larger_batch(inside):
    """A step of fine-tuning may have many times the vectors of one of pre-training; codes that serve are not replaced."""
    finetune, state = load("finetune"), checkpoint("checkpoints/pretrain/best.pt")["model"]
    net = finetune.VQVAE(3, 128, 32, 2, 2)
    many = int(100 * state["quantiser.counts"].sum())
    finetune.take_over(net, state, "encoder", many)
    used = state["quantiser.counts"] > 0.5 * state["quantiser.counts"].mean()
    net.quantiser.revive(torch.zeros(many, 64), torch.ones(many))
    assert used.sum() > 3 and torch.equal(net.quantiser.codes[used], state["quantiser.codes"][used])

def test_take_over_refuses_other_widths(inside, capsys):
    finetune, state = load("finetune"), checkpoint("checkpoints/pretrain/best.pt")["model"]
    short = {name: tensor for name, tensor in state.items() if name != "encoder.0.weight"}
    with pytest.raises(SystemExit) as stop:
        finetune.take_over(finetune.VQVAE(3, 128, 32, 2, 2), short, "all", 1)
    assert stop.value.code == 2 and "encoder.0.weight" in capsys.readouterr().err

def test_widths_come_from_the_checkpoint(here, capsys):
    load("pretrain").main("--width 32 --residual-width 8 --residual-blocks 1 --downs 3 --size 16 --frac 0.02 "
                          "--epochs 1".split())
    capsys.readouterr()
    load("finetune").main("--frac 0.1 --size 16 --epochs 1".split())
    out = capsys.readouterr().out
    state = checkpoint("checkpoints/finetune/best.pt")["model"]
    assert state["encoder.0.weight"].shape == (8, 3, 4, 4) and "checkpoints/pretrain/best.pt" in out
    load("evaluate").main([])
    assert "checkpoints/finetune" in capsys.readouterr().out

def test_toy_weights_on_photos_are_warned_of(inside, flat, capsys, tmp_path):
    load("finetune").main(["--data", str(flat), "--size", "32", "--epochs", "1", "--out", str(tmp_path / "run")])
    assert "warning" in capsys.readouterr().out

# --- other ways to start --------------------------------------------------------------------------

def test_cost(chain):
    """Parameters and multiply-adds of one photo, added up layer by layer."""
    record, = json.loads((chain[0] / "scores.json").read_text())
    net, total = load("finetune").VQVAE(3, 128, 32, 2, 2), [8 * 8 * 512 * 64]        # the look-up of codes
    def count(layer, inputs, output):
        a, b = inputs[0].shape, output.shape
        weights = layer.kernel_size[0] ** 2 * layer.in_channels * layer.out_channels
        places = a if isinstance(layer, torch.nn.ConvTranspose2d) else b
        total.append(weights * places[2] * places[3])
    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            layer.register_forward_hook(count)
    net.eval()(torch.zeros(1, 3, 32, 32))
    assert record["multiply_adds"] == sum(total)
    assert record["parameters"] == sum(p.numel() for p in net.parameters())

def test_from_scratch_with_fewer_cats(here, capsys):
    load("finetune").main("--init none --cats Maine_Coon,Birman,Bombay --size 16 --epochs 1".split())
    out = capsys.readouterr().out
    assert "train 756 " in out and "val 111" in out             # of 999: 25 dogs of 27, 3 cats of 27
    assert json.loads(Path("checkpoints/finetune/result.json").read_text())["args"]["init"] == "none"

@pytest.mark.parametrize("layout", ("flat", "parted"))
def test_a_folder_from_end_to_end(here, layout, request, capsys, tmp_path):
    """Binary with one logit, or three classes and a label that does not count, at a rectangular size."""
    folder = request.getfixturevalue(layout)
    more = ["--ignore", "9"] if layout == "parted" else []
    load("finetune").main(["--data", str(folder), "--init", "none", "--size", "32", "48", "--epochs", "3",
                           "--batch-size", "4", "--loss", "bce+dice+iou", *more])
    meta = meta_of("checkpoints/finetune/model.pt2")
    assert meta["size"] == [32, 48] and meta["ignore"] == (9 if more else None)
    assert meta["classes"] == (["0", "1", "2"] if more else ["foreground"])
    for part in ("test", "val"):
        record, = evaluated(tmp_path / "s.json", "--split", part, "--as-published")
        assert 0 <= record["scores"]["miou"] <= 1 and record["data"] == str(folder)
    assert record["scores"]["miou"] == pytest.approx(meta["metrics"]["miou"], abs=5e-5)

def test_pets_from_end_to_end(here, pets, capsys, tmp_path):
    load("pretrain").main(["--data", "pets", "--root", str(pets), "--size", "16", "--epochs", "1",
                           "--batch-size", "8", "--width", "32"])
    load("finetune").main(["--root", str(pets), "--size", "16", "--epochs", "1", "--batch-size", "8"])
    assert "data     pets: train 35  val 5" in capsys.readouterr().out       # auto finds them
    record, = evaluated(tmp_path / "s.json")
    assert record["photos"] == 10 and record["data"] == "pets"
    assert {"cat_miou", "dog_miou", "pet_iou_without_border", "pet_iou_border_as_pet"} <= set(record["scores"])

@pytest.mark.parametrize("flags", ("--distort rotate jitter grey --mask-style square --mask 0.0025-0.0625", "--patch 5"))
def test_pretraining_flags(here, flags):
    load("pretrain").main(f"{flags} --size 16 --frac 0.02 --epochs 1 --width 32 --batch-size 16".split())
    row, = rows("checkpoints/pretrain")
    assert row["loss"] > 0 and 0 < row["val_used"] <= 512

def test_compiled_checkpoints_look_the_same(here, monkeypatch):
    """--compile compiles in place, so no name in a checkpoint changes."""
    called = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: called.append(self))
    load("finetune").main("--init none --frac 0.05 --size 16 --epochs 1 --compile".split())
    assert len(called) == 1
    assert "encoder.0.weight" in checkpoint("checkpoints/finetune/best.pt")["model"]

# --- a program of another house -------------------------------------------------------------------

def save_program(path, module, meta, size=32):
    program = torch.export.export(module.eval(), (torch.zeros(2, 3, size, size),),
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, path, extra_files={"meta.json": json.dumps(meta)})

def test_a_foreign_program_is_scored(here, tmp_path, capsys):
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large
    class Out(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)

        def forward(self, x):
            return self.net(x)["out"]
    net = Out()
    save_program("foreign.pt2", net, {"classes": ["pet", "background", "border"], "size": 32, "ignore": None})
    record, = evaluated(tmp_path / "f.json", "foreign.pt2", "--data", "toy")
    images, masks, *_ = load("evaluate").load_split("toy", "data", "test", [32, 32], None)
    with torch.no_grad():
        hard = net.eval()(images.float() / 255).argmax(1)
    assert record["scores"]["accuracy"] == pytest.approx((hard == masks).float().mean().item(), abs=5e-5)
    assert "foreign.pt2" in capsys.readouterr().out

@pytest.mark.cuda
def test_cuda_scores_like_the_cpu(inside, tmp_path):
    cpu, = evaluated(tmp_path / "c.json", "--device", "cpu")
    cuda, = evaluated(tmp_path / "g.json", "--device", "cuda")
    assert cuda["scores"]["miou"] == pytest.approx(cpu["scores"]["miou"], abs=2e-3)

@pytest.mark.cuda
def test_cuda_trains(here):
    load("pretrain").main("--size 32 --frac 0.1 --epochs 2 --device cuda".split())
    load("finetune").main("--size 32 --frac 0.3 --epochs 3 --device cuda".split())
    log = rows("checkpoints/finetune")
    assert log[-1]["loss"] < log[0]["loss"] and log[0]["memory_gb"] > 0
    load("evaluate").main(["--device", "cpu"])

@pytest.mark.slow
def test_the_two_commands_as_typed(tmp_path):
    """With nothing but their one argument each, the network ends 0.2 above the best baseline."""
    run("pretrain", "--mask", "0.05-0.25", cwd=tmp_path, timeout=1200)
    run("finetune", "--frac", "0.5", cwd=tmp_path, timeout=1200)
    out = run("evaluate", "--json", "s.json", cwd=tmp_path)
    record, = json.loads((tmp_path / "s.json").read_text())
    best = float(next(line for line in out.splitlines() if line.startswith("all background")).split()[3])
    assert record["scores"]["miou"] > best + 0.2
