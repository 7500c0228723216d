"""Fine-tune the pre-trained VQ-VAE until it segments pets: stage 2 of 3.

WHAT IT DOES    Photos (B, 3, H, W) in, logits (B, C, H, W) out: the VQ-VAE of pretrain.py (van den Oord
  et al. 2017) keeps its encoder, codes and decoder and gets a new head, one channel a class.
YOU WILL LEARN  what is taken over and what never -> take_over; losses by hand -> bce, dice_loss;
  scores that no batch size can change -> confusion, scores; resuming to the bit -> finetune_epoch.
RUN IT          python finetune.py --frac 0.5
                python finetune.py --data pets --resume
                python evaluate.py
WHAT TO EXPECT  @CARD@
DIFFERS FROM THE PAPER  The paper draws pictures from its codes and never segments with them.
"""
import argparse, copy, hashlib, json, math, os, shutil, signal, sys, time
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

AUTO = {"toy": {"size": [64], "epochs": 12, "batch_size": 32, "lr": 1e-3},      # by data
        "pets": {"size": [128], "epochs": 60, "batch_size": 32, "lr": 1e-3},
        "folder": {"size": [128], "epochs": 60, "batch_size": 16, "lr": 1e-3}}
WIDTHS = {"width": 128, "residual_width": 32, "residual_blocks": 2, "downs": 2}   # Sonnet's
DECAY = 0.9                      # of the codebook's moving averages; Sonnet has 0.99
COMMITMENT = 0.25                # weight of the commitment loss, as in the paper
SPLIT_SEED = 0                   # splits, subsets and toy pictures hang on this, not on --seed
CACHE = Path("data/cache")       # decoded photos; delete it whenever you like
SUMS = ("bce", "dice", "iou", "bce+dice", "bce+iou", "dice+iou", "bce+dice+iou")
PETS = ["pet", "background", "border"]
IGNORE = 255                     # label of pixels that count neither in a loss nor in a score
FORMAT = 1                       # of the checkpoints
CATS = ("Abyssinian Bengal Birman Bombay British_Shorthair Egyptian_Mau Maine_Coon Persian Ragdoll "
        "Russian_Blue Siamese Sphynx").split()       # the names of the 25 dog breeds begin small
HELP = type("Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter),
            {})                  # --help shows this docstring as it is, and the defaults

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
    for name, value in AUTO.get(args.data, AUTO["folder"]).items():
        if getattr(args, name) in ("auto", ["auto"]):
            setattr(args, name, value)
    args.size = args.size * 2 if len(args.size) == 1 else args.size
    if len(args.size) != 2 or any(side % multiple for side in args.size):
        fail(f"--size: wanted one side, or H W, in multiples of {multiple}; got {args.size}")

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HELP, allow_abbrev=False)
    p.error = fail
    add = p.add_argument_group("data").add_argument
    add("--data", default="auto", help="toy, pets or a folder; auto: pets if under --root, else toy")
    add("--root", default="data", help="where the data sets lie or are downloaded to")
    add("--size", nargs="+", type=number(int, 8, 4096), default="auto", help="side, or H W")
    add("--frac", type=number(float, 1e-6, 1), default=1.0, help="share of the training photos")
    add("--cats", help="of the cats keep these breeds only, for instance Maine_Coon,Birman,Bombay")
    add("--ignore", type=number(int, 0, 255), help="label in a folder's masks that does not count")
    add = p.add_argument_group("model").add_argument
    add("--init", default="checkpoints/pretrain/best.pt", help="what to start from, or none")
    add("--take", choices=("encoder", "all", "none"), default="all", help="of --init: encoder and "
        "codes; the decoder too; only the widths, for the same network from scratch")
    add("--summary", action="store_true", help="print blocks, parameters, multiply-adds, and leave")
    add = p.add_argument_group("optimisation").add_argument
    add("--loss", choices=SUMS, default="bce+dice", help="the sum of these, equally weighted")
    add("--epochs", type=number(int, 1, 10**6), default="auto", help="passes over the photos")
    add("--batch-size", type=number(int, 1, 10**6), default="auto", help="halve it if memory ends")
    add("--lr", type=number(float, 1e-9, 10), default="auto", help="peak; halve it if loss jumps")
    add("--weight-decay", type=number(float, 0, 10), default=0.05, help="more against overfitting")
    add = p.add_argument_group("runtime").add_argument
    add("--seed", type=number(int, 0, 2**31), default=0, help="moves weights, order, augmentation")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first of them that is there")
    add("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 if it is fast")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="pays in long runs")
    add("--resume", action="store_true", help="continue the run in --out, with the same flags")
    add("--out", default="checkpoints/finetune", help="the run's folder; an older run is kept once")
    return p.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------
## A VQ-VAE is an auto-encoder with a dictionary in the middle. The encoder turns an image into a
## small grid of vectors, the quantiser replaces each by the nearest of K learned codes, and the
## decoder turns the grid of codes back into an image; with another head, into a segmentation.

class Residual(nn.Sequential):
    """x + conv1x1(relu(conv3x3(relu(x)))): (B, width, H, W) in and out."""
    def __init__(self, width, hidden):
        super().__init__(nn.ReLU(), nn.Conv2d(width, hidden, 3, padding=1),
                         nn.ReLU(), nn.Conv2d(hidden, width, 1))

    def forward(self, x):
        return x + super().forward(x)

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
    def __init__(self, K, D):
        super().__init__()
        self.register_buffer("codes", torch.zeros(K, D))
        self.register_buffer("counts", torch.zeros(K))        # vectors a step, moving average

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
        """Move codes that hardly any vector uses onto random vectors of this batch, as if they had
        the usual count. At first no code is in use, so this also starts the codebook from data."""
        grouped = dist.is_initialized()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        kept = flat.new_zeros(ranks)
        kept[rank] = weight.sum()
        kept = sum_over_ranks(kept)                           # vectors that count, on each rank
        usual = kept.sum() / len(self.codes)
        ## K random places among the kept vectors of all ranks; each rank fills in those it holds.
        place = torch.rand(len(self.codes)).to(flat.device) * kept.sum() - kept[:rank].sum()
        row = torch.searchsorted(weight.cumsum(0), place, right=True).clamp(max=len(flat) - 1)
        held = (place >= 0) & (place < kept[rank])
        fresh = sum_over_ranks(flat[row] * held[:, None])               # (K, D)
        dead = self.counts < 0.1 * usual                      # tuned: a tenth of the usual count
        self.codes.copy_(torch.where(dead[:, None], fresh, self.codes))
        self.counts.copy_(torch.where(dead, usual, self.counts))

    def follow(self, flat, ids, weight):
        """Count and sum of the vectors of each code decay by DECAY and take in this batch (eq. 6
        and 7); the code is sum / count (eq. 8), so the old sum is code x count."""
        counts = torch.zeros_like(self.counts).index_add_(0, ids, weight)
        sums = torch.zeros_like(self.codes).index_add_(0, ids, flat * weight[:, None])
        old, new = DECAY * self.counts, (1 - DECAY) * sum_over_ranks(counts)
        sums = self.codes * old[:, None] + (1 - DECAY) * sum_over_ranks(sums)
        self.counts.copy_(old + new)
        self.codes.copy_(sums / self.counts[:, None])

def start(layer):
    """First weights after He et al. (2015): variance is kept, and a residual block begins as x."""
    ## PyTorch's own are so small beside its biases that all vectors begin nearly equal, one code
    ## takes them all, and the codebook collapses.
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        taps = layer.kernel_size[0] ** 2 / (4 if isinstance(layer, nn.ConvTranspose2d) else 1)
        nn.init.normal_(layer.weight, std=(2 / (layer.in_channels * taps)) ** 0.5)
        nn.init.zeros_(layer.bias)
    elif isinstance(layer, Residual):
        nn.init.zeros_(layer[3].weight)

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
        think = lambda: [Residual(width, residual_width) for _ in range(residual_blocks)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, width, 3, padding=1), *think(),
                                     nn.ReLU(), nn.Conv2d(width, D, 1))
        self.quantiser = Quantiser(K, D)
        self.decoder = nn.Sequential(nn.Conv2d(D, width, 3, padding=1), *think(), nn.ReLU(),
                                     *up[:-2])
        self.head = nn.ConvTranspose2d(widths[1], out_channels, 4, stride=2, padding=1)
        self.apply(start)

    def forward(self, x, keep=None):
        if keep is not None:      # a cell of the code grid is masked when all of its pixels are
            keep = F.max_pool2d(keep.float(), 2 ** self.downs)[:, 0] > 0
        z = self.encoder(x - 0.5)                             # (B, D, H/2^downs, W/2^downs)
        q, commitment, ids = self.quantiser(z, keep)
        return self.head(self.decoder(q)), commitment, ids

class Logits(nn.Module):
    """A VQVAE as a plain segmenter, (B, 3, H, W) -> logits alone, as scores and export want it."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[0]

def take_over(model, state, take):
    """Copy the pre-trained encoder and codebook, with "all" the decoder too, into model; never the
    head, which spoke in colours and must now speak in classes -> number of tensors taken."""
    parts = ("encoder.", "quantiser.", "decoder.")[:{"none": 0, "encoder": 2, "all": 3}[take]]
    taken = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    missing, unexpected = model.load_state_dict(taken, strict=False)
    if unexpected or any(name.startswith(parts) for name in missing):
        fail(f"--init: these tensors do not fit: {unexpected or missing}")
    return len(taken)

def summary(model, size, show):
    """Parameters and multiply-adds of one photo; show prints them for every block -> both."""
    rows, twin = {}, copy.deepcopy(model).eval()
    for name, block in twin.named_modules():
        block.register_forward_hook(lambda block, x, y, name=name: rows.update({name: (
            [*(y if torch.is_tensor(y) else y[0]).shape], sum(p.numel() for p in block.parameters()))}))
    with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
        twin(torch.zeros(1, 3, *size))
    for name, flops in counter.get_flop_counts().items():
        shape, n = rows["" if name == "Global" else name.partition(".")[2]]
        if show or name == "Global":
            print(f"{name.replace('Global', 'model'):34} {str(shape):20} {n:>12,} parameters "
                  f"{sum(flops.values()) // 2:>15,} multiply-adds")
    return {"parameters": rows[""][1], "multiply_adds": counter.get_total_flops() // 2}

# --- loss and scores ------------------------------------------------------------------------------
# The same in every segmenter.

def one_hot(masks, classes):
    """masks (B, H, W) -> y (B, C, H, W), valid (B, 1, H, W), floats 0 or 1; of one class, label 1."""
    labels = torch.arange(classes, device=masks.device).view(1, -1, 1, 1) + (classes == 1)
    return (masks[:, None] == labels).float(), (masks[:, None] != IGNORE).float()

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

def segmentation_loss(logits, masks, names):
    """Sum of the named losses in float32, logits (B, C, H, W) against masks (B, H, W)."""
    y, valid = one_hot(masks, logits.shape[1])
    losses = {"bce": bce, "dice": dice_loss, "iou": iou_loss}
    return sum(losses[name](logits.float(), y, valid) for name in names.split("+"))

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

# --- training -------------------------------------------------------------------------------------

def pick_device(name):
    """'auto' takes cuda, then mps, then cpu -> device, whether bfloat16 is fast on it."""
    try:
        device = torch.empty(1, device=name if name != "auto" else "cuda" if torch.cuda.is_available()
                             else "mps" if torch.backends.mps.is_available() else "cpu").device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: not here ({str(error).splitlines()[0]}); try --device cpu")
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device, fast if device.type == "cpu" else \
        device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8

def memory(device):
    """Peak memory in GB: of the CUDA allocator, else of the process; 0 where Linux is not."""
    status = Path("/proc/self/status")
    kilobytes = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else \
        int((kilobytes or [0])[0]) / 1e6

def to_device(tensor, device):
    """The tensor on the device if that leaves 40 % of its free memory, else where it is."""
    full = device.type == "cuda" and tensor.nbytes > 0.6 * torch.cuda.mem_get_info(device)[0]
    return tensor if full else tensor.to(device)

def progress(text):
    """One rewritten line, on a terminal only; an empty text wipes it."""
    if sys.stdout.isatty():
        print(f"\r{text:<39.39}\r", end="", flush=True)

def to_float(images):
    """uint8 (B, 3, H, W) -> float in [0, 1], channels_last, the layout convolutions like best."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)

def augment(images, masks):
    """One draw of flip, zoom (1 to 1.6) and place for photo and mask together, light, contrast and
    tint for the photo alone: uint8 (B, 3, H, W), (B, H, W) -> float in [0, 1], uint8."""
    B, device = len(images), images.device
    u = lambda *shape: torch.rand(*shape) * 2 - 1              # drawn on the CPU, whatever the device
    side, matrix = 1 / (1.3 + 0.3 * u(B)), torch.zeros(B, 2, 3)          # the window's share
    matrix[:, 0, 0], matrix[:, 1, 1] = side * u(B).sign(), side
    matrix[:, :, 2] = u(B, 2) * (1 - side)[:, None]
    grid = F.affine_grid(matrix, (B, 1, *images.shape[2:]), align_corners=False).to(device)
    x = F.grid_sample(to_float(images), grid, "bilinear", "border", align_corners=False)
    masks = F.grid_sample(masks[:, None].float(), grid, "nearest", "border", align_corners=False)
    contrast, light = 1 + 0.4 * u(B, 1, 1, 1), 0.2 * u(B, 1, 1, 1) + 0.1 * u(B, 3, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)                               # (B, 1, 1, 1)
    x = (x - mean) * contrast.to(device) + mean + light.to(device)
    return x.clamp_(0, 1), masks[:, 0].byte()

def lr_at(step, steps, peak):
    """Warm-up over the first twentieth of the steps, then half a cosine down to 0."""
    warm = max(1, steps // 20)
    return peak * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))

def finetune_epoch(model, images, masks, optimizer, args, epoch, amp):
    """One pass over the training photos -> mean loss, confusion (C, C), photos a second."""
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
    total, counts, device = 0.0, 0, next(model.parameters()).device
    for x, y in zip(images.split(64), masks.split(64)):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(to_float(x.to(device)))
        total = total + segmentation_loss(logits, y.to(device), names) * len(x)
        counts = counts + confusion(logits, y.to(device))
    return (total / len(images)).item(), counts

# --- labelled data --------------------------------------------------------------------------------
# The same in every segmenter.

def draw_toy(n, size, seed):
    """n drawn cats and dogs -> images (n, 3, H, W), masks (n, H, W) 0 pet, 1 background, 2 border,
    both uint8, and breeds. Fur, ground and a ball share their colours: only shape tells the pet."""
    images, masks = torch.empty(n, 3, *size).byte(), torch.empty(n, *size).byte()
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
    for first in range(0, n, 256):
        g, b = torch.Generator().manual_seed(seed * 100003 + first), min(256, n - first)
        u = lambda low, high, c=1: low + (high - low) * torch.rand(b, c, 1, 1, generator=g)
        breed, zoom, flip = (first + torch.arange(b)) % 37, u(0.55, 0.9), u(-1, 1).sign()
        X, Y = flip * (x - u(-0.3, 0.3)) / zoom, (y - u(-0.25, 0.25)) / zoom   # (b, 1, H, W)
        disc = lambda cx, cy, rx, ry: ((X - cx) / rx) ** 2 + ((Y - cy) / ry) ** 2 < 1
        ear = lambda cx: ((X - cx).abs() < 0.4 * (Y + 1.05)) & (Y < -0.45)     # pointed: a cat
        flap = disc(-0.85, -0.2, 0.14, 0.38) | disc(-0.05, -0.2, 0.14, 0.38)   # hanging: a dog
        pet = torch.where((breed < 12).view(b, 1, 1, 1), ear(-0.68) | ear(-0.22), flap)
        for cx, cy, rx, ry in ((-0.45, -0.3, 0.4, 0.38), (0.3, 0.3, 0.75, 0.4),
                               (1.1, -0.05, 0.1, 0.45), (-0.1, 0.7, 0.12, 0.4), (0.7, 0.7, 0.12, 0.4)):
            pet = pet | disc(cx, cy, rx, ry)                                   # head, body, tail, legs
        ball = disc(u(-1.4, 1.4), u(-1.2, 1.2), 0.3, 0.3)
        wave = lambda low, high: torch.sin(
            (x * u(-1, 1, 3) + y * u(-1, 1, 3)) * u(low, high, 3) + u(0, 6.3, 3)).mean(1, True)
        tint, grain = u(0.2, 0.8, 3), torch.randn(b, 1, *size, generator=g)
        fur = tint + u(-0.15, 0.15, 3) + 0.2 * wave(20, 40) + 0.06 * grain
        ground = tint + u(-0.25, 0.25, 3) + 0.3 * wave(2, 12) + 0.03 * grain
        k = 2 * max(1, min(size) // 48) + 1                                    # border, in pixels
        wide, slim = (F.max_pool2d(m.float(), k, 1, k // 2) for m in (pet, ~pet))
        images[first:first + b] = torch.where(pet | ball, fur, ground).clamp(0, 1).mul(255).byte()
        masks[first:first + b] = torch.where(wide + slim > 1, 2, 1 - pet.long())[:, 0].byte()
    return images, masks, [(CATS + [f"dog_{d}" for d in range(25)])[i % 37] for i in range(n)]

def subset(breeds, share):
    """A seeded share of each breed, at least one photo, and the others: two lists of numbers. A
    larger share contains a smaller."""
    order = torch.randperm(len(breeds), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    size, seen, lists = Counter(breeds), Counter(), ([], [])
    for i in order:
        lists[seen[breeds[i]] >= share * size[breeds[i]]].append(i)
        seen[breeds[i]] += 1
    return sorted(lists[0]), sorted(lists[1])

def pet_files(root, part):
    """Oxford-IIIT Pet, official split, a tenth of trainval for validation -> pairs, breeds."""
    base = Path(root, "oxford-iiit-pet")
    if not (base / "annotations/trainval.txt").exists():
        from torchvision.datasets import OxfordIIITPet       # here: importing it takes a while
        try:
            OxfordIIITPet(root, download=True)
        except Exception as error:
            fail(f"the pets could not be downloaded ({error}); unpack images.tar.gz and annotations"
                 f".tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets in {base}, or --data toy")
    lines = (base / f"annotations/{'test' if part == 'test' else 'trainval'}.txt").read_text()
    names = [line.split()[0] for line in lines.splitlines() if line and line[0] != "#"]
    pairs = [(base / f"images/{n}.jpg", base / f"annotations/trimaps/{n}.png") for n in names]
    breeds = [name.rsplit("_", 1)[0] for name in names]
    keep = range(len(names)) if part == "test" else subset(breeds, 0.1)[part == "train"]
    return [pairs[i] for i in keep], [breeds[i] for i in keep]

def folder_files(folder, part):
    """images/ and masks/ with equal stems under train/ val/ test/, or flat; a flat folder gives a
    tenth to test, a missing val/ is a tenth of the training photos -> pairs, breeds ("")."""
    flat, cut = Path(folder, "images").is_dir(), not Path(folder, "val").is_dir()
    base = Path(folder, "" if flat else "train" if cut and part == "val" else part)
    photos, masks = ({f.stem: f for f in sorted(base.glob(f"{d}/[!.]*"))} for d in ("images", "masks"))
    for stem in sorted(photos.keys() ^ masks.keys()) or ([] if photos else ["*"]):
        fail(f"{base}: '{stem}' wanted in both images/ and masks/")
    keep = list(range(len(photos)))
    test, rest = subset([""] * len(keep), 0.1) if flat else (keep, keep)
    val, train = subset([""] * len(rest), 0.1) if cut else (range(len(rest)), range(len(rest)))
    keep = test if part == "test" else [rest[i] for i in (val if part == "val" else train)]
    pairs = [list(zip(photos.values(), (masks[stem] for stem in photos)))[i] for i in keep]
    return (pairs, [""] * len(pairs)) if pairs else fail(f"{folder}: too few photos for {part}")

def read_pair(pair, size):
    """(photo, mask) files -> (4, H, W) uint8, RGB and labels; EXIF rotation is undone."""
    try:
        with Image.open(pair[0]) as photo, Image.open(pair[1]) as mask:
            whole = photo.size[::-1 if photo.getexif().get(274, 1) > 4 else 1]  # 274: orientation
            if mask.mode not in ("1", "L", "P") or mask.size != whole:
                raise ValueError(f"photo of {whole}, mask of {mask.size} pixels in mode {mask.mode}; "
                                 "wanted the same size and one 8-bit channel of labels")
            photo.draft("RGB", (2 * size[1], 2 * size[0]))    # JPEG: decodes at 1/2, 1/4 or 1/8
            rgb = ImageOps.exif_transpose(photo).convert("RGB").resize(size[::-1], Image.BILINEAR)
            labels = mask.resize(size[::-1], Image.NEAREST)
            return np.dstack([np.asarray(rgb), np.asarray(labels, np.uint8)]).transpose(2, 0, 1)
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
    save(cache, lambda file: np.save(file, array))
    print(f"decoded  {len(pairs)} photos in {time.perf_counter() - began:.1f} s -> {cache}")
    return torch.from_numpy(array)

def load_split(data, root, part, size, ignore):
    """'toy', 'pets' or a folder; part 'train', 'val' or 'test' -> images (N, 3, H, W) uint8, masks
    (N, H, W) uint8 of labels and IGNORE, breeds (N names), names of the classes."""
    if data == "toy":
        images, masks, breeds = draw_toy(*((256, size, 1) if part == "test" else (1110, size, 2)))
        keep = range(256) if part == "test" else subset(breeds, 0.1)[part == "train"]
        return images[keep], masks[keep], [breeds[i] for i in keep], PETS
    pairs, breeds = pet_files(root, part) if data == "pets" else folder_files(data, part)
    images, masks = decode(pairs, size).split((3, 1), 1)
    table, masks = torch.arange(256).byte(), masks[:, 0]                # (N, H, W)
    values = set(masks.unique().tolist()) - {ignore}
    if data == "pets":
        table -= 1                                     # trimap 1, 2, 3: pet, background, border
    elif values <= {0, 255}:
        table[255] = 1                                 # a black and white mask
    elif max(values) > 99:
        i = (masks == max(values)).flatten(1).any(1).nonzero()[0].item()
        fail(f"{pairs[i][1]}: has the values {masks[i].unique().tolist()[:9]}; wanted 0 and 255, or "
             "labels 0 to C - 1, and --ignore L for one that is no class")
    top = int(table[max(values, default=0)])
    if ignore is not None:
        table[ignore] = IGNORE
    names = PETS if data == "pets" else [str(i) for i in range(top + 1)] if top > 1 else ["foreground"]
    return images, table[masks.int()], breeds, names

# --- checkpoints ----------------------------------------------------------------------------------
def save(path, write):
    """write(file) under a temporary name, then rename: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:           # a full disk is the latter for torch.save
        temporary.unlink(missing_ok=True)
        fail(f"{path}: not written ({str(error).splitlines()[0]}); free space, or another folder")

def load_checkpoint(path, script, hint):
    """The dictionary in a .pt file that `script` wrote, tensors on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if (state["script"], state["format"]) != (script, FORMAT):
            raise ValueError("of another script")
    except FileNotFoundError:
        fail(f"{path}: no such file; {hint}")
    except Exception as error:                         # truncated, foreign, of another script
        fail(f"{path}: not a checkpoint of {script}, format {FORMAT} ({type(error).__name__}); {hint}")
    return state

def open_run(args, model, optimizer):
    """A fresh --out (an earlier run moves to OUT.prev), or with --resume the state of last.pt put
    into model and optimizer -> rows of the epochs so far, number of the best."""
    out, free = Path(args.out), ("resume", "out", "root", "device", "compile")     # may differ
    if args.resume:
        last = load_checkpoint(out / "last.pt", Path(__file__).name, "start without --resume")
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
        shutil.rmtree(f"{out}.prev", ignore_errors=True)
        out.rename(f"{out}.prev")
        print(f"note     the earlier run is now in {out}.prev")
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
    meta = {"format": FORMAT, "script": Path(__file__).name, "args": vars(args), "classes": classes,
            "size": args.size, "ignore": args.ignore, "torch": str(torch.__version__),
            "metrics": {"loss": loss, **scores(counts, len(classes))}}
    save(Path(args.out, "model.pt2"), lambda f: torch.export.save(
        program, f, extra_files={"meta.json": json.dumps(meta)}))
    return meta["metrics"]

def draw_samples(path, images, masks, hard):
    """Photo, truth and prediction of N photos as a PNG: pet orange, background black, border white."""
    colours = torch.randint(40, 255, (256, 3), generator=torch.Generator().manual_seed(4)).byte()
    colours[:3] = torch.tensor([[255, 120, 0], [0, 0, 0], [255, 255, 255]])
    rows = [images.movedim(1, -1).cpu(), *(colours[m.long().cpu()] for m in (masks, hard))]
    rows = torch.cat(rows, 2).flatten(0, 1).numpy()                     # (N H, 3 W, 3)
    save(path, lambda f: Image.fromarray(rows).save(f, "PNG"))

# --- main -----------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a scheduler's stop is a Ctrl-C
    out, hint = Path(args.out), "run python pretrain.py first, or give --init none"

    ## 1. The settings: widths come from the pre-trained network, the rest hangs on the data.
    source = {} if args.init == "none" else load_checkpoint(args.init, "pretrain.py", hint)
    widths = {name: source.get("args", WIDTHS)[name] for name in WIDTHS}
    if args.data == "auto":
        args.data = "pets" if Path(args.root, "oxford-iiit-pet").is_dir() else "toy"
    settle(args, 2 ** widths["downs"])
    device, bf16 = pick_device(args.device)
    amp = args.amp and bf16
    print(f"finetune.py  torch {torch.__version__}  {device}  {'bf16' if amp else 'float32'}  "
          f"seed {args.seed}  -> {out}\nsettings {args.epochs} epochs of batch {args.batch_size}, "
          f"lr {args.lr:.1e}, {args.loss}, size {args.size}")

    ## 2. The data: train and val, never test.
    images, masks, breeds, classes = load_split(args.data, args.root, "train", args.size, args.ignore)
    val_images, val_masks, _, more = load_split(args.data, args.root, "val", args.size, args.ignore)
    classes = max(classes, more, key=len)
    if args.cats:
        cats = set(args.cats.split(","))
        if not cats <= set(CATS) & set(breeds):
            fail(f"--cats {args.cats}: wanted breeds of pets or toy, out of {', '.join(CATS)}")
        keep = [i for i, breed in enumerate(breeds) if breed in cats or breed[0].islower()]
        images, masks, breeds = images[keep], masks[keep], [breeds[i] for i in keep]
    keep = subset(breeds, args.frac)[0]
    images, masks, val_images, val_masks = (
        to_device(t, device) for t in (images[keep], masks[keep], val_images, val_masks))
    print(f"data     {args.data}: train {len(images)}  val {len(val_images)}  on {images.device}"
          + ("  (drawn; for real photos: --data pets)" if args.data == "toy" else ""))

    ## 3. The model: pre-trained but for its head.
    torch.manual_seed(args.seed)
    model = VQVAE(len(classes), **widths)
    if source:
        print(f"init     {take_over(model, source['model'], args.take)} of {len(source['model'])} "
              f"tensors from {args.init}" + ("; warning: it saw toy photos only, better is python "
              "pretrain.py --data catdog" if source["args"]["data"] == "toy" != args.data else ""))
    segmenter = Logits(model)
    cost = summary(segmenter, args.size, args.summary)
    if args.summary:
        return
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    history, best = open_run(args, model, optimizer)
    if args.compile:
        model.compile()
    labels = list(enumerate(classes, start=len(classes) == 1))
    share, name = max((float((val_masks == label).float().mean()), name) for label, name in labels)
    print(f"baseline all {name}: mIoU {share / len(classes):.4f}")

    ## 4. Train; the best epoch is the one with the highest mean IoU on the validation photos.
    print("   epoch    loss  val_loss     acc    mIoU    Dice       lr   img/s     sec")
    try:
        for epoch in range(len(history), args.epochs):
            began = time.perf_counter()
            loss, counts, speed = finetune_epoch(model, images, masks, optimizer, args, epoch, amp)
            val_loss, val_counts = validate(segmenter.eval(), val_images, val_masks, args.loss, amp)
            train, val = scores(counts, len(classes)), scores(val_counts, len(classes))
            row = {"epoch": epoch + 1, "loss": loss, "miou": train["miou"], "dice": train["dice"],
                   "val_loss": val_loss, **{f"val_{key}": value for key, value in val.items()},
                   "lr": lr_at(epoch, args.epochs, args.lr), "images_per_second": speed,
                   "seconds": time.perf_counter() - began, "memory_gb": memory(device)}
            history.append(row)
            best = max(history, key=lambda row: row["val_miou"])["epoch"]
            save_epoch(args, model, optimizer, history, best)
            print(f"{epoch + 1:>4}/{args.epochs:<4}{loss:7.4f}{val_loss:10.4f}{val['accuracy']:8.4f}"
                  f"{val['miou']:8.4f}{val['dice']:8.4f}{row['lr']:9.1e}{speed:8,.0f}"
                  f"{row['seconds']:8.1f}{' *' if best == epoch + 1 else ''}", flush=True)
    except KeyboardInterrupt:
        print(f"\nstopped  {len(history)} whole epochs are kept: --resume continues after them")
        raise SystemExit(130)

    ## 5. Report: the best epoch becomes a program, its scores and a few pictures.
    model.load_state_dict(load_checkpoint(out / "best.pt", "finetune.py", "train again")["model"])
    final = export(segmenter, args, classes, val_images, val_masks)
    result = {**history[best - 1], "metrics": final, "args": vars(args), **cost,
              "data": hashlib.sha256(masks.cpu().numpy().tobytes()).hexdigest()[:16],
              "total_seconds": sum(row["seconds"] for row in history), "torch": str(torch.__version__)}
    save(out / "result.json", lambda file: file.write_text(json.dumps(result, indent=1)))
    logits = segmenter.eval()(to_float(val_images[:8].to(device)))
    draw_samples(out / "samples.png", val_images[:8], val_masks[:8], hard_labels(logits))
    print(f"best     epoch {best}  accuracy {final['accuracy']:.4f}  mIoU {final['miou']:.4f}  "
          f"{out / 'model.pt2'}   total {result['total_seconds']:.0f} s")

if __name__ == "__main__":
    main()
