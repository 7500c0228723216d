"""Pre-train a VQ-VAE on masked photos of cats and dogs, without labels: stage 1 of 3.
WHAT IT DOES    Photos (B, 3, H, W) with grey patches go in, whole photos come out: what is hidden
  must be guessed from its surroundings (Pathak et al. 2016, He et al. 2022), through the discrete
  codes of a VQ-VAE (van den Oord et al. 2017). finetune.py takes over what the network learned.
YOU WILL LEARN  - why the target must be the clean photo -> pretrain_epoch
  - how to mask -> draw_masks; why the codebook must not see masked places -> VQVAE.forward
  - how to tell that it fills in rather than copies -> check, mean_fill
RUN IT          python pretrain.py --mask 0.05-0.25   or torchrun --nproc-per-node 2 pretrain.py
WHAT TO EXPECT  README, old loss of all pixels: masked 0.307 (mean colour 0.831), perplexity 387;
  31 min, 2 CPU cores, torch 2.15; toy 97 s. Broken: `used` below 50/512, `masked` near baseline.
DIFFERS FROM THE PAPER  The codebook forgets faster (0.9, not 0.99), unused codes move to data.
"""
import argparse, hashlib, json, math, os, shutil, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed as dist, nn
# --- knobs ----------------------------------------------------------------------------------------
AUTO = {"toy": {"size": [64], "epochs": 6, "batch_size": 32, "lr": 1e-3},
        "folder": {"size": [128], "epochs": 20, "batch_size": 32, "lr": 1e-3}}    # any other data
DECAY = 0.9                      # of the codebook's averages; 0.99 in Sonnet, see README
COMMITMENT = 0.25                # weight of the commitment loss, as in the paper
FILL = 0.5                       # grey, in the place of what is masked
SPLIT_SEED = 0                   # of splits and subsets, which --seed does not move
CACHE = Path("data/cache")       # decoded photos; delete it whenever you like
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
    add("--data", default="auto", help="toy; or catdog, pets, folders, joined by +")
    add("--root", default="data", help="where the data sets lie or are downloaded to")
    add("--size", nargs="+", type=number(int, 8, 4096, "auto"), default="auto", help="side, or H W")
    add("--frac", type=number(float, 1e-6, 1), default=1.0, help="share of the training photos")
    add("--download", action="store_true", help="fetch what is missing of the four collections")
    add("--mask", type=share_range, default="0.05-0.25", help="share of the area to mask, LO-HI")
    add("--mask-style", choices=("patches", "square"), default="patches", help="many, or one")
    add("--patch", type=number(int, 1, 512), default=8, help="side of a masked patch in pixels")
    add("--distort", nargs="*", choices=("rotate", "jitter", "grey"), default=[], help="quarter "
        "turns of photo and target; colours, or grey, of the input alone")
    add = p.add_argument_group("model").add_argument
    add("--width", type=number(int, 32, 2048), default=128, help="channels of the network")
    add("--residual-width", type=number(int, 4, 2048), default=32, help="channels within a block")
    add("--residual-blocks", type=number(int, 0, 64), default=2, help="more of them see further")
    add("--downs", type=number(int, 1, 6), default=2, help="halvings of the sides before coding")
    add, many = p.add_argument_group("optimisation").add_argument, number(int, 1, 10**6, "auto")
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
    add("--out", default="checkpoints/pretrain", help="the run's folder; an older run is kept once")
    return p.parse_args(argv)
# --- model ----------------------------------------------------------------------------------------
## An auto-encoder with a dictionary in the middle: the encoder turns a photo into a small grid of
## vectors, the quantiser replaces each by the nearest of K codes, the decoder draws from the codes.

class Residual(nn.Sequential):
    """x + conv1x1(relu(conv3x3(relu(x)))): (B, width, H, W) in and out."""
    def __init__(self, width, hidden):
        super().__init__(nn.ReLU(), nn.Conv2d(width, hidden, 3, padding=1),
                         nn.ReLU(), nn.Conv2d(hidden, width, 1))
        nn.init.zeros_(self[3].weight)                     # a new block is x and a constant
    def forward(self, x):
        return x + super().forward(x)
def over_ranks(x):
    """x of all processes of a torchrun, joined along dim 0; x itself in an ordinary run."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)

class Quantiser(nn.Module):
    """Nearest-code lookup (VQ-VAE, eq. 1 and 2) in a codebook that follows the encoder by moving
    averages, without gradients (appendix A.1); in eval mode no buffer changes. z (B, D, H, W), keep
    None or (B, H, W) bool, False where masked -> q (B, D, H, W), commitment (), ids (B, H, W)."""
    def __init__(self, K, D):
        super().__init__()
        self.register_buffer("codes", torch.zeros(K, D))
        self.register_buffer("counts", torch.zeros(K))        # vectors a step, moving average
    def forward(self, z, keep=None):
        B, D, H, W = z.shape
        with torch.autocast(z.device.type, enabled=False):    # in bf16 near codes would be mixed up
            flat = z.float().permute(0, 2, 3, 1).reshape(-1, D)         # (N, D), N = B H W
            weight = torch.ones_like(flat[:, 0]) if keep is None else keep.reshape(-1).float()
            if self.training:             # every process learns from the vectors of all
                joined, weights = over_ranks(flat.detach()), over_ranks(weight)
                self.revive(joined, weights)
            ## |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every code e.
            squares = self.codes.square().sum(1)                        # (K,)
            rows = [flat] if torch.compiler.is_exporting() else flat.detach().split(8192)
            ids = torch.cat([torch.addmm(squares, part, self.codes.T, alpha=-2).argmin(1)
                             for part in rows])      # (N,); 8192 fit a cache; exported, N is free
            q = self.codes[ids]                                         # (N, D)
            if self.training:
                self.follow(joined, over_ranks(ids), weights)
            commitment = F.mse_loss(flat, q)                    # stay near the codes, masked or not
            ## A lookup has no gradient, so the decoder's goes straight through to the encoder:
            ## forward this is q, backward the bracket is a constant and it is flat.
            q = flat + (q - flat).detach()
        return q.view(B, H, W, D).permute(0, 3, 1, 2), commitment, ids.view(B, H, W)
    def revive(self, flat, weight):
        """A code that is nearest to no vector would never move again: so codebooks collapse. Such a
        code goes to a random vector, with the usual count; at first all do, a start from data."""
        usual = weight.sum() / len(self.codes)
        place = torch.rand(len(self.codes), device=flat.device) * weight.sum()   # unmasked
        row = torch.searchsorted(weight.cumsum(0), place, right=True).clamp(max=len(flat) - 1)
        dead = self.counts < 0.1 * usual                      # tuned; 0.9^22 = 0.1: 22 steps unused
        self.codes.copy_(torch.where(dead[:, None], flat[row], self.codes))
        self.counts.copy_(torch.where(dead, usual, self.counts))
    def follow(self, flat, ids, weight):
        """Count and sum of each code's vectors decay and take in this batch, code = sum / count
        (eq. 6 to 8); the sum is not stored: it is code x count."""
        counts = torch.zeros_like(self.counts).index_add_(0, ids, weight)
        sums = torch.zeros_like(self.codes).index_add_(0, ids, flat * weight[:, None])
        sums = DECAY * self.codes * self.counts[:, None] + (1 - DECAY) * sums
        self.counts.copy_(DECAY * self.counts + (1 - DECAY) * counts)
        self.codes.copy_(sums / self.counts.clamp(min=1e-12)[:, None])

class VQVAE(nn.Module):
    """Encoder, quantiser, decoder, head (Sonnet's example); each of `downs` steps halves H and W.
    x (B, 3, H, W) in [0, 1], keep None or (B, 1, H, W) bool, False where masked -> output (B,
    out_channels, H, W), commitment loss (), ids (B, H/2^downs, W/2^downs) of the codes."""
    def __init__(self, out_channels, width, residual_width, residual_blocks, downs, K=512, D=64):
        super().__init__()
        self.downs = downs
        widths = [3] + [width >> step for step in range(downs - 1, -1, -1)]    # 3, 64, 128
        down, up = [], []
        for a, b in zip(widths, widths[1:]):
            down += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU()]       # halves H and W
            up = [nn.ConvTranspose2d(b, a, 4, stride=2, padding=1), nn.ReLU()] + up
        blocks = lambda: [Residual(width, residual_width) for _ in range(residual_blocks)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, width, 3, padding=1), *blocks(),
                                     nn.ReLU(), nn.Conv2d(width, D, 1))
        self.quantiser = Quantiser(K, D)
        self.decoder = nn.Sequential(nn.Conv2d(D, width, 3, padding=1), *blocks(), nn.ReLU(),
                                     *up[:-2])                # the last step up is the head
        self.head = nn.ConvTranspose2d(widths[1], out_channels, 4, stride=2, padding=1)
        ## No layer normalises: plain convolutions get He's weights (2015); those zeroed keep 0.
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d) and m.weight.any()):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    def forward(self, x, keep=None):
        if keep is not None:      # a cell is masked if all its pixels are: no code learns grey
            keep = F.max_pool2d(keep.float(), 2 ** self.downs)[:, 0] > 0
        z = self.encoder(x - 0.5)                             # (B, D, H/2^downs, W/2^downs)
        q, commitment, ids = self.quantiser(z, keep)
        return self.head(self.decoder(q)), commitment, ids
# --- loss and scores ------------------------------------------------------------------------------
def squared_error(output, x, where):
    """Sum of squared errors over the pixels `where` (B, 1, H, W), number of values: (2,)."""
    return torch.stack([((output.float() - x).square() * where).sum(), where.sum() * x.shape[1]])
def mean_fill(x, keep):
    """What a network that only copies may hope for: masked pixels get the mean visible colour."""
    colour = (x * keep).sum((2, 3), True) / keep.sum((2, 3), True).clamp(min=1)     # (B, 3, 1, 1)
    return torch.where(keep, x, colour)
def perplexity(use):
    """exp of the entropy of the codes' use (K,): K if all are used alike, 1 if only one is."""
    share = use / use.sum()
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum()).item()
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
def join_ranks(args):
    """Under torchrun: join its processes, a GPU each, and mute all but the first -> rank, ranks."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if args.download or args.batch_size % ranks:
            fail(f"torchrun: no --download, and --batch-size a multiple of the {ranks} processes")
        sys.excepthook = lambda kind, error, _: print(f"pretrain.py: error: rank {rank}: {error}; "
            f"{kind.__name__}; finished epochs are kept for --resume", file=sys.stderr)
        if torch.cuda.is_available() and args.device in ("auto", "cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")
    return rank, ranks
def progress(text):
    """One rewritten line, on a terminal only; the next print writes over it."""
    if sys.stdout.isatty():
        print(f"\r{text:<39.39}\r", end="", flush=True)
def lr_at(step, steps, peak):
    """Warm-up over the first twentieth of the steps, then half a cosine down to 0."""
    return peak * min((step + 1) / (steps // 20 or 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
def share_range(text):
    """An argparse type: LO-HI with 0 <= LO <= HI, 0.01 <= HI <= 0.95 -> [LO, HI]."""
    low, _, high = text.partition("-")
    if not (0 <= float(low) <= float(high or "nan") and 0.01 <= float(high) <= 0.95):
        raise argparse.ArgumentTypeError(f"{text} is not LO-HI, 0 <= LO <= HI, .01 <= HI <= .95")
    return [float(low), float(high)]
def draw_masks(B, args, device, g=None):
    """B masks that hide a share of the area in args.mask, LO to HI -> (B, 1, H, W) bool on the
    device, where g must be, as copying to it would wait; True where the photo stays visible."""
    u = lambda *shape: torch.rand(*shape, generator=g, device=device)
    (H, W), (low, high), patch = args.size, args.mask, args.patch
    share = low + (high - low) * u(B)
    if args.mask_style == "square":      # one, as large as fits, as in the projects before this
        side = (share * H * W).sqrt().clamp(max=min(H, W)).round()[:, None]            # (B, 1)
        y, x = (torch.arange(n, device=device) - (start * (n - side)).round()
                for n, start in zip((H, W), u(2, B, 1)))                    # (B, H), (B, W)
        rows, columns = (y >= 0) & (y < side), (x >= 0) & (x < side)
        return ~(rows[:, None, :, None] & columns[:, None, None])
    ## Each patch gets a place in a random order; the first `hidden` of them are hidden.
    h, w = -(-H // patch), -(-W // patch)
    hidden = (share * h * w + u(B)).floor()[:, None]                         # right on average
    keep = (u(B, h * w).argsort(1) >= hidden).view(B, 1, h, w)
    return keep.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[:, :, :H, :W]
def distort(x, dice, kinds):
    """Change the colours of x (B, 3, H, W) in [0, 1] as dice (5, B, 1, 1, 1) fell. "jitter": light,
    contrast, saturation by up to half, hue by up to a tenth of the circle. "grey": every fifth."""
    luma = lambda x: 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]     # (B, 1, H, W)
    brightness, contrast, saturation, hue = 0.5 + dice[:4]              # from 0.5 to 1.5
    if "jitter" in kinds:
        x = x * brightness
        mean = luma(x).mean((2, 3), True)
        x = mean + (x - mean) * contrast
        angle, c = 0.4 * math.pi * (hue - 1), x - luma(x)
        ## Hue: turn the colour about the grey axis k (Rodrigues, nearly): c cos + (k x c) sin.
        turn = (c.roll(1, 1) - c.roll(-1, 1)) / 3 ** 0.5
        x = luma(x) + (c * angle.cos() + turn * angle.sin()) * saturation
    if "grey" in kinds:
        x = torch.where(dice[4] < 0.2, luma(x), x)
    return x.clamp(0, 1)
def pretrain_epoch(model, images, index, variance, optimizer, args, epoch, amp, rank, ranks):
    """One pass over images[index], of each batch the part of this rank -> mean loss, images/s."""
    model.train()
    torch.manual_seed(args.seed * 100003 + epoch)      # all that is random here: resume is exact
    batch = min(args.batch_size, len(index) // ranks * ranks) or fail("fewer photos than ranks")
    steps = len(index) // batch                        # an incomplete last batch is left out
    own = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
    order = index[torch.randperm(len(index))].to(images.device)
    device, total, began = next(model.parameters()).device, 0.0, time.perf_counter()
    for step in range(steps):
        x = to_float(images[order[step * batch:][own]].to(device))              # clean target
        dice = torch.rand(6, batch, 1, 1, 1, device=device)[:, own]    # all ranks draw all
        masks = draw_masks(batch, args, device)
        keep, hidden = masks[own], (~masks).float().mean().clamp(min=1e-9)
        ## A cat in a mirror is a cat. Mirrors and masks are new in each pass: no learning by heart.
        x = torch.where(dice[0] < 0.5, x, x.flip(3))
        if "rotate" in args.distort:                   # one turn a batch; rectangles: half turns
            x = x.rot90(int(torch.randint(4, ())) * (1 + (x.shape[2] != x.shape[3])), (2, 3))
        seen = torch.where(keep, distort(x, dice[1:], args.distort), FILL)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output, commitment, _ = model(seen.contiguous(memory_format=torch.channels_last), keep)
        ## The target is the photo as it was; what can be seen does not count, as copying it teaches
        ## little (He et al. 2022). Had the mask been written into x itself, grey would be right
        ## wherever the loss looks, and nothing be learned. (A student project did that.)
        error = ((output.float() - x).square() * ~keep).mean() / hidden      # of a hidden pixel
        loss = error / variance + COMMITMENT * commitment
        lr = lr_at(epoch * steps + step, args.epochs * steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total = total + loss.detach()
        if step % 50 == 49 or step == steps - 1:       # sync: once in 50 steps
            if not (total + sum(w.detach().sum() for w in model.parameters())).isfinite():
                fail(f"the loss is not finite in epoch {epoch + 1} at lr {lr:.1e}; finished "
                     f"epochs are kept; try --lr {args.lr / 3:.0e}")
        speed = (step + 1) * batch / (time.perf_counter() - began)
        progress(f" epoch {epoch + 1}  {(steps - 1 - step) * batch / speed:.0f} s left")
    return over_ranks(total[None]).mean().item() / steps, speed
@torch.inference_mode()
def check(model, images, index, variance, args, amp=False):
    """The photos images[index] under masks that never change -> loss, squared error of the masked
    pixels, that of filling them with the mean colour (both / variance), perplexity, codes used."""
    device, sums = next(model.eval().parameters()).device, 0
    g, use = torch.Generator().manual_seed(SPLIT_SEED), 0 * model.quantiser.counts
    for part in index.split(min(64, 2**20 // math.prod(args.size) or 1)):
        x = to_float(images[part.to(images.device)].to(device))
        keep = draw_masks(len(x), args, "cpu", g).to(device)     # the same on every device
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output, commitment, ids = model(torch.where(keep, x, FILL), keep)
        sums = sums + torch.stack([
            squared_error(output, x, ~keep), squared_error(mean_fill(x, keep), x, ~keep),
            len(x) * torch.stack([commitment, torch.ones_like(commitment)])])
        seen = F.max_pool2d(keep.float(), 2 ** model.downs)[:, 0] > 0       # cells not all masked
        use += torch.bincount(ids[seen], minlength=len(use))
    masked, fill, commitment = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
    masked, fill, used = masked / variance, fill / variance, int((use > 0).sum())
    return {"loss": masked + COMMITMENT * commitment, "masked": masked, "mean_fill": fill,
            "perplexity": perplexity(use), "used": used}
# --- unlabelled data ------------------------------------------------------------------------------

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
ARCHIVES = {                     # by folder: name, photos, source; CIFAR-10 is torchvision's
    "Images": ("Stanford Dogs", "*/*.jpg",
               "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar"),
    "cats_and_dogs_filtered": ("Google filtered", "*/*s/*.jpg", "https://storage.googleapis.com/"
                               "mledu-datasets/cats_and_dogs_filtered.zip"),
    "PetImages": ("Microsoft", "*/*.jpg", "https://download.microsoft.com/download/3/E/1/3E1C3F21-"
                  "ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip")}
def catdog_items(root, download):
    """The four collections under root -> [(source, "cat" or "dog", file, or CIFAR's array)]."""
    root, found, url = Path(root), [], "https://www.cs.toronto.edu/~kriz/cifar.html"
    try:
        if download or (root / "cifar-10-batches-py").is_dir():
            from torchvision.datasets import CIFAR10, utils
            cifar = CIFAR10(root, train=True, download=download)
            found += [("CIFAR-10", {3: "cat", 5: "dog"}[label], image) for image, label in
                      zip(cifar.data, cifar.targets) if label in (3, 5)]
        for folder, (source, pattern, url) in ARCHIVES.items():
            if download and not (root / folder).is_dir():
                shutil.rmtree(part := root / "unpacking", ignore_errors=True)     # a cut archive
                utils.download_and_extract_archive(url, part, part, remove_finished=True)
                os.replace(part / folder, root / folder)       # whole or not at all
            found += [(source, "cat" if file.parent.name.lower().startswith("cat") else "dog", file)
                      for file in sorted((root / folder).glob(pattern))]
    except Exception as error:
        fail(f"catdog: {error}; unpack {url} under {root} by hand, or leave out --download")
    return found or fail(f"catdog: none of the four collections lies under {root}; try --download")
def list_items(data, root, download):
    """A kind of photos, or several joined by + -> [(source, species or "", item)]."""
    found, base, names = [], Path(root, "oxford-iiit-pet"), "annotations/trainval.txt"
    for kind in data.split("+"):
        if kind == "catdog":
            found += catdog_items(root, download)
        elif kind == "pets":
            if not (base / names).exists():
                fail(f"pets: not in {base}; python unet.py --data pets --root {root} gets them")
            found += [(kind, "", base / f"images/{line.split()[0]}.jpg") for line in
                      (base / names).read_text().splitlines() if line and line[0] != "#"]
        else:
            files = [file for file in sorted(Path(kind).rglob("*")) if file.parent.name != "masks"
                     and file.suffix.lower() in Image.registered_extensions()]
            found += [(kind, "", f) for f in files] or fail(f"--data {kind}: no photos there")
    return found
def decode_photos(items, size):
    """Read every item once, in threads -> (N, 3, H, W) uint8 mapped from a file in data/cache/, and
    {"bad": {number: reason}, "twins": [numbers of photos equal to an earlier one]}."""
    stats = [item.tobytes() if isinstance(item, np.ndarray) else
             (str(item), os.access(item, os.R_OK) and item.stat()[6:9:2]) for item in items]
    key = hashlib.sha256(repr((FORMAT, size, stats)).encode()).hexdigest()[:16]
    cache, notes, began = CACHE / f"{key}.bin", CACHE / f"{key}.json", time.perf_counter()
    try:
        pixels = np.memmap(cache, np.uint8, "c", shape=(len(items), 3, *size))
        return torch.from_numpy(pixels), json.loads(notes.read_text())
    except (FileNotFoundError, ValueError):            # not there yet, or cut short
        bad, first, twins = {}, {}, []
    def read(i):
        try:
            source = Image.fromarray if isinstance(items[i], np.ndarray) else Image.open
            with source(items[i]) as image:
                image.draft("RGB", (2 * size[1], 2 * size[0]))    # JPEG: decodes at 1/2, 1/4 or 1/8
                image = image.point(lambda v: v / 256) if image.mode[0] == "I" else image   # 16 bit
                x = ImageOps.exif_transpose(image).convert("RGB").resize(size[::-1], Image.BILINEAR)
                return np.asarray(x).transpose(2, 0, 1).tobytes()
        except Exception as error:                     # whatever a broken file can provoke
            bad[i] = str(error)
            return bytes(3 * size[0] * size[1])
    def write(part):        # in place: another may read it; the notes come last, then it is whole
        with open(cache, "ab"), open(cache, "r+b") as file, ThreadPoolExecutor() as pool:
            for n in range(0, len(items), 4096):       # so many at most are held in memory
                for i, pixels in enumerate(pool.map(read, range(len(items))[n:n + 4096]), n):
                    file.write(pixels)
                    progress(f" decoding {i}/{len(items)}")
                    if i not in bad and first.setdefault(hashlib.sha256(pixels).digest(), i) != i:
                        twins.append(i)
        part.write_text(json.dumps({"bad": bad, "twins": twins}))
    save(notes, write)
    print(f"decoded  {len(items)} photos in {time.perf_counter() - began:.1f} s -> {cache}")
    return decode_photos(items, size)                  # of what is on the disk now
def load_photos(args):
    """-> images (N, 3, H, W) uint8, numbers of the readable, single ones, as many cats as dogs."""
    if args.data == "toy":
        return draw_toy(4096, args.size, SPLIT_SEED + 3)[0], torch.arange(4096)
    found = list_items(args.data, args.root, args.download)
    images, notes = decode_photos([item for _, _, item in found], args.size)
    good = sorted({*range(len(found))} - {int(i) for i in notes["bad"]} - {*notes["twins"]})
    cats, dogs, taken = ([i for i in good if found[i][1] == kind] for kind in ("cat", "dog", ""))
    g, most = torch.Generator().manual_seed(SPLIT_SEED), min(len(cats), len(dogs)) or len(good)
    for kind in (cats, dogs):           # the larger species is cut at random over all its sources
        taken += [kind[i] for i in torch.randperm(len(kind), generator=g).tolist()[:most]]
    print(f"{'source':18}{'cats':>8}{'dogs':>8}{'others':>8}{'broken':>8}{'copies':>8}{'taken':>8}")
    for source in dict.fromkeys(s for s, _, _ in found):
        own = {i for i, item in enumerate(found) if item[0] == source}
        counts = [sum(found[i][1] == kind for i in own) for kind in ("cat", "dog", "")]
        counts += [len(own & {*part}) for part in (map(int, notes["bad"]), notes["twins"], taken)]
        print(f"{source:18}" + "".join(f"{count:8}" for count in counts))
    for i, reason in list(notes["bad"].items())[:3]:
        print(f"skipped  {found[int(i)][2]}: {reason}")
    len(taken) > 1 or fail(f"--data {args.data}: {len(taken)} readable photos, two are needed")
    return images, torch.tensor(sorted(taken))
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
def pretrain_vqvae(args, out):
    ## 1. The settings.
    if args.data == "auto":
        found = any(Path(args.root, name).is_dir() for name in ("cifar-10-batches-py", *ARCHIVES))
        args.data = "catdog" if found or args.download else "toy"
    settle(args, 2 ** args.downs)
    (rank, ranks), (device, amp) = join_ranks(args), pick_device(args.device, args.amp)
    print(f"pretrain.py  torch {torch.__version__}  {device}  {'bf16' if amp else 'float32'}  seed "
          f"{args.seed}  {args.epochs} epochs  batch {args.batch_size}  lr {args.lr:g}  -> {out}")
    ## 2. The photos: a tenth (2,000 at most) for validation, --frac of the others for training.
    images, index = load_photos(args)
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(SPLIT_SEED))]
    held, args.photos = min(len(index) // 10, 2000) or 1, len(index)        # for --resume: the same
    val, train = index[:held], index[held:][:round(args.frac * (len(index) - held)) or 1]
    full = device.type == "cuda" and images.nbytes > 0.6 * torch.cuda.mem_get_info(device)[0]
    images = images if full else images.to(device)
    variance = (images[train[:min(2000, 2**25 // math.prod(args.size))]] / 255).var().item()
    print(f"data     {args.data}: train {len(train)}  val {len(val)}  {args.size} pixels  variance "
          f"{variance:.4f}" + ("  (drawn; real ones: --download)" if args.data == "toy" else ""))
    ## 3. The model. The baseline fills what is masked with the mean colour of what is visible.
    torch.manual_seed(args.seed)
    model = VQVAE(3, args.width, args.residual_width, args.residual_blocks, args.downs)
    model.to(device, memory_format=torch.channels_last)
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"model    {weights:,} parameters, codebook of {model.quantiser.codes.numel():,} numbers")
    baseline = check(model, images, val, variance, args, amp)["mean_fill"]
    print(f"baseline mean colour: error of masked pixels {baseline:.4f}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    history, best = open_run(args, model, optimizer) if rank == 0 or args.resume else ([], 0)
    if args.compile:
        model.compile()
    shared = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    ## 4. Train; the best epoch is the one with the lowest loss on the validation photos.
    print("   epoch    loss  val_loss  masked perplexity     used       lr   img/s     sec")
    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        loss, speed = pretrain_epoch(shared, images, train, variance, optimizer, args, epoch, amp,
                                     rank, ranks)
        seen = check(model, images, val, variance, args, amp)
        row = {"epoch": epoch + 1, "loss": loss, **{f"val_{key}": seen[key] for key in seen},
               "lr": optimizer.param_groups[0]["lr"], "images_per_second": speed,
               "seconds": time.perf_counter() - began, "memory_gb":
               torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None}
        best = min([*history, row], key=lambda row: row["val_loss"])["epoch"]
        if rank == 0:
            save_epoch(args, model, optimizer, [*history, row], best)
        history.append(row)
        print("{epoch:>4}/{0:<4}{loss:7.4f}{val_loss:10.4f}{val_masked:8.4f}"
              "{val_perplexity:11.1f}{val_used:5}/{1}{lr:9.1e}{images_per_second:8,.0f}"
              "{seconds:8.1f}{2}".format(args.epochs, len(model.quantiser.codes),
                                         " *" if best == epoch + 1 else "", **row), flush=True)
    if ranks > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    ## 5. Report: the best epoch's scores; photo, masked photo, the photo filled in.
    model.load_state_dict(load_checkpoint(out / "best.pt", Path(__file__).name, "retrain")["model"])
    row = history[best - 1]
    result = {**row, "args": vars(args), "torch": torch.__version__, "parameters": weights,
              "photos": len(train), "total_seconds": sum(row["seconds"] for row in history)}
    save(out / "result.json", lambda file: file.write_text(json.dumps(result, indent=1)))
    x = to_float(images[val[:8].to(images.device)].to(device))
    keep = draw_masks(len(x), args, "cpu", torch.Generator().manual_seed(SPLIT_SEED)).to(device)
    output = torch.no_grad()(model.eval())(seen := torch.where(keep, x, FILL))[0]
    draw_samples(out / "samples.png", *(p.clamp(0, 1).mul(255).byte() for p in (
        x, seen, torch.where(keep, x, output))))
    print("best     epoch {epoch}  masked {val_masked:.4f}, mean colour {val_mean_fill:.4f}  {0}  "
          "total {1:.0f} s".format(out / "best.pt", result["total_seconds"], **row))
def main(argv=None):
    """pretrain_vqvae, with one line in the place of a traceback where the machine gives out."""
    args, began = parse_args(argv), time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a scheduler's stop is a Ctrl-C
    try:
        pretrain_vqvae(args, Path(args.out))
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
