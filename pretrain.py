"""Pre-train a VQ-VAE on masked photos of cats and dogs, without labels: stage 1 of 3.

HEADER
"""
import argparse, hashlib, json, math, os, shutil, signal, sys, time
try:
    import resource
except ImportError:      # Windows
    resource = None
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

# --- knobs ----------------------------------------------------------------------------------------

AUTO = {                         # what "auto" means, by data
    "toy": {"size": [64], "epochs": 6, "batch_size": 32, "lr": 1e-3},
    "folder": {"size": [128], "epochs": 20, "batch_size": 64, "lr": 1e-3},
}
DECAY = 0.9                      # of the codebook's moving averages; Sonnet has 0.99
COMMITMENT = 0.25                # weight of the commitment loss, as in the paper
FILL = 0.5                       # grey, in the place of what is masked
SPLIT_SEED = 0                   # splits, subsets and toy pictures hang on this, not on --seed
CACHE = Path("data/cache")       # decoded photos; delete it whenever you like
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

def share_range(text):
    """An argparse type: LO-HI with 0 <= LO <= HI <= 0.95 -> (LO, HI)."""
    try:
        low, high = map(float, text.split("-"))
    except ValueError:
        low, high = 1, 0
    if not 0 <= low <= high <= 0.95:
        raise argparse.ArgumentTypeError(f"{text} is not LO-HI with 0 <= LO <= HI <= 0.95")
    return [low, high]

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
    add("--data", default="auto", help="toy, catdog, pets, folders of photos, joined by +")
    add("--root", default="data", help="where the data sets lie or are downloaded to")
    add("--size", nargs="+", type=number(int, 8, 4096), default="auto", help="side, or H W; auto: by data")
    add("--frac", type=number(float, 1e-6, 1), default=1.0, help="share of the training photos")
    add("--download", action="store_true", help="fetch those of the four collections that lack")
    add("--mask", type=share_range, default="0.05-0.25", help="share of the area to mask, LO-HI")
    add("--mask-style", choices=("patches", "square"), default="patches", help="many, or one")
    add("--patch", type=number(int, 1, 512), default=8, help="side of a masked patch in pixels")
    add("--rotate", action="store_true", help="turn photo and target by a random quarter turn")
    add("--jitter", action="store_true", help="change the input's colours; the target stays clean")
    add("--grey", action="store_true", help="a fifth of the inputs in grey; the target stays clean")
    add = p.add_argument_group("model").add_argument
    add("--width", type=number(int, 8, 2048), default=128, help="channels of the network")
    add("--residual-width", type=number(int, 4, 2048), default=32, help="channels within a block")
    add("--residual-blocks", type=number(int, 0, 64), default=2, help="more of them see further")
    add("--downs", type=number(int, 1, 6), default=2, help="halvings of the sides before coding")
    add = p.add_argument_group("optimisation").add_argument
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
    add("--out", default="checkpoints/pretrain", help="the run's folder; an older run is kept once")
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

# --- loss and scores ------------------------------------------------------------------------------

def squared_error(output, x, where):
    """Sum of squared errors over the pixels `where` (B, 1, H, W), and the number of values."""
    return ((output.float() - x).square() * where).sum(), where.sum() * x.shape[1]

def mean_fill(x, keep):
    """The trivial answer: every masked pixel gets the mean colour of its photo's visible ones."""
    colour = (x * keep).sum((2, 3), True) / keep.sum((2, 3), True).clamp(min=1)     # (B, 3, 1, 1)
    return torch.where(keep, x, colour)

def perplexity(use):
    """exp of the entropy of the codes' use (K,): K if all are used alike, 1 if only one is."""
    share = use / use.sum()
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum()).item()

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

def lr_at(step, steps, peak):
    """Warm-up over the first twentieth of the steps, then half a cosine down to 0."""
    warm = max(1, steps // 20)
    return peak * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))

def to_bytes(x):
    """Float (B, 3, H, W), any range -> uint8 pixels."""
    return x.float().clamp(0, 1).mul(255).round().byte()

def draw_masks(B, size, low, high, patch, style, g=None):
    """B masks that hide a share of the area drawn from [low, high] -> (B, 1, H, W) bool, True where
    the photo stays visible. Drawn on the CPU, whatever the device."""
    H, W = size
    share = low + (high - low) * torch.rand(B, generator=g)
    if style == "square":                # one square, as in the projects this one follows
        side = (share * H * W).sqrt().clamp(max=min(H, W)).round()[:, None]            # (B, 1)
        top, left = torch.rand(2, B, 1, generator=g) * (torch.tensor([H, W]).view(2, 1, 1) - side)
        y, x = torch.arange(H) - top.round(), torch.arange(W) - left.round()        # (B, H), (B, W)
        inside = ((y >= 0) & (y < side))[:, :, None] & ((x >= 0) & (x < side))[:, None]
        return ~inside[:, None]
    h, w = -(-H // patch), -(-W // patch)
    hidden = (share * h * w + torch.rand(B, generator=g)).floor()[:, None]          # right on average
    rank = torch.rand(B, h * w, generator=g).argsort(1).argsort(1)                  # a random order
    keep = (rank >= hidden).view(B, 1, h, w)
    return keep.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[:, :, :H, :W]

def distort(x, jitter, grey):
    """Change the colours of x (B, 3, H, W) in [0, 1]: brightness, contrast and saturation by up to
    half, hue by up to a tenth of the circle (jitter); a fifth of the photos to grey (grey)."""
    B, device = len(x), x.device
    u = lambda: (torch.rand(B, 1, 1, 1) * 2 - 1).to(device)
    luma = torch.tensor([0.299, 0.587, 0.114], device=device).view(1, 3, 1, 1)
    if jitter:
        x = x * (1 + 0.5 * u())
        mean = (x * luma).sum(1, True).mean((2, 3), True)
        x = mean + (x - mean) * (1 + 0.5 * u())
        light = (x * luma).sum(1, True)                                 # (B, 1, H, W)
        angle, c = 0.1 * 2 * math.pi * u(), x - light
        ## Hue: turn the colour about the grey axis k (Rodrigues): c cos + (k x c) sin.
        turn = (c.roll(1, 1) - c.roll(-1, 1)) / 3 ** 0.5
        x = light + (c * angle.cos() + turn * angle.sin()) * (1 + 0.5 * u())
    if grey:
        x = torch.where(torch.rand(B, 1, 1, 1).to(device) < 0.2, (x * luma).sum(1, True), x)
    return x.clamp(0, 1)

def pretrain_epoch(model, images, index, variance, optimizer, args, epoch, amp):
    """One pass over images[index] -> mean loss, images a second."""
    model.train()
    torch.manual_seed(args.seed * 100003 + epoch)      # all that is random here: resume is exact
    batch = min(args.batch_size, len(index))
    steps = len(index) // batch                        # an incomplete last batch is left out
    order = index[torch.randperm(len(index))].to(images.device)
    device, total, began = next(model.parameters()).device, 0.0, time.perf_counter()
    for step in range(steps):
        x = to_float(images[order[step * batch:(step + 1) * batch]].to(device))    # the clean target
        x = torch.where(torch.rand(batch, 1, 1, 1).to(device) < 0.5, x, x.flip(3))
        if args.rotate:
            x = x.rot90(int(torch.randint(4, ())), (2, 3))
        keep = draw_masks(batch, x.shape[2:], *args.mask, args.patch, args.mask_style).to(device)
        seen = torch.where(keep, distort(x, args.jitter, args.grey), FILL)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output, commitment, _ = model(seen.contiguous(memory_format=torch.channels_last), keep)
        ## The target is the photo as it was: what is hidden has to be guessed from its surroundings.
        loss = (output.float() - x).square().mean() / variance + COMMITMENT * commitment
        lr = lr_at(epoch * steps + step, args.epochs * steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total = total + loss.detach()
        if step % 50 == 49 or step == steps - 1:       # sync: once in 50 steps
            if not math.isfinite(total.item()):
                fail(f"the loss is not finite in epoch {epoch + 1} at lr {lr:.1e}; the last good "
                     f"epoch is kept; try --lr {args.lr / 3:.0e}")
            speed = (step + 1) * batch / (time.perf_counter() - began)
            progress(f" epoch {epoch + 1}  {(steps - 1 - step) * batch / speed:.0f} s left")
    progress("")
    return total.item() / steps, speed

@torch.inference_mode()
def check(model, images, index, variance, args, amp=False):
    """The validation photos under masks that never change -> normalised squared error of all and of
    masked pixels, the same for filling in the mean colour, commitment, perplexity, codes in use."""
    model.eval()
    g, device = torch.Generator().manual_seed(SPLIT_SEED), next(model.parameters()).device
    use = torch.zeros(len(model.quantiser.codes), dtype=torch.long, device=device)
    sums = torch.zeros(5, 2, device=device)            # (sum, number) of five means
    for part in index.split(64):
        x = to_float(images[part.to(images.device)].to(device))
        keep = draw_masks(len(x), x.shape[2:], *args.mask, args.patch, args.mask_style, g).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output, commitment, ids = model(torch.where(keep, x, FILL), keep)
        sums += torch.stack([torch.stack(pair) for pair in (
            squared_error(output, x, torch.ones_like(keep)), squared_error(output, x, ~keep),
            squared_error(mean_fill(x, keep), x, torch.ones_like(keep)),
            squared_error(mean_fill(x, keep), x, ~keep),
            (commitment * len(x), torch.tensor(len(x), device=device)))])
        open_ = F.max_pool2d(keep.float(), 2 ** model.downs)[:, 0] > 0      # cells not all masked
        use += torch.bincount(ids[open_], minlength=len(use))
    error, masked, fill, fill_masked, commitment = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
    v = variance
    return {"loss": error / v + COMMITMENT * commitment, "error": error / v, "masked": masked / v,
            "mean_fill": fill / v, "mean_fill_masked": fill_masked / v, "commitment": commitment,
            "perplexity": perplexity(use.double()), "used": int((use > 0).sum())}

# --- unlabelled data ------------------------------------------------------------------------------

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

def upright(image, size):
    """RGB, EXIF rotation undone, resized to (H, W) -> (3, H, W) uint8."""
    image.draft("RGB", (2 * size[1], 2 * size[0]))     # JPEG: decoded at 1/2, 1/4 or 1/8 at once
    image = ImageOps.exif_transpose(image).convert("RGB").resize(size[::-1], Image.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)

URLS = {       # CIFAR-10 comes through torchvision's own class
    "Images": "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar",
    "cats_and_dogs_filtered":
        "https://storage.googleapis.com/mledu-datasets/cats_and_dogs_filtered.zip",
    "PetImages": "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F"
                 "/kagglecatsanddogs_5340.zip",
}

def catdog_items(root, download):
    """The four collections as far as they lie under root -> [(source, "cat" or "dog", item)], an
    item being a file, or for CIFAR-10 an array (32, 32, 3)."""
    root, found = Path(root), []
    if download or (root / "cifar-10-batches-py").is_dir():
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import download_and_extract_archive
        try:
            for name, url in URLS.items() if download else []:
                if not (root / name).is_dir():
                    download_and_extract_archive(url, root)
            cifar = CIFAR10(root, train=True, download=download)
        except Exception as error:
            fail(f"catdog: {error}; unpack it by hand under {root}, or go on without --download")
        found += [("CIFAR-10", {3: "cat", 5: "dog"}[label], cifar.data[i])
                  for i, label in enumerate(cifar.targets) if label in (3, 5)]
    for source, pattern in (("Stanford Dogs", "Images/*/*.jpg"),
                            ("Google filtered", "cats_and_dogs_filtered/*/*s/*.jpg"),
                            ("Microsoft", "PetImages/*/*.jpg")):
        found += [(source, "cat" if file.parent.name.lower().startswith("cat") else "dog", file)
                  for file in sorted(root.glob(pattern))]
    return found or fail(f"catdog: none of the four collections lies under {root}; try --download")

def list_items(data, root, download):
    """A kind of photos, or several joined by + -> [(source, species or "", item)]."""
    found = []
    for kind in data.split("+"):
        if kind == "catdog":
            found += catdog_items(root, download)
        else:
            folder = Path(root, "oxford-iiit-pet/images") if kind == "pets" else Path(kind)
            names = None
            if kind == "pets":
                text = Path(root, "oxford-iiit-pet/annotations/trainval.txt")
                if not text.exists():
                    fail(f"pets: {text} is not there; python finetune.py --data pets fetches them")
                names = {line.split()[0] for line in text.read_text().splitlines() if line}
            found += [(kind, "", file) for file in sorted(folder.rglob("*"))
                      if file.suffix.lower() in Image.registered_extensions()
                      and (names is None or file.stem in names)]
    return found or fail(f"--data {data}: no photos there")

def decode_photos(items, size):
    """Read every item once, in threads -> (N, 3, H, W) uint8 mapped from a file in data/cache/, and
    {"bad": {number: reason}, "twins": [numbers of exact copies of an earlier photo]}."""
    stats = [item.tobytes() if isinstance(item, np.ndarray) else
             (str(item.resolve()), item.stat().st_size, item.stat().st_mtime_ns) for item in items]
    key = hashlib.sha256(repr((FORMAT, size, stats)).encode()).hexdigest()[:16]
    cache, notes, began = CACHE / f"{key}.npy", CACHE / f"{key}.json", time.perf_counter()
    try:
        return torch.from_numpy(np.load(cache, mmap_mode="c")), json.loads(notes.read_text())
    except (OSError, ValueError):                      # not there yet, or cut short
        CACHE.mkdir(parents=True, exist_ok=True)
    part, bad, first, twins = CACHE / f".{key}.{os.getpid()}", {}, {}, []
    array = np.lib.format.open_memmap(part, "w+", np.uint8, (len(items), 3, *size))

    def read(i):
        try:
            image = Image.fromarray(items[i]) if isinstance(items[i], np.ndarray) else \
                Image.open(items[i])
            with image:
                array[i] = upright(image, size)
        except Exception as error:                     # whatever a broken file can provoke
            bad[i] = str(error)
        return hashlib.sha256(array[i].tobytes()).digest()

    with ThreadPoolExecutor() as pool:
        for i, digest in enumerate(pool.map(read, range(len(items)))):
            progress(f" decoding {i}/{len(items)}")
            if i not in bad and first.setdefault(digest, i) != i:
                twins.append(i)
    progress("")
    array.flush()
    save(notes, lambda file: file.write_text(json.dumps({"bad": bad, "twins": twins})))
    os.replace(part, cache)
    print(f"decoded  {len(items)} photos in {time.perf_counter() - began:.1f} s -> {cache}")
    return torch.from_numpy(array), json.loads(notes.read_text())

def load_photos(args):
    """The photos of --data -> images (N, 3, H, W) uint8, and the numbers of those to use: readable,
    without exact copies, as many cats as dogs."""
    if args.data == "toy":
        return draw_toy(4096, args.size, SPLIT_SEED + 3)[0], torch.arange(4096)
    found = list_items(args.data, args.root, args.download)
    images, notes = decode_photos([item for _, _, item in found], args.size)
    out = {int(i) for i in notes["bad"]} | set(notes["twins"])
    good = [i for i in range(len(found)) if i not in out]
    kinds = {kind: [i for i in good if found[i][1] == kind] for kind in ("cat", "dog", "")}
    most = min(len(kinds["cat"]), len(kinds["dog"])) or len(good)
    g = torch.Generator().manual_seed(SPLIT_SEED)
    taken = []
    for kind in kinds.values():         # the larger species is cut at random over all its sources
        order = torch.randperm(len(kind), generator=g).tolist()
        taken += [kind[i] for i in order[:len(kind) if kind is kinds[""] else most]]
    print(f"{'source':18}{'cats':>8}{'dogs':>8}{'others':>8}{'broken':>8}{'copies':>8}{'taken':>8}")
    for source in dict.fromkeys(s for s, _, _ in found):
        own = [i for i, item in enumerate(found) if item[0] == source]
        counts = [sum(found[i][1] == kind for i in own) for kind in ("cat", "dog", "")]
        counts += [sum(str(i) in notes["bad"] for i in own), len(set(notes["twins"]) & set(own)),
                   len(set(taken) & set(own))]
        print(f"{source:18}" + "".join(f"{count:8}" for count in counts))
    for i, reason in list(notes["bad"].items())[:3]:
        print(f"skipped  {found[int(i)][2]}: {reason}")
    return images, torch.tensor(sorted(taken))

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

def draw_samples(path, *columns):
    """Pictures (N, 3, H, W) uint8, one column each, as a PNG."""
    rows = torch.cat([column.cpu() for column in columns], 3).movedim(1, -1)    # (N, H, W', 3)
    save(path, lambda f: Image.fromarray(rows.flatten(0, 1).numpy()).save(f, "PNG"))

# --- main -----------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a scheduler's stop is a Ctrl-C
    out = Path(args.out)

    ## 1. The settings.
    if args.data == "auto":
        found = any(Path(args.root, name).is_dir() for name in ("cifar-10-batches-py", *URLS))
        args.data = "catdog" if found or args.download else "toy"
    settle(args, 2 ** args.downs)
    device, bf16 = pick_device(args.device)
    amp = args.amp and bf16
    print(f"pretrain.py  torch {torch.__version__}  {device}  {'bf16' if amp else 'float32'}  "
          f"seed {args.seed}  -> {args.out}")

    ## 2. The photos: a tenth (at most 2,000) for validation, --frac of the others for training.
    images, index = load_photos(args)
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(SPLIT_SEED))]
    held = min(len(index) // 10, 2000) or 1
    val, train = index[:held], index[held:]
    train = train[:max(1, round(args.frac * len(train)))]
    images = to_device(images, device)
    variance = (images[train[:2000]].float() / 255).var().item()
    print(f"data     {args.data}: train {len(train)}  val {len(val)}  {args.size[0]}x{args.size[1]}  "
          f"{images.nbytes / 1e6:.0f} MB on {images.device}  variance {variance:.4f}"
          + ("  (drawn; real photos: --download)" if args.data == "toy" else ""))
    print(f"settings {args.epochs} epochs of batch {args.batch_size}, lr {args.lr:.1e}, "
          f"mask {args.mask[0]}-{args.mask[1]} in {args.mask_style} of {args.patch} px")

    ## 3. The model.
    torch.manual_seed(args.seed)
    model = VQVAE(3, args.width, args.residual_width, args.residual_blocks, args.downs)
    model.to(device, memory_format=torch.channels_last)
    print(f"model    {sum(p.numel() for p in model.parameters()):,} parameters and "
          f"{model.quantiser.codes.numel():,} numbers in the codebook")
    first = check(model, images, val, variance, args, amp)
    print(f"baseline mean colour of what is visible: error {first['mean_fill']:.4f}, "
          f"of masked pixels {first['mean_fill_masked']:.4f}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    history, best = open_run(args, model, optimizer)
    if args.compile:
        model.compile()

    ## 4. Train; the best epoch is the one with the lowest loss on the validation photos.
    print("   epoch    loss  val_loss   error  masked  perplexity     used       lr   img/s     sec")
    try:
        for epoch in range(len(history), args.epochs):
            start = time.perf_counter()
            loss, speed = pretrain_epoch(model, images, train, variance, optimizer, args, epoch, amp)
            scores = check(model, images, val, variance, args, amp)
            row = {"epoch": epoch + 1, "loss": loss,
                   **{f"val_{name}": value for name, value in scores.items()},
                   "lr": optimizer.param_groups[0]["lr"], "images_per_second": speed,
                   "seconds": time.perf_counter() - start, "memory_gb": peak_memory(device)}
            better = not history or row["val_loss"] < history[best - 1]["val_loss"]
            best = epoch + 1 if better else best
            history.append(row)
            save_epoch(args, model, optimizer, history, best)
            used = f"{scores['used']}/{len(model.quantiser.codes)}"
            print(f"{epoch + 1:>4}/{args.epochs:<4}{loss:7.4f}{scores['loss']:10.4f}"
                  f"{scores['error']:8.4f}{scores['masked']:8.4f}{scores['perplexity']:12.1f}{used:>9}"
                  f"{row['lr']:9.1e}{speed:8,.0f}{row['seconds']:8.1f}{' *' if better else ''}",
                  flush=True)
    except KeyboardInterrupt:
        progress("")
        print(f"stopped  {len(history)} whole epochs are kept: --resume continues after them")
        raise SystemExit(130)

    ## 5. Report: the best epoch's scores, and photo, masked photo, output.
    model.load_state_dict(load_checkpoint(out / "best.pt", "pretrain.py", "train again")["model"])
    result = {**history[best - 1], "args": vars(args), "torch": str(torch.__version__),
              "parameters": sum(p.numel() for p in model.parameters()), "photos": len(train),
              "total_seconds": sum(row["seconds"] for row in history)}
    save(out / "result.json", lambda file: file.write_text(json.dumps(result, indent=1)))
    x = to_float(images[val[:8]].to(device))
    keep = draw_masks(len(x), x.shape[2:], *args.mask, args.patch, args.mask_style,
                      torch.Generator().manual_seed(SPLIT_SEED)).to(device)
    seen = torch.where(keep, x, FILL)
    with torch.inference_mode():
        output = model.eval()(seen, keep)[0]
    draw_samples(out / "samples.png", *(to_bytes(picture) for picture in (x, seen, output)))
    row = history[best - 1]
    print(f"best     epoch {best}  error {row['val_error']:.4f}  masked {row['val_masked']:.4f} "
          f"(mean colour {row['val_mean_fill_masked']:.4f})  perplexity {row['val_perplexity']:.0f}  "
          f"used {row['val_used']}  {out / 'best.pt'}  total {result['total_seconds']:.0f} s")

if __name__ == "__main__":
    main()
