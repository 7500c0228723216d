"""LinkNet, SegNet and U-Net are those of the papers; evaluate.py's scores are those of scikit-learn
and of the descriptions of the published definitions; constant answers are scored beside them."""

import argparse
import itertools
import statistics

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


def size_of(net):
    return sum(weight.numel() for weight in net.parameters())


@pytest.mark.parametrize(
    "encoder, depths, classes, million",
    [("resnet18", [2, 2, 2, 2], 12, 11.5), ("resnet34", [3, 4, 6, 3], 3, 21.6)],
)
def test_linknet_has_the_parameters_of_the_paper(encoder, depths, classes, million):
    want = resnet(depths) + conv_bn(64, 32) + conv_bn(32, 32) + conv(32, classes, 2, True)
    for a, b in [(512, 256), (256, 128), (128, 64), (64, 64)]:
        want += conv_bn(a, a // 4, 1) + conv_bn(a // 4, a // 4) + conv_bn(a // 4, b, 1)
    assert size_of(linknet.LinkNet(classes, encoder)) == want
    assert round(want / 1e6, 1) == million


def test_segnet_has_the_parameters_of_the_paper():
    """Of 29,449,932 with 12 classes, 7,936 are biases, for which batch normalisation has no use."""
    net = segnet.SegNet(12, 64)
    assert size_of(net) - size_of(net.painter) == 29_449_932 - 7_936


def test_unet_has_the_parameters_of_the_paper():
    widths, want = [64, 128, 256, 512, 1024], conv(64, 3, 1, True)
    for a, b in zip([3, *widths], widths):
        want += conv_bn(a, b) + conv_bn(b, b)
    for b, a in itertools.pairwise(widths):
        want += conv(a, b, 2, True) + conv_bn(2 * b, b) + conv_bn(b, b)
    assert size_of(unet.UNet(3, 64)) == want
    assert round(want / 1e6, 2) == 31.04


# --- the networks --------------------------------------------------------------------------------


NETWORKS = {
    "linknet": lambda: linknet.LinkNet(3),
    "linknet subpixel": lambda: linknet.LinkNet(3, up="subpixel"),
    "segnet": lambda: segnet.SegNet(3, 4),
    "unet": lambda: unet.UNet(3, 4),
    "unet bilinear": lambda: unet.UNet(3, 4, "bilinear"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_program_is_the_network(name):
    """For every batch size, at a rectangular size, with normalisation that has seen data."""
    net = NETWORKS[name]()
    net.train()(torch.rand(4, 3, 32, 64))
    net.eval()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(net, (torch.zeros(2, 3, 32, 64),), dynamic_shapes=shapes).module()
    for B in [1, 2, 7]:
        x = torch.rand(B, 3, 32, 64)
        want = net(x)
        assert want.shape == (B, 3, 32, 64)
        torch.testing.assert_close(program(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_learns(name):
    torch.manual_seed(0)
    net, x = NETWORKS[name](), torch.rand(2, 3, 64, 64)
    loss = net(x).square().mean()
    if name == "segnet":  # its head of colours
        loss = loss + segnet.fill_loss(net, x)
    loss.backward()
    for weight_name, weight in net.named_parameters():
        assert weight.grad is not None and weight.grad.any(), weight_name


def test_subpixel_upsampling_starts_without_a_pattern():
    """ICNR: the four pixels of each 2x2 block are equal."""
    out = linknet.doubled(6, 3, "subpixel")(torch.rand(2, 6, 5, 7))
    assert out.shape == (2, 3, 10, 14)
    one = out[:, :, ::2, ::2]
    assert torch.equal(out, one.repeat_interleave(2, 2).repeat_interleave(2, 3))


# --- SegNet's pre-training -----------------------------------------------------------------------


def test_what_is_hidden_must_be_filled_in():
    """A network that answers with what it sees has an error of 0.25 on white photos, where grey
    hides them, and of 0 on grey ones."""
    inputs = []

    def features(x):
        inputs.append(x)
        return x

    model = argparse.Namespace(features=features, painter=lambda maps: maps)
    assert segnet.fill_loss(model, torch.ones(64, 3, 32, 64)).item() == pytest.approx(0.25)
    assert segnet.fill_loss(model, torch.full((64, 3, 32, 64), 0.5)).item() == 0
    hidden = (inputs[0] == 0.5).float()
    assert torch.equal(
        hidden, F.avg_pool2d(hidden, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    )
    assert hidden.mean().item() == pytest.approx(0.6, abs=0.05)


def test_pretraining_looks_at_no_label():
    images, masks = segnet.draw_toy(8, [32, 32], seed=0)
    args = segnet.parse_args(["--pretrain", "1", "--epochs", "2", "--device", "cpu"])
    weights = []
    for labels in [masks, 2 - masks]:
        torch.manual_seed(0)
        net = segnet.SegNet(3, 4)
        optimizer = torch.optim.AdamW(net.parameters(), args.lr)
        for epoch in [0, 1]:
            segnet.segnet_epoch(net, optimizer, images, labels, args, epoch)
            weights.append(torch.nn.utils.parameters_to_vector(net.parameters()))
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[1], weights[3])


# --- evaluate.py against scikit-learn ------------------------------------------------------------

IGNORE = 255


def split(classes):
    """Logits and masks of 70 photos, with pixels that do not count; the first is all background, in
    truth and in the answer."""
    C, g = len(classes), torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(70, C, 9, 8, generator=g)
    masks = torch.randint(C, (70, 9, 8), generator=g).byte()
    masks[torch.rand(70, 9, 8, generator=g) < 0.1] = IGNORE
    background = classes.index("background")
    masks[0] = background
    logits[0, background] += 30
    return logits, masks


def flat(logits, masks):
    """Truth and answer of every pixel that counts."""
    valid = masks != IGNORE
    return masks[valid].numpy(), logits.argmax(1)[valid].numpy()


def each_photo(logits, masks):
    """The same for one photo after the other."""
    return [flat(x[None], y[None]) for x, y in zip(logits, masks)]


def evaluated(logits, masks, classes, batch_size=4):
    """All scores as evaluate.py computes them; its photos are the numbers of the logits."""

    def segment(x):
        return logits[(255 * x[:, 0, 0, 0]).round().long()]

    args = argparse.Namespace(batch_size=batch_size, device="cpu")
    images = torch.arange(len(masks)).byte()[:, None, None, None].expand(-1, 3, 9, 8)
    counts, soft = e.run_program(segment, images, masks, args)
    result = e.class_scores(counts, classes) | e.published_scores(counts, soft, classes)
    if classes == e.PETS:
        result |= e.pet_scores(counts, torch.arange(len(masks)) % 2 == 0)
    return result


@pytest.fixture(scope="module", params=[["background", "foreground"], e.PETS], ids=["two", "pets"])
def case(request):
    """Logits, masks, names of the classes, and the scores."""
    logits, masks = split(request.param)
    return logits, masks, request.param, evaluated(logits, masks, request.param)


def test_class_scores(case):
    logits, masks, classes, got = case
    truth, answer = flat(logits, masks)
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(truth, answer))
    for key, function in [
        ("iou", metrics.jaccard_score),
        ("dice", metrics.f1_score),
        ("precision", metrics.precision_score),
        ("recall", metrics.recall_score),
    ]:
        want = function(truth, answer, average=None)
        assert [got["classes"][name][key] for name in classes] == pytest.approx(want.tolist())
        mean = got["miou"] if key == "iou" else got[key]
        assert mean == pytest.approx(want.mean())


def test_a_class_that_is_nowhere_is_left_out():
    masks = torch.ones(2, 9, 8).byte()
    masks[0, :2] = 0
    logits = 9.0 * F.one_hot(masks.long(), 3).movedim(-1, 1)
    got = evaluated(logits, masks, e.PETS)
    assert got["miou"] == got["dice"] == 1
    assert got["D3_dice"] == got["D3_iou"] == got["D7_dice"] == 1
    assert got["classes"]["border"]["iou"] is None


def test_pet_scores():
    logits, masks = split(e.PETS)
    got = evaluated(logits, masks, e.PETS)
    for species, first in [("cat", 0), ("dog", 1)]:
        truth, answer = flat(logits[first::2], masks[first::2])
        want = metrics.jaccard_score(truth, answer, average="macro")
        assert got[f"{species}_miou"] == pytest.approx(want)
        want = metrics.accuracy_score(truth, answer)
        assert got[f"{species}_accuracy"] == pytest.approx(want)


def test_the_batch_size_changes_no_score(case):
    logits, masks, classes, got = case
    for size in [1, 64]:
        other = evaluated(logits, masks, classes, size)
        assert other.pop("classes") == got["classes"]
        for key, value in other.items():
            assert value == pytest.approx(got[key], abs=5e-5), key


# --- the published definitions, from their descriptions ------------------------------------------


def wanted(classes):
    """The classes that the published scores count: not the background, where there are but two."""
    if len(classes) == 2:
        return [1]
    return list(range(len(classes)))


def soft_overlap(logits, masks, classes, twice=False, together=1):
    """Means of Dice and IoU in float64, of so many photos counted together, over classes and pixels
    with a sigmoid as the answer, or a sigmoid of that."""
    dice, iou = [], []
    for x, y in zip(logits.double().split(together), masks.split(together)):
        both, total = 0.0, 0.0
        for c in wanted(classes):
            p, t = x[:, c].sigmoid()[y != IGNORE], (y[y != IGNORE] == c).double()
            if twice:
                p = p.sigmoid()
            both += (p * t).sum().item()
            total += (p.sum() + t.sum()).item()
        dice.append(2 * both / total)
        iou.append(both / (total - both))
    return statistics.fmean(dice), statistics.fmean(iou)


@pytest.mark.parametrize("key, how", [("D1", {}), ("D2", {"twice": True}), ("D6", {"together": 4})])
def test_d1_d2_and_d6_are_soft(key, how, case):
    logits, masks, classes, got = case
    want = soft_overlap(logits, masks, classes, **how)
    assert (got[f"{key}_dice"], got[f"{key}_iou"]) == pytest.approx(want, rel=1e-4)


def test_d3_counts_32_photos_together(case):
    logits, masks, classes, got = case
    kind = {"average": "macro", "labels": wanted(classes)}
    batches = [flat(x, y) for x, y in zip(logits.split(32), masks.split(32))]
    dice = [metrics.f1_score(*batch, **kind) for batch in batches]
    iou = [metrics.jaccard_score(*batch, **kind) for batch in batches]
    assert got["D3_dice"] == pytest.approx(statistics.fmean(dice), abs=1e-6)
    assert got["D3_iou"] == pytest.approx(statistics.fmean(iou), abs=1e-6)


def test_d4_is_the_mean_accuracy_of_the_photos(case):
    logits, masks, _, got = case
    accuracies = [metrics.accuracy_score(*photo) for photo in each_photo(logits, masks)]
    assert got["D4_accuracy"] == pytest.approx(statistics.fmean(accuracies))


def test_d5_is_of_the_first_class_alone(case):
    logits, masks, classes, got = case
    first = wanted(classes)[0]
    assert got["D5_iou"] == pytest.approx(got["classes"][classes[first]]["iou"])
    truth, answer = flat(logits, masks)
    assert got["D5_iou"] == pytest.approx(metrics.jaccard_score(truth == first, answer == first))


def test_d7_counts_the_classes_that_are_in_the_photo(case):
    """Mean Dice of each photo, mean of batches of 8; a photo with nothing to find is left out."""
    logits, masks, classes, got = case
    batches = []
    for x, y in zip(logits.split(8), masks.split(8)):
        photos = []
        for truth, answer in each_photo(x, y):
            there = [c for c in wanted(classes) if c in truth]
            if there:
                photos.append(metrics.f1_score(truth, answer, labels=there, average="macro"))
        batches.append(statistics.fmean(photos))
    assert got["D7_dice"] == pytest.approx(statistics.fmean(batches), abs=1e-6)


def test_a_perfect_network_has_a_ceiling_under_d2():
    """Answers of 0 and 1 get one more sigmoid, 0.5 and 0.731: no network can do better."""
    masks = split(e.PETS)[1]
    masks[masks == IGNORE] = 0
    logits = 200.0 * F.one_hot(masks.long(), 3).movedim(-1, 1) - 100
    got = evaluated(logits, masks, e.PETS)
    assert got["D2_dice"] == pytest.approx(0.5354, abs=5e-5)
    assert got["D2_iou"] == pytest.approx(0.3655, abs=5e-5)
    for key in ["D1_dice", "D3_dice", "D4_accuracy", "D6_dice", "D7_dice"]:
        assert got[key] == pytest.approx(1, abs=1e-5), key


# --- baselines -----------------------------------------------------------------------------------


def test_constant_answers_are_scored_too(here, capsys):
    """accuracy = the share of the class, IoU = that or 0, mIoU = that share / classes."""
    unet.main([*SMALL["unet"], "--frac", "0.05", "--epochs", "1"])
    capsys.readouterr()
    e.main([])
    out = capsys.readouterr().out
    masks = unet.draw_toy(256, [32, 32], seed=2)[1]
    for label, name in enumerate(e.PETS):
        share = (masks == label).float().mean().item()
        for value in [share, share / 3, 2 * share / (1 + share) / 3]:
            assert f"all {name}" in out and f" {value:.4f}" in out
