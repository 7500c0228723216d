"""U-Net: an encoder, a decoder, and at every size a bridge between them.
WHAT IT DOES    Photos (B, 3, H, W) go in, logits (B, C, H, W) come out (Ronneberger et al. 2015).
  The encoder halves the image four times, the decoder doubles it again and at each size is handed
  what the encoder saw there, so it knows both what is in the photo and where its edges are.
YOU WILL LEARN  - how features of two sizes are joined, by concatenation -> Up
  - two ways to double a feature map, and which costs what -> Up; softmax or sigmoid -> UNet
  - how a classifier from a library becomes an encoder -> backbone, stages_of
RUN IT          python unet.py
                python unet.py --resume
                python unet.py --data pets --width 64             the paper's 31 M parameters
                python evaluate.py checkpoints/unet
WHAT TO EXPECT  Toy mIoU 0.808 (81 s), pets mIoU 0.740 (96 px, --width 32, 163 min on one core),
  pets mIoU 0.730 (96 px, --width 24, 97 min); CPU, torch 2.15. A broken run stays at the baseline.
DIFFERS FROM THE PAPER  Padded convolutions (the paper crops 572 pixels to 388), batch
  normalisation, colours, AdamW, BCE + Dice; no dropout, elastic distortion, weight map of borders.
"""
import argparse, copy, hashlib, json, math, os, shutil, signal, sys, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
# --- knobs ----------------------------------------------------------------------------------------
AUTO = {"toy": {"size": [64], "width": 16, "epochs": 16, "batch_size": 32, "lr": 2e-3},
        "folder": {"size": [128], "width": 32, "epochs": 60, "batch_size": 16, "lr": 1e-3}}
SPLIT_SEED = 0                   # of splits and subsets, which --seed does not move
CACHE = Path("data/cache")       # decoded photos; delete it whenever you like
PETS = ["pet", "background", "border"]
SUMS = ("bce", "dice", "iou", "bce+dice", "bce+iou", "dice+iou", "bce+dice+iou")
IGNORE = 255                     # label of pixels that count neither in a loss nor in a score
FORMAT = 1                       # of the checkpoints
CATS = ("Abyssinian Bengal Birman Bombay British_Shorthair Egyptian_Mau Maine_Coon Persian Ragdoll "
        "Russian_Blue Siamese Sphynx").split()       # the names of the 25 dog breeds begin small
HELP = type("", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})
def fail(message):
    """Bad input: one line on stderr that says what to do, exit code 2."""
    print(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)
def number(kind, low, high, *words):
    """An argparse type: a number of that kind in [low, high], or one of the words."""
    def numeric(text):
        if text not in words and not low <= kind(text) <= high:      # refuses NaN too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return text if text in words else kind(text)
    return numeric
def settle(args, multiple):
    """Put the values for this data in the place of 'auto', and check the size."""
    for name, value in AUTO.get(args.data, AUTO["folder"]).items():
        if getattr(args, name) in ("auto", ["auto"]):
            setattr(args, name, value)
    args.size = args.size * 2 if len(args.size) == 1 else args.size
    if len(args.size) != 2 or "auto" in args.size or any(side % multiple for side in args.size):
        fail(f"--size: wanted one side, or H W, in multiples of {multiple}; got {args.size}")

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HELP, allow_abbrev=False)
    p.error = fail
    add = p.add_argument_group("data").add_argument
    add("--data", default="auto", help="toy, pets, a folder; auto: pets if under --root, else toy")
    add("--root", default="data", help="where the data sets lie or are downloaded to")
    add("--size", nargs="+", type=number(int, 8, 4096, "auto"), default="auto", help="side, or H W")
    add("--frac", type=number(float, 1e-6, 1), default=1.0, help="share of the training photos")
    add("--ignore", type=number(int, 0, 255), help="label in a folder's masks that does not count")
    add = p.add_argument_group("model").add_argument
    add("--width", type=number(int, 1, 512, "auto"), default="auto", help="channels; paper: 64")
    add("--up", choices=("transpose", "bilinear"), default="transpose", help="bilinear is cheaper")
    add("--encoder", choices=("none", "resnet34", "efficientnet_b0"), default="none",
        help="a classifier of torchvision in the place of the paper's encoder")
    add("--weights", default="none", help="of that classifier: none, imagenet, or a file of it")
    add("--head", choices=("sigmoid", "softmax"), default="sigmoid", help="for a single class")
    add("--summary", action="store_true", help="print shapes, parameters, multiply-adds; no run")
    add, many = p.add_argument_group("optimisation").add_argument, number(int, 1, 10**6, "auto")
    add("--loss", choices=SUMS, default="bce+dice", help="their sum, equally weighted")
    add("--epochs", type=many, default="auto", help="passes over the photos")
    add("--batch-size", type=many, default="auto", help="halve it if memory runs out")
    add("--lr", type=number(float, 1e-9, 10, "auto"), default="auto", help="halve it if loss jumps")
    add("--weight-decay", type=number(float, 0, 10), default=0.05, help="more against overfitting")
    add = p.add_argument_group("runtime").add_argument
    add("--seed", type=number(int, 0, 2**31), default=0, help="moves weights, order, augmentation")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first of them that is there")
    add("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 if it is fast")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="for long runs")
    add("--resume", action="store_true", help="continue the run in --out, with the same flags")
    add("--out", default="checkpoints/unet", help="the run's folder; an older run is kept once")
    return p.parse_args(argv)
# --- model ----------------------------------------------------------------------------------------
## Going down, maps get smaller and channels more: what is there, but no longer exactly where. Going
## up, each map is doubled and joined to the encoder's map of that size, which still knows where.

class Normalise(nn.Module):
    """x in [0, 1] -> about mean 0, variance 1 in each colour, by ImageNet's mean and variance."""
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), False)
    def forward(self, x):
        return (x - self.mean) / self.std
def conv_bn(a, b, side=3):
    """Convolution a -> b channels, batch normalisation, ReLU; H and W stay."""
    return nn.Sequential(nn.Conv2d(a, b, side, padding=side // 2, bias=False), nn.BatchNorm2d(b),
                         nn.ReLU(inplace=True))
def double_conv(a, b):
    """The paper's pair of 3x3 convolutions: two of them see 5x5 pixels with fewer weights."""
    return nn.Sequential(conv_bn(a, b), conv_bn(b, b))

class Up(nn.Module):
    """x (B, a, H, W), bridge (B, skip, 2H, 2W) from the encoder -> (B, b, 2H, 2W)."""
    def __init__(self, a, skip, b, up):
        super().__init__()
        ## A transposed convolution learns how to fill the new pixels: each input pixel paints a 2x2
        ## block, and blocks do not overlap. Bilinear up-sampling has nothing to learn; the 1x1
        ## convolution beside it mixes channels alone, up-sampling pixels alone: the two may be
        ## swapped, and the convolution comes first, where there are four times fewer pixels.
        self.enlarge = nn.ConvTranspose2d(a, b, 2, stride=2) if up == "transpose" else \
            nn.Sequential(nn.Conv2d(a, b, 1), nn.Upsample(scale_factor=2, mode="bilinear"))
        self.convs = double_conv(b + skip, b)
    def forward(self, x, bridge):
        return self.convs(torch.cat([bridge, self.enlarge(x)], 1))
def backbone(name, weights):
    """torchvision's classifier of that name, its weights drawn, ImageNet's, or those of a file."""
    from torchvision import models                           # here: importing it takes a while
    model = models.get_model(name)
    try:
        ready = models.get_model_weights(name).DEFAULT
        if weights == "imagenet":
            model.load_state_dict(ready.get_state_dict(check_hash=True))
        elif weights != "none":
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:                         # no network, no file, another network's
        fail(f"--weights {weights}: not for {name} ({str(error)[:150]}); fetch {ready.url} by hand "
             "and give --weights FILE, or train from scratch with --weights none")
    return model
def stages_of(name, weights):
    """The parts of a torchvision classifier, each at half the size of the one before, and their
    channels. First comes the image itself, as the bridge at full size."""
    net = backbone(name, weights)
    ## A classifier halves the photo five times on its way to one answer. What it has between two
    ## halvings is a bridge; only its last layers, which answer, are left out. With ImageNet's
    ## weights the way down begins with filters for edges and fur, and the way up with nothing.
    if name == "resnet34":
        half, quarter = [net.conv1, net.bn1, net.relu], [net.maxpool, net.layer1]
        return [nn.Identity(), nn.Sequential(*half), nn.Sequential(*quarter), net.layer2,
                net.layer3, net.layer4], [3, 64, 64, 128, 256, 512]
    f = net.features                                   # its strides are at 0, 2, 3, 4 and 6
    return [nn.Identity(), f[:2], f[2:3], f[3:4], f[4:6], f[6:8]], [3, 16, 24, 40, 112, 320]

class UNet(nn.Module):
    """x (B, 3, H, W) in [0, 1] -> logits (B, classes, H, W). H and W are multiples of 16, or with a
    backbone of 32."""
    def __init__(self, classes, width=64, up="transpose", encoder="none", weights="none",
                 head="sigmoid"):
        super().__init__()
        self.normalise = Normalise()
        if encoder == "none":
            widths = [width << step for step in range(5)]                # 64, 128, 256, 512, 1024
            stages = [double_conv(3, width)] + [nn.Sequential(
                nn.MaxPool2d(2), double_conv(a, b)) for a, b in zip(widths, widths[1:])]
        else:
            stages, widths = stages_of(encoder, weights)
        self.encoder, self.decoder, a = nn.ModuleList(stages), nn.ModuleList(), widths[-1]
        for skip in widths[-2::-1]:
            self.decoder.append(Up(a, skip, a // 2, up))
            a = a // 2
        ## For one class there are two habits. One channel x and a sigmoid: p = 1 / (1 + e^-x). Two
        ## channels u, v and a softmax: p = e^v / (e^u + e^v) = 1 / (1 + e^-(v - u)). So the second
        ## is the first with x = v - u: the same model with weights to spare.
        self.softmax = head == "softmax" and classes == 1
        self.head = nn.Conv2d(a, 2 if self.softmax else classes, 1)
    def forward(self, x):
        x, bridges = self.normalise(x), []
        ## The bridges have to be kept until the way up. The first (without a backbone)
        ## has `width` numbers a pixel, more than all others together: large photos, small batches.
        ## (SegNet keeps a place for each maximum instead, for which two bits would do.)
        for stage in self.encoder:
            x = stage(x)
            bridges.append(x)              # (B, width, H, W), (B, 2 width, H/2, W/2), ...
        bridges.pop()                                         # the last is x itself
        for block in self.decoder:
            x = block(x, bridges.pop())
        x = self.head(x)                                      # (B, C, H, W)
        return x[:, 1:] - x[:, :1] if self.softmax else x
def summary(model, size, show):
    """Parameters and multiply-adds of one photo -> (int, int); if show, of every block too."""
    rows, model = {}, copy.deepcopy(model).eval()
    for name, block in model.named_modules():
        block.register_forward_hook(lambda block, x, y, name=name: rows.update({name: (
            [*(y if torch.is_tensor(y) else y[0]).shape[1:]],
            sum(weight.numel() for weight in block.parameters()))}))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size))
    counts = {name.partition(".")[2]: flops for name, flops in counter.get_flop_counts().items()}
    for name, (shape, weights) in rows.items():
        total = sum(counts.get(name, {}).values()) // 2
        if show and name.count(".") < 2:       # the blocks, and the whole
            print(f"{name or type(model).__name__:12} {str(shape):16} {weights:>12,} parameters "
                  f"{total:>15,} multiply-adds")
    return weights, total          # of the last row, the whole
def export(model, args, losses, images, masks):
    """The segmenter as a program, OUT/model.pt2 (README: how the scripts talk) -> val scores."""
    model = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format).eval()
    program = torch.export.export(model, (torch.zeros(2, 3, *args.size),),    # 1 would be frozen
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    loss, counts = validate(program.module(), images.cpu(), masks.cpu(), losses)
    meta = {"format": FORMAT, "script": Path(__file__).name, "args": vars(args), "size": args.size,
            "classes": args.classes, "ignore": args.ignore, "torch": str(torch.__version__),
            "metrics": {"loss": loss, **scores(counts, len(args.classes))}}
    extra = {"meta.json": json.dumps(meta)}
    save(Path(args.out, "model.pt2"), lambda f: torch.export.save(program, f, extra_files=extra))
    return meta["metrics"]
# --- loss and scores ------------------------------------------------------------------------------
def one_hot(masks, classes):
    """masks (B, H, W) -> y (B, C, H, W), valid (B, 1, H, W), floats; a single class is label 1."""
    labels = torch.arange(classes, device=masks.device).view(1, -1, 1, 1) + (classes == 1)
    return (masks[:, None] == labels).float(), (masks[:, None] != IGNORE).float()
def bce(logits, y, valid):
    """Binary cross-entropy, each class against the rest, mean over the valid pixels."""
    ## -y log p - (1 - y) log(1 - p), p = sigmoid(x), is max(x, 0) - x y + log(1 + e^-|x|),
    ## which overflows for no x.
    loss = logits.clamp(min=0) - logits * y + torch.log1p(torch.exp(-logits.abs()))
    return (loss * valid).sum() / (valid.sum() * logits.shape[1]).clamp(min=1)
def overlap(logits, y, valid):
    """Soft |P and T| and |P| + |T| with P = sigmoid(logits), T = y: (B, C) each."""
    p, y = logits.sigmoid() * valid, y * valid
    return (p * y).sum((2, 3)), p.sum((2, 3)) + y.sum((2, 3))
def dice_loss(logits, y, valid):
    """1 - Dice, Dice = (2 |P and T| + 1) / (|P| + |T| + 1) of each image and channel, mean."""
    both, total = overlap(logits, y, valid)
    return 1 - ((2 * both + 1) / (total + 1)).mean()
def iou_loss(logits, y, valid):
    """1 - IoU, IoU = (|P and T| + 1) / (|P or T| + 1) of each image and channel, mean."""
    both, total = overlap(logits, y, valid)
    return 1 - ((both + 1) / (total - both + 1)).mean()
LOSSES = {"bce": bce, "dice": dice_loss, "iou": iou_loss}
def segmentation_loss(logits, masks, losses):
    """Sum of the losses in float32, logits (B, C, H, W) against masks (B, H, W)."""
    y, valid = one_hot(masks, logits.shape[1])
    return sum(loss(logits.float(), y, valid) for loss in losses)
def confusion(logits, masks):
    """(C, C) pixels by truth (down) and prediction; summed over a split, no batch size matters."""
    C = max(2, logits.shape[1])
    hard = logits.max(1).indices if logits.shape[1] > 1 else logits[:, 0] > 0           # (B, H, W)
    cell = torch.where(masks == IGNORE, C * C, masks.long() * C + hard).flatten()
    counts = torch.zeros(C * C + 1, dtype=torch.long, device=cell.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell))[:-1].view(C, C)
def scores(counts, classes):
    """Accuracy; IoU and Dice = 2 IoU / (1 + IoU), means over the classes that occur, or 1."""
    both, total = counts.diag().double(), (counts.sum(0) + counts.sum(1)).double()
    iou = (both / (total - both))[-classes:]                            # nan where total = 0
    means = torch.stack([iou, 2 * iou / (1 + iou)]).nanmean(1).nan_to_num(1)
    return {"accuracy": (both.sum() / counts.sum()).item(), "miou": means[0].item(),
            "dice": means[1].item(), "iou": iou.nan_to_num().tolist()}
# --- training -------------------------------------------------------------------------------------
def to_float(images):
    """uint8 (B, 3, H, W) -> float in [0, 1], channels_last, the layout convolutions like best."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)
def pick_device(name, amp):
    """'auto' takes cuda or mps where it is there, else cpu -> device, whether bfloat16 is fast."""
    there = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.empty(1, device=there if name == "auto" else name).device
    except Exception as error:                         # each backend has its own
        fail(f"--device {name}: not here ({str(error).splitlines()[0]:.99}); try --device cpu")
    if device.type == "cuda":
        return device, amp and torch.cuda.get_device_capability(device)[0] >= 8
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device, amp and device.type == "cpu" and fast
def progress(text):
    """One rewritten line, on a terminal only; the next print writes over it."""
    if sys.stdout.isatty():
        print(f"\r{text:<39.39}\r", end="", flush=True)
def lr_at(step, steps, peak):
    """Warm-up over the first twentieth of the steps, then half a cosine down to 0."""
    return peak * min((step + 1) / (steps // 20 or 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
def augment(images, masks):
    """uint8 (B, 3, H, W), (B, H, W), flipped and zoomed as one, recoloured -> floats, uint8."""
    B, device = len(images), images.device
    u = lambda *shape: torch.rand(*shape, device=device) * 2 - 1    # copying would wait
    side, matrix = 1 / (1.3 + 0.3 * u(B)), torch.zeros(B, 2, 3, device=device)   # cut out
    matrix[:, 0, 0], matrix[:, 1, 1] = side * u(B).sign(), side
    matrix[:, :, 2] = u(B, 2) * (1 - side)[:, None]
    grid = F.affine_grid(matrix, (B, 1, *images.shape[2:]), align_corners=False)
    x = F.grid_sample(to_float(images), grid, "bilinear", "reflection", align_corners=False)
    y = F.grid_sample(masks[:, None].float(), grid, "nearest", "reflection", align_corners=False)
    contrast, light = 1 + 0.4 * u(B, 1, 1, 1), 0.2 * u(B, 1, 1, 1) + 0.1 * u(B, 3, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)                               # (B, 1, 1, 1)
    x = (x - mean) * contrast + mean + light
    return x.clamp_(0, 1), y[:, 0].byte()
def train_epoch(model, images, masks, losses, optimizer, schedule, args, epoch, amp):
    """One pass over the training photos -> loss, counts (C, C), images a second."""
    model.train()
    torch.manual_seed(args.seed * 100003 + epoch)      # all that is random here: resume is exact
    device, batch = next(model.parameters()).device, min(args.batch_size, len(images))
    steps = len(images) // batch                       # an incomplete last batch is left out
    order = torch.randperm(len(images)).to(images.device)
    total, counts, began = 0.0, 0, time.perf_counter()
    for step in range(steps):
        index = order[step * batch:(step + 1) * batch]
        x, y = augment(images[index].to(device), masks[index].to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(x)
        loss = segmentation_loss(logits, y, losses)
        lr = schedule(epoch * steps + step, args.epochs * steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total, counts = total + loss.detach(), counts + confusion(logits.detach(), y)
        if step % 50 == 49 or step == steps - 1:       # sync: once in 50 steps
            if not (total + sum(w.detach().sum() for w in model.parameters())).isfinite():
                fail(f"the loss is not finite in epoch {epoch + 1} at lr {lr:.1e}; finished "
                     f"epochs are kept; try --lr {args.lr / 3:.0e}")
        speed = (step + 1) * batch / (time.perf_counter() - began)
        progress(f" epoch {epoch + 1}  {(steps - 1 - step) * batch / speed:.0f} s left")
    return total.item() / steps, counts.cpu(), speed
@torch.inference_mode()
def validate(model, images, masks, losses, amp=False):
    """Mean loss and confusion (C, C) of a segmenter over a whole split."""
    total, counts, n = 0.0, 0, min(64, 2**20 // images[0, 0].numel() or 1)      # photos at a time
    for x, y in zip(images.split(n), masks.split(n)):
        x, y = to_float(x.to(device := next(model.parameters()).device)), y.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(x)
        total = total + segmentation_loss(logits, y, losses) * len(x)
        counts = counts + confusion(logits, y)
    return (total / len(images)).item(), counts.cpu()
# --- labelled data --------------------------------------------------------------------------------
def subset(breeds, share):
    """Indices of a seeded share of each breed, at least one, and of the rest; 25 % is in 50 %."""
    g, size, seen, lists = torch.Generator(), Counter(breeds), Counter(), ([], [])
    for i in torch.randperm(len(breeds), generator=g.manual_seed(SPLIT_SEED)).tolist():
        lists[seen[breeds[i]] >= share * size[breeds[i]]].append(i)      # list 0: chosen
        seen[breeds[i]] += 1
    return sorted(lists[0]), sorted(lists[1])
def draw_toy(n, size, seed):
    """n drawn cats and dogs -> images (n, 3, H, W), masks (n, H, W) 0 pet, 1 background, 2 border,
    both uint8, and breeds. Fur, ground and a ball share colours: shape tells pet from ball."""
    images, masks = torch.empty(n, 3, *size).byte(), torch.empty(n, *size).byte()
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
    for i in range(0, n, 256):
        g, b = torch.Generator().manual_seed(seed * 100003 + i), min(256, n - i)
        u = lambda low, high, c=1: low + (high - low) * torch.rand(b, c, 1, 1, generator=g)
        cat, zoom = ((i + torch.arange(b)) % 37 < 12).view(b, 1, 1, 1), u(0.55, 0.9)
        X, Y = u(-1, 1).sign() * (x - u(-0.3, 0.3)) / zoom, (y - u(-0.25, 0.25)) / zoom
        disc = lambda cx, cy, rx, ry: ((X - cx) / rx) ** 2 + ((Y - cy) / ry) ** 2 < 1
        tips = (((X + 0.45).abs() - 0.23).abs() < 0.4 * (Y + 1.05)) & (Y < -0.45)     # (b, 1, H, W)
        pet = torch.where(cat, tips, disc(-0.85, -0.2, 0.14, 0.4) | disc(-0.05, -0.2, 0.14, 0.4))
        pet = pet | disc(-0.45, -0.3, 0.4, 0.38) | disc(0.3, 0.3, 0.75, 0.4) | disc(
            1.1, 0, 0.1, 0.45) | disc(-0.1, 0.7, 0.12, 0.4) | disc(0.7, 0.7, 0.12, 0.4)
        wave = lambda low, high: torch.sin((x * u(-1, 1, 3) + y * u(-1, 1, 3)) * u(low, high, 3)
                                           + u(0, 6.3, 3)).mean(1, True) + u(-0.2, 0.2, 3)
        fur, tint = pet | disc(u(-1.4, 1.4), u(-1.2, 1.2), 0.3, 0.3), u(0.2, 0.8, 3)    # and a ball
        paint = torch.where(fur, 0.25 * wave(20, 40), 0.3 * wave(2, 12)) + tint
        paint += 0.04 * torch.randn(b, 1, *size, generator=g)
        images[i:i + b] = paint.clamp(0, 1).mul(255).byte()
        k = 2 * max(1, min(size) // 48) + 1                                    # border, in pixels
        grown, rest = (F.max_pool2d(m.float(), k, 1, k // 2) for m in (pet, ~pet))
        masks[i:i + b] = torch.where(grown + rest > 1, 2, 1 - pet.long())[:, 0].byte()
    return images, masks, [(CATS + [f"dog_{d}" for d in range(25)])[i % 37] for i in range(n)]
def pet_files(root, part):
    """Oxford-IIIT Pet, official split, a tenth of trainval for validation -> pairs, breeds."""
    base = Path(root, "oxford-iiit-pet")
    if not (base / "annotations/trainval.txt").exists():
        from torchvision.datasets import OxfordIIITPet       # here: importing it takes a while
        try:
            OxfordIIITPet(root, download=True)
        except Exception as error:
            fail(f"pets: no download ({error}); unpack images.tar.gz and annotations.tar.gz of "
                 f"https://www.robots.ox.ac.uk/~vgg/data/pets in {base}, or take --data toy")
    lines = (base / f"annotations/{'test' if part == 'test' else 'trainval'}.txt").read_text()
    names = [line.split()[0] for line in lines.splitlines() if line and line[0] != "#"]
    breeds = [name.rsplit("_", 1)[0] for name in names]
    keep = range(len(names)) if part == "test" else subset(breeds, 0.1)[part == "train"]
    return [(base / f"images/{names[i]}.jpg", base / f"annotations/trimaps/{names[i]}.png")
            for i in keep], [breeds[i] for i in keep]
def folder_files(folder, part):
    """images/ and masks/, flat or under train/ val/ test/ (see README) -> pairs, breeds ("")."""
    flat, cut = Path(folder, "images").is_dir(), not Path(folder, "val").is_dir()
    base = Path(folder, "" if flat else "train" if cut and part == "val" else part)
    files = [sorted(base.glob(pattern)) for pattern in ("images/[!.]*", "masks/[!.]*")]
    photos, masks = ({file.stem: file for file in kind} for kind in files)
    count = Counter(file.stem for kind in files for file in kind)
    odd = [s for s in sorted(count) if count[s] > 2 or s not in photos or s not in masks]
    if odd or not photos:
        fail(f"{base}: '{odd[0] if odd else 'a photo'}' wanted once in images/ and once in masks/")
    every, stems = range(len(photos)), list(photos)
    test, rest = subset([""] * len(photos), 0.1) if flat else (every, every)
    val, train = subset([""] * len(rest), 0.1) if flat or cut else (every, every)
    keep = test if part == "test" else [rest[i] for i in (val if part == "val" else train)]
    pairs = [(photos[stems[i]], masks[stems[i]]) for i in keep]
    return (pairs, [""] * len(pairs)) if pairs else fail(f"{folder}: too few photos for {part}")
def read_pair(pair, size):
    """(photo, mask) files -> (4, H, W) uint8, RGB and labels, stretched and turned upright."""
    try:
        with Image.open(pair[0]) as photo, Image.open(pair[1]) as mask:
            full = photo.size[::-1 if photo.getexif().get(274, 1) > 4 else 1]  # 274: orientation
            if mask.mode not in ("1", "L", "P") or photo.mode[0] == "I" or mask.size != full:
                raise OSError(f"wrong mode or size: {photo.mode} {full}, {mask.mode} {mask.size}")
            photo.draft("RGB", (2 * size[1], 2 * size[0]))    # JPEG: decodes at 1/2, 1/4 or 1/8
            rgb = ImageOps.exif_transpose(photo).convert("RGB").resize(size[::-1], Image.BILINEAR)
            return np.dstack([rgb, mask.resize(size[::-1], Image.NEAREST)]).transpose(2, 0, 1)
    except Exception as error:                         # whatever a broken file can provoke
        raise OSError(f"{pair[0]}, {pair[1].name}: {error}") from error
def decode(pairs, size):
    """Read every pair once, in threads -> (N, 4, H, W) uint8, kept in data/cache/ under a name made
    from the paths, sizes and times of what was read."""
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime) for p in pairs for f in p]
    key = hashlib.sha256(repr((FORMAT, size, stats)).encode()).hexdigest()[:16]
    cache, began, shape = CACHE / f"{key}.bin", time.perf_counter(), (len(pairs), 4, *size)
    if cache.exists() and cache.stat().st_size == math.prod(shape):
        return torch.from_numpy(np.memmap(cache, np.uint8, "c", shape=shape))
    array = np.empty(shape, np.uint8)
    with ThreadPoolExecutor() as pool:
        for i, pixels in enumerate(pool.map(lambda pair: read_pair(pair, size), pairs)):
            array[i] = pixels
            progress(f" decoding {i}/{len(pairs)}")
    save(cache, array.tofile)
    print(f"decoded  {len(pairs)} photos in {time.perf_counter() - began:.1f} s -> {cache}")
    return torch.from_numpy(array)
def load_split(data, root, part, size, ignore):
    """-> images (N, 3, H, W), masks (N, H, W) of labels, IGNORE; uint8; breeds (N); class names."""
    if data == "toy" and (ignore in (None, IGNORE) or fail("--ignore: not for drawn pets")):
        images, masks, breeds = draw_toy(*((256, size, 1) if part == "test" else (1110, size, 2)))
        keep = range(256) if part == "test" else subset(breeds, 0.1)[part == "train"]
        return images[keep], masks[keep], [breeds[i] for i in keep], PETS
    pairs, breeds = pet_files(root, part) if data == "pets" else folder_files(data, part)
    images, masks = decode(pairs, size).split((3, 1), 1)
    table, masks = torch.arange(256).byte(), masks[:, 0]                # (N, H, W)
    found = torch.bincount(masks.flatten(), minlength=256).nonzero().flatten().tolist()
    top = max(values := set(found) - {ignore} or fail(f"{data}: --ignore ignores every label"))
    if data == "pets":
        table -= 1                                     # trimap 1, 2, 3: pet, background, border
    elif values <= {0, 255}:
        table[255] = top = 1                           # a black and white mask
    elif top > 99:
        i = (masks == top).flatten(1).any(1).nonzero()[0].item()
        fail(f"{pairs[i][1]}: {masks[i].unique().tolist()[-9:]}; wanted 0, 255 or 0..C-1, --ignore")
    if ignore is not None:
        table[ignore] = IGNORE
    names = [str(label) for label in range(top + 1)] if top > 1 else ["foreground"]
    return images, table[masks.int()], breeds, PETS if data == "pets" else names
# --- checkpoints ----------------------------------------------------------------------------------
def load_checkpoint(path, script, hint):
    """The dictionary in a .pt file that `script` wrote, tensors on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if (state["script"], state["format"]) == (script, FORMAT):
            return state
        problem = f"is not of {script}, format {FORMAT}"
    except Exception as error:                         # truncated, or something else entirely
        problem = "no such file" if isinstance(error, FileNotFoundError) else "not a checkpoint"
    fail(f"{path}: {problem}; {hint}")
def save(path, write):
    """write(file) under a temporary name, then rename: a kill leaves the old or the new file."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:           # a full disk is the latter for torch.save
        fail(f"{path}: not written ({str(error).splitlines()[0]}); free space, or another folder")
    finally:
        if temporary.exists():
            temporary.unlink()
def open_run(args, model, optimizer):
    """A fresh --out (an earlier run moves to OUT.prev), or with --resume last.pt put into model and
    optimizer -> rows of the epochs so far, number of the best."""
    out, free = Path(args.out), ("resume", "out", "root", "device", "compile", "download")
    if args.resume:
        last = load_checkpoint(out / "last.pt", Path(__file__).name, "start without --resume")
        try:
            other = [f"--{key.replace('_', '-')} {vars(args).get(key)} (was {was})" for key, was in
                     last["args"].items() if key not in free and vars(args).get(key) != was]
            if other:
                fail(f"--resume: the run in {out} had other arguments or data: {', '.join(other)}")
            model.load_state_dict(last["model"])
            optimizer.load_state_dict(last["optimizer"])
            for part in out.glob(".[0-9]*"):           # left by a process that was killed
                part.unlink(missing_ok=True)
            return last["history"], last["best"]
        except (KeyError, RuntimeError, TypeError, ValueError):
            fail(f"{out / 'last.pt'}: not as it was written; start without --resume")
    if out.exists() and any(file.name[0] != "." for file in out.iterdir()):
        if not (out / "best.pt").exists():             # the first file of a run
            fail(f"--out {out}: holds something that is not a run; choose another folder")
        shutil.rmtree(f"{out}.prev", ignore_errors=True)
        print(f"note     the earlier run is now in {out.rename(f'{out}.prev')}")
    return [], 0
def save_epoch(args, model, optimizer, history, best):
    """best.pt if the last epoch is the best, the log, last.pt; a kill between loses one epoch."""
    out, log = Path(args.out), Path(args.out, "log.jsonl")
    rows = [json.dumps(row) + "\n" for row in history]
    if (log.read_text().splitlines(True) if log.exists() else [])[:len(rows) - 1 or 1] != rows[:-1]:
        fail(f"{out}: another run writes there too, or the folder was deleted; this one ends")
    state = {"format": FORMAT, "script": Path(__file__).name, "args": vars(args),
             "epoch": len(history), "model": model.state_dict()}
    if best == len(history):
        save(out / "best.pt", lambda f: torch.save(state | {"metrics": history[-1]}, f))
    save(log, lambda f: f.write_text("".join(rows)))
    state |= {"optimizer": optimizer.state_dict(), "best": best, "history": history}
    save(out / "last.pt", lambda f: torch.save(state, f))
def draw_samples(path, *columns):
    """Columns of N pictures as a PNG: RGB (N, 3, H, W), or labels (N, H, W), 0 orange, 1 black."""
    colours = torch.randint(40, 255, (256, 3), generator=torch.Generator().manual_seed(4)).byte()
    colours[:3] = torch.tensor([[255, 120, 0], [0, 0, 0], [255, 255, 255]])
    columns = [c.cpu().movedim(1, -1) if c.dim() == 4 else colours[c.cpu().long()] for c in columns]
    page = Image.fromarray(torch.cat(columns, 2).flatten(0, 1).numpy())       # (N H, columns W, 3)
    save(path, lambda f: page.save(f, "PNG"))
# --- main -----------------------------------------------------------------------------------------
def train_unet(args, out):
    ## 1. The settings hang on the data.
    if args.data == "auto":
        args.data = "pets" if Path(args.root, "oxford-iiit-pet").is_dir() else "toy"
    multiple = 16 if args.encoder == "none" else 32       # so much smaller get the maps
    settle(args, multiple)
    if args.weights != "none" and args.encoder == "none":
        fail(f"--weights {args.weights}: of which --encoder?")
    device, amp = pick_device(args.device, args.amp)
    print(f"unet.py  torch {torch.__version__}  {device}  {'bf16' if amp else 'float32'}  seed "
          f"{args.seed}  {args.epochs} epochs  batch {args.batch_size}  lr {args.lr:g}  -> {out}")
    ## 2. The data, train and val, never test; on the device if the photos fit 40 % of what is free.
    (images, masks, breeds, classes), (val_images, val_masks, _, more) = (
        load_split(args.data, args.root, part, args.size, args.ignore) for part in ("train", "val"))
    args.photos, args.classes = len(breeds), (classes := max(classes, more, key=len))    # is saved
    keep = subset(breeds, args.frac)[0]
    full = device.type == "cuda" and images.nbytes > 0.4 * torch.cuda.mem_get_info(device)[0]
    images, masks, val_images, val_masks = (t.to("cpu" if full else device) for t in (
        images[keep], masks[keep], val_images, val_masks))
    print(f"data     {args.data}: train {len(images)}  val {len(val_images)}  {args.size} pixels"
          + ("  (drawn; for real photos: --data pets)" if args.data == "toy" else ""))
    if min(args.batch_size, len(images)) * math.prod(args.size) <= multiple ** 2:
        fail("--batch-size: batch normalisation needs two values; take a larger batch or size")
    ## 3. The model. The baseline is the best constant answer.
    losses = [LOSSES[name] for name in args.loss.split("+")]
    torch.manual_seed(args.seed)
    model = UNet(len(classes), args.width, args.up, args.encoder,
                 "none" if args.resume or args.summary else args.weights, args.head)
    parameters, multiply_adds = summary(model, args.size, args.summary)
    print(f"model    {args.width} wide, {parameters:,} parameters, {multiply_adds:,} multiply-adds")
    if args.summary:
        return
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    history, best = open_run(args, model, optimizer)
    if args.compile:
        model.compile()
    share = torch.bincount(val_masks.cpu().flatten(), minlength=256)[:IGNORE].double()
    share = (share / share.sum())[len(classes) == 1:]         # of one class: not the background
    print(f"baseline constant answer: mIoU {share.max() / (share > 0).sum().clamp(min=1):.4f}")
    ## 4. Train; the best epoch is the one with the highest mean IoU on the validation photos.
    print("   epoch    loss  val_loss     acc    mIoU    Dice       lr   img/s     sec")
    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        loss, counts, speed = train_epoch(model, images, masks, losses, optimizer, lr_at,
                                          args, epoch, amp)
        val_loss, val_counts = validate(model.eval(), val_images, val_masks, losses, amp)
        val = {f"val_{key}": value for key, value in scores(val_counts, len(classes)).items()}
        row = {"epoch": epoch + 1, "loss": loss, **scores(counts, len(classes)),
               "val_loss": val_loss, **val, "lr": optimizer.param_groups[0]["lr"],
               "images_per_second": speed, "seconds": time.perf_counter() - began, "memory_gb":
               torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None}
        best = max([*history, row], key=lambda row: row["val_miou"])["epoch"]
        save_epoch(args, model, optimizer, [*history, row], best)
        history.append(row)
        print("{epoch:>4}/{0:<4}{loss:7.4f}{val_loss:10.4f}{val_accuracy:8.4f}{val_miou:8.4f}"
              "{val_dice:8.4f}{lr:9.1e}{images_per_second:8,.0f}{seconds:8.1f}{1}".format(
                  args.epochs, " *" if best == epoch + 1 else "", **row), flush=True)
    ## 5. Report: the best epoch becomes a program, its scores and a few pictures.
    model.load_state_dict(load_checkpoint(out / "best.pt", Path(__file__).name, "retrain")["model"])
    final = export(model.eval(), args, losses, val_images, val_masks)
    result = {**history[best - 1], "metrics": final, "args": vars(args), "parameters": parameters,
              "multiply_adds": multiply_adds, "torch": torch.__version__,
              "train_masks": hashlib.sha256(masks.cpu().numpy().tobytes()).hexdigest()[:16],
              "total_seconds": sum(row["seconds"] for row in history)}
    save(out / "result.json", lambda file: file.write_text(json.dumps(result, indent=1)))
    logits = torch.no_grad()(model)(to_float(val_images[:8].to(device)))
    hard = logits.argmax(1) if len(classes) > 1 else logits[:, 0] < 0           # 0 is orange
    draw_samples(out / "samples.png", val_images[:8], val_masks[:8] ^ (len(classes) == 1), hard)
    print(f"best     epoch {best}  accuracy {final['accuracy']:.4f}  mIoU {final['miou']:.4f}  "
          f"{out / 'model.pt2'}   total {result['total_seconds']:.0f} s")
def main(argv=None):
    """train_unet, with one line in the place of a traceback where the machine gives out."""
    args, began = parse_args(argv), time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a scheduler's stop is a Ctrl-C
    try:
        train_unet(args, Path(args.out))
    except KeyboardInterrupt:
        kept = any(args.resume or f.stat().st_mtime > began for f in Path(args.out).glob("last.pt"))
        print("\nstopped ", f"--resume continues {args.out}" if kept else "no epoch yet")
        raise SystemExit(130)
    except (OSError, MemoryError, RuntimeError) as e:      # the last is torch's, for memory too
        if not isinstance(e, RuntimeError) or any(w in str(e).lower() for w in ("alloc", "of mem")):
            fail(e if isinstance(e, OSError) else "out of memory; halve --batch-size or --size")
        raise
if __name__ == "__main__":
    main()
