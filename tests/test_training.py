"""The small parts of a training: schedule, device, progress, validation, baseline; vqvae.py's own."""
import json, math, re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from conftest import LIGHT, SEGMENTERS, SMALL, TRAINING, load, rows, write_folder

def test_lr_at():
    """Up over a twentieth of the steps, half a cosine down, nothing but a function of the step."""
    lr_at = load("pretrain").lr_at
    curve = [lr_at(step, 400, 2.0) for step in range(400)]
    assert curve[0] == pytest.approx(2 / 20) and max(curve) == pytest.approx(2, abs=0.02)
    assert curve.index(max(curve)) in (18, 19, 20) and curve[200] == pytest.approx(1)
    assert all(a > b for a, b in zip(curve[20:], curve[21:])) and 0 < curve[-1] < 1e-4
    assert lr_at(0, 1, 2.0) == 2 and lr_at(300, 400, 2.0) == curve[300]       # a run of one step; asked again

@pytest.mark.parametrize("bf16, amx, asked, want", ((True, False, True, True), (False, True, True, True),
                                                    (False, False, True, False), (True, True, False, False)))
def test_bfloat16_where_it_is_fast(bf16, amx, asked, want, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert load("unet").pick_device("cpu", asked) == (torch.device("cpu"), want)

@pytest.mark.parametrize("name", LIGHT)
def test_progress_on_a_terminal_alone(name, here, capsys, monkeypatch):
    """Seconds left from the first step on, written over by the next line."""
    flags = [*SMALL[name], "--frac", "0.02", "--epochs", "1", "--batch-size", "8"]
    load(name).main(flags)
    assert "\r" not in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    load(name).main([*flags, "--out", "again"])
    lines = re.findall(r"\r( epoch 1 +\d+ s left) *\r", capsys.readouterr().out)
    assert len(lines) >= 2 and lines[-1].endswith(" 0 s left")

@pytest.mark.parametrize("name", SEGMENTERS)
def test_the_printed_baseline(name, here, capsys):
    """The share of the most frequent class, as its IoU, over the number of classes."""
    load(name).main([*SMALL[name], "--data", "toy", "--frac", "0.02", "--epochs", "1"])
    size = int(SMALL[name][SMALL[name].index("--size") + 1])
    masks = load(name).load_split("toy", "data", "val", [size, size], None)[1]
    want = max((masks == label).float().mean().item() for label in range(3)) / 3
    assert f"mIoU {want:.4f}" in capsys.readouterr().out

@pytest.mark.parametrize("percent, radius", ((0, None), (9, None), (25, 2), (50, 5), (75, 7), (100, 10)))
def test_blur(percent, radius, monkeypatch):
    """PIL's radius at 120 pixels, as published, and twice that at 240."""
    seen, blur = [], ImageFilter.GaussianBlur
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda r: seen.append(r) or blur(r))
    g = torch.Generator().manual_seed(0)
    for side in (120, 240):
        images = torch.randint(0, 256, (2, 3, side, side), generator=g).byte()
        out = load("evaluate").blur_photos(images, percent)
        assert out.shape == images.shape and out.dtype == torch.uint8
        if radius is None:
            assert torch.equal(out, images)
        else:
            assert seen[-2:] == [radius * side // 120] * 2
            one = Image.fromarray(images[1].movedim(0, 2).numpy()).filter(blur(radius * side // 120))
            assert np.array_equal(out[1].movedim(0, 2).numpy(), np.asarray(one))

# --- validation without labels ----------------------------------------------------------------------

def photos(n=70):
    return load("vqvae").draw_toy(n, (16, 16), 5)[0]

def test_check_has_masks_that_never_change():
    """The same scores whatever was drawn before and however often it is asked; other photos, others."""
    m = load("pretrain")
    args = m.parse_args(["--size", "16", "--mask", "0.5-0.75"])
    args.size = [16, 16]
    torch.manual_seed(0)
    model, images = m.VQVAE(3, 32, 4, 1, 2), photos()
    model.train()(images[:32] / 255)                   # fills the codebook
    first = m.check(model, images, torch.arange(70), 0.1, args)
    torch.manual_seed(9)
    torch.rand(7)
    assert m.check(model, images, torch.arange(70), 0.1, args) == first
    assert m.check(model, images, torch.arange(35), 0.1, args) != first
    assert 1 <= first["perplexity"] <= first["used"] <= 512 and first["masked"] > 0

def test_measure_is_of_the_whole_split():
    """Photos in batches of 64 score as each alone does, and codes are counted over all of them."""
    m = load("vqvae")
    torch.manual_seed(0)
    model, images = m.VQVAE(3, 32, 4, 1, 2), photos()
    model.train()(images[:64] / 255)
    whole, each = m.measure(model, images, 0.1), [m.measure(model, image[None], 0.1) for image in images]
    for key in ("loss", "error"):
        assert whole[key] == pytest.approx(sum(one[key] for one in each) / 70, rel=1e-4)
    assert whole["psnr"] == pytest.approx(-10 * math.log10(0.1 * whole["error"]), rel=1e-6)
    assert whole["used"] > max(one["used"] for one in each) and whole["perplexity"] > 16    # 16 vectors a photo

# --- vqvae.py ---------------------------------------------------------------------------------------

def test_units_of_the_error():
    """Plain grey of the mean scores 1, a perfect copy 0; halving an error adds 3 dB."""
    m, x = load("vqvae"), torch.rand(4, 3, 8, 8)
    variance = x.var(correction=0).item()
    for output, want in ((torch.full_like(x, x.mean().item()), 1), (x, 0)):
        loss, error = m.reconstruction_loss(output, x, torch.tensor(2.0), variance)
        assert error.item() == pytest.approx(want, abs=1e-5) and (loss - error).item() == pytest.approx(0.25 * 2)
    assert m.psnr(0.01) == pytest.approx(20) and m.psnr(0.005) - m.psnr(0.01) == pytest.approx(3.0103, abs=1e-4)

def test_vqvae_learns(here, capsys):
    load("vqvae").main(["--size", "32", "--frac", "0.3", "--epochs", "4", "--width", "64", "--lr", "3e-3"])
    log = rows("checkpoints/vqvae")
    assert log[-1]["val_error"] < 0.6 < log[0]["val_error"] and log[-1]["val_used"] > 100
    for name in ("samples.png", "codes.png"):
        with Image.open(f"checkpoints/vqvae/{name}") as page:
            assert page.size == (64, 8 * 32)
    left, right = np.split(np.asarray(Image.open("checkpoints/vqvae/samples.png")).astype(float), 2, 1)
    assert np.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.7            # the copies look like the photos

def test_vqvae_summary(here, capsys):
    m = load("vqvae")
    m.main(["--summary", "--size", "32"])
    *_, last = capsys.readouterr().out.splitlines()
    weights = sum(weight.numel() for weight in m.VQVAE(3, 128, 32, 2, 2).parameters())
    assert last.startswith("VQVAE") and f"{weights:,} parameters" in last and not Path("checkpoints").exists()
    m.main([*SMALL["vqvae"], "--size", "32", "--frac", "0.02", "--epochs", "1"])
    result = json.loads(Path("checkpoints/vqvae/result.json").read_text())
    assert result["parameters"] == weights and f"{result['multiply_adds']:,} multiply-adds" in last

# --- compiled, and on a GPU -------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", ("vqvae", "pretrain", "finetune"))
def test_compiled_learns_alike(name, here):
    """--compile changes the speed alone: the losses agree within rounding."""
    flags = [*SMALL[name], "--frac", "0.02", "--epochs", "2", "--no-amp"]
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        load(name).main([*flags, *more, "--out", out])
    a, b = ([row["val_loss"] for row in rows(folder)] for folder in ("plain", "compiled"))
    assert b == pytest.approx(a, rel=0.02)

@pytest.mark.cuda
@pytest.mark.parametrize("name", TRAINING)
def test_cuda(name, here):
    """Every script trains there, its loss falls, and what it leaves opens on a CPU."""
    folder = write_folder("photos", 40)
    data = folder if name in SEGMENTERS else folder / "images"
    load(name).main([*SMALL[name], "--data", str(data), "--epochs", "4", "--batch-size", "8", "--device", "cuda",
                     "--out", "run"])
    log = rows("run")
    assert log[-1]["loss"] < log[0]["loss"] and log[0]["memory_gb"] > 0
    if name in SEGMENTERS:
        load("evaluate").main(["run", "--data", str(folder), "--device", "cpu"])
