"""Losses and scores against independent libraries and plain loops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load
from sklearn import metrics
from torchmetrics.functional.segmentation import dice_score, mean_iou

m = load("unet")  # losses and scores are the same text in every segmenter (test_copies.py)
IGNORE = 255
each_loss = pytest.mark.parametrize("loss", [m.bce_loss, m.dice_loss, m.iou_loss])


def batch(C, B=3, H=7, W=5, ignore=True, scale=3.0):
    """Random logits and labels; a fifth of the pixels does not count."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, C, H, W, generator=g) * scale
    masks = torch.randint(C, (B, H, W), generator=g).byte()
    if ignore:
        masks[torch.rand(B, H, W, generator=g) < 0.2] = IGNORE
    return logits, masks


# --- losses --------------------------------------------------------------------------------------


def test_one_hot():
    y, valid = m.one_hot(torch.tensor([[[0, 1, 2, IGNORE]]]).byte(), 3)
    assert y.tolist() == [[[[1, 0, 0, 0]], [[0, 1, 0, 0]], [[0, 0, 1, 0]]]]
    assert valid.tolist() == [[[[1, 1, 1, 0]]]]
    assert y.dtype == valid.dtype == torch.float32


@pytest.mark.parametrize("C", [2, 3])
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_bce_is_that_of_torch(C, scale):
    logits, masks = batch(C, scale=scale)
    y, valid = m.one_hot(masks, C)
    counts = valid.bool().expand_as(y)
    want = F.binary_cross_entropy_with_logits(logits[counts], y[counts])
    torch.testing.assert_close(m.bce_loss(logits, y, valid), want)


def test_bce_at_extreme_logits():
    """Right or wrong by 10,000: the loss and its gradient stay finite."""
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4]).view(1, 1, 2, 2).requires_grad_()
    y = torch.tensor([1.0, 0, 0, 1]).view(1, 1, 2, 2)
    loss = m.bce_loss(logits, y, torch.ones(1, 1, 2, 2))
    loss.backward()
    assert loss.item() == 5000
    assert logits.grad.flatten().tolist() == [0, 0, 0.25, -0.25]


@pytest.mark.parametrize("name", ["dice", "iou"])
def test_overlap_losses_are_those_of_a_plain_loop(name):
    logits, masks = batch(3, H=4, W=3)
    losses = []
    for b, c in itertools.product(range(3), range(3)):
        both, answer, truth = 0, 0, 0
        for h, w in itertools.product(range(4), range(3)):
            if masks[b, h, w] != IGNORE:
                p = 1 / (1 + math.exp(-logits[b, c, h, w]))
                t = float(masks[b, h, w] == c)
                both, answer, truth = both + p * t, answer + p, truth + t
        if name == "dice":
            losses.append(1 - (2 * both + 1) / (answer + truth + 1))
        else:
            losses.append(1 - (both + 1) / (answer + truth - both + 1))
    got = m.LOSSES[name](logits, *m.one_hot(masks, 3))
    assert got.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@each_loss
def test_gradients(loss):
    logits, masks = batch(3, B=2, H=3, W=3)
    y, valid = m.one_hot(masks, 3)
    y, valid, logits = y.double(), valid.double(), logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, y, valid), logits)


@each_loss
def test_ignored_pixels_do_not_count(loss):
    logits, masks = batch(3)
    y, valid = m.one_hot(masks, 3)
    other = torch.where(valid == 0, -5 * logits, logits)
    assert loss(other, y, valid) == loss(logits, y, valid)


@each_loss
def test_nothing_to_count_is_no_loss(loss):
    logits, masks = batch(3)
    nothing = m.one_hot(torch.full_like(masks, IGNORE), 3)
    assert loss(logits, *nothing).item() == 0


@each_loss
def test_a_class_that_is_not_there(loss):
    """An empty mask that is answered with nothing costs nothing; any answer costs."""
    y, valid = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    nothing, something = torch.full_like(y, -100), torch.full_like(y, 1)
    assert loss(nothing, y, valid).item() == pytest.approx(0, abs=1e-6)
    assert loss(something, y, valid).item() > 0.5


@each_loss
def test_right_costs_nothing_and_wrong_costs(loss):
    _, masks = batch(3, ignore=False)
    y, valid = m.one_hot(masks, 3)
    assert loss(200 * y - 100, y, valid).item() == pytest.approx(0, abs=1e-6)
    assert loss(100 - 200 * y, y, valid).item() > 0.8


@pytest.mark.parametrize("names", ["bce", "dice", "iou", "bce+dice", "bce+dice+iou"])
def test_the_loss_is_the_sum_that_was_named(names):
    logits, masks = batch(3)
    y, valid = m.one_hot(masks, 3)
    want = sum(m.LOSSES[name](logits, y, valid) for name in names.split("+"))
    assert m.segmentation_loss(logits, masks, names) == want


def test_losses_are_computed_in_float32():
    logits, masks = batch(3)
    half = logits.bfloat16()
    loss = m.segmentation_loss(half, masks, "bce+dice")
    assert loss.dtype == torch.float32
    assert loss == m.segmentation_loss(half.float(), masks, "bce+dice")


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [2, 3, 7])
def test_scores_are_those_of_scikit_learn(C):
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


def test_scores_are_those_of_torchmetrics():
    logits, masks = batch(4, B=1, H=30, W=30, ignore=False)
    got = m.scores(m.confusion(logits, masks))
    pair = logits.argmax(1), masks.long()
    miou = mean_iou(*pair, num_classes=4, input_format="index")
    dice = dice_score(*pair, num_classes=4, input_format="index", average="macro")
    assert got["val_miou"] == pytest.approx(miou.item(), abs=1e-6)
    assert got["val_dice"] == pytest.approx(dice.item(), abs=1e-6)


def test_dice_is_two_iou_over_one_plus_iou():
    counts = m.confusion(*batch(3))
    both = counts.diag()
    answer, truth = counts.sum(0), counts.sum(1)
    iou = both / (answer + truth - both)
    dice = 2 * both / (answer + truth)
    torch.testing.assert_close(dice, 2 * iou / (1 + iou))
    assert m.scores(counts)["val_dice"] == pytest.approx(dice.mean().item(), abs=1e-6)


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
    weights = load("linknet").rarity(masks, 3)
    assert weights.tolist() == pytest.approx(
        [1 / math.log(1.92), 1 / math.log(1.12), 50.5], abs=0.01
    )


def test_weighted_cross_entropy_is_that_of_torch():
    logits, masks = batch(3)
    weights = torch.tensor([1.0, 5.0, 50.0])
    want = F.cross_entropy(logits, masks.long(), weights, ignore_index=IGNORE)
    got = load("linknet").weighted_ce(logits, *m.one_hot(masks, 3), weights)
    torch.testing.assert_close(got, want)
