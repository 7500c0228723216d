"""LinkNet, SegNet and U-Net are those of the papers; evaluate.py's scores are those of scikit-learn
and of the descriptions of the published definitions; constant answers are scored beside them."""

import argparse
import itertools
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, load
from sklearn import metrics

linknet, segnet, unet, e = map(load, ["linknet", "segnet", "unet", "evaluate"])

# --- sizes, counted from the papers --------------------------------------------------------------


def conv(a, b, side, bias=False):
    return a * b * side * side + bias * b


def conv_bn(a, b, side=3):
    return conv(a, b, side) + 2 * b


def resnet(depths):
    """A ResNet of basic blocks without its classifier."""
    total, a = conv_bn(3, 64, 7), 64
    for b, depth in zip([64, 128, 256, 512], depths):
        total += conv_bn(a, b) + (2 * depth - 1) * conv_bn(b, b)
        if a != b:
            total += conv_bn(a, b, 1)
        a = b
    return total


def linknet_decoder(a, b):
    return conv_bn(a, a // 4, 1) + conv_bn(a // 4, a // 4) + conv_bn(a // 4, b, 1)


def size_of(net):
    return sum(weight.numel() for weight in net.parameters())


@pytest.mark.parametrize(
    "encoder, depths, classes, million",
    [("resnet18", [2, 2, 2, 2], 12, 11.5), ("resnet34", [3, 4, 6, 3], 3, 21.6)],
)
def test_linknet_has_the_parameters_of_the_paper(encoder, depths, classes, million):
    want = resnet(depths) + conv_bn(64, 32) + conv_bn(32, 32) + conv(32, classes, 2, True)
    for a, b in [(512, 256), (256, 128), (128, 64), (64, 64)]:
        want += linknet_decoder(a, b)
    assert size_of(linknet.LinkNet(classes, encoder)) == want
    assert round(want / 1e6, 1) == million


def test_segnet_has_the_parameters_of_the_paper():
    """Of 29,449,932 with 12 classes, 7,936 are biases, for which batch normalisation has no use."""
    net = segnet.SegNet(12, 64)
    assert size_of(net) == 29_449_932 - 7_936


def test_unet_has_the_parameters_of_the_paper():
    widths, want = [64, 128, 256, 512, 1024], conv(64, 3, 1, True)
    for a, b in zip([3, *widths], widths):
        want += conv_bn(a, b) + conv_bn(b, b)
    for b, a in itertools.pairwise(widths):
        want += conv(a, b, 2, True) + conv_bn(2 * b, b) + conv_bn(b, b)
    assert size_of(unet.UNet(3, 64)) == want
    assert round(want / 1e6, 2) == 31.04


# --- the networks --------------------------------------------------------------------------------


def build(name):
    torch.manual_seed(0)
    if name == "linknet":
        return linknet.LinkNet(3, "resnet18")
    if name == "linknet subpixel":
        return linknet.LinkNet(3, "resnet18", "subpixel")
    if name == "segnet":
        return segnet.SegNet(3, 4)
    if name == "unet":
        return unet.UNet(3, 4)
    if name == "unet bilinear":
        return unet.UNet(3, 4, "bilinear")
    return unet.UNet(3, up="bilinear", encoder=name.split()[1])


VARIANTS = ["linknet", "linknet subpixel", "segnet", "unet", "unet bilinear"]
VARIANTS += ["unet resnet34", "unet efficientnet_b0"]
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [*VARIANTS[:-1], pytest.param(VARIANTS[-1], marks=SLOW)])
def test_the_program_is_the_network(name):
    """For every batch size, at a rectangular size, with normalisation that has seen data."""
    net = build(name)
    net.train()(torch.rand(4, 3, 32, 64))
    net.eval()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(net, (torch.zeros(2, 3, 32, 64),), dynamic_shapes=shapes).module()
    for B in [1, 2, 7]:
        x = torch.rand(B, 3, 32, 64)
        want = net(x)
        assert want.shape == (B, 3, 32, 64)
        torch.testing.assert_close(program(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_learns(name):
    net = build(name).eval()  # no block is left out at random
    net(torch.rand(2, 3, 64, 64)).square().mean().backward()
    for weight_name, weight in net.named_parameters():
        assert weight.grad is not None and weight.grad.any(), weight_name


def test_unpooling_writes_each_maximum_back_to_its_place():
    x = torch.rand(2, 3, 8, 8)
    pooled, places = F.max_pool2d(x, 2, return_indices=True)
    up = pooled.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(F.max_unpool2d(pooled, places, 2), torch.where(up == x, x, 0))


def test_bilinear_upsampling_and_a_1x1_convolution_may_be_swapped():
    convolution, upsample = unet.Up(6, 3, "bilinear").enlarge
    x = torch.rand(2, 6, 5, 7)
    torch.testing.assert_close(upsample(convolution(x)), convolution(upsample(x)))


# --- LinkNet's loss and schedules ----------------------------------------------------------------


def test_rarity():
    masks = torch.tensor([0] * 60 + [1] * 30 + [255] * 90 + [3] * 10).byte()
    want = [1 / math.log(1.02 + p) for p in (0.6, 0.3, 0, 0.1)]
    assert linknet.rarity(masks, 4).tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("C", [2, 5])
def test_weighted_ce(C):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, C, 6, 5, generator=g).requires_grad_()
    masks, weights = torch.randint(C, (3, 6, 5), generator=g), torch.rand(C, generator=g) + 0.5
    masks[0, :2] = 255
    got = linknet.weighted_ce(logits, *linknet.one_hot(masks, C), weights)
    want = F.cross_entropy(logits, masks, weights, ignore_index=255)
    torch.testing.assert_close(got, want)
    (a,) = torch.autograd.grad(got, logits)
    (b,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(a, b)
    nothing = linknet.one_hot(torch.full_like(masks, 255), C)
    assert linknet.weighted_ce(logits, *nothing, weights).item() == 0


def test_one_cycle_is_the_librarys():
    """torch ends its rise one step earlier, and its fall at a ten-thousandth."""
    steps = 2000
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.3, total_steps=steps, cycle_momentum=False
    )
    for step in range(steps):
        assert abs(linknet.one_cycle(step, steps, 0.3) - schedule.get_last_lr()[0]) < 0.0012
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("seed", range(3))
def test_plateau_is_the_librarys(seed):
    g = np.random.default_rng(seed)
    optimizer, history = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0), []
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.1, patience=5, threshold=0, eps=0
    )
    for loss in [*np.linspace(1, 0.5, 10), *(0.5 + 0.05 * g.standard_normal(60))]:
        history.append({"val_loss": float(loss)})
        schedule.step(float(loss))
        want = optimizer.param_groups[0]["lr"]
        assert linknet.plateau(history, 1.0) == pytest.approx(want, rel=1e-9)
    assert want < 1


@pytest.mark.parametrize(
    "schedule, want",
    [
        ("cosine", [0.933, 0.5, 0.067]),
        ("onecycle", [0.603, 0.812, 0.133]),
        ("plateau", [1, 1, 1]),
    ],
)
def test_schedules(schedule, want):
    """The rates at the end of three epochs of two steps."""
    args, got = linknet.parse_args(["--schedule", schedule, "--lr", "1"]), []
    for epoch in range(3):
        history = [{"val_loss": 1.0}] * epoch
        got.append(linknet.scheduled_lr(2 * epoch + 1, 6, history, args))
    assert got == pytest.approx(want, abs=1e-3)


# --- evaluate.py against scikit-learn ------------------------------------------------------------

IGNORE = 255
KINDS = pytest.mark.parametrize("classes", [["background", "foreground"], e.PETS])


def split(classes, n=21, seed=1):
    """Logits and masks of n photos, with pixels that do not count; the first is all background."""
    C, g = len(classes), torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, C, 9, 8, generator=g)
    masks = torch.randint(C, (n, 9, 8), generator=g).byte()
    masks[torch.rand(n, 9, 8, generator=g) < 0.1] = IGNORE
    masks[0] = classes.index("background")
    return logits, masks


def flat(logits, masks):
    """Truth and answer of every pixel that counts, as lists."""
    valid = masks != IGNORE
    return masks[valid].tolist(), logits.argmax(1)[valid].tolist()


def evaluated(logits, masks, classes, batch_size=4):
    """All scores as evaluate.py computes them; its photos are the numbers of the logits."""

    def segment(x):
        return logits[(255 * x[:, 0, 0, 0]).round().long()]

    args = argparse.Namespace(batch_size=batch_size, device="cpu")
    images = torch.arange(len(masks)).byte()[:, None, None, None].expand(-1, 3, 9, 8)
    counts, soft, _ = e.run_program(segment, images, masks, args)
    result = e.class_scores(counts, classes) | e.published_scores(counts, soft, classes)
    if classes == e.PETS:
        result |= e.pet_scores(counts, torch.arange(len(masks)) % 2 == 0)
    return result


@KINDS
def test_class_scores(classes):
    logits, masks = split(classes)
    truth, answer = flat(logits, masks)
    got = evaluated(logits, masks, classes)
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(truth, answer))
    for key, function in [
        ("iou", metrics.jaccard_score),
        ("dice", metrics.f1_score),
        ("f1", metrics.f1_score),
        ("precision", metrics.precision_score),
        ("recall", metrics.recall_score),
    ]:
        want = function(truth, answer, average=None, zero_division=0)
        assert [got["classes"][name][key] for name in classes] == pytest.approx(want.tolist())
        if key == "iou":
            key = "miou"
        assert got[key] == pytest.approx(want.mean())


@KINDS
def test_means_over_photos(classes):
    """A class that is neither in a photo nor in its answer counts as a full success."""
    logits, masks = split(classes)
    logits[0] = -9
    logits[0, classes.index("background")] = 9
    iou, dice = [], []
    for i in range(len(masks)):
        truth, answer = flat(logits[i : i + 1], masks[i : i + 1])
        kind = {"average": "macro", "zero_division": 1, "labels": list(range(len(classes)))}
        iou.append(metrics.jaccard_score(truth, answer, **kind))
        dice.append(metrics.f1_score(truth, answer, **kind))
    got = evaluated(logits, masks, classes)
    assert got["image_miou"] == pytest.approx(statistics.fmean(iou))
    assert got["image_dice"] == pytest.approx(statistics.fmean(dice))


def test_a_class_that_is_nowhere_is_left_out():
    masks = torch.ones(2, 9, 8).byte()
    masks[0, :2] = 0
    logits = 9.0 * F.one_hot(masks.long(), 3).movedim(-1, 1)
    got = evaluated(logits, masks, e.PETS)
    assert got["miou"] == got["dice"] == got["image_miou"] == 1
    assert got["D3_dice"] == got["D3_iou"] == got["D7_dice"] == 1
    assert got["classes"]["border"]["iou"] is None


def test_pet_scores():
    logits, masks = split(e.PETS)
    truth, answer = map(np.array, flat(logits, masks))
    got = evaluated(logits, masks, e.PETS)
    inside = truth != 2  # border pixels left out; a border that is answered is no pet
    want = metrics.jaccard_score(truth[inside] == 0, answer[inside] == 0)
    assert got["pet_iou_without_border"] == pytest.approx(want)
    want = metrics.jaccard_score(truth != 1, answer != 1)
    assert got["pet_iou_border_as_pet"] == pytest.approx(want)
    for species, first in [("cat", 0), ("dog", 1)]:
        truth, answer = flat(logits[first::2], masks[first::2])
        want = metrics.jaccard_score(truth, answer, average="macro")
        assert got[f"{species}_miou"] == pytest.approx(want)
        want = metrics.accuracy_score(truth, answer)
        assert got[f"{species}_accuracy"] == pytest.approx(want)


@KINDS
def test_the_batch_size_changes_no_score(classes):
    logits, masks = split(classes)
    one, all_ = [evaluated(logits, masks, classes, size) for size in (1, 64)]
    assert one.pop("classes") == all_.pop("classes")
    assert one == pytest.approx(all_, abs=5e-5)


# --- the published definitions, from their descriptions ------------------------------------------


def wanted(classes):
    """The classes that the published scores count: not the background, where there are but two."""
    if len(classes) == 2:
        return [1]
    return list(range(len(classes)))


def soft_sums(logits, masks, classes, twice=False):
    """|P and T| and |P| + |T| of each photo, over classes and pixels, in float64."""
    sums = []
    for x, y in zip(logits.double(), masks):
        both, total = 0.0, 0.0
        for c in wanted(classes):
            p, t = x[c].sigmoid()[y != IGNORE], (y[y != IGNORE] == c).double()
            if twice:
                p = p.sigmoid()
            both += (p * t).sum().item()
            total += (p.sum() + t.sum()).item()
        sums.append((both, total))
    return sums


def mean_overlap(sums):
    """Means of Dice and IoU."""
    dice = [2 * both / total for both, total in sums]
    iou = [both / (total - both) for both, total in sums]
    return statistics.fmean(dice), statistics.fmean(iou)


@KINDS
def test_d1_and_d2_are_soft_sums_of_each_photo(classes):
    logits, masks = split(classes)
    got = evaluated(logits, masks, classes)
    for key, twice in [("D1", False), ("D2", True)]:
        want = mean_overlap(soft_sums(logits, masks, classes, twice))
        assert (got[f"{key}_dice"], got[f"{key}_iou"]) == pytest.approx(want, rel=1e-4)


@KINDS
def test_d3_counts_32_photos_together(classes):
    logits, masks = split(classes, 70)
    kind = {"average": "macro", "zero_division": 0, "labels": wanted(classes)}
    dice, iou = [], []
    for x, y in zip(logits.split(32), masks.split(32)):
        dice.append(metrics.f1_score(*flat(x, y), **kind))
        iou.append(metrics.jaccard_score(*flat(x, y), **kind))
    got = evaluated(logits, masks, classes)
    assert got["D3_dice"] == pytest.approx(statistics.fmean(dice), abs=1e-6)
    assert got["D3_iou"] == pytest.approx(statistics.fmean(iou), abs=1e-6)


@KINDS
def test_d4_is_the_mean_accuracy_of_the_photos(classes):
    logits, masks = split(classes)
    each = [metrics.accuracy_score(*flat(x[None], y[None])) for x, y in zip(logits, masks)]
    got = evaluated(logits, masks, classes)
    assert got["D4_accuracy"] == pytest.approx(statistics.fmean(each))


@KINDS
def test_d5_is_what_is_looked_for(classes):
    """The foreground of two classes, else the first, all photos counted together."""
    logits, masks = split(classes)
    truth, answer = [np.array(labels) == wanted(classes)[0] for labels in flat(logits, masks)]
    got = evaluated(logits, masks, classes)
    assert got["D5_precision"] == pytest.approx(metrics.precision_score(truth, answer))
    assert got["D5_recall"] == pytest.approx(metrics.recall_score(truth, answer))
    assert got["D5_f1"] == pytest.approx(metrics.f1_score(truth, answer))
    assert got["D5_iou"] == pytest.approx(metrics.jaccard_score(truth, answer))


@KINDS
def test_d6_is_soft_over_four_photos(classes):
    logits, masks = split(classes, 22)
    sums, batches = soft_sums(logits, masks, classes), []
    for first in range(0, 22, 4):
        both, total = zip(*sums[first : first + 4])
        batches.append((sum(both), sum(total)))
    got = evaluated(logits, masks, classes)
    assert (got["D6_dice"], got["D6_iou"]) == pytest.approx(mean_overlap(batches), rel=1e-4)


@KINDS
def test_d7_counts_the_classes_that_are_in_the_photo(classes):
    """Mean Dice of each photo, mean of batches of 8; a photo with nothing to find is left out."""
    logits, masks = split(classes)
    batches = []
    for first in range(0, 21, 8):
        photos = []
        for x, y in zip(logits[first : first + 8], masks[first : first + 8]):
            truth, answer = flat(x[None], y[None])
            there = [c for c in wanted(classes) if c in truth]
            if there:
                dice = metrics.f1_score(truth, answer, labels=there, average="macro")
                photos.append(dice)
        batches.append(statistics.fmean(photos))
    got = evaluated(logits, masks, classes)
    assert got["D7_dice"] == pytest.approx(statistics.fmean(batches), abs=1e-6)


def test_a_perfect_network_has_a_ceiling_under_d2():
    """Answers of 0 and 1 get one more sigmoid, 0.5 and 0.731: no network can do better."""
    masks = split(e.PETS)[1]
    masks[masks == IGNORE] = 0
    logits = 200.0 * F.one_hot(masks.long(), 3).movedim(-1, 1) - 100
    got = evaluated(logits, masks, e.PETS)
    assert got["D2_dice"] == pytest.approx(0.5354, abs=5e-5)
    assert got["D2_iou"] == pytest.approx(0.3655, abs=5e-5)
    for key in ["D1_dice", "D3_dice", "D4_accuracy", "D5_f1", "D6_dice", "D7_dice"]:
        assert got[key] == pytest.approx(1, abs=1e-5), key


def test_d1_is_accuracy_where_answers_are_0_or_1():
    logits, masks = split(e.PETS)
    logits = 200.0 * F.one_hot(logits.argmax(1), 3).movedim(-1, 1) - 100
    got = evaluated(logits, masks, e.PETS)
    assert got["D1_dice"] == pytest.approx(got["D4_accuracy"], abs=1e-4)


# --- baselines -----------------------------------------------------------------------------------


def test_constant_answers_are_scored_too(here, capsys):
    """accuracy = the share of the class, IoU = that or 0, mIoU = that share / classes."""
    unet.main([*SMALL["unet"], "--frac", "0.05", "--epochs", "1"])
    capsys.readouterr()
    e.main([])
    out = capsys.readouterr().out
    masks = unet.draw_toy(256, [32, 32], seed=1)[1]
    for label, name in enumerate(e.PETS):
        share = (masks == label).float().mean().item()
        for value in [share, share / 3, 2 * share / (1 + share) / 3]:
            assert f"all {name}" in out and f" {value:.4f}" in out
