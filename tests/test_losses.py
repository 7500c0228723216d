"""Losses and scores against torch, scikit-learn and plain loops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load
from sklearn import metrics

m = load("unet")  # losses and scores are the same text in every segmenter (test_copies.py)
IGNORE = 255
each_loss = pytest.mark.parametrize("loss", [m.bce_loss, m.dice_loss])


def batch(C, B=3, H=7, W=5, scale=3.0):
    """Random logits and labels; a fifth of the pixels does not count."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, C, H, W, generator=g) * scale
    masks = torch.randint(C, (B, H, W), generator=g).byte()
    masks[torch.rand(B, H, W, generator=g) < 0.2] = IGNORE
    return logits, masks


# --- losses --------------------------------------------------------------------------------------


def targets(masks, C):
    """Labels (B, H, W) -> y (B, C, H, W), one-hot, and valid (B, 1, H, W)."""
    valid = (masks != IGNORE).float()[:, None]
    y = F.one_hot(masks.long() * (masks != IGNORE), C).movedim(3, 1)
    return y * valid, valid


@pytest.mark.parametrize("C", [2, 3])
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_bce_is_that_of_torch(C, scale):
    """The loss and its gradient, where logits are wrong by 10,000 too."""
    logits, masks = batch(C, scale=scale)
    y, valid = targets(masks, C)
    counts = valid.bool().expand_as(y)
    logits.requires_grad_()
    want = F.binary_cross_entropy_with_logits(logits[counts], y[counts])
    got = m.bce_loss(logits, y, valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*[torch.autograd.grad(loss, logits) for loss in (got, want)])


def test_dice_loss_is_that_of_a_plain_loop():
    logits, masks = batch(3, H=4, W=3)
    losses = []
    for b, c in itertools.product(range(3), range(3)):
        both, total = 0, 0
        for h, w in itertools.product(range(4), range(3)):
            if masks[b, h, w] != IGNORE:
                p = 1 / (1 + math.exp(-logits[b, c, h, w]))
                t = float(masks[b, h, w] == c)
                both, total = both + p * t, total + p + t
        losses.append(1 - (2 * both + 1) / (total + 1))
    got = m.dice_loss(logits, *targets(masks, 3))
    assert got.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@each_loss
def test_gradients(loss):
    logits, masks = batch(3, B=2, H=3, W=3)
    y, valid = targets(masks, 3)
    y, valid, logits = y.double(), valid.double(), logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, y, valid), logits)


@each_loss
def test_ignored_pixels_do_not_count(loss):
    logits, masks = batch(3)
    y, valid = targets(masks, 3)
    other = torch.where(valid == 0, -5 * logits, logits)
    assert loss(other, y, valid) == loss(logits, y, valid)


@each_loss
def test_nothing_to_count_is_no_loss(loss):
    logits, masks = batch(3)
    nothing = targets(torch.full_like(masks, IGNORE), 3)
    assert loss(logits, *nothing).item() == 0


@each_loss
def test_a_class_that_is_not_there(loss):
    """An empty mask that is answered with nothing costs nothing; any answer costs."""
    y, valid = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    nothing, something = torch.full_like(y, -100), torch.full_like(y, 1)
    assert loss(nothing, y, valid).item() == pytest.approx(0, abs=1e-6)
    assert loss(something, y, valid).item() > 0.5


@pytest.mark.parametrize("C", [2, 3])
def test_the_loss_is_bce_plus_dice_in_float32(C):
    logits, masks = batch(C)
    half = logits.bfloat16()
    y, valid = targets(masks, C)
    want = m.bce_loss(half.float(), y, valid) + m.dice_loss(half.float(), y, valid)
    loss = m.segmentation_loss(half, masks)
    assert loss == want and loss.dtype == torch.float32


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [2, 3, 7])
def test_scores_are_those_of_scikit_learn(C):
    """Dice, which is taken from IoU, is its F1."""
    logits, masks = batch(C, H=20, W=20)
    counts = m.confusion(logits, masks)
    truth = masks[masks != IGNORE].tolist()
    answer = logits.argmax(1)[masks != IGNORE].tolist()
    assert counts.dtype == torch.long
    assert counts.tolist() == metrics.confusion_matrix(truth, answer).tolist()
    want = {
        "val_accuracy": metrics.accuracy_score(truth, answer),
        "val_miou": metrics.jaccard_score(truth, answer, average="macro"),
        "val_dice": metrics.f1_score(truth, answer, average="macro"),
    }
    assert m.scores(counts) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batch_size_changes_no_score(size):
    logits, masks = batch(3, B=9)
    parts = zip(logits.split(size), masks.split(size))
    assert torch.equal(sum(m.confusion(*part) for part in parts), m.confusion(logits, masks))


def test_a_class_that_never_occurs_is_left_out():
    counts = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert m.scores(counts)["val_miou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    counts[1, 2] = 1  # once answered it counts, with 0
    assert m.scores(counts)["val_miou"] == pytest.approx((6 / 9 + 3 / 7 + 0) / 3)


# --- linknet.py ----------------------------------------------------------------------------------


def test_rare_classes_weigh_more():
    """The weights are ENet's, 1 / ln(1.02 + share of the pixels)."""
    masks = torch.tensor([0] * 90 + [1] * 10 + [IGNORE] * 7).byte()
    want = [1 / math.log(1.92), 1 / math.log(1.12), 1 / math.log(1.02)]
    assert load("linknet").class_weights(masks, 3) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("scale", [1, 1e4])
def test_weighted_cross_entropy_is_that_of_torch(scale):
    logits, masks = batch(3, scale=scale)
    weights = [1.0, 5.0, 50.0]
    want = F.cross_entropy(logits, masks.long(), torch.tensor(weights), ignore_index=IGNORE)
    torch.testing.assert_close(load("linknet").weighted_ce(logits, masks, weights), want)


def test_weighted_cross_entropy_of_nothing():
    logits, masks = batch(3)
    loss = load("linknet").weighted_ce(logits, torch.full_like(masks, IGNORE), [1.0, 1.0, 1.0])
    assert loss.item() == 0
