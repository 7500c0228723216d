"""The steps of a training: what is shown to the network, how fast it learns, whether it does."""

import pytest
import torch
from conftest import SEGMENTERS, SMALL, load, rows, run, write_folder

m = load("unet")  # the training section is the same text in every segmenter (test_copies.py)


# --- augmentation --------------------------------------------------------------------------------


def painted(masks):
    """Photos that show their own mask: class 1 white, the rest black."""
    return (masks == 1).byte()[:, None].repeat(1, 3, 1, 1) * 255


def test_photo_and_mask_move_together():
    torch.manual_seed(0)
    masks = (m.draw_toy(64, (48, 64), seed=5)[1] == 1).byte()
    x, y = m.augment(painted(masks), masks)
    grey = x.mean(1)
    middle = (grey.amax((1, 2), True) + grey.amin((1, 2), True)) / 2
    share = y.float().mean((1, 2))
    both = (share > 0.05) & (share < 0.95)  # where both classes are still in the window
    assert both.sum() > 40
    assert ((grey > middle) == (y == 1))[both].float().mean() > 0.985
    moved = (y != masks).flatten(1).any(1)
    assert moved.float().mean() > 0.9


def test_augment_leaves_its_input_and_the_labels():
    torch.manual_seed(0)
    images, masks = m.draw_toy(16, (32, 64), seed=5)
    masks[:, :4] = m.IGNORE
    before = images.clone(), masks.clone()
    x, y = m.augment(images, masks)
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])
    assert x.shape == images.shape and x.min() >= 0 and x.max() <= 1
    assert y.shape == masks.shape and y.dtype == torch.uint8
    assert set(y.unique().tolist()) <= {0, 1, 2, m.IGNORE}


def test_about_half_are_mirrored():
    """In a photo that is white on its right, mirrored ones are white on their left."""
    torch.manual_seed(0)
    masks = torch.zeros(400, 32, 32).byte()
    masks[:, :, 16:] = 1
    _, y = m.augment(painted(masks), masks)
    left, right = y[:, :, 0].float().mean(1), y[:, :, -1].float().mean(1)
    sure = left != right
    assert (left > right)[sure].float().mean() == pytest.approx(0.5, abs=0.1)


def test_augment_hangs_on_the_seed():
    images, masks = m.draw_toy(4, (32, 32), seed=5)
    answers = []
    for seed in [1, 1, 2]:
        torch.manual_seed(seed)
        answers.append(m.augment(images, masks)[0])
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


# --- the learning rate ---------------------------------------------------------------------------


def test_lr_at():
    """Up over a twentieth of the steps, then down half a cosine to nearly 0."""
    curve = [m.lr_at(step, 400, 2.0) for step in range(400)]
    assert curve[0] == pytest.approx(2 / 20) and max(curve) == pytest.approx(2, abs=0.02)
    assert curve.index(max(curve)) in [19, 20]
    assert curve[200] == pytest.approx(1)
    assert curve[20:] == sorted(curve[20:], reverse=True) and 0 < curve[-1] < 1e-4


def test_lr_of_a_run_of_one_step():
    assert m.lr_at(0, 1, 2.0) == 2


# --- what pretrain.py hides ----------------------------------------------------------------------


def hidden(B, size, low, high, style, patch=8):
    """B masks as --mask LOW-HIGH --mask-style STYLE draws them, True where a pixel is hidden."""
    torch.manual_seed(0)
    flags = ["--size", *map(str, size), "--mask", f"{low}-{high}", "--mask-style", style]
    args = load("pretrain").parse_args([*flags, "--patch", str(patch)])
    keep = load("pretrain").draw_masks(B, args, "cpu")
    assert keep.shape == (B, 1, *size) and keep.dtype == torch.bool
    return ~keep


@pytest.mark.parametrize("style", ["square", "patches"])
@pytest.mark.parametrize("low, high", [(0.05, 0.25), (0.5, 0.75), (0.3, 0.3)])
def test_masks_have_their_share_of_the_area(style, low, high):
    share = hidden(1000, (64, 64), low, high, style).float().mean((1, 2, 3))
    step = 2 / 64  # a square's side is whole, and so is a patch
    assert share.mean().item() == pytest.approx((low + high) / 2, abs=0.01)
    assert low - step <= share.min() and share.max() <= high + step
    if low < high:  # drawn for each photo, any share alike
        assert share.std().item() == pytest.approx((high - low) / 12**0.5, abs=0.01)


def test_a_square_is_one_square():
    for mask in hidden(100, (32, 64), 0.05, 0.25, "square"):
        y, x = mask[0].nonzero().unbind(1)
        side = y.max() - y.min() + 1
        assert side == x.max() - x.min() + 1 and len(y) == side**2


def test_patches_are_whole():
    cells = hidden(50, (32, 64), 0.05, 0.25, "patches").view(50, 1, 4, 8, 8, 8)
    assert torch.equal(cells.all(5).all(3), cells.any(5).any(3)) and cells.any()


@pytest.mark.parametrize("style", ["square", "patches"])
def test_masks_lie_everywhere(style):
    often = hidden(8000, (32, 64), 0.3, 0.3, style).float().mean(0)
    assert often.min() > 0


def test_a_mask_never_hides_all():
    """Not even where patches are larger than the photo."""
    assert not hidden(20, (32, 32), 0.9, 0.95, "patches", patch=64).flatten(1).all(1).any()


def test_pretraining_must_restore_what_was_hidden():
    """The error is that of the hidden pixels of the clean photo; visible ones cost nothing."""
    hidden_error = load("pretrain").hidden_error
    x = torch.rand(2, 3, 8, 8)
    keep = torch.rand(2, 1, 8, 8) < 0.5
    assert hidden_error(torch.where(keep, x + 9, x), x, keep) == 0
    assert hidden_error(torch.where(keep, x, x + 3), x, keep).item() == pytest.approx(9, rel=1e-4)


def test_the_baseline_of_pretraining_is_the_mean_visible_colour():
    x = torch.rand(2, 3, 8, 8)
    keep = torch.rand(2, 1, 8, 8) < 0.5
    filled = load("pretrain").mean_fill(x, keep)
    assert torch.equal(filled[0, 1][keep[0, 0]], x[0, 1][keep[0, 0]])
    want = x[0, 1][keep[0, 0]].mean().item()
    assert filled[0, 1][~keep[0, 0]].unique().tolist() == pytest.approx([want])


@pytest.mark.parametrize("use, want", [([1, 1, 1, 1], 4), ([7, 0, 0], 1), ([1, 1, 0, 0], 2)])
def test_perplexity(use, want):
    assert load("pretrain").perplexity(torch.tensor(use).double()) == pytest.approx(want)


# --- runs ----------------------------------------------------------------------------------------


LINKNET = pytest.param("linknet", marks=pytest.mark.slow)  # it saves 100 MB an epoch


@pytest.mark.parametrize("name", ["finetune", LINKNET, "segnet", "unet"])
def test_the_loss_halves(name, tmp_path):
    """Bright ellipses on dark ground are learnt in seconds, and found in photos never seen."""
    write_folder(tmp_path / "mine", 24)
    flags = ["--data", "mine", "--epochs", "20", "--batch-size", "4", "--lr", "1e-2"]
    out = run(name, *SMALL[name], *flags, "--out", "run", cwd=tmp_path)
    log = rows(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"] / 2
    baseline = next(line for line in out.splitlines() if line.startswith("baseline"))
    miou = float(baseline.split()[-1])
    assert max(row["val_miou"] for row in log) > miou + 0.3


@pytest.mark.parametrize("name", SEGMENTERS)
def test_the_printed_baseline_is_one_answer_everywhere(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder("mine", 20)
    script = load(name)
    args = script.parse_args([*SMALL[name], "--data", "mine"])
    train, val = script.load_data(args)
    masks = torch.cat([train[1], val[1]]).long()
    answer = torch.zeros(2).index_fill(0, masks.flatten().mode().values, 1)
    logits = answer.view(1, 2, 1, 1).expand(len(masks), 2, *masks.shape[1:])
    want = script.scores(script.confusion(logits, masks))
    line = capsys.readouterr().out.partition("baseline")[2].splitlines()[0]
    assert f"accuracy {want['val_accuracy']:.4f}" in line
    assert f"mIoU {want['val_miou']:.4f}" in line
