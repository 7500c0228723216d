"""LinkNet, SegNet and U-Net: the papers' sizes, the variants, and the story from training to scores."""
import json, math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import models

from conftest import BASELINES, SMALL, checkpoint, interrupt, load, rows, write_folder

if BASELINES != ["linknet", "segnet", "unet"]:
    pytest.skip("the baselines are not all there", allow_module_level=True)
linknet, segnet, unet = map(load, BASELINES)
each = pytest.mark.parametrize("name", BASELINES)

# --- sizes, counted by hand from the papers ---------------------------------------------------------

def conv(a, b, side, bias=False):
    return a * b * side * side + bias * b

def norm(n):
    return 2 * n

def resnet(depths):
    """A ResNet of basic blocks without its classifier."""
    total, a = conv(3, 64, 7) + norm(64), 64
    for b, depth in zip((64, 128, 256, 512), depths):
        for i in range(depth):
            total += conv(a if i == 0 else b, b, 3) + conv(b, b, 3) + 2 * norm(b)
            if i == 0 and a != b:
                total += conv(a, b, 1) + norm(b)
        a = b
    return total

def decoder(m, n):
    q = m // 4
    return conv(m, q, 1) + norm(q) + conv(q, q, 3) + norm(q) + conv(q, n, 1) + norm(n)

@pytest.mark.parametrize("encoder, depths, classes, million", (
    ("resnet18", (2, 2, 2, 2), 12, 11.5), ("resnet34", (3, 4, 6, 3), 3, 21.6)))
def test_linknet_has_the_parameters_of_the_paper(encoder, depths, classes, million):
    head = conv(64, 32, 3) + norm(32) + conv(32, 32, 3) + norm(32) + conv(32, classes, 2, bias=True)
    want = resnet(depths) + decoder(512, 256) + decoder(256, 128) + decoder(128, 64) + decoder(64, 64) + head
    net = linknet.LinkNet(classes, encoder)
    assert sum(p.numel() for p in net.parameters()) == want
    assert round(want / 1e6, 1) == million
    assert sum(p.numel() for p in models.get_model(encoder).parameters()) == resnet(depths) + 512 * 1000 + 1000

def test_segnet_has_the_parameters_of_the_paper():
    """Of 29,449,932 with 12 classes, 7,936 are biases, for which batch normalisation has no use."""
    a, want, biases = 3, 0, 0
    for b, depth in zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3)):
        inner = (depth - 1) * conv(b, b, 3)
        want += 2 * inner + conv(a, b, 3) + 2 * (depth - 1) * norm(b) + norm(b)
        biases += (2 * depth - 1) * b
        if a > 3:
            want, biases = want + conv(b, a, 3) + norm(a), biases + a
        a = b
    want += conv(64, 12, 3, bias=True)
    assert sum(p.numel() for p in segnet.SegNet(12, 64).parameters()) == want
    assert want + biases == 29_449_932 and biases == 7_936

def test_unet_has_the_parameters_of_the_paper():
    widths, want = (64, 128, 256, 512, 1024), 0
    for a, b in zip((3, *widths), widths):
        want += conv(a, b, 3) + conv(b, b, 3) + 2 * norm(b)
    for b, a in zip(widths, widths[1:]):
        want += conv(a, b, 2, bias=True) + conv(2 * b, b, 3) + conv(b, b, 3) + 2 * norm(b)
    want += conv(64, 3, 1, bias=True)
    assert sum(p.numel() for p in unet.UNet(3, 64).parameters()) == want
    assert round(want / 1e6, 2) == 31.04

# --- the networks -----------------------------------------------------------------------------------

VARIANTS = {
    "linknet": lambda: linknet.LinkNet(3, "resnet18"),
    "linknet subpixel": lambda: linknet.LinkNet(1, "resnet18", up="subpixel"),
    "segnet": lambda: segnet.SegNet(3, 4, 2),
    "unet": lambda: unet.UNet(3, 4),
    "unet bilinear": lambda: unet.UNet(1, 4, up="bilinear"),
    "unet softmax": lambda: unet.UNet(1, 4, head="softmax"),
    "unet resnet34": lambda: unet.UNet(3, encoder="resnet34", up="bilinear"),
    "unet efficientnet_b0": lambda: unet.UNet(3, encoder="efficientnet_b0"),
}

@pytest.mark.parametrize("name", VARIANTS)
def test_exported_program_is_the_network(name):
    """For every batch size, at a rectangular size, with normalisation layers that have seen data."""
    torch.manual_seed(0)
    net = VARIANTS[name]().train()
    net(torch.rand(4, 3, 32, 64))
    net.eval()
    program = torch.export.export(net, (torch.zeros(2, 3, 32, 64),), dynamic_shapes=(
        {0: torch.export.Dim("batch", min=1)},)).module()
    for B in (1, 2, 7):
        x = torch.rand(B, 3, 32, 64)
        want = net(x)
        assert want.shape == (B, 1 if name.split()[-1] in ("subpixel", "bilinear", "softmax") else 3, 32, 64)
        torch.testing.assert_close(program(x), want, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_learns(name):
    torch.manual_seed(0)
    net = VARIANTS[name]()
    net(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []

def test_linknet_adds_what_the_encoder_had():
    """All four links, as in the authors' code: the last adds what the max-pooling gave the first block."""
    torch.manual_seed(0)
    net, x = linknet.LinkNet(3, "resnet18").eval(), torch.rand(1, 3, 64, 64)
    first = net.first(x)
    e1 = net.encoder[0](first)
    e2 = net.encoder[1](e1)
    e3 = net.encoder[2](e2)
    d = net.decoder[0](net.encoder[3](e3)) + e3
    d = net.decoder[1](d) + e2
    d = net.decoder[2](d) + e1
    assert first.shape == e1.shape == d.shape == (1, 64, 16, 16) and e3.shape == (1, 256, 4, 4)
    torch.testing.assert_close(net(x), net.head(net.decoder[3](d) + first))

def test_unpooling_writes_each_maximum_back_to_its_place():
    x = torch.rand(2, 3, 8, 8)
    pooled, places = F.max_pool2d(x, 2, return_indices=True)
    up = pooled.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(F.max_unpool2d(pooled, places, 2), torch.where(up == x, x, 0))

def test_bilinear_upsampling_and_a_1x1_convolution_may_be_swapped():
    block = unet.Up(6, 3, 4, "bilinear")
    x = torch.rand(2, 6, 5, 7)
    torch.testing.assert_close(block.enlarge(x), block.enlarge[0](block.enlarge[1](x)))

def test_two_channels_and_a_softmax_are_one_and_a_sigmoid():
    torch.manual_seed(0)
    net, x = unet.UNet(1, 4, head="softmax").eval(), torch.rand(2, 3, 32, 32)
    seen = []
    net.head.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    p = net(x).sigmoid()
    torch.testing.assert_close(p[:, 0], seen[0].softmax(1)[:, 1])

@pytest.mark.parametrize("name", ("linknet", "unet"))
def test_a_summary_needs_no_weights(name, here, monkeypatch):
    m, asked = load(name), []
    whole = m.backbone
    monkeypatch.setattr(m, "backbone", lambda net, weights: asked.append(weights) or whole(net, "none"))
    m.main(["--data", "toy", "--size", "32", "--encoder", "resnet34", "--weights", "imagenet", "--summary"])
    assert asked == ["none"]

@pytest.mark.parametrize("name", BASELINES)
def test_the_cost_is_that_of_the_exported_program(name, here, capsys):
    """summary and result.json agree with what evaluate.py counts in the program."""
    m = load(name)
    m.main([*SMALL[name], "--summary"])
    lines = capsys.readouterr().out.splitlines()
    assert not Path("checkpoints").exists() and len(lines) > 8
    m.main([*SMALL[name], "--frac", "0.05", "--epochs", "1"])
    load("evaluate").main(["--json", "s.json"])
    record, = json.loads(Path("s.json").read_text())
    result = json.loads(Path(f"checkpoints/{name}/result.json").read_text())
    for key in ("parameters", "multiply_adds"):
        assert record[key] == result[key] > 1000
        assert f"{result[key]:,} {key.replace('_', '-')}" in lines[-1]
    whole = lines[-2].split()
    assert whole[-2].replace(",", "") == str(result["multiply_adds"])
    assert sum(int(line.split()[-2].replace(",", "")) for line in lines[2:-2]
               if line.endswith("multiply-adds") and "." in line.split()[0] or line.startswith(("head ", "first "))) \
        == pytest.approx(result["multiply_adds"], rel=0.25)

# --- weights from elsewhere -------------------------------------------------------------------------

def test_weights_of_a_file(here):
    torch.manual_seed(1)
    net = models.resnet18()
    torch.save(net.state_dict(), "mine.pth")
    torch.manual_seed(2)
    model = linknet.LinkNet(3, "resnet18", "mine.pth")
    assert torch.equal(model.encoder[3][1].conv2.weight, net.layer4[1].conv2.weight)
    linknet.main([*SMALL["linknet"], "--weights", "mine.pth", "--frac", "0.05", "--epochs", "1"])

@pytest.mark.parametrize("name, flags", (("linknet", ["--encoder", "resnet18"]), ("unet", ["--encoder", "resnet34"])))
def test_weights_that_do_not_fit(name, flags, here, refuse):
    torch.save(models.mobilenet_v2().state_dict(), "other.pth")
    Path("text.pth").write_text("no weights")
    for file, part in (("other.pth", "Missing"), ("text.pth", ""), ("nowhere.pth", "nowhere")):
        line = refuse(name, *SMALL[name], "--size", "32", *flags, "--weights", file)
        assert f"--weights {file}" in line and part in line and "--weights none" in line
    assert not Path("checkpoints").exists()

@pytest.mark.parametrize("name, encoder", (("linknet", "resnet34"), ("unet", "resnet34"), ("unet", "efficientnet_b0")))
def test_imagenet_weights(name, encoder, here, refuse, monkeypatch):
    torch.manual_seed(3)
    net, asked = models.get_model(encoder), []
    def fetched(url, **_):
        asked.append(url)
        return net.state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    model = load(name).LinkNet(3, encoder, "imagenet") if name == "linknet" else \
        unet.UNet(3, encoder=encoder, weights="imagenet")
    want = net.conv1.weight if encoder == "resnet34" else net.features[0][0].weight
    got = model.first[1].weight if name == "linknet" else model.encoder[1][0].weight if encoder == "resnet34" \
        else model.encoder[1][0][0].weight
    assert torch.equal(got, want) and asked == [models.get_model_weights(encoder).DEFAULT.url]
    def offline(url, **_):
        raise OSError("no route to host")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    line = refuse(name, *SMALL[name], "--size", "32", "--encoder", encoder, "--weights", "imagenet")
    assert "no route to host" in line and asked[0] in line and "--weights FILE" in line and "--weights none" in line

def test_linknet_takes_imagenet_weights_for_photos_alone(here, monkeypatch):
    for data, want in (("toy", "none"), ("pets", "imagenet"), ("folder", "imagenet")):
        args = linknet.parse_args(["--data", data])
        linknet.settle(args, 32)
        assert args.weights == want

# --- weighted cross-entropy, schedules ----------------------------------------------------------------

def test_rarity():
    masks = torch.tensor([0] * 60 + [1] * 30 + [255] * 90 + [3] * 10).byte()
    want = [1 / math.log(1.02 + p) for p in (0.6, 0.3, 0, 0.1)]
    assert linknet.rarity(masks, 4).tolist() == pytest.approx(want, rel=1e-5)
    assert linknet.rarity(torch.tensor([0, 0, 0, 1]).byte(), 1).tolist() == pytest.approx(
        [1 / math.log(1.77), 1 / math.log(1.27)], rel=1e-5)

@pytest.mark.parametrize("C", (1, 2, 5))
def test_weighted_ce(C):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, C, 6, 5, generator=g).requires_grad_()
    masks = torch.randint(max(2, C), (3, 6, 5), generator=g).byte()
    weights = torch.rand(max(2, C), generator=g) + 0.5
    masks[0, :2] = 255
    got = linknet.weighted_ce(logits, *linknet.one_hot(masks, C), weights)
    both = torch.cat([torch.zeros_like(logits), logits], 1) if C == 1 else logits
    want = F.cross_entropy(both, masks.long(), weights, ignore_index=255)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (got, want)))
    nothing = torch.full_like(masks, 255)
    assert linknet.weighted_ce(logits, *linknet.one_hot(nothing, C), weights).item() == 0

def test_one_cycle_is_the_librarys():
    """torch ends its rise one step earlier, and its fall at a ten-thousandth."""
    steps, layer = 2000, torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps, cycle_momentum=False)
    want = []
    for _ in range(steps):
        want.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    got = [linknet.one_cycle(step, steps, 0.3) for step in range(steps)]
    assert max(abs(a - b) for a, b in zip(got, want)) < 0.3 * 0.004
    assert max(got) == pytest.approx(0.3) and got[0] == pytest.approx(0.012) and got[-1] < 1e-6

@pytest.mark.parametrize("seed", range(5))
def test_plateau_is_the_librarys(seed):
    g = np.random.default_rng(seed)
    losses = np.concatenate([np.linspace(1, 0.5, 10), 0.5 + 0.05 * g.standard_normal(60)])
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=5, threshold=0, eps=0)
    history = []
    for loss in losses:
        history.append({"val_loss": float(loss)})
        schedule.step(float(loss))
        assert linknet.plateau(history, 1.0) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert linknet.plateau(history, 1.0) < 1

@pytest.mark.parametrize("schedule, want", (("cosine", [0.933, 0.5, 0.067]), ("onecycle", [0.603, 0.812, 0.133]),
                                            ("plateau", [1, 1, 1])))
def test_schedules_are_used(schedule, want, here):
    """The rates at the end of three epochs of two steps."""
    folder = write_folder(here / "photos", 20)
    linknet.main(["--data", str(folder), *SMALL["linknet"], "--batch-size", "8", "--epochs", "3", "--lr", "1e-3",
                  "--loss", "wce", "--schedule", schedule])
    lrs = [row["lr"] for row in rows("checkpoints/linknet")]
    assert [1e3 * lr for lr in lrs] == pytest.approx(want, abs=1e-3)

# --- SegNet's own pre-training ------------------------------------------------------------------------

def test_hide():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 36, 52)
    before, seen = x.clone(), segnet.hide(x)
    hidden = (seen != x).any(1)
    assert torch.equal(x, before)                    # the target stays clean
    assert (seen[hidden[:, None].expand_as(x)] == 0.5).all()
    assert hidden.float().mean().item() == pytest.approx(0.6, abs=0.05)
    blocks = hidden[:, :32, :48].unflatten(2, (6, 8)).unflatten(1, (4, 8)).float().mean((2, 4))
    assert set(blocks.flatten().tolist()) <= {0.0, 1.0}          # whole squares
    again = segnet.hide(x)
    assert not torch.equal(again, seen)

def test_pretraining_is_handed_on(here, capsys):
    segnet.main([*SMALL["segnet"], "--pretrain", "--epochs", "3"])
    log = rows("checkpoints/segnet_pretrain")
    assert log[-1]["val_loss"] < log[0]["val_loss"] and log[-1]["loss"] < log[0]["loss"]
    best, files = checkpoint("checkpoints/segnet_pretrain/best.pt"), Path("checkpoints/segnet_pretrain").iterdir()
    assert {file.name for file in files} == {"best.pt", "last.pt", "log.jsonl", "samples.png"}
    assert best["epoch"] == min(log, key=lambda row: row["val_loss"])["epoch"]
    net = segnet.SegNet(3, 4, 2)
    head = net.head.weight.clone()
    count = segnet.inherit(net, "checkpoints/segnet_pretrain/best.pt")
    state = net.state_dict()
    assert count == len(state) - 2 and torch.equal(net.head.weight, head)
    assert all(torch.equal(state[name], best["model"][name]) for name in state if "head" not in name)
    capsys.readouterr()
    segnet.main([*SMALL["segnet"], "--init", "checkpoints/segnet_pretrain/best.pt", "--frac", "0.05", "--epochs", "1"])
    assert f"init     {count} tensors" in capsys.readouterr().out
    load("evaluate").main([])                        # the pre-training has no program: it is left out
    assert "segnet_pretrain" not in capsys.readouterr().out

def test_pretraining_on_other_photos(here, pets, capsys):
    quick = [*SMALL["segnet"], "--pretrain", "--epochs", "1", "--batch-size", "4", "--out", "run"]
    segnet.main([*quick, "--data", "pets", "--root", str(pets)])
    assert "train 35  val 5" in capsys.readouterr().out
    folder = write_folder(here / "photos", 20)
    segnet.main([*quick, "--data", str(folder)])
    assert "train 16  val 2" in capsys.readouterr().out
    (folder / "images/empty.jpg").write_bytes(b"")     # Microsoft's archive holds two like that
    segnet.main([*quick, "--data", str(folder / "images")])                  # a plain folder
    assert "train 18  val 2" in capsys.readouterr().out

def test_pretraining_resumes_to_the_bit(here, monkeypatch, capsys):
    folder = write_folder(here / "photos", 20)
    argv = ["--data", str(folder / "images"), *SMALL["segnet"], "--pretrain", "--epochs", "4", "--batch-size", "4"]
    segnet.main([*argv, "--out", "straight"])
    with monkeypatch.context() as patch:
        interrupt(patch, 11)
        with pytest.raises(SystemExit) as stop:
            segnet.main([*argv, "--out", "stopped"])
    assert stop.value.code == 130 and len(rows("stopped")) == 2
    segnet.main([*argv, "--out", "stopped", "--resume"])
    a, b = (checkpoint(f"{run}/last.pt")["model"] for run in ("straight", "stopped"))
    assert all(torch.equal(a[name], b[name]) for name in a)

def test_init_that_does_not_fit(here, refuse):
    assert "python segnet.py --pretrain" in refuse("segnet", *SMALL["segnet"], "--init", "nowhere.pt")
    state = {"script": "segnet.py", "format": segnet.FORMAT, "args": {}, "model": segnet.SegNet(3, 8, 2).state_dict()}
    torch.save(state, "wide.pt")
    assert "another network" in refuse("segnet", *SMALL["segnet"], "--init", "wide.pt")
    torch.save(state | {"script": "unet.py"}, "other.pt")
    assert "other.pt" in refuse("segnet", *SMALL["segnet"], "--init", "other.pt")

def test_pretraining_on_nothing(here, refuse):
    Path("empty").mkdir()
    assert "empty" in refuse("segnet", *SMALL["segnet"], "--pretrain", "--data", "empty")
    folder = write_folder(here / "photos", 4) / "images"
    (folder / "broken.jpg").write_bytes(b"no photo")
    assert "broken.jpg" in refuse("segnet", *SMALL["segnet"], "--pretrain", "--data", str(folder))

# --- the story --------------------------------------------------------------------------------------

@each
def test_trains_and_is_scored(name, here, capsys):
    """On drawn pets the loss falls and the network beats the baseline; evaluate.py gives the stored
    validation scores back, and takes all three in one table."""
    size = {"linknet": "--frac 0.3 --epochs 3", "segnet": "--width 8 --stages 3 --frac 0.5 --epochs 6",
            "unet": "--width 8 --frac 0.5 --epochs 6"}[name]
    load(name).main([*SMALL[name], "--size", "32", *size.split(), "--batch-size", "16", "--lr", "3e-3"])
    out = capsys.readouterr().out
    log, folder = rows(f"checkpoints/{name}"), Path("checkpoints", name)
    base = float(out[out.index("baseline"):].split("mIoU")[1].split()[0])
    assert log[-1]["loss"] < 0.92 * log[0]["loss"] and max(row["val_miou"] for row in log) > base + 0.1
    assert {file.name for file in folder.iterdir()} == {
        "best.pt", "last.pt", "log.jsonl", "result.json", "samples.png", "model.pt2"}
    result = json.loads((folder / "result.json").read_text())
    load("evaluate").main(["--split", "val", "--json", "s.json"])
    record, = json.loads(Path("s.json").read_text())
    for key in ("accuracy", "miou", "dice"):
        assert record["scores"][key] == pytest.approx(result["metrics"][key], abs=5e-5)
    with Image.open(folder / "samples.png") as picture:
        assert picture.size == (96, 256)

@each
def test_city_labels(name, here):
    """Label ids 0 to 33 as in Cityscapes, one of them without a say, at twice the width."""
    g = np.random.default_rng(0)
    def paint(labels):
        return np.kron(g.integers(0, 34, (4, 8)), np.ones((10, 10))).astype(np.uint8)
    for part, n in (("train", 9), ("val", 3), ("test", 3)):
        write_folder(here / "city" / part, n, (80, 40), paint)
    m = load(name)
    m.main(["--data", "city", *SMALL[name], "--size", "32", "64", "--ignore", "0", "--epochs", "1", "--batch-size",
            "4", *(["--loss", "wce"] if name == "linknet" else [])])
    load("evaluate").main(["--json", "s.json"])
    record, = json.loads(Path("s.json").read_text())
    assert len(record["scores"]["classes"]) == 34 and record["size"] == [32, 64]

@each
def test_bad_input(name, here, refuse):
    """The class count of a run that is resumed, a size that cannot be halved, masks in colours."""
    folder = write_folder(here / "photos", 20)
    flags = ["--data", str(folder), *SMALL[name], "--batch-size", "4", "--epochs", "1", "--out", "run"]
    load(name).main(flags)
    write_folder(here / "photos", 20, paint=lambda labels: labels * 2)
    line = refuse(name, *flags, "--resume")
    assert "--classes" in line and "foreground" in line
    line = refuse(name, *flags, "--size", "74")
    assert "--size" in line and f"multiples of { {'linknet': 32, 'segnet': 4, 'unet': 16}[name]};" in line
    Image.new("RGB", (48, 40)).save(folder / "masks/003.png")
    line = refuse(name, *flags)
    assert "003" in line and "RGB" in line

@pytest.mark.parametrize("name", ("linknet", "unet"))
def test_one_photo_at_the_smallest_size(name, here, refuse):
    """Its deepest map is one value a channel, of which there is no variance; SegNet's is 2 x 2."""
    for flags in (["--batch-size", "1"], ["--data", str(write_folder(here / "photos", 3))]):
        line = refuse(name, *SMALL[name], *flags, "--epochs", "1")
        assert "--batch-size" in line and "batch normalisation" in line
    segnet.main(["--width", "4", "--stages", "3", "--size", "8", "--data", str(here / "photos"), "--epochs", "1"])
