"""What pre-training hides and distorts."""
import argparse

import pytest
import torch

from conftest import SCRIPTS, load

if "pretrain" not in SCRIPTS:
    pytest.skip("no pretrain.py", allow_module_level=True)
m = load("pretrain")

def masks(B=1, size=(32, 48), low=0.05, high=0.25, patch=8, style="patches", seed=0):
    flags = argparse.Namespace(size=size, mask=[low, high], patch=patch, mask_style=style)
    return m.draw_masks(B, flags, "cpu", None if seed is None else torch.Generator().manual_seed(seed))

def hidden(keep):
    return (~keep).float().mean((1, 2, 3))

@pytest.mark.parametrize("style, patch", (("patches", 8), ("patches", 4), ("square", 8)))
@pytest.mark.parametrize("low, high", ((0.05, 0.25), (0.5, 0.75), (0.3, 0.3)))
def test_share_of_the_area(style, patch, low, high):
    keep = masks(2000, (64, 64), low, high, patch, style)
    assert keep.shape == (2000, 1, 64, 64) and keep.dtype == torch.bool
    share, step = hidden(keep), (patch / 64) ** 2 if style == "patches" else 2 / 64
    assert share.mean().item() == pytest.approx((low + high) / 2, abs=0.005)
    assert low - step <= share.min() and share.max() <= high + step
    if low < high:
        assert share.std().item() == pytest.approx((high - low) / 12 ** 0.5, abs=0.01)   # uniform

def test_nothing_and_no_more():
    assert masks(50, low=0, high=0).all()
    assert masks(50, low=0, high=0, style="square").all()

def test_patches_are_aligned_and_whole():
    keep = masks(50, (32, 48), patch=8)
    cells = keep.view(50, 1, 4, 8, 6, 8)
    assert torch.equal(cells.all(5).all(3), cells.any(5).any(3)) and not keep.all()

def test_a_patch_need_not_divide_the_side():
    assert masks(50, (30, 50), patch=8).shape == (50, 1, 30, 50)
    assert masks(3, (8, 8), low=0.9, high=0.9, patch=64).shape == (3, 1, 8, 8)

def test_patches_lie_everywhere():
    often = (~masks(3000, (32, 48), patch=8)).float().mean(0)
    assert often.min() > 0.11 and often.max() < 0.19          # 0.15 on average

def test_square_is_one_square():
    for keep in masks(200, (32, 48), style="square"):
        y, x = (~keep[0]).nonzero().unbind(1)
        side, width = (y.max() - y.min() + 1).item(), (x.max() - x.min() + 1).item()
        assert side == width and len(y) == side * width

def test_square_lies_everywhere():
    places = (~masks(3000, (32, 48), low=0.1, high=0.1, style="square")).float().mean((0, 1))
    assert (places > 0).all()

def test_seeds():
    assert torch.equal(masks(9, seed=1), masks(9, seed=1))
    assert not torch.equal(masks(9, seed=1), masks(9, seed=2))
    torch.manual_seed(3)
    first = masks(9, seed=None)
    torch.manual_seed(3)
    assert torch.equal(first, masks(9, seed=None))

class Spy(torch.nn.Module):
    """Looks like a VQVAE to an epoch, answers 0.5 everywhere, and remembers what it saw."""
    def __init__(self):
        super().__init__()
        self.bias, self.seen, self.keep = torch.nn.Parameter(torch.zeros(1)), [], []

    def forward(self, x, keep=None):
        self.seen.append(x.clone())
        self.keep.append(keep.clone())
        return torch.full_like(x, 0.5) + 0 * self.bias, self.bias.sum() * 0, None

def epoch(*flags, photos=None, number=0, rank=0, ranks=1):
    """One epoch with a spy for the network; later flags win -> photos, spy, loss."""
    photos = torch.randint(256, (8, 3, 32, 32)).byte() if photos is None else photos
    args = m.parse_args(["--mask", "0.3-0.6", "--epochs", "1", "--batch-size", str(len(photos)), "--lr", "1e-3",
                         "--size", *map(str, photos.shape[2:]), *flags])
    spy, before = Spy(), photos.clone()
    loss = m.pretrain_epoch(spy, photos, torch.arange(len(photos)), 1.0, torch.optim.SGD(spy.parameters(), 0.0), args,
                            number, False, rank, ranks)[0]
    assert torch.equal(photos, before)
    return photos, spy, loss

@pytest.mark.parametrize("flags", ((), ("--mask-style", "square"), ("--distort", "jitter", "grey"), ("--distort", "rotate")))
def test_target_is_the_clean_photo_where_it_is_hidden(flags):
    """The loss of the answer 0.5 is its distance to the hidden pixels as they were, whatever was done to
    the input. Photos of one colour each look the same however they are turned."""
    images, spy, loss = epoch(*flags, photos=torch.randint(256, (8, 3, 1, 1)).byte().expand(8, 3, 32, 32))
    order = (torch.manual_seed(0), torch.randperm(8))[1]       # the epoch's first draw
    error = (images[order].float() / 255 - 0.5).square() * ~spy.keep[0]
    assert loss == pytest.approx((error.mean() / hidden(spy.keep[0]).mean()).item(), rel=1e-5)
    assert 0.2 < hidden(spy.keep[0]).mean() < 0.7

def test_fill():
    images, spy, _ = epoch()
    seen, keep = spy.seen[0], spy.keep[0].expand_as(spy.seen[0])
    assert m.FILL == 0.5 and (seen[~keep] == m.FILL).all()
    x = images.float() / 255
    either = torch.stack([x, x.flip(3)], 1)                     # (n, 2, 3, H, W), in any order
    for photo, visible in zip(seen, keep):
        assert ((photo == either) | ~visible).flatten(2).all(2).any()

def test_rotation_turns_photo_and_target_alike():
    """One corner is bright: after some epochs it was seen in all four."""
    photo = torch.zeros(1, 3, 32, 32).byte()
    photo[..., :16, :16] = 255
    corners = set()
    for number in range(40):
        _, spy, _ = epoch("--mask", "0-0.01", "--distort", "rotate", photos=photo, number=number)
        if spy.keep[0].all():
            corners.add(tuple(spy.seen[0][0, 0, ::31, ::31].flatten().tolist()))
    assert corners == {(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)}

def test_rotation_of_a_rectangle_stays_a_rectangle():
    for number in range(8):
        _, spy, _ = epoch("--distort", "rotate", photos=torch.zeros(1, 3, 16, 32).byte(), number=number)
        assert spy.seen[0].shape == (1, 3, 16, 32)

def test_ranks_share_a_batch():
    """What two ranks see of a batch is, put together, what one rank sees of it."""
    images = torch.randint(256, (8, 3, 32, 32)).byte()
    def seen(rank, ranks):
        _, spy, _ = epoch("--batch-size", "4", "--distort", "rotate", "jitter", "grey", photos=images, rank=rank, ranks=ranks)
        return spy.seen, spy.keep
    (whole, masks), (left, left_masks), (right, right_masks) = seen(0, 1), seen(0, 2), seen(1, 2)
    assert len(whole) == len(left) == len(right) == 2
    for one, *two in [*zip(whole, left, right), *zip(masks, left_masks, right_masks)]:
        assert torch.equal(one, torch.cat(two))

# --- colours --------------------------------------------------------------------------------------

def test_distort_leaves_shape_and_range():
    torch.manual_seed(0)
    x = torch.rand(16, 3, 9, 7)
    before = x.clone()
    out = m.distort(x, torch.rand(5, 16, 1, 1, 1), ["jitter", "grey"])
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(x, before) and (out != x).flatten(1).any(1).all()
    assert torch.equal(m.distort(x, torch.rand(5, 16, 1, 1, 1), []), x)

def test_grey_is_grey_and_a_fifth():
    torch.manual_seed(0)
    x = torch.rand(2000, 3, 2, 2)
    out = m.distort(x, torch.rand(5, 2000, 1, 1, 1), ["grey"])
    grey = (out - out[:, :1]).abs().amax((1, 2, 3)) < 1e-6
    assert grey.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(out[~grey], x[~grey])
    torch.testing.assert_close(out[grey][:, :1], (x[grey] * torch.tensor([0.299, 0.587, 0.114])
                                                  .view(1, 3, 1, 1)).sum(1, True))

def test_jitter_of_grey_photos_makes_no_colour():
    torch.manual_seed(0)
    out = m.distort(torch.rand(16, 1, 8, 8).expand(-1, 3, -1, -1) * 0.5 + 0.2, torch.rand(5, 16, 1, 1, 1),
                    ["jitter"])
    assert (out - out[:, :1]).abs().max() < 1e-5

def test_hue_turns_by_a_tenth_of_the_circle_at_most():
    torch.manual_seed(0)
    colour = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1).expand(500, 3, 2, 2)
    out = m.distort(colour, torch.rand(5, 500, 1, 1, 1), ["jitter"])[:, :, 0, 0].double()
    c = out - out.mean(1, True)
    a = (torch.tensor([2.0, -1, -1]) / 6 ** 0.5).double()
    angle = torch.acos(((c @ a) / c.norm(dim=1)).clamp(-1, 1)) / (2 * torch.pi)
    assert angle.max() < 0.1 + 0.01 and angle.max() > 0.08

# --- scores ---------------------------------------------------------------------------------------

def test_mean_fill():
    x = torch.rand(2, 3, 4, 4)
    keep = torch.rand(2, 1, 4, 4) < 0.5
    out = m.mean_fill(x, keep)
    for b in range(2):
        for c in range(3):
            visible = x[b, c][keep[b, 0]]
            torch.testing.assert_close(out[b, c][~keep[b, 0]], visible.mean().expand((~keep[b, 0]).sum()))
            assert torch.equal(out[b, c][keep[b, 0]], visible)
    assert m.mean_fill(x, torch.zeros(2, 1, 4, 4, dtype=torch.bool)).isfinite().all()

def test_perplexity():
    assert m.perplexity(torch.ones(512).double()) == pytest.approx(512)
    assert m.perplexity(torch.tensor([7.0, 0, 0])) == pytest.approx(1)
    assert m.perplexity(torch.tensor([1.0, 1, 0, 0])) == pytest.approx(2)

@pytest.mark.parametrize("text, want", (("0.05-0.25", (0.05, 0.25)), ("0-0.01", (0, 0.01)), ("0.95-0.95", (0.95, 0.95))))
def test_share_range_accepts(text, want):
    assert tuple(m.share_range(text)) == want

@pytest.mark.parametrize("text", ("0.9-0.1", "0-0", "0-0.005", "0.1", "a-b", "0.1-0.2-0.3", "0.1-1", "-0.1-0.5", "nan-nan", ""))
def test_share_range_refuses(text):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):      # argparse reports both
        m.share_range(text)
