"""The steps of a training: what is shown to the network, how fast it learns, whether it does."""

import math

import pytest
import torch
from conftest import SMALL, TRAINING, load, network, rows, write_folder

m = load("unet")  # augment and the scores are the same text in every segmenter (test_copies.py)
pretrain = load("pretrain")


# --- augmentation --------------------------------------------------------------------------------


def test_photo_and_mask_are_mirrored_together():
    """About half of them; labels stay as they are, and colours between 0 and 1."""
    torch.manual_seed(0)
    masks = m.draw_toy(400, (32, 48), seed=5)[1]
    masks[:, :4] = m.IGNORE
    photos = 255 * (masks == 1).byte()  # they show their own mask
    x, y = m.augment(photos[:, None].repeat(1, 3, 1, 1), masks)
    assert x.min() >= 0 and x.max() <= 1 and y.dtype == torch.uint8
    dark = x.mean(1).amin((1, 2), keepdim=True)
    assert torch.equal(x.mean(1) > dark + 0.2, y == 1)
    mirrored = (y == masks.flip(2)).flatten(1).all(1)
    assert ((y == masks).flatten(1).all(1) | mirrored).all()
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.1)


# --- the learning rate ---------------------------------------------------------------------------


class Still(torch.optim.SGD):
    """It notes the learning rate of every step, and moves no weight."""

    def __init__(self, model):
        super().__init__(model.parameters())
        self.rates = []

    def step(self):
        self.rates.append(self.param_groups[0]["lr"])


@pytest.mark.parametrize("name", TRAINING)
def test_the_learning_rate(name):
    """Up over a twentieth of the run, then down half a cosine to nearly 0."""
    args = load(name).parse_args([*SMALL[name], "--batch-size", "2", "--epochs", "4", "--lr", "2"])
    args.variance, args.weights = 1.0, [1.0, 1.0]
    images, masks = m.draw_toy(10, (32, 32), seed=5)
    data = [images, masks.clamp(max=1)]
    if name in ["vqvae", "pretrain"]:
        data.pop()
    model = network(name)
    optimizer = Still(model)
    (train_epoch,) = [thing for key, thing in vars(load(name)).items() if key.endswith("_epoch")]
    for epoch in range(4):  # of five steps
        row = train_epoch(model, optimizer, *data, args, epoch)
        assert row["lr"] == optimizer.rates[-1]
    want = [1 + math.cos(math.pi * (step + 0.5) / 20) for step in range(20)]
    want[0] /= 2  # in the middle of the warm-up
    assert optimizer.rates == pytest.approx(want)


# --- what pretrain.py hides ----------------------------------------------------------------------

SQUARE, PATCHES = 0, 8  # --patch
each_kind = pytest.mark.parametrize("patch", [SQUARE, PATCHES])


def hidden(B, size, mask, patch):
    """B masks as --mask MASK --patch PATCH draws them, True where a pixel is hidden."""
    torch.manual_seed(0)
    flags = ["--size", *map(str, size), "--mask", mask, "--patch", str(patch)]
    masks = pretrain.draw_masks(B, pretrain.parse_args(flags))
    assert masks.shape == (B, 1, *size) and masks.dtype == torch.bool
    return masks


@each_kind
@pytest.mark.parametrize("low, high", [(0.05, 0.25), (0.5, 0.75), (0.3, 0.3)])
def test_masks_have_their_share_of_the_area(patch, low, high):
    share = hidden(1000, (64, 64), f"{low}-{high}", patch).float().mean((1, 2, 3))
    step = 2 / 64  # a square's side is whole, and so is a patch
    assert share.mean().item() == pytest.approx((low + high) / 2, abs=0.01)
    assert low - step <= share.min() and share.max() <= high + step
    # Drawn for each photo, any share alike.
    assert share.std().item() == pytest.approx((high - low) / 12**0.5, abs=0.01)


def test_a_square_is_one_square():
    for mask in hidden(100, (32, 64), "0.05-0.25", SQUARE):
        y, x = mask[0].nonzero().unbind(1)
        side = y.max() - y.min() + 1
        assert side == x.max() - x.min() + 1 and len(y) == side**2


def test_patches_are_whole():
    cells = hidden(50, (32, 64), "0.05-0.25", PATCHES).view(50, 1, 4, 8, 8, 8)
    assert torch.equal(cells.all(5).all(3), cells.any(5).any(3)) and cells.any()


@each_kind
def test_masks_lie_everywhere(patch):
    often = hidden(8000, (32, 64), "0.3-0.3", patch).float().mean(0)
    assert often.min() > 0


@pytest.mark.parametrize("patch", [SQUARE, PATCHES, 64])
def test_a_mask_never_hides_all(patch):
    """Not even where a patch is larger than the photo."""
    assert not hidden(20, (32, 32), "0.9-0.99", patch).flatten(1).all(1).any()


class Grey(torch.nn.Module):
    """It answers every photo with the grey that hides, and learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return torch.full_like(x, pretrain.FILL) + self.weight, torch.zeros(()), None


@pytest.mark.parametrize("flags", [[], ["--distort", "rotate", "jitter", "grey"]])
def test_grey_is_no_answer_to_a_grey_square(flags):
    """The target of pre-training is the photo as it was: white, in spite of mask and jitter."""
    args = pretrain.parse_args(["--size", "32", "--device", "cpu", *flags])
    args.variance = 1.0
    white, model = torch.full((8, 3, 32, 32), 255).byte(), Grey()
    row = pretrain.pretrain_epoch(model, Still(model), white, args, 0)
    assert row["loss"] == pytest.approx(0.25)


def test_the_baseline_of_pretraining_is_the_mean_colour_of_what_is_seen():
    x = torch.rand(2, 3, 8, 8)
    mask = torch.rand(2, 1, 8, 8) < 0.5
    seen = ~mask[0, 0]
    filled = pretrain.mean_fill(x, mask)
    assert torch.equal(filled[0, 1][seen], x[0, 1][seen])
    want = x[0, 1][seen].mean().item()
    assert filled[0, 1][~seen].unique().tolist() == pytest.approx([want])


# --- what the codes' use is ----------------------------------------------------------------------


class RedIsTheCode(torch.nn.Module):
    """The ids of a photo are its red; what comes out is too bright by 0.1."""

    def forward(self, x):
        return x + 0.1, torch.tensor(2.0), (255 * x[:, 0]).round().long()


def measured(name, function, images, *masks):
    """What this function of the script says of images, in batches of two."""
    script = load(name)
    args = script.parse_args(["--batch-size", "2", "--device", "cpu"])
    args.variance = 0.1
    return getattr(script, function)(RedIsTheCode(), images, *masks, args)


@pytest.mark.parametrize("codes, want", [([0, 1, 2, 3], 4), ([7, 7, 7, 7], 1), ([5, 6, 5, 6], 2)])
def test_perplexity_is_that_of_the_whole_split(codes, want):
    """Four photos of one code each. All alike: as many as there are; only one: 1."""
    images = torch.tensor(codes).byte().view(4, 1, 1, 1).expand(4, 3, 8, 8)
    row = measured("vqvae", "measure", images)
    assert row["val_perplexity"] == pytest.approx(want) and row["val_used"] == want
    row = measured("pretrain", "check", images, torch.zeros(4, 1, 8, 8, dtype=torch.bool))
    assert row["val_perplexity"] == pytest.approx(want) and row["val_used"] == want


def test_the_error_of_a_reconstruction():
    """In units of the variance, 0.1, and in dB."""
    row = measured("vqvae", "measure", torch.full((3, 3, 8, 8), 100).byte())
    assert row["val_error"] == pytest.approx(0.1**2 / 0.1)
    assert row["val_psnr"] == pytest.approx(20)
    assert row["val_loss"] == pytest.approx(row["val_error"] + 0.25 * 2)


def test_the_error_of_what_is_hidden():
    """What is hidden goes in as 0.5 and comes out as 0.6; what is seen does not count. Each hidden
    pixel counts once, though the last batch has one photo, and that another share of them."""
    images = torch.full((3, 3, 8, 8), 100).byte()
    images[2] = 200
    masks = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    masks[:2, :, :, :3] = masks[2, :, :, :6] = True
    row = measured("pretrain", "check", images, masks)
    want = (6 * (0.6 - 100 / 255) ** 2 + 6 * (0.6 - 200 / 255) ** 2) / 12
    assert row["val_hidden"] == pytest.approx(want / 0.1)
    assert row["val_mean_fill"] == pytest.approx(0, abs=1e-9)
    assert row["val_loss"] == pytest.approx(row["val_hidden"] + 0.25 * 2)


# --- runs ----------------------------------------------------------------------------------------


LINKNET = pytest.param("linknet", 20, marks=pytest.mark.slow)  # it saves 180 MB an epoch


@pytest.mark.parametrize("name, epochs", [("finetune", 10), LINKNET, ("segnet", 20), ("unet", 20)])
def test_the_loss_halves(name, epochs, here, capsys):
    """Bright ellipses on dark ground are learnt in seconds, and found in photos never seen."""
    write_folder("mine", 24)
    flags = ["--data", "mine", "--epochs", str(epochs), "--batch-size", "4", "--lr", "1e-2"]
    load(name).main([*SMALL[name], *flags, "--out", "run"])
    log = rows("run")
    assert log[-1]["loss"] < log[0]["loss"] / 2
    baseline = capsys.readouterr().out.partition("baseline")[2].splitlines()[0]
    assert max(row["val_miou"] for row in log) > float(baseline.split()[-1]) + 0.3
