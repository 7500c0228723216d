"""Fine-tune the pre-trained VQ-VAE until it segments pets: stage 2 of 3.

HEADER
"""
import argparse, copy, hashlib, json, math, os, shutil, signal, sys, time
try:
    import resource
except ImportError:      # Windows
    resource = None
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# --- knobs ----------------------------------------------------------------------------------------

AUTO = {                         # what "auto" means, by data
    "toy": {"size": [64], "epochs": 12, "batch_size": 32, "lr": 1e-3},
    "pets": {"size": [128], "epochs": 60, "batch_size": 32, "lr": 1e-3},
    "folder": {"size": [128], "epochs": 60, "batch_size": 16, "lr": 1e-3},
}
WIDTHS = {"width": 128, "residual_width": 32, "residual_blocks": 2, "downs": 2}   # Sonnet's
COMMITMENT = 0.25                # weight of the commitment loss, as in the paper
SPLIT_SEED = 0                   # splits, subsets and toy pictures hang on this, not on --seed
CACHE = Path("data/cache")       # decoded photos; delete it whenever you like
IGNORE = 255                     # label of pixels that count neither in a loss nor in a score
FORMAT = 1                       # of the checkpoints
CATS = ("Abyssinian Bengal Birman Bombay British_Shorthair Egyptian_Mau Maine_Coon Persian Ragdoll "
        "Russian_Blue Siamese Sphynx").split()    # the other 25 breeds are dogs, in small letters
HELP = type("Help", (argparse.ArgumentDefaultsHelpFormatter,      # defaults shown, and the
                     argparse.RawDescriptionHelpFormatter), {})   # docstring's line breaks kept

def fail(message):
    """Bad input: one line on stderr that says what to do, exit code 2."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)

def number(kind, low, high):
    """An argparse type: 'auto', or a number of that kind in [low, high]."""
    def parse(text):
        if text != "auto" and not low <= kind(text) <= high:      # refuses NaN too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return text if text == "auto" else kind(text)
    parse.__name__ = kind.__name__
    return parse

def settle(args, multiple):
    """Put the values for this data in the place of 'auto', and check the size."""
    for name, value in AUTO[args.data if args.data in AUTO else "folder"].items():
        if getattr(args, name) in ("auto", ["auto"]):
            setattr(args, name, value)
    args.size = args.size * 2 if len(args.size) == 1 else args.size
    if len(args.size) != 2 or any(side % multiple for side in args.size):
        fail(f"--size {' '.join(map(str, args.size))}: wanted one side or H W, multiples of "
             f"{multiple}, such as {max(1, args.size[0] // multiple) * multiple}")

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HELP, allow_abbrev=False)
    p.error = fail
    add = p.add_argument_group("data").add_argument
    add("--data", default="auto", help="toy, pets or a folder; auto: pets if under --root, else toy")
    add("--root", default="data", help="where the data sets lie or are downloaded to")
    add("--size", nargs="+", type=number(int, 8, 4096), default="auto", help="side, or H W; auto: by data")
    add("--frac", type=number(float, 1e-6, 1), default=1.0, help="share of the training photos")
    add("--cats", help="of the cats keep these breeds only, for instance Maine_Coon,Birman,Bombay")
    add("--ignore", type=number(int, 0, 255), help="label in a folder's masks that does not count")
    add = p.add_argument_group("model").add_argument
    add("--init", default="checkpoints/pretrain/best.pt", help="start from this; none: from scratch")
    add("--take", choices=("encoder", "all"), default="all", help="all: the decoder as well")
    add("--width", type=number(int, 8, 2048), default="auto", help="channels; auto: as in --init")
    add("--residual-width", type=number(int, 4, 2048), default="auto", help="channels within a block")
    add("--residual-blocks", type=number(int, 0, 64), default="auto", help="more of them see further")
    add("--downs", type=number(int, 1, 6), default="auto", help="halvings of the sides before coding")
    add("--summary", action="store_true", help="print blocks, parameters, multiply-adds, and leave")
    add = p.add_argument_group("optimisation").add_argument
    add("--loss", type=loss_sum, default="bce+dice", help="a sum of bce, dice and iou")
    add("--epochs", type=number(int, 1, 10**6), default="auto", help="passes over the photos")
    add("--batch-size", type=number(int, 1, 10**6), default="auto", help="halve it if memory runs out")
    add("--lr", type=number(float, 1e-9, 10), default="auto", help="peak; halve it if the loss jumps")
    add("--weight-decay", type=number(float, 0, 10), default=0.05, help="raise it if val_loss rises")
    add = p.add_argument_group("runtime").add_argument
    add("--seed", type=number(int, 0, 2**31), default=0, help="moves weights, order, augmentation")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first of them that is there")
    add("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 where it is fast")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="pays in long runs")
    add("--resume", action="store_true", help="continue the run in --out, with the same flags")
    add("--out", default="checkpoints/finetune", help="the run's folder; an older run is kept once")
    return p.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------
## A VQ-VAE is an auto-encoder with a dictionary in the middle. The encoder turns an image into a
## small grid of vectors, the quantiser replaces each by the nearest of K learned codes, and the
## decoder turns the grid of codes back into an image; with another head, into a segmentation.

class ResidualStack(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), several times: (B, width, H, W) in and out."""

    def __init__(self, width, hidden, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(width, hidden, 3, padding=1),
                          nn.ReLU(), nn.Conv2d(hidden, width, 1)) for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return F.relu(x)

def sum_over_ranks(x):
    """x summed in place over the processes of a torchrun; x itself in an ordinary run."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x

class Quantiser(nn.Module):
    """Nearest-code lookup (VQ-VAE, eq. 1 and 2) in a codebook that follows the encoder by moving
    averages, without gradients (appendix A.1). In eval mode no buffer changes.

    forward: z (B, D, H, W), keep None or (B, H, W) bool, False where the input was masked
             -> q (B, D, H, W), commitment loss (), ids (B, H, W) int64 in [0, K)."""

    def __init__(self, K, D, decay=0.9):
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.zeros(K, D))
        self.register_buffer("counts", torch.zeros(K))        # vectors a step, moving average
        self.register_buffer("sums", torch.zeros(K, D))       # of those vectors; code = sum / count

    def forward(self, z, keep=None):
        B, D, H, W = z.shape
        with torch.autocast(z.device.type, enabled=False):    # in bf16 near codes would be mixed up
            flat = z.float().permute(0, 2, 3, 1).reshape(-1, D)         # (N, D), N = B H W
            weight = torch.ones_like(flat[:, 0]) if keep is None else keep.reshape(-1).float()
            if self.training:
                self.revive(flat.detach(), weight)
            ids = self.nearest(flat.detach())                           # (N,)
            q = self.codes[ids]                                         # (N, D)
            if self.training:
                self.follow(flat.detach(), ids, weight)
            commitment = (flat - q).square().mean()           # keeps the encoder near its codes
            ## A lookup has no gradient, so the decoder's goes straight through to the encoder:
            ## forward this is q, backward the bracket is a constant and it is flat.
            q = flat + (q - flat).detach()
        return q.view(B, H, W, D).permute(0, 3, 1, 2), commitment, ids.view(B, H, W)

    def nearest(self, flat):
        """(N, D) -> (N,) number of the nearest code."""
        ## |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every code.
        squares = self.codes.square().sum(1)                            # (K,)
        rows = flat.split(8192) if self.training else [flat]  # small blocks stay in the cache
        return torch.cat([torch.addmm(squares, r, self.codes.T, alpha=-2).argmin(1) for r in rows])

    def revive(self, flat, weight):
        """Move codes that hardly any vector uses onto random vectors of this batch: code, count and
        sum together. At first no code is in use, so this also starts the codebook from data."""
        K, grouped = len(self.codes), dist.is_initialized()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        kept = flat.new_zeros(ranks)
        kept[rank] = weight.sum()
        kept = sum_over_ranks(kept)                           # vectors that count, on each rank
        usual = kept.sum() / K                                # mean use of a code
        ## K random places among the kept vectors of all ranks; each rank fills in those it holds.
        place = torch.rand(K).to(flat.device) * kept.sum() - kept[:rank].sum()
        row = torch.searchsorted(weight.cumsum(0), place, right=True).clamp(max=len(flat) - 1)
        held = (place >= 0) & (place < kept[rank])
        fresh = sum_over_ranks(flat[row] * held[:, None])               # (K, D)
        dead = self.counts < 0.1 * usual                      # tuned: a tenth of the mean use
        self.codes.copy_(torch.where(dead[:, None], fresh, self.codes))
        self.sums.copy_(torch.where(dead[:, None], fresh * usual, self.sums))
        self.counts.copy_(torch.where(dead, usual, self.counts))

    def follow(self, flat, ids, weight):
        """count <- decay count + (1 - decay) new count, sums alike, code = sum / count (eq. 6-8)."""
        counts = torch.zeros_like(self.counts).index_add_(0, ids, weight)
        sums = torch.zeros_like(self.sums).index_add_(0, ids, flat * weight[:, None])
        self.counts.lerp_(sum_over_ranks(counts), 1 - self.decay)
        self.sums.lerp_(sum_over_ranks(sums), 1 - self.decay)
        self.codes.copy_(self.sums / self.counts[:, None])

def start(layer):
    """First weights after He et al. (2015): variance is kept, and a residual block begins as x."""
    ## PyTorch's own are so small beside its biases that all vectors begin nearly equal, one code
    ## takes them all, and the codebook collapses.
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        taps = layer.kernel_size[0] ** 2 / (4 if isinstance(layer, nn.ConvTranspose2d) else 1)
        nn.init.normal_(layer.weight, std=(2 / (layer.in_channels * taps)) ** 0.5)
        nn.init.zeros_(layer.bias)
    elif isinstance(layer, ResidualStack):
        for block in layer.blocks:
            nn.init.zeros_(block[3].weight)

class VQVAE(nn.Module):
    """Encoder, quantiser, decoder, head (Sonnet's example); each of `downs` steps halves H and W.

    forward: x (B, 3, H, W) in [0, 1], keep None or (B, 1, H, W) bool, False for a masked pixel
             -> output (B, out_channels, H, W), commitment loss (), ids (B, H/2^downs, W/2^downs)."""

    def __init__(self, out_channels, width, residual_width, residual_blocks, downs, K=512, D=64):
        super().__init__()
        self.downs = downs
        widths = [3] + [width >> step for step in range(downs - 1, -1, -1)]    # 3, 64, 128
        down, up = [], []
        for a, b in zip(widths, widths[1:]):
            down += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU()]       # halves H and W
            up = [nn.ConvTranspose2d(b, a, 4, stride=2, padding=1), nn.ReLU()] + up
        self.encoder = nn.Sequential(
            *down, nn.Conv2d(width, width, 3, padding=1),
            ResidualStack(width, residual_width, residual_blocks),
            nn.Conv2d(width, D, 1))
        self.quantiser = Quantiser(K, D)
        self.decoder = nn.Sequential(
            nn.Conv2d(D, width, 3, padding=1),
            ResidualStack(width, residual_width, residual_blocks), *up[:-2])
        self.head = nn.ConvTranspose2d(widths[1], out_channels, 4, stride=2, padding=1)
        self.apply(start)

    def forward(self, x, keep=None):
        if keep is not None:      # a cell of the code grid is masked when all of its pixels are
            keep = F.max_pool2d(keep.float(), 2 ** self.downs)[:, 0] > 0
        z = self.encoder(x - 0.5)                             # (B, D, H/2^downs, W/2^downs)
        q, commitment, ids = self.quantiser(z, keep)
        return self.head(self.decoder(q)), commitment, ids

def summary(model, size, show):
    """Parameters and multiply-adds of one (3, H, W) image -> both; show prints them by block."""
    lines, device = [], next(model.parameters()).device
    hooks = [block.register_forward_hook(lambda block, x, y, name=name: lines.append(
        (name, tuple((y[0] if isinstance(y, tuple) else y).shape[1:]),
         sum(p.numel() for p in block.parameters())))) for name, block in model.named_modules()
        if name.count(".") == 1]
    with torch.no_grad(), FlopCounterMode(model.eval(), display=False, depth=3) as counter:
        model(torch.zeros(1, 3, *size, device=device))
    macs = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    for hook in hooks:
        hook.remove()
    total = sum(p.numel() for p in model.parameters()), macs["Global"]
    for name, shape, number in lines if show else []:
        print(f"{name:24} {str(shape):18} {number:>12,} parameters "
              f"{macs.get(f'{type(model).__name__}.{name}', 0):>16,} multiply-adds")
    print(f"model    {total[0]:,} parameters, {total[1]:,} multiply-adds an image of {size}")
    return {"parameters": total[0], "multiply_adds": total[1]}

class Logits(nn.Module):
    """The network as a plain segmenter, (B, 3, H, W) -> logits: what validation and export want."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[0]

def take_over(model, state, take):
    """Copy the pre-trained encoder and codebook (with "all" the decoder too) into model, but never
    the head, which spoke in colours and must now speak in classes -> number of tensors taken."""
    parts = ("encoder.", "quantiser.", "decoder.")[:3 if take == "all" else 2]
    missing, unexpected = model.load_state_dict(
        {name: tensor for name, tensor in state.items() if name.startswith(parts)}, strict=False)
    fresh = {name for name in model.state_dict() if not name.startswith(parts)}
    if set(missing) != fresh or unexpected:
        fail(f"--init: these tensors do not fit: {sorted(set(missing) ^ fresh) + unexpected}")
    return len(model.state_dict()) - len(fresh)

# --- loss and scores ------------------------------------------------------------------------------
# The same in every segmenter.

def one_hot(masks, classes):
    """masks (B, H, W) -> y (B, C, H, W) and valid (B, 1, H, W), floats 0 or 1. With one class, that
    is label 1, the foreground."""
    labels = torch.arange(1 if classes == 1 else 0, max(2, classes), device=masks.device)
    masks = masks[:, None]                                              # (B, 1, H, W)
    return (masks == labels.view(1, -1, 1, 1)).float(), (masks != IGNORE).float()

def bce(logits, y, valid):
    """Binary cross-entropy of every channel, mean over the valid pixels."""
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

def loss_sum(text):
    """An argparse type: names of losses joined by +."""
    if not set(text.split("+")) <= set(LOSSES):
        raise argparse.ArgumentTypeError(f"{text} is not a sum of {', '.join(LOSSES)}")
    return text

def segmentation_loss(logits, masks, names):
    """Sum of the named losses in float32, logits (B, C, H, W) against masks (B, H, W)."""
    y, valid = one_hot(masks, logits.shape[1])
    return sum(LOSSES[name](logits.float(), y, valid) for name in names.split("+"))

def hard_labels(logits):
    """(B, C, H, W) -> (B, H, W) int64: the largest of C logits, or whether the only one is > 0."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()

def confusion(logits, masks):
    """(C, C) pixel counts, truth down, prediction across (C = 2 for one channel), int64. Scores come
    from their sum over a whole split, so the batch size changes nothing."""
    C = max(2, logits.shape[1])
    cell = torch.where(masks == IGNORE, C * C, masks.long() * C + hard_labels(logits)).flatten()
    counts = torch.zeros(C * C + 1, dtype=torch.long, device=cell.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell))[:-1].view(C, C)

def scores(counts, classes):
    """Accuracy, and the mean over classes of IoU and Dice = 2 IoU / (1 + IoU). A class that occurs in
    neither truth nor prediction is left out; with one class only the foreground counts."""
    both, total = counts.diag().double(), (counts.sum(0) + counts.sum(1)).double()
    iou = (both / (total - both))[-classes:]                            # nan where total = 0
    return {"accuracy": (both.sum() / counts.sum()).item(), "miou": iou.nanmean().item(),
            "dice": (2 * iou / (1 + iou)).nanmean().item(), "iou": iou.nan_to_num().tolist()}

def best_baseline(truth, classes):
    """(name, scores) of the best constant answer, from pixel counts of the true classes (C,)."""
    names = classes if len(classes) > 1 else ["background", *classes]
    each = [(name, scores(truth[:, None] * (torch.arange(len(names)) == i), len(classes)))
            for i, name in enumerate(names)]
    return max(each, key=lambda pair: pair[1]["miou"])

# --- training -------------------------------------------------------------------------------------

def pick_device(name):
    """'auto' takes cuda, then mps, then cpu -> device, whether bfloat16 is fast on it (CUDA
    capability 8, a CPU with AVX512-BF16 or AMX)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: not here ({str(error).splitlines()[0]}); try --device cpu")
    if device.type == "cuda":
        return device, torch.cuda.get_device_capability(device)[0] >= 8
    return device, device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                             or torch.cpu._is_amx_tile_supported())

def peak_memory(device):
    """Peak memory in GB: of the CUDA allocator, else of the process; 0 where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak / (1e9 if sys.platform == "darwin" else 1e6)   # macOS counts bytes, Linux kB

def to_device(tensor, device):
    """The tensor on the device if that leaves 40 % of its memory free, else where it is."""
    if device.type == "cuda" and tensor.nbytes > 0.6 * torch.cuda.mem_get_info(device)[0]:
        return tensor
    return tensor.to(device)

def progress(text):
    """One rewritten line, on a terminal only; an empty text wipes it."""
    if sys.stdout.isatty():
        print(f"\r{text:<39.39}\r", end="", flush=True)

def to_float(images):
    """(B, 3, H, W) uint8 -> float in [0, 1], channels_last, the layout convolutions are fastest in."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)

def augment(images, masks):
    """One draw of flip, zoom (1 to 1.6) and place for photo and mask together, colours for the photo
    alone: uint8 (B, 3, H, W), (B, H, W) -> float in [0, 1], uint8."""
    B, device = len(images), images.device
    u = lambda *shape: torch.rand(*shape) * 2 - 1              # drawn on the CPU, whatever the device
    side = 1 / (1.3 + 0.3 * u(B))                              # of the window, as a share
    matrix = torch.zeros(B, 2, 3)                              # place in the output -> in the photo
    matrix[:, 0, 0], matrix[:, 1, 1] = side * u(B).sign(), side
    matrix[:, :, 2] = u(B, 2) * (1 - side)[:, None]
    grid = F.affine_grid(matrix, (B, 1, *images.shape[2:]), align_corners=False).to(device)
    x = F.grid_sample(to_float(images), grid, "bilinear", "border", align_corners=False)
    masks = F.grid_sample(masks[:, None].float(), grid, "nearest", "border", align_corners=False)
    mean = x.mean((1, 2, 3), keepdim=True)                     # (B, 1, 1, 1)
    contrast, light = 1 + 0.4 * u(B, 1, 1, 1), 0.2 * u(B, 1, 1, 1) + 0.1 * u(B, 3, 1, 1)
    x = (x - mean) * contrast.to(device) + mean + light.to(device)
    return x.clamp_(0, 1), masks[:, 0].byte()

def lr_at(step, steps, peak):
    """Warm-up over the first twentieth of the steps, then half a cosine down to 0."""
    warm = max(1, steps // 20)
    return peak * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))

def finetune_epoch(model, images, masks, optimizer, args, epoch, amp):
    """One pass over the training photos -> mean loss, confusion (C, C), images a second."""
    model.train()
    torch.manual_seed(args.seed * 100003 + epoch)      # all that is random here: resume is exact
    batch = min(args.batch_size, len(images))
    steps = len(images) // batch                       # an incomplete last batch is left out
    order = torch.randperm(len(images)).to(images.device)
    total, counts, began = 0.0, 0, time.perf_counter()
    for step in range(steps):
        index = order[step * batch:(step + 1) * batch]
        x, y = augment(images[index], masks[index])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits, commitment, _ = model(x)
        loss = segmentation_loss(logits, y, args.loss) + COMMITMENT * commitment
        lr = lr_at(epoch * steps + step, args.epochs * steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total, counts = total + loss.detach(), counts + confusion(logits.detach(), y)
        if step % 50 == 49 or step == steps - 1:       # sync: once in 50 steps
            if not math.isfinite(total.item()):
                fail(f"the loss is not finite in epoch {epoch + 1} at lr {lr:.1e}; the last good "
                     f"epoch is kept; try --lr {args.lr / 3:.0e}")
            speed = (step + 1) * batch / (time.perf_counter() - began)
            progress(f" epoch {epoch + 1}  {(steps - 1 - step) * batch / speed:.0f} s left")
    progress("")
    return total.item() / steps, counts, speed

@torch.inference_mode()
def validate(model, images, masks, names, amp=False):
    """Mean loss and confusion (C, C) of a segmenter over a whole split."""
    total, counts = 0.0, 0
    for x, y in zip(images.split(64), masks.split(64)):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = model(to_float(x))
        total = total + segmentation_loss(logits, y, names) * len(x)
        counts = counts + confusion(logits, y)
    return (total / len(images)).item(), counts

# --- labelled data --------------------------------------------------------------------------------
# The same in every segmenter.

def draw_toy(n, size, seed):
    """n drawn cats and dogs -> images (n, 3, H, W), masks (n, H, W) 0 pet, 1 background, 2 border,
    both uint8, and their breeds. Fur and background share their colours, and a ball of the same fur
    lies about: only shape tells the animal."""
    images, masks = torch.empty(n, 3, *size).byte(), torch.empty(n, *size).byte()
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
    for first in range(0, n, 256):
        g, b = torch.Generator().manual_seed(seed * 100003 + first), min(256, n - first)
        u = lambda low, high, c=1: low + (high - low) * torch.rand(b, c, 1, 1, generator=g)
        breed = ((first + torch.arange(b)) % 37).view(b, 1, 1, 1)              # 12 cats, 25 dogs
        zoom, flip = u(0.55, 0.9), u(-1, 1).sign()
        X, Y = flip * (x - u(-0.3, 0.3)) / zoom, (y - u(-0.25, 0.25)) / zoom   # (b, 1, H, W)
        disc = lambda cx, cy, rx, ry: ((X - cx) / rx) ** 2 + ((Y - cy) / ry) ** 2 < 1
        tip = lambda cx: ((X - cx).abs() < 0.4 * (Y + 1.05)) & (Y < -0.45)
        cat, dog = tip(-0.68) | tip(-0.22), disc(-0.85, -0.2, 0.14, 0.38)      # pointed, hanging
        pet = torch.where(breed < 12, cat, dog | disc(-0.05, -0.2, 0.14, 0.38)) \
            | disc(-0.45, -0.3, 0.4, 0.38) | disc(0.3, 0.3, 0.75, 0.4) \
            | disc(1.1, -0.05, 0.1, 0.45) | disc(-0.1, 0.7, 0.12, 0.4) | disc(0.7, 0.7, 0.12, 0.4)
        ball = disc(u(-1.4, 1.4), u(-1.2, 1.2), 0.3, 0.3)
        wave = lambda low, high: torch.sin(
            (x * u(-1, 1, 3) + y * u(-1, 1, 3)) * u(low, high, 3) + u(0, 6.3, 3)).mean(1, True)
        tint, grain = u(0.2, 0.8, 3), torch.randn(b, 1, *size, generator=g)
        fur = tint + 0.15 * torch.sin(breed + torch.arange(3).view(3, 1, 1)) \
            + 0.2 * wave(20, 40) + 0.06 * grain
        ground = tint + u(-0.25, 0.25, 3) + 0.3 * wave(2, 12) + 0.03 * grain
        k = 2 * max(1, min(size) // 48) + 1                                    # border, in pixels
        wide, slim = (F.max_pool2d(m.float(), k, 1, k // 2) for m in (pet, ~pet))
        images[first:first + b] = torch.where(pet | ball, fur, ground).clamp(0, 1).mul(255).byte()
        masks[first:first + b] = torch.where(wide + slim > 1, 2, 1 - pet.long())[:, 0].byte()
    return images, masks, [(CATS + [f"dog_{d}" for d in range(25)])[i % 37] for i in range(n)]

def subset(breeds, share):
    """Indices of a seeded share of each breed, at least one; a larger share contains a smaller."""
    g = torch.Generator().manual_seed(SPLIT_SEED)
    size, seen, taken = Counter(breeds), Counter(), []
    for i in torch.randperm(len(breeds), generator=g).tolist():
        if seen[breeds[i]] < share * size[breeds[i]]:
            taken.append(i)
        seen[breeds[i]] += 1
    return sorted(taken)

def cut(items, breeds, first):
    """The seeded tenth of the items (first) or the other nine tenths, and their breeds."""
    tenth = set(subset(breeds, 0.1))
    chosen = [i for i in range(len(items)) if (i in tenth) == first]
    return [items[i] for i in chosen], [breeds[i] for i in chosen]

def pet_files(root, part):
    """Oxford-IIIT Pet in its official split, a tenth of trainval for validation -> pairs, breeds."""
    base = Path(root, "oxford-iiit-pet")
    if not (base / "annotations/trainval.txt").exists():
        from torchvision.datasets import OxfordIIITPet       # here: importing it takes a while
        try:
            OxfordIIITPet(root, download=True)
        except Exception as error:
            fail(f"Oxford-IIIT Pet could not be downloaded ({error}); unpack images.tar.gz and "
                 f"annotations.tar.gz of robots.ox.ac.uk/~vgg/data/pets in {base}, or --data toy")
    lines = (base / f"annotations/{'test' if part == 'test' else 'trainval'}.txt").read_text()
    names = [line.split()[0] for line in lines.splitlines() if line and line[0] != "#"]
    pairs = [(base / f"images/{n}.jpg", base / f"annotations/trimaps/{n}.png") for n in names]
    breeds = [name.rsplit("_", 1)[0] for name in names]
    return (pairs, breeds) if part == "test" else cut(pairs, breeds, part == "val")

def folder_files(folder, part):
    """images/ and masks/ with equal stems, flat or under train/ val/ test/ -> pairs, breeds ("")."""
    parts = [p for p in ("train", "val", "test") if Path(folder, p, "images").is_dir()]
    base = Path(folder, part if part in parts else "train" if parts else "")
    if parts and part == "test" and part not in parts:
        fail(f"{folder}: there is no test/images; try --split val")
    photos, masks = ({f.stem: f for f in sorted(base.glob(f"{d}/[!.]*"))} for d in ("images", "masks"))
    for stem in sorted(photos.keys() ^ masks.keys()) or ([] if photos else ["*"]):
        fail(f"{base}: '{stem}' wanted in both images/ and masks/")
    pairs, breeds = [(photos[stem], masks[stem]) for stem in photos], [""] * len(photos)
    if not parts:                # flat: a tenth to test, a tenth of the others for validation
        pairs, breeds = cut(pairs, breeds, part == "test")
    if part != "test" and not {"train", "val"} <= set(parts):
        pairs, breeds = cut(pairs, breeds, part == "val")
    return (pairs, breeds) if pairs else fail(f"{folder}: too few photos for a {part} split")

def upright(image, size):
    """RGB, EXIF rotation undone, resized to (H, W) -> (3, H, W) uint8."""
    image.draft("RGB", (2 * size[1], 2 * size[0]))     # JPEG: decoded at 1/2, 1/4 or 1/8 at once
    image = ImageOps.exif_transpose(image).convert("RGB").resize(size[::-1], Image.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)

def read_pair(pair, size):
    """(photo, mask) files -> (4, H, W) uint8: RGB and the labels."""
    try:
        with Image.open(pair[0]) as photo, Image.open(pair[1]) as mask:
            whole = photo.size[::-1 if photo.getexif().get(274, 1) > 4 else 1]  # 274: orientation
            if mask.mode not in ("1", "L", "P") or mask.size != whole:
                raise ValueError(f"the photo is {whole}, its mask {mask.size} in mode {mask.mode}; "
                                 "wanted the same size and one 8-bit channel of labels")
            labels = np.asarray(mask.resize(size[::-1], Image.NEAREST), np.uint8)
            return np.concatenate([upright(photo, size), labels[None]])
    except Exception as error:                         # whatever a broken file can provoke
        fail(f"{pair[0]}: {error}")

def decode(pairs, size):
    """Read every pair once, in threads -> (N, 4, H, W) uint8, mapped from a file in data/cache/ whose
    name hangs on the paths, sizes and times of what was read."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
             for pair in pairs for file in pair]
    key = hashlib.sha256(repr((FORMAT, size, stats)).encode()).hexdigest()[:16]
    cache, began = CACHE / f"{key}.npy", time.perf_counter()
    try:
        return torch.from_numpy(np.load(cache, mmap_mode="c"))
    except (OSError, ValueError):                      # not there yet, or cut short
        array = np.empty((len(pairs), 4, *size), np.uint8)
    with ThreadPoolExecutor() as pool:
        for i, pixels in enumerate(pool.map(lambda pair: read_pair(pair, size), pairs)):
            array[i] = pixels
            progress(f" decoding {i}/{len(pairs)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    save(cache, lambda file: np.save(file, array))
    print(f"decoded  {len(pairs)} photos in {time.perf_counter() - began:.1f} s -> {cache}")
    return torch.from_numpy(array)

def load_split(data, root, part, size, ignore):
    """'toy', 'pets' or a folder, part 'train', 'val' or 'test' -> images (N, 3, H, W) uint8, masks
    (N, H, W) uint8 of labels and IGNORE, breeds (N names)."""
    if data == "toy":
        n, seed = (256, 1) if part == "test" else (1110, 2)
        images, masks, breeds = draw_toy(n, size, SPLIT_SEED + seed)
        if part != "test":
            chosen, breeds = cut(range(n), breeds, part == "val")
            images, masks = images[chosen], masks[chosen]
        return images, masks, breeds
    pairs, breeds = pet_files(root, part) if data == "pets" else folder_files(data, part)
    images, masks = decode(pairs, size).split((3, 1), 1)
    masks = masks[:, 0]                                                 # (N, H, W)
    if data == "pets":
        return images, masks - 1, breeds               # trimap 1, 2, 3: pet, background, border
    values = set(masks.unique().tolist()) - {ignore}
    table = torch.arange(256).byte()
    if values <= {0, 255}:
        table[255] = 1                                 # a black and white mask
    elif max(values) > 99:
        i = (masks == max(values)).flatten(1).any(1).nonzero()[0].item()
        fail(f"{pairs[i][1]}: has the values {masks[i].unique().tolist()[:9]}; wanted 0 and 255, or "
             "labels 0 to C - 1, and --ignore L for one that is no class")
    if ignore is not None:
        table[ignore] = IGNORE
    return images, table[masks.int()], breeds

def class_names(data, *masks):
    """The names of the classes; a folder's are numbers, or 'foreground' for labels 0 and 1."""
    if data in ("toy", "pets"):
        return ["pet", "background", "border"]
    top = max(mask[mask != IGNORE].max().item() for mask in masks)
    return [str(label) for label in range(top + 1)] if top > 1 else ["foreground"]

# --- checkpoints ----------------------------------------------------------------------------------
# The same in every training script.

def save(path, write):
    """write(file) under a temporary name, then rename: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".new.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:           # a full disk is the latter for torch.save
        fail(f"{path}: not written ({str(error).splitlines()[0]}); free space or change --out")

def load_checkpoint(path, script, hint):
    """The dictionary in a .pt file that `script` wrote, tensors on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: no such file; {hint}")
    except Exception as error:                         # truncated, or no checkpoint at all
        fail(f"{path}: not a readable checkpoint ({str(error).splitlines()[0][:60]}); {hint}")
    if not isinstance(state, dict) or (state.get("script"), state.get("format")) != (script, FORMAT):
        fail(f"{path}: not a checkpoint of {script}, format {FORMAT}; {hint}")
    return state

def open_run(args, model, optimizer):
    """A fresh --out (an earlier run moves to OUT.prev), or with --resume the state of last.pt put
    into model and optimizer -> rows of the epochs so far, number of the best."""
    out = Path(args.out)
    if args.resume:
        last = load_checkpoint(out / "last.pt", Path(__file__).name, "start without --resume")
        free = ("resume", "out", "root", "device", "compile")           # may differ
        other = [f"--{name.replace('_', '-')} {vars(args).get(name)} (was {was})" for name, was in
                 last["args"].items() if name not in free and vars(args).get(name) != was]
        if other:
            fail(f"--resume: the run in {out} had other arguments: {', '.join(other)}")
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        return last["history"], last["best"]
    if out.exists() and any(out.iterdir()):
        if not (out / "log.jsonl").exists():
            fail(f"--out {out}: holds something that is not a run; choose another folder")
        previous = out.with_name(out.name + ".prev")
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(out, previous)
        print(f"note     the earlier run is now in {previous}")
    out.mkdir(parents=True, exist_ok=True)
    return [], 0

def save_epoch(args, model, optimizer, history, best):
    """best.pt if the last epoch is the best, the log, last.pt. Killed in between, --resume does the
    epoch again, with the same result."""
    out = Path(args.out)
    state = {"format": FORMAT, "script": Path(__file__).name, "args": vars(args),
             "epoch": len(history), "model": model.state_dict()}
    if best == len(history):
        save(out / "best.pt", lambda f: torch.save(state | {"metrics": history[-1]}, f))
    save(out / "log.jsonl", lambda f: f.write_text("".join(json.dumps(r) + "\n" for r in history)))
    state |= {"optimizer": optimizer.state_dict(), "best": best, "history": history}
    save(out / "last.pt", lambda f: torch.save(state, f))

def export(model, args, classes, images, masks):
    """The segmenter as a torch.export program, OUT/model.pt2: float32 RGB (B, 3, H, W) in [0, 1] in,
    logits (B, C, H, W) out, and meta.json inside -> the program's scores on the validation split."""
    model = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format).eval()
    program = torch.export.export(model, (torch.zeros(2, 3, *args.size),),
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    loss, counts = validate(program.module(), images.cpu(), masks.cpu(), args.loss)
    metrics = {"loss": loss, **scores(counts, len(classes))}
    meta = {"format": FORMAT, "script": Path(__file__).name, "args": vars(args), "classes": classes,
            "size": args.size, "ignore": args.ignore, "metrics": metrics,
            "torch": str(torch.__version__)}
    save(Path(args.out, "model.pt2"), lambda f: torch.export.save(
        program, f, extra_files={"meta.json": json.dumps(meta)}))
    return metrics

def paint(masks):
    """Labels (N, H, W) -> colours (N, 3, H, W) uint8: pet orange, background black, border white."""
    colours = torch.randint(40, 255, (256, 3), generator=torch.Generator().manual_seed(4)).byte()
    colours[:3] = torch.tensor([[255, 120, 0], [0, 0, 0], [255, 255, 255]])
    return colours[masks.long()].movedim(-1, 1)

def draw_samples(path, *columns):
    """Pictures (N, 3, H, W) uint8, one column each, as a PNG."""
    rows = torch.cat([column.cpu() for column in columns], 3).movedim(1, -1)    # (N, H, W', 3)
    save(path, lambda f: Image.fromarray(rows.flatten(0, 1).numpy()).save(f, "PNG"))

# --- main -----------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a scheduler's stop is a Ctrl-C
    began, out = time.time(), Path(args.out)

    ## 1. The settings: widths come from the pre-trained network, the rest hangs on the data.
    source = None if args.init == "none" else load_checkpoint(
        args.init, "pretrain.py", "run python pretrain.py first, or give --init none")
    for name, value in WIDTHS.items():
        value = source["args"][name] if source else value
        if getattr(args, name) not in ("auto", value) and source:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {args.init} has {value}")
        setattr(args, name, value if getattr(args, name) == "auto" else getattr(args, name))
    if args.data == "auto":
        args.data = "pets" if Path(args.root, "oxford-iiit-pet").is_dir() else "toy"
    settle(args, 2 ** args.downs)
    device, bf16 = pick_device(args.device)
    amp = args.amp and bf16
    print(f"finetune.py  torch {torch.__version__}  {device}  {'bf16' if amp else 'float32'}  "
          f"seed {args.seed}  -> {args.out}")

    ## 2. The data: train and val, never test.
    images, masks, breeds = load_split(args.data, args.root, "train", args.size, args.ignore)
    val_images, val_masks, _ = load_split(args.data, args.root, "val", args.size, args.ignore)
    classes = class_names(args.data, masks, val_masks)
    if args.cats:
        cats = args.cats.split(",")
        if not set(cats) <= set(CATS) & set(breeds):
            fail(f"--cats {args.cats}: wanted breeds of pets or toy, out of {', '.join(CATS)}")
        chosen = [i for i, breed in enumerate(breeds) if breed in cats or breed[0].islower()]
        images, masks, breeds = images[chosen], masks[chosen], [breeds[i] for i in chosen]
    chosen = subset(breeds, args.frac)
    images, masks, val_images, val_masks = (
        to_device(t, device) for t in (images[chosen], masks[chosen], val_images, val_masks))
    truth = torch.bincount(val_masks.flatten().int().cpu(), minlength=256)[:max(2, len(classes))]
    print(f"data     {args.data}: train {len(images)}  val {len(val_images)}  "
          f"{args.size[0]}x{args.size[1]}  {(images.nbytes + val_images.nbytes) / 1e6:.0f} MB on "
          f"{images.device}" + ("  (drawn; real photos: --data pets)" if args.data == "toy" else ""))
    print(f"settings {args.epochs} epochs of batch {args.batch_size}, lr {args.lr:.1e}, {args.loss}")

    ## 3. The model: pre-trained but for its head.
    torch.manual_seed(args.seed)
    model = VQVAE(len(classes), *(getattr(args, name) for name in WIDTHS))
    if source:
        taken = take_over(model, source["model"], args.take)
        print(f"init     {taken} of {len(source['model'])} tensors from {args.init}")
        if source["args"]["data"] == "toy" and args.data != "toy":
            print("warning  it has seen toy photos only; better: python pretrain.py --data catdog")
    model.to(device, memory_format=torch.channels_last)
    segmenter = Logits(model)
    cost = summary(segmenter, args.size, args.summary)
    if args.summary:
        return
    name, worth = best_baseline(truth, classes)
    print(f"baseline all {name}: accuracy {worth['accuracy']:.4f}  mIoU {worth['miou']:.4f}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    history, best = open_run(args, model, optimizer)
    if args.compile:
        model.compile()

    ## 4. Train; the best epoch is the one with the highest mean IoU on the validation photos.
    print("   epoch    loss  val_loss     acc    mIoU    Dice       lr   img/s     sec")
    try:
        for epoch in range(len(history), args.epochs):
            start = time.perf_counter()
            loss, counts, speed = finetune_epoch(model, images, masks, optimizer, args, epoch, amp)
            model.eval()
            val_loss, val_counts = validate(segmenter, val_images, val_masks, args.loss, amp)
            train, val = scores(counts, len(classes)), scores(val_counts, len(classes))
            row = {"epoch": epoch + 1, "loss": loss, "miou": train["miou"], "dice": train["dice"],
                   "val_loss": val_loss, **{f"val_{name}": value for name, value in val.items()},
                   "lr": optimizer.param_groups[0]["lr"], "images_per_second": speed,
                   "seconds": time.perf_counter() - start, "memory_gb": peak_memory(device)}
            better = not history or row["val_miou"] > history[best - 1]["val_miou"]
            best = epoch + 1 if better else best
            history.append(row)
            save_epoch(args, model, optimizer, history, best)
            print(f"{epoch + 1:>4}/{args.epochs:<4}{loss:7.4f}{val_loss:10.4f}{val['accuracy']:8.4f}"
                  f"{val['miou']:8.4f}{val['dice']:8.4f}{row['lr']:9.1e}{speed:8,.0f}"
                  f"{row['seconds']:8.1f}{' *' if better else ''}", flush=True)
    except KeyboardInterrupt:
        progress("")
        print(f"stopped  {len(history)} whole epochs are kept: --resume continues after them")
        raise SystemExit(130)

    ## 5. Report: the best epoch becomes a program, its scores and a few pictures.
    model.load_state_dict(load_checkpoint(out / "best.pt", "finetune.py", "train again")["model"])
    metrics = export(segmenter, args, classes, val_images, val_masks)
    result = {**history[best - 1], "metrics": metrics, "args": vars(args), **cost,
              "data": hashlib.sha256(masks.cpu().numpy().tobytes()).hexdigest()[:16],
              "total_seconds": sum(row["seconds"] for row in history), "torch": str(torch.__version__)}
    save(out / "result.json", lambda file: file.write_text(json.dumps(result, indent=1)))
    with torch.inference_mode():
        hard = hard_labels(segmenter.eval()(to_float(val_images[:8])))
    draw_samples(out / "samples.png", val_images[:8], paint(val_masks[:8]), paint(hard))
    print(f"best     epoch {best}  accuracy {metrics['accuracy']:.4f}  mIoU {metrics['miou']:.4f}  "
          f"{out / 'model.pt2'}   peak {peak_memory(device):.1f} GB   total {result['total_seconds']:.0f} s")

if __name__ == "__main__":
    main()
