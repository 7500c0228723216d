"""LinkNet: segmentation at the price of a classifier.

WHAT IT DOES  Photos (B, 3, H, W) become logits (B, C, H, W), a score of every
class for every pixel (Chaurasia & Culurciello 2017). The encoder is a ResNet.
The decoder adds the encoder's maps, and so stays narrow and fast.

    photo 3 x 64 x 64                                logits classes x 64 x 64
    64 x 16 x 16 ------------------- + -----------------> 64 x 16 x 16
      64 x 16 x 16 ----------------- + ---------------> 64 x 16 x 16
        128 x 8 x 8 ---------------- + -------------> 128 x 8 x 8
          256 x 4 x 4 -------------- + -----------> 256 x 4 x 4
            512 x 2 x 2 --------------------------^

YOU WILL LEARN  skips by addition, a classifier as encoder -> LinkNet; two ways
to learn up-sampling -> doubled; how rare classes count more -> class_weights

RUN IT  python linknet.py                        drawn cats and dogs
        python linknet.py --resume --epochs 12   goes on where the run ended
        python linknet.py --data pets --size 96 --imagenet
        python evaluate.py checkpoints/linknet   scores on photos never seen

WHAT TO EXPECT  Toy: test mIoU 0.73, a minute on two cores; all one class: 0.23
DIFFERS FROM THE PAPER  AdamW, warm-up and a cosine, where it has RMSProp;
random weights unless --imagenet; --up subpixel and resnet34 are ours.
"""

import json
import math
import shutil
import sys
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets, models
from torchvision.models.feature_extraction import create_feature_extractor

SCRIPT = "linknet.py"
IGNORE = 255  # label of pixels that count neither in a loss nor in a score


def parse_args(argv=None):
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--data", default="toy", help="toy, pets, or a folder with images/ and masks/")
    p.add_argument("--root", default="data", help="where pets lie or are downloaded to")
    p.add_argument("--size", type=int, nargs="+", default=[64], metavar="PX", help="side, or H W")
    p.add_argument("--ignore", type=int, help="label of the masks that does not count")
    p.add_argument("--frac", type=float, default=1.0, help="share of the training photos")
    p.add_argument("--imagenet", action="store_true", help="start from a trained classifier")
    p.add_argument("--encoder", choices=["resnet18", "resnet34"], default="resnet18")
    p.add_argument("--up", choices=["transpose", "subpixel"], default="transpose")
    p.add_argument("--epochs", type=int, default=4, help="passes over the training photos")
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="less saves memory")
    p.add_argument("--lr", type=float, default=2e-3, help="peak of the learning rate")
    p.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation")
    p.add_argument("--device", default=str(device), help="cuda, mps, cpu")
    p.add_argument("--bf16", action="store_true", help="16 bits, as on GPUs; faster on new CPUs")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its flags")
    p.add_argument("--out", default="checkpoints/linknet", help="the run's folder")
    args = p.parse_args(argv)
    if args.resume:  # the run's own flags (but for out and device), and those that are typed win
        last = load_checkpoint(Path(args.out, "last.pt"), SCRIPT)
        p.set_defaults(**(last["args"] | {"out": args.out, "device": args.device}))
        args = p.parse_args(argv)
    args.size = (args.size * 2)[:2]  # H, W; one number is both
    if any(side % 32 for side in args.size):
        p.error(f"--size {args.size}: the sides are halved five times, take multiples of 32")
    if not 0 < args.frac <= 1:
        p.error(f"--frac {args.frac}: wanted more than 0, at most 1")
    args.bf16 |= args.device.startswith("cuda") and torch.cuda.is_bf16_supported(False)  # natively
    return args


# --- model ---------------------------------------------------------------------------------------
## In U-Net every size takes about equal work. A ResNet goes down to a quarter of the side at once,
## and a block of the decoder works at a quarter of its channels: LinkNet hands the encoder's maps
## across as U-Net does, for a fraction of the multiply-adds of one with as many channels.


def conv_bn(a, b, kernel):
    """(B, a, H, W) -> (B, b, H, W): convolution, batch normalisation, ReLU."""
    conv = nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU(inplace=True))


def doubled(a, b, up):
    """(B, a, H, W) -> (B, b, 2H, 2W): learned up-sampling, batch normalisation, ReLU."""
    ## A transposed 3x3 convolution with stride 2 paints a 3x3 block for every input pixel; blocks
    ## overlap in every second row and column, which may show as a chequered pattern. Sub-pixel
    ## convolution (Shi et al. 2016) makes four times the channels and sorts them into 2x2 blocks,
    ## without overlap, and without a pattern if four filters start equal (ICNR, Aitken 2017).
    if up == "transpose":
        conv = nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1, bias=False)
    else:
        four = nn.Conv2d(a, 4 * b, 3, padding=1, bias=False)
        four.weight.data = four.weight.data[::4].repeat_interleave(4, 0)
        conv = nn.Sequential(four, nn.PixelShuffle(2))
    return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU(inplace=True))


def decoder_block(a, b, up):
    """(B, a, H, W) -> (B, b, 2H, 2W): 1x1 down to a/4 channels, doubled there, 1x1 up to b."""
    return nn.Sequential(conv_bn(a, a // 4, 1), doubled(a // 4, a // 4, up), conv_bn(a // 4, b, 1))


class LinkNet(nn.Module):
    """x (B, 3, H, W) in [0, 1], H and W multiples of 32 -> logits (B, classes, H, W)."""

    def __init__(self, classes, encoder="resnet18", up="transpose", imagenet=False):
        super().__init__()
        ## A classifier halves the photo five times on its way to one answer. All but that answer is
        ## an encoder, and with ImageNet's weights it knows edges and fur from the start.
        weights = "DEFAULT" if imagenet else None
        try:
            net = models.get_model(encoder, weights=weights)
        except OSError as error:  # no network, a full disk
            sys.exit(f"{error}: fetch the file named above by hand and put it there")
        layers = ["maxpool", "layer1", "layer2", "layer3", "layer4"]
        self.encoder = create_feature_extractor(net, layers)  # x -> {layer: its map}
        self.block4 = decoder_block(512, 256, up)
        self.block3 = decoder_block(256, 128, up)
        self.block2 = decoder_block(128, 64, up)
        # The mirror of layer1, which does not halve.
        self.block1 = nn.Sequential(conv_bn(64, 16, 1), conv_bn(16, 16, 3), conv_bn(16, 64, 1))
        self.last = nn.Sequential(doubled(64, 32, up), conv_bn(32, 32, 3))
        self.head = nn.ConvTranspose2d(32, classes, 2, stride=2)

    def forward(self, x):
        x = 4.4 * x - 2  # about mean 0, variance 1, as --imagenet wants it
        ## Two maps of 64 channels at H/4, then 128 at H/8, 256 at H/16 and 512 at H/32.
        x0, x1, x2, x3, x4 = self.encoder(x).values()
        ## The link: what went into a layer of the encoder is added to what its mirror puts out. A
        ## sum has no more channels than its terms, so the decoder stays narrow.
        x = self.block4(x4) + x3  # (B, 256, H/16, W/16)
        x = self.block3(x) + x2  # (B, 128, H/8, W/8)
        x = self.block2(x) + x1  # (B, 64, H/4, W/4)
        x = self.block1(x) + x0  # (B, 64, H/4, W/4)
        x = self.last(x)  # (B, 32, H/2, W/2)
        return self.head(x)  # (B, C, H, W)


# --- loss and scores (the same in every script that has them) ------------------------------------


def class_weights(masks, classes):
    """ENet's weights (Paszke et al. 2016), as in the paper: 1 / ln(1.02 + p) for a class with share
    p of the pixels, from 1.4 if it is everywhere to 50 if it is rare. masks (N, H, W) -> list."""
    counts = torch.bincount(masks.flatten(), minlength=256)[:classes]
    shares = counts / counts.sum()
    return (1 / torch.log(1.02 + shares)).tolist()


def weighted_ce(logits, masks, weights):
    """Cross-entropy, weighted mean over the pixels, in float32: logits (B, C, H, W), masks
    (B, H, W). A softmax over the classes, where unet.py has a sigmoid of each. The same is
    F.cross_entropy(logits, masks.long(), torch.tensor(weights), ignore_index=IGNORE)."""
    valid = masks != IGNORE
    labels = masks.long() * valid  # (B, H, W), 0 where ignored
    log_p = logits.float().log_softmax(1)  # (B, C, H, W)
    log_true = log_p.gather(1, labels[:, None])[:, 0]  # (B, H, W), of the true class
    weight = torch.tensor(weights, device=masks.device)[labels] * valid  # (B, H, W)
    return -(log_true * weight).sum() / weight.sum().clamp(min=1e-9)


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


def linknet_epoch(model, optimizer, images, masks, args, epoch):
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
            logits = model(x)
        loss = weighted_ce(logits, truth, args.weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    if not total.isfinite():  # waits for the GPU, once an epoch
        sys.exit(f"the loss of epoch {epoch + 1} is not finite: try --lr {args.lr / 3:.0e}")
    return {"loss": total.item() / steps, "lr": lr}


@torch.inference_mode()
def linknet_validate(model, images, masks, args):
    """Mean loss and scores of a whole split."""
    model.eval()
    total, counts = 0.0, 0
    for photos, truth in zip(images.split(args.batch_size), masks.split(args.batch_size)):
        logits = model(photos / 255)
        total += weighted_ce(logits, truth, args.weights).item() * len(photos)
        counts += confusion(logits, truth)
    return {"val_loss": total / len(images)} | scores(counts)


def train_linknet(model, optimizer, history, photos, val, args):
    """The epochs that are not in history yet. Each leaves log.jsonl, and last.pt for --resume;
    one with the highest mean IoU on the validation photos so far leaves best.pt."""
    print(" epoch      loss       lr val_loss      acc     mIoU     Dice  seconds")
    for epoch in range(len(history), args.epochs):
        began = time.time()
        row = {"epoch": epoch + 1} | linknet_epoch(model, optimizer, *photos, args, epoch)
        row |= linknet_validate(model, *val, args) | {"seconds": time.time() - began}
        history.append(row)
        best = row["val_miou"] == max(old["val_miou"] for old in history)
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
    args.weights = class_weights(photos[1], len(args.classes))

    ## 2. The network and its optimizer. --resume fills both, else an old run moves to OUT.prev.
    torch.manual_seed(args.seed)
    model = LinkNet(len(args.classes), args.encoder, args.up, args.imagenet and not args.resume)
    model.to(args.device, memory_format=torch.channels_last)  # faster
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    args.parameters = sum(weight.numel() for weight in model.parameters())
    args.checksum = args.parameters + sum(tensor.sum().item() for tensor in photos + val)
    print(f"model    LinkNet on {args.encoder}, {args.parameters / 1e6:.1f} M parameters")
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
    train_linknet(model, optimizer, history, photos, val, args)
    finish(model, args)


if __name__ == "__main__":
    main()
