"""SegNet: pooling remembers where each maximum stood, un-pooling puts it back.

WHAT IT DOES  Photos (B, 3, H, W) become logits (B, C, H, W), a score of every
class for every pixel (Badrinarayanan et al. 2017). The encoder has VGG-16's
convolutions and poolings, the decoder the same mirrored; what is handed across
is not the maps, but the place of the largest of each four values.

    16 x 64 x 64                                        channels x 64 x 64
      16 x 32 x 32 ---------------- places ---------------> 16 x 64 x 64
        32 x 16 x 16 -------------- places -------------> 16 x 32 x 32
          64 x 8 x 8 -------------- places -----------> 32 x 16 x 16
            128 x 4 x 4 ----------- places ---------> 64 x 8 x 8

YOU WILL LEARN  un-pooling with indices, which is the whole idea -> SegNet; a
masked autoencoder of a plain convolutional network -> fill_in, pretrain; how
its weights become the start of a segmenter -> take_over; losses by hand ->
bce_loss, dice_loss

RUN IT  python segnet.py                         drawn cats and dogs
        python segnet.py --resume --epochs 24    goes on where the run ended
        python segnet.py --pretrain              learns from photos alone, then
        python segnet.py --init checkpoints/segnet_pretrain/best.pt
        python segnet.py --data pets --size 96 --width 32
        python evaluate.py checkpoints/segnet    scores on photos never seen

WHAT TO EXPECT  TODO
DIFFERS FROM THE PAPER  Smaller (its own: --stages 5 --width 64); AdamW, BCE +
Dice, no weights of VGG-16 or of the classes. --pretrain is not in the paper.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets
from torchvision.utils import save_image

SCRIPT = "segnet.py"
ENDINGS = Image.registered_extensions()
IGNORE = 255  # label of pixels that count neither in a loss nor in a score
FILL = 0.5  # grey, in the place of what is hidden


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def flag(name, default, help):
        p.add_argument(name, default=default, type=type(default), help=help)

    flag("--data", "toy", "toy, pets, or a folder with images/ and masks/")
    flag("--root", "data", "where pets lie or are downloaded to")
    p.add_argument("--size", type=int, nargs="+", default=[64], help="side in pixels, or H W")
    flag("--frac", 1.0, "share of the training photos")
    p.add_argument("--ignore", type=int, help="label of a mask that does not count")
    p.add_argument("--pretrain", action="store_true", help="restore masked photos, without labels")
    flag("--init", "none", "weights to start from: RUN/best.pt, for instance of --pretrain")
    flag("--width", 16, "channels at full size; paper: 64")
    p.add_argument("--stages", type=int, choices=range(1, 6), default=4, help="halvings; paper: 5")
    flag("--loss", "bce+dice", "bce, dice, iou, or a sum of them")
    flag("--epochs", 16, "passes over the training photos")
    flag("--batch-size", 32, "halve it if memory runs out")
    flag("--lr", 2e-3, "peak of the learning rate; halve it if the loss jumps")
    flag("--seed", 0, "moves weights, order and augmentation")
    flag("--device", str(torch.accelerator.current_accelerator(True) or "cpu"), "cuda, mps, cpu")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, same flags")
    flag("--out", "checkpoints/segnet", "the run's folder; with --pretrain: segnet_pretrain")
    args = p.parse_args(argv)
    if args.pretrain:
        p.set_defaults(out="checkpoints/segnet_pretrain")
        args = p.parse_args(argv)
    if args.resume:  # the run's own flags, but those that are typed win
        last = load_checkpoint(Path(args.out, "last.pt"), SCRIPT)
        p.set_defaults(**last["args"] | {"out": args.out, "device": args.device})
        args = p.parse_args(argv)
    args.size = (args.size * 2)[:2]  # H, W
    if args.size[0] % 32 or args.size[1] % 32:
        p.error(f"--size {args.size}: the sides are halved up to five times, take multiples of 32")
    if not 0 < args.frac <= 1:
        p.error(f"--frac {args.frac}: wanted more than 0, at most 1")
    return args


# --- model ---------------------------------------------------------------------------------------
## Max-pooling keeps the largest of four values and forgets which it was, and so where edges are.
## SegNet keeps that number, for which two bits would do; un-pooling writes each value back to its
## place, with zeros around it that the next convolutions fill. U-Net hands the whole maps across
## instead, and its edges are the better for it.


def conv_bn(a, b, side=3):
    """(B, a, H, W) -> (B, b, H, W): convolution, batch normalisation, ReLU."""
    conv = nn.Conv2d(a, b, side, padding=side // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU(inplace=True))


def convs(*widths):
    """(B, first width, H, W) -> (B, last width, H, W), a convolution from each to the next."""
    return nn.Sequential(*[conv_bn(a, b) for a, b in pairwise(widths)])


class SegNet(nn.Module):
    """x (B, 3, H, W) in [0, 1], H and W multiples of 2^stages -> logits (B, classes, H, W)."""

    def __init__(self, classes, width=64, stages=5):
        super().__init__()
        w1, w2, w4, w8 = width, 2 * width, 4 * width, 8 * width
        encoder = [
            convs(3, w1, w1),  # (B, width, H, W)
            convs(w1, w2, w2),  # (B, 2 width, H/2, W/2), after a pooling, and so on
            convs(w2, w4, w4, w4),
            convs(w4, w8, w8, w8),
            convs(w8, w8, w8, w8),
        ]
        decoder = [  # each is a mirror, so the last comes first
            convs(w1, w1),
            convs(w2, w2, w1),
            convs(w4, w4, w4, w2),
            convs(w8, w8, w8, w4),
            convs(w8, w8, w8, w8),
        ]
        self.encoder = nn.ModuleList(encoder[:stages])
        self.decoder = nn.ModuleList(reversed(decoder[:stages]))
        self.head = nn.Conv2d(width, classes, 3, padding=1)  # no activation: logits go out

    def forward(self, x):
        x = 4.4 * x - 2  # about mean 0, variance 1
        places = []
        for stage in self.encoder:
            ## place: the number, within its map, of the pixel that each maximum came from.
            x, place = F.max_pool2d(stage(x), 2, return_indices=True)
            places.append(place)  # (B, width, H/2, W/2), (B, 2 width, H/4, W/4), ...
        for stage in self.decoder:  # and the same backwards, up to (B, width, H, W)
            x = stage(F.max_unpool2d(x, places.pop(), 2))
        return self.head(x)  # (B, C, H, W)


def take_over(model, path, *scripts):
    """Fill model with all tensors of a best.pt that fit, but never with its head."""
    own, taken = model.state_dict(), {}
    for name, tensor in load_checkpoint(path, *scripts)["model"].items():
        if name in own and own[name].shape == tensor.shape and not name.startswith("head."):
            taken[name] = tensor
    model.load_state_dict(taken, strict=False)
    print(f"init     {len(taken)} of {len(own)} tensors are those of {path}")


# --- loss and scores -----------------------------------------------------------------------------
# The same in every script that has this section.


def one_hot(masks, classes):
    """masks (B, H, W) -> y (B, C, H, W) and valid (B, 1, H, W), floats of 0 and 1."""
    labels = torch.arange(classes, device=masks.device).view(-1, 1, 1)
    masks = masks[:, None]
    return (masks == labels).float(), (masks != IGNORE).float()


def bce_loss(logits, y, valid):
    """Binary cross-entropy, each class against the rest, mean over the valid pixels."""
    # -y log p - (1 - y) log(1 - p) with p = sigmoid(x) is max(x, 0) - x y + log(1 + e^-|x|),
    # which overflows for no x.
    loss = logits.relu() - logits * y + torch.log1p(torch.exp(-logits.abs()))
    return (loss * valid).mean() / valid.mean().clamp(min=1e-9)


def overlap(logits, y, valid):
    """|P and T| and |P| + |T| of each image and class, (B, C), with P = sigmoid(logits), T = y."""
    p = logits.sigmoid() * valid
    return (p * y).sum((2, 3)), (p + y).sum((2, 3))  # y is 0 where nothing counts


def dice_loss(logits, y, valid):
    """1 - Dice, Dice = (2 |P and T| + 1) / (|P| + |T| + 1) of each image and class, mean."""
    both, total = overlap(logits, y, valid)
    return 1 - ((2 * both + 1) / (total + 1)).mean()


def iou_loss(logits, y, valid):
    """1 - IoU, IoU = (|P and T| + 1) / (|P or T| + 1) of each image and class, mean."""
    both, total = overlap(logits, y, valid)
    return 1 - ((both + 1) / (total - both + 1)).mean()


LOSSES = {"bce": bce_loss, "dice": dice_loss, "iou": iou_loss}


def segmentation_loss(logits, masks, names):
    """The sum of losses that --loss names, in float32: logits (B, C, H, W), masks (B, H, W)."""
    y, valid = one_hot(masks, logits.shape[1])
    return sum(LOSSES[name](logits.float(), y, valid) for name in names.split("+"))


def confusion(logits, masks):
    """(C, C) pixels by truth (down) and answer (across). It is summed over a split: means of the
    scores of batches would hang on the batch size."""
    C = logits.shape[1]
    cell = masks.long() * C + logits.argmax(1)  # (B, H, W), a number for each pair of labels
    cell[masks == IGNORE] = C * C  # one more, for what does not count
    return torch.bincount(cell.flatten(), minlength=C * C + 1)[:-1].view(C, C)


def scores(counts):
    """Accuracy, mean IoU and mean Dice. IoU = |P and T| / |P or T|, Dice = 2 IoU / (1 + IoU); a
    class that neither occurs nor is answered is nan, and left out of the means."""
    counts = counts.cpu()  # sync; MPS has no float64
    both = counts.diag().double()
    iou = both / (counts.sum(0) + counts.sum(1) - both)
    accuracy, miou, dice = both.sum() / counts.sum(), iou.nanmean(), (2 * iou / (1 + iou)).nanmean()
    return {"val_accuracy": accuracy.item(), "val_miou": miou.item(), "val_dice": dice.item()}


def hidden_error(output, x, keep):
    """Mean squared error of the values that are hidden, where keep (B, 1, H, W) is False."""
    squares = (output.float() - x).square() * ~keep  # (B, 3, H, W)
    return squares.sum() / (3 * (~keep).sum()).clamp(min=1)


# --- training ------------------------------------------------------------------------------------


def fast_bf16(device):
    """Whether the hardware computes in bfloat16, which takes half the time and memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


def augment(images, masks):
    """uint8 (B, 3, H, W), (B, H, W), mirrored and zoomed alike -> x in [0, 1], masks uint8."""
    B, device = len(images), images.device

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, device=device)

    # Photo and mask are read at the same places: a window of random side and place, or its mirror.
    side = 1 / uniform(1.0, 1.6, B)
    window = torch.zeros(B, 2, 3, device=device)
    window[:, 0, 0] = side * uniform(-1, 1, B).sign()
    window[:, 1, 1] = side
    window[:, :, 2] = uniform(-1, 1, B, 2) * (1 - side)[:, None]
    places = F.affine_grid(window, [B, 1, *masks.shape[1:]], align_corners=False)  # (B, H, W, 2)
    x = F.grid_sample(images / 255, places, "bilinear", align_corners=False)
    y = F.grid_sample(masks[:, None].float(), places, "nearest", align_corners=False)
    # Only the photo changes its colours: contrast, then light, of all and of each.
    mean = x.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    x = (x - mean) * uniform(0.6, 1.4, B, 1, 1, 1) + mean
    x = x + uniform(-0.2, 0.2, B, 1, 1, 1) + uniform(-0.1, 0.1, B, 3, 1, 1)
    return x.clamp(0, 1), y[:, 0].byte()


def lr_at(step, steps, peak):
    """Warm-up over the first twentieth of the steps, then half a cosine down to 0."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_epoch(model, optimizer, images, masks, args, epoch):
    """One pass over the training photos -> mean loss, and the learning rate at its end."""
    model.train()
    ## All that is random in an epoch hangs on this number: a run that was stopped goes on exactly
    ## as it would have, and no generator's state has to be kept.
    torch.manual_seed(args.seed * 100003 + epoch)
    order = torch.randperm(len(images)).to(images.device)
    steps = max(1, len(images) // args.batch_size)  # an incomplete last batch is left out
    total = 0.0
    for step in range(steps):
        batch = order[step * args.batch_size :][: args.batch_size]
        x, y = augment(images[batch], masks[batch])
        lr = lr_at(epoch * steps + step, args.epochs * steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(x.device.type, torch.bfloat16, enabled=fast_bf16(x.device)):
            logits = model(x)
        loss = segmentation_loss(logits, y, args.loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    if not total.isfinite():  # sync: once an epoch
        sys.exit(f"the loss of epoch {epoch + 1} is not finite: try --lr {args.lr / 3:.0e}")
    return {"loss": total.item() / steps, "lr": lr}


def fill_in(model, x):
    """A masked autoencoder: photos x (B, 3, H, W) with grey patches go in, the photos as they were
    come out -> error of what was hidden, what was seen, and the output."""
    ## A thin scratch could be filled in from its two rims. Of a patch of 8 pixels the rims say
    ## little, and with 60 % of all patches gone its neighbours are often gone, too.
    B, _, H, W = x.shape
    keep = torch.rand(B, 1, H // 8, W // 8, device=x.device) > 0.6
    keep = keep.repeat_interleave(8, 2).repeat_interleave(8, 3)  # (B, 1, H, W)
    seen = torch.where(keep, x, FILL)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=fast_bf16(x.device)):
        output = model(seen)
    ## Whoever can fill in an ear must know something of cats. The target is x as it was: with the
    ## patches in it, grey would be right wherever the loss looks. (Convolutions cannot leave hidden
    ## patches out, as He et al. 2022 do; they see grey.)
    return hidden_error(output, x, keep), seen, output


def fill_epoch(model, optimizer, images, masks, args, epoch):
    """train_epoch without masks: the photos themselves are the target."""
    model.train()
    torch.manual_seed(args.seed * 100003 + epoch)
    order = torch.randperm(len(images)).to(images.device)
    steps = max(1, len(images) // args.batch_size)
    total = 0.0
    for step in range(steps):
        batch = order[step * args.batch_size :][: args.batch_size]
        x, _ = augment(images[batch], masks[batch])
        lr = lr_at(epoch * steps + step, args.epochs * steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        loss, _, _ = fill_in(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    if not total.isfinite():  # sync: once an epoch
        sys.exit(f"the loss of epoch {epoch + 1} is not finite: try --lr {args.lr / 3:.0e}")
    return {"loss": total.item() / steps, "lr": lr}


@torch.inference_mode()
def validate_fill(model, images, args):
    """Mean error of what is hidden, over a whole split."""
    model.eval()
    torch.manual_seed(0)  # patches that never change
    total = 0.0
    for x in images.split(args.batch_size):
        loss, _, _ = fill_in(model, x / 255)
        total += loss.item() * len(x)
    return {"val_loss": total / len(images)}


@torch.inference_mode()
def finish_fill(model, images, args):
    """Of the best epoch, beside best.pt: result.json; samples.png, photos, what is seen of them and
    the answers."""
    out, x = Path(args.out), images[:8] / 255
    result = load_checkpoint(out / "best.pt", SCRIPT)
    model.load_state_dict(result.pop("model"))
    _, seen, output = fill_in(model.eval(), x)
    rows = torch.cat([x, seen, output])
    save(partial(save_image, rows, nrow=len(x)), out / "samples.png")
    result["torch"] = torch.__version__
    save(partial(Path.write_text, data=json.dumps(result, indent=1)), out / "result.json")
    best = result["metrics"]
    print(f"best     epoch {best['epoch']}  next: python {SCRIPT} --init {out / 'best.pt'}")


def pretrain(model, optimizer, history, train, val, args):
    """Train without labels. The best epoch has the lowest error on the validation photos."""
    print(" epoch    loss  val_loss       lr     sec")
    for epoch in range(len(history), args.epochs):
        began = time.time()
        row = {"epoch": epoch + 1, **fill_epoch(model, optimizer, *train, args, epoch)}
        row |= {**validate_fill(model, val[0], args), "seconds": time.time() - began}
        history.append(row)
        best = row["val_loss"] == min(old["val_loss"] for old in history)
        save_epoch(args, model, optimizer, history, best)
        print(
            f"{epoch + 1:3}/{args.epochs:<3}{row['loss']:7.4f}{row['val_loss']:10.4f}"
            f"{row['lr']:9.1e}{row['seconds']:8.1f}{' *' if best else ''}"
        )
    finish_fill(model, val[0], args)


@torch.inference_mode()
def validate(model, images, masks, args):
    """Mean loss and scores of a whole split."""
    model.eval()
    total, counts = 0.0, 0
    for x, y in zip(images.split(args.batch_size), masks.split(args.batch_size)):
        logits = model(x / 255)
        total += segmentation_loss(logits, y, args.loss).item() * len(x)
        counts += confusion(logits, y)
    return {"val_loss": total / len(images), **scores(counts)}


def finish(model, images, masks, args):
    """Of the best epoch, beside best.pt: model.pt2, a program that evaluate.py runs without knowing
    how it was built, x (B, 3, H, W) in [0, 1] -> logits (B, C, H, W), B free; result.json, which is
    in the program too; samples.png, photos, their masks and the answers."""
    out, x = Path(args.out), images[:8].cpu() / 255
    result = load_checkpoint(out / "best.pt", SCRIPT)
    model.load_state_dict(result.pop("model"))
    model.to("cpu", memory_format=torch.contiguous_format).eval()
    with torch.inference_mode():
        rows = [x]
        for labels in [masks[:8].cpu(), model(x).argmax(1)]:  # black, grey, white
            grey = labels[:, None] / (len(args.classes) - 1)
            rows.append(grey.expand(-1, 3, -1, -1))
    save(partial(save_image, torch.cat(rows), nrow=len(x)), out / "samples.png")
    result |= {"classes": args.classes, "size": args.size, "ignore": args.ignore}
    result["torch"] = torch.__version__
    free = {0: torch.export.Dim("batch", min=1)}
    zeros = torch.zeros(2, 3, *args.size)  # a batch of one would be taken for fixed
    program = torch.export.export(model, (zeros,), dynamic_shapes=(free,))
    meta = {"meta.json": json.dumps(result)}
    save(partial(torch.export.save, program, extra_files=meta), out / "model.pt2")
    save(
        partial(Path.write_text, data=json.dumps(result, indent=1)), out / "result.json"
    )  # last: now it is finished
    best = result["metrics"]
    print(f"best     epoch {best['epoch']}  mIoU {best['val_miou']:.4f}  {out / 'model.pt2'}")


# --- data ----------------------------------------------------------------------------------------
# The same in every script that has this section.


def draw_toy(n, size, seed):
    """n drawn cats and dogs -> images (n, 3, H, W), masks (n, H, W), uint8: 0 pet, 1 ground, 2 the
    border between them. A ball has the pet's colour, so colour alone does not tell."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.linspace(-1, 1, size[0])[:, None], torch.linspace(-1, 1, size[1])
    images, masks = torch.empty(n, 3, *size), torch.ones(n, *size, dtype=torch.uint8)
    for i in range(n):
        # Forms that are below 1 inside of them, the pet's and the ball's at random places.
        a, b, c, d = torch.rand(4, generator=g) - 0.5
        X, Y = abs(x - a), y - b
        body = 5 * X**2 + 5 * (Y - 0.4) ** 2
        head = 8 * X**2 + 8 * (Y + 0.2) ** 2
        if i % 2 == 0:
            ears = 6 * abs(X - 0.25) + 2.5 * abs(Y + 0.5)  # a cat's
        else:
            ears = 40 * (X - 0.35) ** 2 + 8 * (Y + 0.1) ** 2  # a dog's
        pet = body.minimum(head).minimum(ears)  # (H, W)
        ball = 15 * (x - 2 * c) ** 2 + 15 * (y - 2 * d) ** 2
        masks[i][pet < 1.2] = 2
        masks[i][pet < 0.8] = 0
        coat, ground = 0.2 + 0.6 * torch.rand(2, 3, 1, 1, generator=g)
        images[i] = torch.where(pet.minimum(ball) < 1, coat, ground)
    images += 0.1 * torch.randn(images.shape, generator=g)
    return (255 * images.clamp(0, 1)).byte(), masks


def list_pairs(folder):
    """[(photo, mask) paths] of equal names in images/ and masks/; x_mask.png is a mask of x.jpg."""
    found = []
    for kind in ["images", "masks"]:
        paths = [path for path in Path(folder, kind).glob("*") if path.suffix.lower() in ENDINGS]
        found.append({path.stem.removesuffix("_mask").removesuffix("_gt"): path for path in paths})
    photos, masks = found
    lonely = sorted(photos.keys() ^ masks.keys())
    if lonely or not photos:
        sys.exit(f"{folder}: wanted pairs in images/ and masks/; {lonely[:5] or 'none there'}")
    return [(photos[name], masks[name]) for name in photos]


def hash_of(pair):
    """A number in [0, 1) that hangs on the name of the photo alone."""
    return int(hashlib.sha256(pair[0].stem.encode()).hexdigest()[:8], 16) / 16**8


def list_photos(args):
    """{"train", "val", "test": [(photo, mask) paths]}. A val or test that is missing is a tenth of
    train, by a hash of the names: a photo that is added later moves none from train to test."""
    parts = {}
    if args.data == "pets":
        base = Path(args.root, "oxford-iiit-pet")
        try:
            datasets.OxfordIIITPet(args.root, download=True)
        except Exception as error:  # no network, a full disk, a broken archive
            url = "https://www.robots.ox.ac.uk/~vgg/data/pets"
            sys.exit(
                f"{error}: unpack images.tar.gz, annotations.tar.gz of {url} in {base} by hand"
            )
        for part, listed in [("train", "trainval"), ("test", "test")]:
            names = (base / f"annotations/{listed}.txt").read_text().split()[::4]
            masks = [base / f"annotations/trimaps/{name}.png" for name in names]
            parts[part] = [(base / f"images/{mask.stem}.jpg", mask) for mask in masks]
    for part in ["train", "val", "test"]:
        for images in Path(args.data).glob(f"{part}*/images"):  # valid/ is understood
            parts[part] = list_pairs(images.parent)
    train = sorted(parts.pop("train", None) or list_pairs(args.data), key=hash_of)
    for part, low in [("test", 0.0), ("val", 0.1)]:
        if part not in parts:
            parts[part] = [pair for pair in train if low <= hash_of(pair) < low + 0.1] or train[:1]
            train = [pair for pair in train if pair not in parts[part]]
    if not train or not parts["val"]:
        sys.exit(f"{args.data}: too few photos to train, validate and test with")
    return parts | {"train": train}


def read_pair(pair, size):
    """(photo, mask) paths -> RGB and labels (H, W, 4) uint8, stretched to size."""
    try:
        photo, mask = ImageOps.exif_transpose(Image.open(pair[0])), Image.open(pair[1])
        if photo.size != mask.size or photo.mode[0] in "IF" or mask.format == "JPEG":
            raise ValueError(f"{photo.size} {photo.mode} with {mask.size} {mask.format}")
        photo = photo.convert("RGB").resize(size[::-1], Image.BILINEAR)
        mask = mask.convert("L").resize(size[::-1], Image.NEAREST)  # a label is a grey value
        return np.dstack([photo, mask])
    except Exception as error:  # whatever a broken file can provoke
        sys.exit(f"{pair[0]}, {pair[1]}: {error}; wanted an 8-bit photo, a PNG mask of its size")


def read_photos(pairs, args):
    """All pairs -> images (N, 3, H, W), masks (N, H, W), uint8. They are decoded once and kept in
    data/cache/, under a name that hangs on what was read; delete it whenever you like."""
    key = str(args.size)
    for photo, mask in pairs:
        key += f"{photo} {photo.stat().st_mtime} {mask} {mask.stat().st_mtime}"
    cache = Path(f"data/cache/{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt")
    if not cache.exists():
        with ThreadPoolExecutor() as pool:
            pixels = list(pool.map(read_pair, pairs, [args.size] * len(pairs)))
        save(partial(torch.save, torch.tensor(np.stack(pixels)).movedim(3, 1)), cache)
    pixels = torch.load(cache)
    images, masks = pixels[:, :3], pixels[:, 3]
    if args.data == "pets":
        masks -= 1  # trimap 1, 2, 3: pet, background, border
    elif args.ignore is not None:
        masks[masks == args.ignore] = IGNORE
    elif masks.unique().tolist() == [0, 255]:
        masks //= 255  # black and white
    return images, masks


def load_data(args):
    """(images (N, 3, H, W), masks (N, H, W)) to train on and to validate with, uint8 on the device.
    Sets args.classes, and args.photos, which tells --resume whether the photos are the same."""
    if args.data == "toy":
        images, masks = draw_toy(1110, args.size, seed=0)
        photos, n = [], 1000
    else:
        parts = list_photos(args)
        images, masks = read_photos(parts["train"] + parts["val"], args)
        photos, n = parts["train"], len(parts["train"])
    counts = torch.bincount(masks.flatten(), minlength=256)
    if args.ignore is not None:
        counts[IGNORE] = 0
    shares = counts / counts.sum()
    labels = shares.nonzero().flatten().tolist()
    if len(labels) < 2 or labels[-1] >= min(len(labels), IGNORE):
        sys.exit(f"{args.data}: labels {labels[:9]}; wanted 0 and 255, or 0 to C-1 (see README)")
    args.classes = [str(label) for label in labels]
    if args.data in ("toy", "pets"):
        args.classes = ["pet", "background", "border"]
    elif len(labels) == 2:
        args.classes = ["background", "foreground"]
    few = math.ceil(args.frac * n)  # the first ones: a quarter lies within the half
    names = "".join(photo.name for photo, _ in photos[:few])
    args.photos = hashlib.sha256(f"{few} {names}".encode()).hexdigest()
    print(f"data     {args.data}: train {few}  val {len(masks) - n}  {args.size} pixels")
    print("masks   ", *[f"{name} {share:.1%} " for name, share in zip(args.classes, shares)][:7])
    print(
        f"baseline one answer: accuracy {shares.max():.4f}  mIoU {shares.max() / len(labels):.4f}"
    )
    images, masks = images.to(args.device), masks.to(args.device)
    return (images[:few], masks[:few]), (images[n:], masks[n:])


# --- checkpoints ---------------------------------------------------------------------------------
# The same in every script that has this section.


def save(write, path):
    """write(file), then rename it: a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    write(temporary)
    os.replace(temporary, path)


def load_checkpoint(path, *scripts):
    """The dictionary in a .pt file that one of the scripts wrote, its tensors on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        script = state["script"]
    except Exception as error:  # not there, cut short, or something else entirely
        sys.exit(f"{path}: {type(error).__name__}: run python {scripts[0]} first")
    if script not in scripts:
        sys.exit(f"{path} was written by {script}, not by {' or '.join(scripts)}")
    return state


def open_run(args, model, optimizer):
    """The rows of the epochs so far. With --resume these are in last.pt, which also fills model and
    optimizer; without it there are none, and a run that is there moves to OUT.prev."""
    if args.resume:
        last = load_checkpoint(Path(args.out, "last.pt"), SCRIPT)
        if last["args"]["photos"] != args.photos:
            sys.exit("--resume: the run had other photos; train anew without --resume")
        try:
            model.load_state_dict(last["model"])
        except RuntimeError:
            sys.exit("--resume: the run had other widths or classes; train anew without --resume")
        optimizer.load_state_dict(last["optimizer"])
        return last["history"]
    if Path(args.out, "last.pt").exists():
        shutil.rmtree(f"{args.out}.prev", ignore_errors=True)
        os.rename(args.out, f"{args.out}.prev")
    return []


def save_epoch(args, model, optimizer, history, best):
    """best.pt if the last epoch is the best one, log.jsonl, and last.pt at the end: after a kill in
    between, --resume does the epoch again."""
    out, rows = Path(args.out), "".join(json.dumps(row) + "\n" for row in history)
    state = {"script": SCRIPT, "args": vars(args), "model": model.state_dict()}
    if best:
        save(partial(torch.save, state | {"metrics": history[-1]}), out / "best.pt")
    save(partial(Path.write_text, data=rows), out / "log.jsonl")
    state |= {"optimizer": optimizer.state_dict(), "history": history}
    save(partial(torch.save, state), out / "last.pt")


# --- main ----------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    print(f"{SCRIPT}  torch {torch.__version__}  {args.device}  seed {args.seed}  -> {out}")

    ## 1. The photos. Those of the test split are for evaluate.py alone.
    train, val = load_data(args)
    if args.pretrain:
        args.classes = ["red", "green", "blue"]  # the head speaks in colours

    ## 2. The network, its optimizer, and what --init or --resume put into them.
    torch.manual_seed(args.seed)
    model = SegNet(len(args.classes), args.width, args.stages)
    if args.init != "none" and not args.resume:
        take_over(model, args.init, SCRIPT)
    model.to(args.device, memory_format=torch.channels_last)
    args.parameters = sum(weight.numel() for weight in model.parameters())
    print(f"model    SegNet width {args.width}, {args.parameters / 1e6:.1f} M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    history = open_run(args, model, optimizer)

    ## 3. Train. The best epoch is the one with the highest mean IoU on the validation photos.
    try:
        if args.pretrain:
            return pretrain(model, optimizer, history, train, val, args)
        print(" epoch    loss  val_loss     acc    mIoU    Dice       lr     sec")
        for epoch in range(len(history), args.epochs):
            began = time.time()
            row = {"epoch": epoch + 1, **train_epoch(model, optimizer, *train, args, epoch)}
            row |= {**validate(model, *val, args), "seconds": time.time() - began}
            history.append(row)
            best = row["val_miou"] == max(old["val_miou"] for old in history)
            save_epoch(args, model, optimizer, history, best)
            print(
                f"{epoch + 1:3}/{args.epochs:<3}{row['loss']:7.4f}{row['val_loss']:10.4f}"
                f"{row['val_accuracy']:8.4f}{row['val_miou']:8.4f}{row['val_dice']:8.4f}"
                f"{row['lr']:9.1e}{row['seconds']:8.1f}{' *' if best else ''}"
            )
    except KeyboardInterrupt:
        again = f"python {SCRIPT} --resume --out {out}"
        sys.exit(f"stopped  {again} goes on; with --epochs {len(history)} it ends here")

    ## 4. The best epoch becomes a program.
    finish(model, *val, args)


if __name__ == "__main__":
    main()
