"""SegNet: pooling remembers where each maximum stood, un-pooling puts it back.

WHAT IT DOES  Photos (B, 3, H, W) become logits (B, C, H, W), a score of every
class for every pixel (Badrinarayanan et al. 2017). The encoder is VGG-16, the
decoder its mirror. The indices of the maxima are handed across, not the maps.

    photo 3 x 64 x 64                                logits classes x 64 x 64
    16 x 64 x 64 ---------------- indices --------------> 16 x 64 x 64
      32 x 32 x 32 -------------- indices ------------> 32 x 32 x 32
        64 x 16 x 16 ------------ indices ----------> 64 x 16 x 16
          128 x 8 x 8 ----------- indices --------> 128 x 8 x 8
            128 x 4 x 4 --------- indices ------> 128 x 4 x 4
              128 x 2 x 2 -----------------------^

YOU WILL LEARN  un-pooling with indices -> SegNet; how a convolutional network
learns without labels -> fill_loss

RUN IT  python segnet.py                         drawn cats and dogs
        python segnet.py --epochs 24 --pretrain 8    8 of them ignore the labels
        python segnet.py --data pets --size 96 --width 32
        python evaluate.py checkpoints/segnet    scores on photos never seen

WHAT TO EXPECT  Toy: test mIoU 0.47, a minute on two cores; all one class: 0.23
DIFFERS FROM THE PAPER  Fewer channels (its own: --width 64), AdamW, BCE + Dice;
no pre-trained VGG-16, no class weights. --pretrain is not in the paper.
"""

import json
import math
import shutil
import sys
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets

SCRIPT = "segnet.py"
IGNORE = 255  # label of pixels that count neither in a loss nor in a score


def parse_args(argv=None):
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--data", default="toy", help="toy, pets, or a folder with images/ and masks/")
    p.add_argument("--root", default="data", help="where pets lie or are downloaded to")
    p.add_argument("--size", type=int, nargs="+", default=[64], metavar="PX", help="side, or H W")
    p.add_argument("--ignore", type=int, help="label of the masks that does not count")
    p.add_argument("--frac", type=float, default=1.0, help="share of the training photos")
    p.add_argument("--width", type=int, default=16, help="channels at full size; paper: 64")
    p.add_argument("--pretrain", type=int, default=0, help="so many of the epochs fill in photos")
    p.add_argument("--epochs", type=int, default=6, help="passes over the training photos")
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="less saves memory")
    p.add_argument("--lr", type=float, default=2e-3, help="peak of the learning rate")
    p.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation")
    p.add_argument("--device", default=str(device), help="cuda, mps, cpu")
    p.add_argument("--bf16", action="store_true", help="16 bits, as on GPUs; faster on new CPUs")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its flags")
    p.add_argument("--out", default="checkpoints/segnet", help="the run's folder")
    args = p.parse_args(argv)
    if args.resume:  # the run's own flags (but for out and device), and those that are typed win
        last = load_checkpoint(Path(args.out, "last.pt"), SCRIPT)
        p.set_defaults(**(last["args"] | {"out": args.out, "device": args.device}))
        args = p.parse_args(argv)
    args.size = (args.size * 2)[:2]  # H, W; one number is both
    if any(side % 32 for side in args.size):
        p.error(f"--size {args.size}: the sides are halved five times, take multiples of 32")
    if not 0 <= args.pretrain < args.epochs:
        p.error(f"--pretrain {args.pretrain}: of {args.epochs} epochs one at least has to segment")
    if not 0 < args.frac <= 1:
        p.error(f"--frac {args.frac}: wanted more than 0, at most 1")
    args.bf16 |= args.device.startswith("cuda") and torch.cuda.is_bf16_supported(False)  # natively
    return args


# --- model ---------------------------------------------------------------------------------------
## Max-pooling keeps the largest of four values and forgets which it was, and so where edges are.
## SegNet remembers (2 bits a window would do), where U-Net keeps whole maps. Un-pooling puts values
## back there, and the next convolutions fill the zeros.


def convs(*widths):
    """(B, first width, H, W) -> (B, last width, H, W), a 3x3 convolution from each to the next."""
    layers = []
    for a, b in pairwise(widths):
        conv = nn.Conv2d(a, b, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class SegNet(nn.Module):
    """x (B, 3, H, W) in [0, 1], H and W multiples of 32 -> logits (B, classes, H, W)."""

    def __init__(self, classes, width=64):
        super().__init__()
        w1, w2, w4, w8 = width, 2 * width, 4 * width, 8 * width
        encoder = [convs(3, w1, w1), convs(w1, w2, w2), convs(w2, w4, w4, w4)]
        encoder += [convs(w4, w8, w8, w8), convs(w8, w8, w8, w8)]
        # A block ends with the channels of the indices that come next.
        decoder = [convs(w8, w8, w8, w8), convs(w8, w8, w8, w4)]
        decoder += [convs(w4, w4, w4, w2), convs(w2, w2, w1), convs(w1, w1)]
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.head = nn.Conv2d(width, classes, 3, padding=1)  # no activation: logits go out
        self.painter = nn.Conv2d(width, 3, 3, padding=1)  # the head of --pretrain: colours go out

    def features(self, x):
        """The last maps, (B, width, H, W)."""
        x = 4.4 * x - 2  # about mean 0, variance 1
        indices = []
        for block in self.encoder:
            ## index: row x W + column of each maximum, in the map before pooling.
            x, index = F.max_pool2d(block(x), 2, return_indices=True)
            indices.append(index)  # (B, width, H/2, W/2), (B, 2 width, H/4, W/4), ...
        for block in self.decoder:
            x = block(F.max_unpool2d(x, indices.pop(), 2))  # back to (B, width, H, W)
        return x

    def forward(self, x):
        return self.head(self.features(x))  # (B, C, H, W)


def fill_loss(model, x):
    """Photos x (B, 3, H, W) with grey patches go in, the photos as they were are to come out ->
    mean squared error of what was hidden (SimMIM, Xie et al. 2022, takes the absolute one)."""
    ## A patch is too large to guess from its rim: the network has to know what an ear looks like.
    B, _, H, W = x.shape
    hidden = torch.rand(B, 1, H // 8, W // 8, device=x.device) < 0.6
    hidden = F.interpolate(hidden.float(), size=(H, W))  # (B, 1, H, W) of 0 and 1
    output = model.painter(model.features(torch.where(hidden > 0, 0.5, x)))
    return ((output.float() - x).square() * hidden).mean() / hidden.mean()


# --- loss and scores (the same in every script that has them) ------------------------------------


def bce_loss(logits, y, valid):
    """Binary cross-entropy, each class against the rest, mean over the valid pixels. logits and y
    are (B, C, H, W), y one-hot; valid (B, 1, H, W) is 1 where a pixel counts and 0 elsewhere."""
    # With p = 1 / (1 + e^-x) of a logit x, -y log p - (1 - y) log(1 - p) = x + log(1 + e^-x) - x y.
    # If x < 0, e^-x may overflow: take log(1 + e^x) - x y. Both: max(x, 0) - x y + log(1 + e^-|x|).
    loss = logits.relu() - logits * y + torch.log1p(torch.exp(-logits.abs()))
    return (loss * valid).mean() / valid.mean().clamp(min=1e-9)  # sum / (C x valid pixels)


def dice_loss(logits, y, valid):
    """1 - Dice, the mean over photos and classes of (2 sum(p y) + 1) / (sum(p) + sum(y) + 1)."""
    p = logits.sigmoid() * valid
    both, total = (p * y).sum((2, 3)), (p + y).sum((2, 3))  # (B, C)
    return 1 - ((2 * both + 1) / (total + 1)).mean()  # + 1, as a class may be nowhere


def segmentation_loss(logits, masks):
    """BCE: each pixel weighs the same. Dice: each class does, however small. Their sum, in float32,
    of logits (B, C, H, W), masks (B, H, W)."""
    logits, masks = logits.float(), masks[:, None]  # (B, 1, H, W)
    labels = torch.arange(logits.shape[1], device=masks.device).view(-1, 1, 1)
    y = (masks == labels).float()  # (B, C, H, W), one-hot, 0 everywhere at IGNORE
    valid = (masks != IGNORE).float()
    return bce_loss(logits, y, valid) + dice_loss(logits, y, valid)


def confusion(logits, masks):
    """(C, C) pixels by truth (down) and prediction (across). These counts are summed over a split
    before any score is taken: means of the scores of batches would depend on the batch size."""
    C = logits.shape[1]
    cell = masks.long() * C + logits.argmax(1)  # (B, H, W), a number for each pair of labels
    cell[masks == IGNORE] = C * C  # one more, for what does not count
    return torch.bincount(cell.flatten(), minlength=C * C + 1)[:-1].view(C, C)


def scores(counts):
    """Accuracy, mean IoU and mean Dice. Of a class, with T its true and P its predicted pixels, IoU
    is |P and T| / |P or T|, and Dice 2 IoU / (1 + IoU); nan, and left out, if both are empty."""
    counts = counts.cpu()  # waits for the GPU; MPS has no float64
    both = counts.diag().double()
    iou = both / (counts.sum(0) + counts.sum(1) - both)
    return {
        "val_accuracy": (both.sum() / counts.sum()).item(),
        "val_miou": iou.nanmean().item(),
        "val_dice": (2 * iou / (1 + iou)).nanmean().item(),
    }


def print_baseline(counts, classes):
    """Each class's share of the pixels, counts (256,), and what is to be beaten: one class only."""
    shares = counts[: len(classes)] / counts[:IGNORE].sum()
    listed = [f"{name} {share:.1%} " for name, share in zip(classes, shares)]
    print("masks   ", *listed[:6], f"ignored {counts[IGNORE] / counts.sum():.1%}")
    top = shares.max()
    print(f"baseline commonest: accuracy {top:.4f}  mIoU {top / len(classes):.4f}")


# --- training ------------------------------------------------------------------------------------


def augment(images, masks):
    """uint8 (B, 3, H, W), (B, H, W) -> x in [0, 1] and masks, mirrored or not, in other light."""
    ## No zoom: enlarging the photos of pets by 1 to 1.6 cost U-Net 1.5 points of mean IoU.
    B = len(images)
    mirror = torch.rand(B, 1, 1, device=images.device) < 0.5
    masks = torch.where(mirror, masks.flip(2), masks)
    x = torch.where(mirror[:, None], images.flip(3), images) / 255
    mean = x.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    x = (x - mean) * x.new_empty(B, 1, 1, 1).uniform_(0.6, 1.4) + mean  # contrast
    x = x + x.new_empty(B, 1, 1, 1).uniform_(-0.2, 0.2)  # light
    x = x + x.new_empty(B, 3, 1, 1).uniform_(-0.1, 0.1)  # tint
    return x.clamp(0, 1), masks


def segnet_epoch(model, optimizer, images, masks, args, epoch):
    """One pass over the training photos -> mean loss, and the learning rate at its end."""
    model.train()
    ## All that is random in an epoch comes from this seed: with the same --epochs, a run that was
    ## stopped goes on as it would have, on a CPU to the bit, and no generator's state is kept.
    torch.manual_seed(args.seed * 100003 + epoch)
    steps = math.ceil(len(images) / args.batch_size)
    batches = torch.randperm(len(images), device=images.device).tensor_split(steps)  # even parts
    total = 0.0
    for step, batch in enumerate(batches):
        x, truth = augment(images[batch], masks[batch])
        ## Warm-up over the first twentieth of the run, and half a cosine from the peak to 0.
        done = (epoch + (step + 0.5) / steps) / args.epochs  # from 0 to 1
        lr = args.lr * min(1, 20 * done) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            if epoch < args.pretrain:  # without labels
                loss = fill_loss(model, x)
            else:
                loss = segmentation_loss(model(x), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    if not total.isfinite():  # waits for the GPU, once an epoch
        sys.exit(f"the loss of epoch {epoch + 1} is not finite: try --lr {args.lr / 3:.0e}")
    return {"loss": total.item() / steps, "lr": lr}


@torch.inference_mode()
def validate(model, images, masks, args):
    """Mean loss and scores of a whole split."""
    model.eval()
    total, counts = 0.0, 0
    for photos, truth in zip(images.split(args.batch_size), masks.split(args.batch_size)):
        logits = model(photos / 255)
        total += segmentation_loss(logits, truth).item() * len(photos)
        counts += confusion(logits, truth)
    return {"val_loss": total / len(images)} | scores(counts)


def train_segnet(model, optimizer, history, photos, val, args):
    """The epochs that are not in history yet. Each leaves log.jsonl, and last.pt for --resume;
    one with the highest mean IoU on the validation photos so far leaves best.pt."""
    print(" epoch      loss       lr val_loss      acc     mIoU     Dice  seconds")
    for epoch in range(len(history), args.epochs):
        began = time.time()
        row = {"epoch": epoch + 1} | segnet_epoch(model, optimizer, *photos, args, epoch)
        row |= validate(model, *val, args) | {"seconds": time.time() - began}
        history.append(row)
        segmenting = [old["val_miou"] for old in history[args.pretrain :]]
        best = row["val_miou"] == max(segmenting, default=None)  # False while pre-training
        state = {"script": SCRIPT, "args": vars(args), "model": model.state_dict(), "metrics": row}
        if best:
            save(Path(args.out, "best.pt"), lambda file: torch.save(state, file))
        state |= {"optimizer": optimizer.state_dict(), "history": history}
        log = "".join(json.dumps(old) + "\n" for old in history)
        save(Path(args.out, "log.jsonl"), lambda file: file.write_text(log))
        save(Path(args.out, "last.pt"), lambda file: torch.save(state, file))
        numbers = "".join(f"{value:9.4f}" for value in list(row.values())[1:])
        print(f"{epoch + 1:3}/{args.epochs:<3}{numbers}{' *' if best else ''}")


def finish(model, args):
    """The best epoch becomes model.pt2, a program from x to logits for any B, and result.json."""
    out = Path(args.out)
    result = load_checkpoint(out / "best.pt", SCRIPT)
    model.load_state_dict(result.pop("model"))
    model.to("cpu", memory_format=torch.contiguous_format).eval()
    text = json.dumps(result | {"torch": torch.__version__}, indent=1)
    B = torch.export.Dim("B", min=1)
    zeros = torch.zeros(2, 3, *args.size)  # with B = 1 it would take B for a constant
    program = torch.export.export(model, (zeros,), dynamic_shapes=({0: B},))
    meta = {"meta.json": text}
    save(out / "model.pt2", lambda file: torch.export.save(program, file, extra_files=meta))
    save(out / "result.json", lambda file: file.write_text(text))
    best = result["metrics"]
    print(f"best     epoch {best['epoch']}  mIoU {best['val_miou']:.4f}  {out / 'model.pt2'}")


# --- data (the same in every script that has it) -------------------------------------------------


def draw_toy(n, size, seed):
    """n drawn cats and dogs -> images (n, 3, H, W), masks (n, H, W), uint8: 0 pet, 1 background, 2
    their border. The ears of a cat are diamonds, those of a dog ellipses."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.linspace(-1, 1, size[0])[:, None], torch.linspace(-1, 1, size[1])
    a, b, c, d = torch.rand(4, n, 1, 1, generator=g) - 0.5  # the pet's place, and the ball's
    X, Y = abs(x - a), y - b  # (n, 1, W), (n, H, 1); abs mirrors one ear into two, y points down
    # A form is where its formula is below 1; minimum joins two. From 0.8 to 1.2 is the border.
    body, head = 5 * X**2 + 5 * (Y - 0.4) ** 2, 8 * X**2 + 8 * (Y + 0.2) ** 2
    cat, dog = 6 * abs(X - 0.25) + 2.5 * abs(Y + 0.5), 40 * (X - 0.35) ** 2 + 8 * (Y + 0.1) ** 2
    ears = torch.where(torch.arange(n).view(n, 1, 1) % 2 == 0, cat, dog)
    pet = body.minimum(head).minimum(ears)
    ball = 15 * (x - 2 * c) ** 2 + 15 * (y - 2 * d) ** 2  # in the pet's colour, to mislead
    masks = torch.ones(n, *size, dtype=torch.uint8)
    masks[pet < 1.2] = 2
    masks[pet < 0.8] = 0
    coat, ground = 0.2 + 0.6 * torch.rand(2, n, 3, 1, 1, generator=g)
    images = torch.where((pet.minimum(ball) < 1)[:, None], coat, ground)
    images = images + 0.1 * torch.randn(images.shape, generator=g)
    return (255 * images.clamp(0, 1)).byte(), masks


def list_folder(folder):
    """[(photo, mask) paths] of equal names in images/ and masks/; x_mask.png is a mask of x.jpg."""
    pairs = {}
    for kind in ["images", "masks"]:
        for path in sorted(Path(folder, kind).glob("[!.]*")):
            if path.suffix.lower() in Image.registered_extensions():
                name = path.stem.removesuffix("_mask").removesuffix("_gt")
                pairs.setdefault(name, []).append(path)
    odd = [name for name, pair in pairs.items() if len(pair) != 2]
    if odd or not pairs:
        sys.exit(f"{folder}: wanted pairs in images/ and masks/; {odd[:5] or 'none there'}")
    return [tuple(pair) for pair in pairs.values()]


def list_photos(args):
    """The (photo, mask) paths of "train", "val" and "test". A missing val or test is a tenth of
    train, by a hash of the names: a photo that is added later moves no other."""
    parts = {}
    if args.data == "pets":
        base = Path(args.root, "oxford-iiit-pet")
        try:
            datasets.OxfordIIITPet(args.root, download=True)
        except Exception as error:  # no network, a full disk, a broken archive
            sys.exit(f"{error}: unpack www.robots.ox.ac.uk/~vgg/data/pets in {base} by hand")
        for part, file in [("train", "trainval.txt"), ("test", "test.txt")]:
            names = (base / "annotations" / file).read_text().split()[::4]  # the 1st of 4 words
            photos, masks = base / "images", base / "annotations/trimaps"
            parts[part] = [(photos / f"{name}.jpg", masks / f"{name}.png") for name in names]
    else:
        for folder in ["train", "val", "valid", "test"]:  # valid is kept as val
            if Path(args.data, folder, "images").exists():
                parts[folder.removesuffix("id")] = list_folder(Path(args.data, folder))
    train = parts.get("train") or list_folder(args.data)
    hashes = {pair: zlib.crc32(pair[0].stem.encode()) for pair in train}
    for part, number in [("test", 0), ("val", 1)]:
        if part not in parts:
            parts[part] = [pair for pair in train if hashes[pair] % 10 == number] or train[:1]
            train = sorted(set(train) - set(parts[part]))
    if not train:
        sys.exit(f"{args.data}: too few photos to train, validate and test with")
    # Names sort by breed, hashes do not: the first photos, any --frac of them, are of all breeds.
    return parts | {"train": sorted(train, key=hashes.get)}


def read_pair(pair, args):
    """(photo, mask) paths -> RGB and labels (H, W, 4) uint8, stretched to --size."""
    try:
        photo, mask = ImageOps.exif_transpose(Image.open(pair[0])), Image.open(pair[1])
        if photo.size != mask.size or photo.mode[0] in "IF" or mask.format == "JPEG":
            raise ValueError(f"{photo.size} {photo.mode} with {mask.size} {mask.format}")
        photo = photo.convert("RGB").resize(args.size[::-1], Image.BILINEAR)
        # The labels are the grey values, or the numbers that a PNG with a palette has for its
        # colours, say 1 for red. (With just two colours, the greys: white may be number 0.)
        labels = np.array(mask.convert("L").resize(args.size[::-1], Image.NEAREST))
        if mask.mode == "P" and mask.format == "PNG" and len(mask.palette.colors) > 2:
            labels = np.array(mask.resize(args.size[::-1], Image.NEAREST))
        return np.dstack([photo, labels])
    except Exception as error:  # whatever a broken file can provoke
        sys.exit(f"{pair[0]}, {pair[1]}: {error}; wanted an 8-bit photo, a PNG mask of its size")


def load_split(args, part):
    """Photos of train, val or test -> images (N, 3, H, W), masks (N, H, W), uint8."""
    if args.data == "toy":
        n, seed = {"train": (1000, 0), "val": (110, 1), "test": (256, 2)}[part]
        return draw_toy(n, args.size, seed)
    pairs = list_photos(args)[part]
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(read_pair, pairs, [args] * len(pairs))))
    masks = pixels[..., 3]
    void = masks == args.ignore  # False everywhere without --ignore
    if args.data == "pets":
        masks -= 1  # trimap 1, 2, 3: pet, background, border
    elif set(np.unique(masks[~void])) <= {0, 255}:
        masks //= 255  # black and white; in other masks 255 does not count, as in VOC
    masks[void] = IGNORE
    return torch.tensor(pixels[..., :3]).movedim(3, 1), torch.tensor(masks)


def load_data(args):
    """(images, masks) to train on, and to validate with; sets args.classes."""
    train, val = load_split(args, "train"), load_split(args, "val")
    counts = torch.bincount(torch.cat([train[1], val[1]]).flatten(), minlength=256)
    labels = counts[:IGNORE].nonzero().flatten().tolist()
    C = max(labels, default=0) + 1
    if not 2 <= C < IGNORE or 0 not in labels or 2 * len(labels) < C:  # a rare one may be missing
        sys.exit(f"{args.data}: labels {labels[:9]}; wanted 0 and 255, or 0 to C-1 (see README)")
    args.classes = [str(label) for label in range(C)]
    if args.data in ("toy", "pets"):
        args.classes = ["pet", "background", "border"][:C]
    elif C == 2:
        args.classes = ["background", "foreground"]
    few = math.ceil(args.frac * len(train[0]))
    print(f"data     {args.data}: train {few}  val {len(val[0])}  {args.size} pixels")
    print_baseline(counts, args.classes)
    return [t[:few].to(args.device) for t in train], [t.to(args.device) for t in val]


# --- checkpoints (the same in every script that has it) ------------------------------------------


def save(path, write):
    """write(file), then rename it: a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    write(temporary)
    temporary.replace(path)


def load_checkpoint(path, *scripts):
    """The dictionary in a .pt file that one of the scripts wrote, its tensors on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] not in scripts:
            raise ValueError(f"it was written by {state['script']}")
        return state
    except Exception as error:  # not there, cut short, or from elsewhere
        sys.exit(f"{path}: {error!r:.99}; run python {scripts[0]} first")


# --- main ----------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    print(f"{SCRIPT}  torch {torch.__version__}  {args.device}  seed {args.seed}  -> {out}")

    ## 1. The photos. Those of the test split are for evaluate.py alone.
    photos, val = load_data(args)

    ## 2. The network and its optimizer. --resume fills both, else an old run moves to OUT.prev.
    torch.manual_seed(args.seed)
    model = SegNet(len(args.classes), args.width)
    model.to(args.device, memory_format=torch.channels_last)  # faster
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    args.parameters = sum(weight.numel() for weight in model.parameters())
    args.checksum = args.parameters + sum(tensor.sum().item() for tensor in photos + val)
    print(f"model    SegNet width {args.width}, {args.parameters / 1e6:.1f} M parameters")
    history = []
    if args.resume:
        last = load_checkpoint(out / "last.pt", SCRIPT)
        if last["args"]["checksum"] != args.checksum:  # other widths, other pixels
            sys.exit("--resume: the run had other photos or sizes; train anew without --resume")
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        history = last["history"]
    elif (out / "last.pt").exists() and not any(out.glob("*/")):  # it holds no other runs
        shutil.rmtree(f"{out}.prev", ignore_errors=True)
        out.rename(f"{out}.prev")

    ## 3. Train, and make a program of the best epoch.
    train_segnet(model, optimizer, history, photos, val, args)
    finish(model, args)


if __name__ == "__main__":
    main()
