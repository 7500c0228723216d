"""Losses and scores against independent libraries and plain loops."""
import itertools, math

import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics
from torchmetrics.functional.segmentation import dice_score, mean_iou

from conftest import SEGMENTERS, load

m = load(SEGMENTERS[0])            # the losses and scores are the same text in every segmenter
IGNORE = 255

def batch(C, B=3, H=7, W=5, ignore=True, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, C, H, W, generator=g) * scale
    masks = torch.randint(max(2, C), (B, H, W), generator=g).byte()
    if ignore:
        masks[torch.rand(B, H, W, generator=g) < 0.2] = IGNORE
    return logits, masks

# --- losses ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("C", (1, 3))
def test_one_hot(C):
    masks = torch.tensor([[[0, 1, min(2, C), IGNORE]]]).byte()
    y, valid = m.one_hot(masks, C)
    want = [[[0, 1, 1, 0]]] if C == 1 else [[[1, 0, 0, 0]], [[0, 1, 0, 0]], [[0, 0, 1, 0]]]
    assert y.tolist() == [want] and valid.tolist() == [[[[1, 1, 1, 0]]]]
    assert y.dtype == valid.dtype == torch.float32

@pytest.mark.parametrize("C, scale", list(itertools.product((1, 3), (1, 30, 1e4))))
def test_bce(C, scale):
    logits, masks = batch(C, scale=scale)
    y, valid = m.one_hot(masks, C)
    keep = valid.bool().expand_as(y)
    want = F.binary_cross_entropy_with_logits(logits[keep], y[keep])
    torch.testing.assert_close(m.bce(logits, y, valid), want)

def test_bce_has_finite_gradients_at_extreme_logits():
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4]).view(1, 1, 2, 2).requires_grad_()
    y = torch.tensor([1.0, 0, 0, 1]).view(1, 1, 2, 2)
    loss = m.bce(logits, y, torch.ones(1, 1, 2, 2))
    loss.backward()
    assert loss.item() == 5000.0
    assert logits.grad.flatten().tolist() == [0, 0, 0.25, -0.25]

@pytest.mark.parametrize("name", ("bce", "dice_loss", "iou_loss"))
def test_gradients(name):
    logits, masks = batch(3, B=2, H=3, W=3)
    y, valid = (t.double() for t in m.one_hot(masks, 3))
    assert torch.autograd.gradcheck(lambda x: getattr(m, name)(x, y, valid), logits.double().requires_grad_())

@pytest.mark.parametrize("name, C", list(itertools.product(("dice_loss", "iou_loss"), (1, 3))))
def test_overlap_losses(name, C):
    logits, masks = batch(C, H=4, W=3)
    losses = []
    for b, c in itertools.product(range(len(masks)), range(C)):
        both = p_sum = t_sum = 0.0
        for h, w in itertools.product(range(4), range(3)):
            if masks[b, h, w] != IGNORE:
                p = 1 / (1 + math.exp(-logits[b, c, h, w]))
                t = float(masks[b, h, w] == (1 if C == 1 else c))
                both, p_sum, t_sum = both + p * t, p_sum + p, t_sum + t
        losses.append(1 - (2 * both + 1) / (p_sum + t_sum + 1) if name == "dice_loss" else
                      1 - (both + 1) / (p_sum + t_sum - both + 1))
    got = getattr(m, name)(logits, *m.one_hot(masks, C))
    assert got.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)

@pytest.mark.parametrize("name", ("bce", "dice_loss", "iou_loss"))
def test_ignored_pixels_do_not_count(name):
    logits, masks = batch(3)
    other = torch.where((masks == IGNORE)[:, None], -5 * logits, logits)
    y, valid = m.one_hot(masks, 3)
    assert getattr(m, name)(other, y, valid) == getattr(m, name)(logits, y, valid)
    nothing = m.one_hot(torch.full_like(masks, IGNORE), 3)
    assert getattr(m, name)(logits, *nothing).item() == 0

@pytest.mark.parametrize("name", ("bce", "dice_loss", "iou_loss"))
def test_perfect_is_zero_and_wrong_is_not(name):
    _, masks = batch(3, ignore=False)
    y, valid = m.one_hot(masks, 3)
    assert getattr(m, name)((2 * y - 1) * 100, y, valid).item() == pytest.approx(0, abs=1e-6)
    assert getattr(m, name)((1 - 2 * y) * 100, y, valid).item() > 0.8

def test_losses_are_summed_in_float32():
    logits, masks = batch(3)
    y, valid = m.one_hot(masks, 3)
    whole = m.segmentation_loss(logits.bfloat16(), masks, [m.bce, m.dice_loss, m.iou_loss])
    rounded = logits.bfloat16().float()
    assert whole.dtype == torch.float32
    assert whole.item() == pytest.approx(sum(f(rounded, y, valid).item() for f in
                                             (m.bce, m.dice_loss, m.iou_loss)), rel=1e-6)

# --- scores ---------------------------------------------------------------------------------------

def flat(logits, masks):
    """Valid pixels as lists for scikit-learn: truth, prediction."""
    hard = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    valid = masks != IGNORE
    return masks[valid].tolist(), hard[valid].tolist()

@pytest.mark.parametrize("C", (1, 2, 3, 7))
def test_scores(C):
    logits, masks = batch(C, H=20, W=20)
    truth, guess = flat(logits, masks)
    labels = list(range(max(2, C)))
    counts = m.confusion(logits, masks)
    assert counts.dtype == torch.long
    assert counts.tolist() == metrics.confusion_matrix(truth, guess, labels=labels).tolist()
    got, kind = m.scores(counts, C), {"labels": labels[-C:], "average": None}
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess), abs=1e-12)
    assert got["iou"] == pytest.approx(metrics.jaccard_score(truth, guess, **kind).tolist(), abs=1e-12)
    assert got["miou"] == pytest.approx(metrics.jaccard_score(truth, guess, **kind).mean(), abs=1e-12)
    assert got["dice"] == pytest.approx(metrics.f1_score(truth, guess, **kind).mean(), abs=1e-12)

def test_scores_against_torchmetrics():
    logits, masks = batch(4, B=1, H=30, W=30, ignore=False)
    kind = {"num_classes": 4, "input_format": "index", "include_background": True}
    got = m.scores(m.confusion(logits, masks), 4)
    hard = logits.argmax(1)
    assert got["miou"] == pytest.approx(mean_iou(hard, masks.long(), **kind).item(), abs=1e-6)
    assert got["dice"] == pytest.approx(
        dice_score(hard, masks.long(), average="macro", **kind).mean().item(), abs=1e-6)

@pytest.mark.parametrize("C", (1, 3))
def test_dice_is_two_iou_over_one_plus_iou(C):
    got = m.scores(m.confusion(*batch(C)), C)
    assert got["dice"] == pytest.approx(sum(2 * i / (1 + i) for i in got["iou"]) / C, abs=1e-12)

@pytest.mark.parametrize("size", (1, 2, 7))
def test_batch_size_changes_nothing(size):
    logits, masks = batch(3, B=9)
    parts = [m.confusion(x, y) for x, y in zip(logits.split(size), masks.split(size))]
    assert torch.equal(sum(parts), m.confusion(logits, masks))

def test_a_class_that_never_occurs_is_left_out():
    counts = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert m.scores(counts, 3)["miou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    counts[1, 2] = 1                   # once guessed it counts, with 0
    assert m.scores(counts, 3)["miou"] == pytest.approx((6 / 9 + 3 / 7 + 0) / 3)

def test_one_class_counts_the_foreground_only():
    got = m.scores(torch.tensor([[90, 2], [3, 5]]), 1)
    assert got["iou"] == pytest.approx([5 / 10]) and got["miou"] == pytest.approx(0.5)
    assert got["dice"] == pytest.approx(10 / 15) and got["accuracy"] == pytest.approx(0.95)

# --- the scores of evaluate.py --------------------------------------------------------------------

e = load("evaluate")
PETS = ["pet", "background", "border"]

def split(n=21, C=3, seed=1, size=(9, 8)):
    """A split of n images with ignored pixels, and one image whose truth is all background."""
    logits, masks = batch(C, n, *size, seed=seed)
    masks[0] = 1 if C > 1 else 0
    return logits, masks

def hard_of(logits):
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()

def counted(logits, masks):
    return e.image_counts(hard_of(logits), masks, max(2, logits.shape[1]))

@pytest.mark.parametrize("C", (1, 3))
def test_image_counts(C):
    logits, masks = split(C=C)
    for i, counts in enumerate(counted(logits, masks)):
        truth, guess = flat(logits[i:i + 1], masks[i:i + 1])
        want = metrics.confusion_matrix(truth, guess, labels=list(range(max(2, C))))
        assert counts.tolist() == want.tolist()

@pytest.mark.parametrize("C, names", ((1, ["foreground"]), (3, PETS)))
def test_class_scores(C, names):
    logits, masks = split(C=C)
    truth, guess = flat(logits, masks)
    kind = {"labels": list(range(max(2, C)))[-C:], "average": None, "zero_division": 0}
    got = e.class_scores(counted(logits, masks), names)
    for key, function in (("iou", metrics.jaccard_score), ("dice", metrics.f1_score),
                          ("f1", metrics.f1_score), ("precision", metrics.precision_score),
                          ("recall", metrics.recall_score)):
        want = function(truth, guess, **kind)
        assert [got["classes"][name][key] for name in names] == pytest.approx(want.tolist(), abs=1e-12)
        assert got["miou" if key == "iou" else key] == pytest.approx(want.mean(), abs=1e-12)
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess), abs=1e-12)

def slow_image_mean(logits, masks, C, top):
    """Mean over images and classes of top(hit, truth, guess), 1 where both are empty."""
    values = []
    for x, y in zip(logits, masks):
        truth, guess = flat(x[None], y[None])
        for c in [1] if C == 1 else range(C):
            hit = sum(t == g == c for t, g in zip(truth, guess))
            values.append(top(hit, truth.count(c), guess.count(c)) if c in truth + guess else 1.0)
    return sum(values) / len(values)

@pytest.mark.parametrize("C, names", ((1, ["foreground"]), (3, PETS)))
def test_image_means(C, names):
    logits, masks = split(C=C)
    logits[0] = torch.tensor([-9.0, 9, -9])[-C:].view(C, 1, 1) if C > 1 else -9   # empty on empty
    got = e.class_scores(counted(logits, masks), names)
    assert got["image_miou"] == pytest.approx(
        slow_image_mean(logits, masks, C, lambda hit, t, p: hit / (t + p - hit)), abs=1e-12)
    assert got["image_dice"] == pytest.approx(
        slow_image_mean(logits, masks, C, lambda hit, t, p: 2 * hit / (t + p)), abs=1e-12)

def test_empty_masks():
    logits, masks = torch.full((2, 1, 4, 4), -1.0), torch.zeros(2, 4, 4).byte()
    got = e.class_scores(counted(logits, masks), ["foreground"])
    assert got["image_miou"] == got["image_dice"] == got["accuracy"] == 1
    assert got["miou"] == 1 and got["classes"]["foreground"]["iou"] is None
    logits[0, 0, 0, 0] = 1             # one wrong pixel: that image is all wrong, the other is right
    assert e.class_scores(counted(logits, masks), ["foreground"])["image_miou"] == 0.5

def test_pet_scores():
    logits, masks = split()
    breeds = (["Birman", "beagle", "Bombay"] * 9)[:len(masks)]
    got = e.pet_scores(counted(logits, masks), breeds)
    truth, guess = map(torch.tensor, flat(logits, masks))
    inside = truth != 2                # border pixels left out; guessed border is not pet
    assert got["pet_iou_without_border"] == pytest.approx(
        metrics.jaccard_score(truth[inside] == 0, guess[inside] == 0), abs=1e-12)
    assert got["pet_iou_border_as_pet"] == pytest.approx(
        metrics.jaccard_score(truth != 1, guess != 1), abs=1e-12)
    for kind, which in (("cat", [b[0] == "B" for b in breeds]), ("dog", [b[0] == "b" for b in breeds])):
        truth, guess = flat(logits[which], masks[which])
        assert got[f"{kind}_miou"] == pytest.approx(
            metrics.jaccard_score(truth, guess, average="macro"), abs=1e-12)
        assert got[f"{kind}_accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess), abs=1e-12)

# --- the definitions behind published numbers, from their descriptions -----------------------------

def published(logits, masks, names):
    return e.published_scores(counted(logits, masks), e.soft_sums(logits, masks), names)

def slow_soft(logits, masks, C, twice):
    """[(|P and T|, |P|, |T|)] of each image over all channels and valid pixels, in numpy's float64."""
    out = []
    for x, y in zip(logits.double(), masks):
        valid = y != IGNORE
        p = 1 / (1 + torch.exp(-x))
        p = 1 / (1 + torch.exp(-p)) if twice else p
        t = torch.stack([(y == (1 if C == 1 else c)).double() for c in range(C)])
        out.append([(p * t)[:, valid].sum().item(), p[:, valid].sum().item(), t[:, valid].sum().item()])
    return out

CASES = pytest.mark.parametrize("C, names", ((1, ["foreground"]), (3, PETS)))

@CASES
@pytest.mark.parametrize("key, twice", (("D1", False), ("D2", True)))
def test_d1_d2(key, twice, C, names):
    logits, masks = split(C=C)
    got, s, sums = published(logits, masks, names), 1e-5, slow_soft(logits, masks, C, twice)
    dice = [2 * (i + s) / (p + t + s) for i, p, t in sums]
    iou = [(i + s) / (p + t - i + s) for i, p, t in sums]
    assert got[f"{key}_dice"] == pytest.approx(sum(dice) / len(dice), rel=1e-5)
    assert got[f"{key}_iou"] == pytest.approx(sum(iou) / len(iou), rel=1e-5)

def test_a_perfect_network_has_a_ceiling_under_d2():
    """Outputs of 0 and 1 get a sigmoid on top: 0.5 and 0.731, and no network can do better."""
    masks = batch(3, ignore=False, H=40, W=40)[1]
    logits = (m.one_hot(masks, 3)[0] * 2 - 1) * 100
    got = published(logits, masks, PETS)
    assert got["D2_dice"] == pytest.approx(0.5354, abs=5e-5)
    assert got["D2_iou"] == pytest.approx(0.3655, abs=5e-5)
    for key in ("D1_dice", "D1_iou", "D3_dice", "D3_iou", "D4_accuracy", "D5_f1", "D6_dice", "D6_iou", "D7_dice"):
        assert got[key] == pytest.approx(1, abs=1e-5), key

def test_d1_is_pixel_accuracy_when_the_sigmoids_are_saturated():
    logits, masks = split(40, seed=3)
    logits = (F.one_hot(logits.argmax(1), 3).movedim(-1, 1) * 2 - 1) * 100.0
    got = published(logits, masks, PETS)
    assert got["D1_dice"] == pytest.approx(got["D4_accuracy"], abs=1e-5)

@CASES
def test_d3(C, names):
    """Hard, macro over classes, pooled in batches of 32, mean over batches, the last one alike."""
    logits, masks = split(70, C)
    dice, iou = [], []
    for x, y in zip(logits.split(32), masks.split(32)):
        kind = {"labels": list(range(max(2, C)))[-C:], "average": "macro", "zero_division": 0}
        dice.append(metrics.f1_score(*flat(x, y), **kind))
        iou.append(metrics.jaccard_score(*flat(x, y), **kind))
    got = published(logits, masks, names)
    assert got["D3_dice"] == pytest.approx(sum(dice) / 3, abs=1e-9)
    assert got["D3_iou"] == pytest.approx(sum(iou) / 3, abs=1e-6)          # it smooths with 1e-6

@CASES
def test_d4(C, names):
    logits, masks = split(C=C)
    each = [metrics.accuracy_score(*flat(x[None], y[None])) for x, y in zip(logits, masks)]
    assert published(logits, masks, names)["D4_accuracy"] == pytest.approx(sum(each) / len(each), abs=1e-12)

@CASES
def test_d5(C, names):
    """Precision, recall, F1 and IoU of the first class (of one class: the foreground), pooled."""
    logits, masks = split(C=C)
    truth, guess = (torch.tensor(t) == (1 if C == 1 else 0) for t in flat(logits, masks))
    got = published(logits, masks, names)
    for key, function in (("precision", metrics.precision_score), ("recall", metrics.recall_score),
                          ("f1", metrics.f1_score), ("iou", metrics.jaccard_score)):
        assert got[f"D5_{key}"] == pytest.approx(function(truth, guess), abs=1e-12)

@CASES
def test_d6(C, names):
    """Soft, summed over a batch of 4, mean over batches."""
    logits, masks = split(22, C)
    sums, dice, iou = slow_soft(logits, masks, C, False), [], []
    for first in range(0, 22, 4):
        i, p, t = (sum(column) for column in zip(*sums[first:first + 4]))
        dice.append((2 * i + 1e-6) / (p + t + 1e-6))
        iou.append((i + 1e-6) / (p + t - i + 1e-6))
    got = published(logits, masks, names)
    assert got["D6_dice"] == pytest.approx(sum(dice) / len(dice), rel=1e-5)
    assert got["D6_iou"] == pytest.approx(sum(iou) / len(iou), rel=1e-5)

@CASES
def test_d7(C, names):
    """Mean Dice of each image over the classes in its truth, mean of batches of 8."""
    logits, masks = split(21, C)
    images = []
    for x, y in zip(logits, masks):
        truth, guess = flat(x[None], y[None])
        present = [c for c in ([1] if C == 1 else range(C)) if c in truth]
        each = [2 * sum(t == g == c for t, g in zip(truth, guess)) / (truth.count(c) + guess.count(c))
                for c in present]
        images += [sum(each) / len(each)] if each else [math.nan]          # a photo of nothing: left out
    batches = [images[i:i + 8] for i in range(0, len(images), 8)]
    batches = [[value for value in batch if value == value] for batch in batches]
    want = sum(sum(b) / len(b) for b in batches) / len(batches)
    assert published(logits, masks, names)["D7_dice"] == pytest.approx(want, abs=1e-6)     # float32

def test_classes_that_are_absent_lower_nothing():
    """A perfect answer without borders, and two photos, one without a pet: Dice is 1 in D3 and D7."""
    masks = torch.ones(2, 4, 4).byte()
    masks[0, :2] = 0
    logits = F.one_hot(masks.long(), 3).movedim(-1, 1) * 9.0
    got = published(logits, masks, PETS)
    assert got["D3_dice"] == got["D7_dice"] == got["D3_iou"] == 1
    pet = published(4.5 - logits[:, 1:2], 1 - masks, ["pet"])
    assert pet["D7_dice"] == 1

def test_published_scores_are_finite_for_constant_answers():
    logits, masks = torch.zeros(9, 3, 4, 4), torch.full((9, 4, 4), 1).byte()
    logits[:, 1] = 5
    assert all(math.isfinite(value) for value in published(logits, masks, PETS).values())
