"""Train a VQ-VAE to draw photos from a small grid of codes: the paper's own experiment.

WHAT IT DOES    Photos (B, 3, H, W) go in, the same photos come out, and on the way each patch of
  4 x 4 pixels is one of 512 codes: (B, H/4, W/4) numbers of 9 bits stand for the photo. The loss is
  the squared error and a commitment term (van den Oord et al. 2017, arXiv:1711.00937).
YOU WILL LEARN
  - how a lookup that has no gradient is trained all the same -> Quantiser.forward
  - how a codebook learns without an optimiser -> Quantiser.follow
  - why codebooks collapse, and what keeps this one alive -> Quantiser.revive
  - how to read perplexity: 512 if all codes are used alike, 1 if only one is -> perplexity
RUN IT          python vqvae.py
                python vqvae.py --data pets --epochs 12
                python vqvae.py --resume
                python vqvae.py --width 256 --residual-width 256 --residual-blocks 4
WHAT TO EXPECT  Pets at 64 px, 12 epochs: error 0.040, PSNR 25.8 dB, perplexity 392,
  271 s on one CPU core, torch 2.15, seed 0.
  A broken run: `used` stays below 50/512 and the error above 0.2, the codebook has collapsed.
DIFFERS FROM THE PAPER  The codebook's averages forget faster (0.9 a step, Sonnet: 0.99): a young
  encoder runs away from slow codes, and the codebook collapses. Codes start from data, unused ones
  move to data. Convolutions start with He's weights.
"""
import argparse, copy, hashlib, json, math, os, shutil, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed as dist, nn
from torch.utils.flop_counter import FlopCounterMode
# --- knobs ----------------------------------------------------------------------------------------
AUTO = {"toy": {"size": [64], "epochs": 6, "batch_size": 32, "lr": 1e-3},
        "folder": {"size": [64], "epochs": 30, "batch_size": 32, "lr": 1e-3}}    # any other data
DECAY = 0.9                      # of the codebook's averages; 0.99 in Sonnet, see README
COMMITMENT = 0.25                # weight of the commitment loss, as in the paper
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
    add("--data", default="auto", help="toy, pets, a folder; auto: pets if under --root, else toy")
    add("--root", default="data", help="where the data sets lie or are downloaded to")
    add("--size", nargs="+", type=number(int, 8, 4096, "auto"), default="auto", help="side, or H W")
    add("--frac", type=number(float, 1e-6, 1), default=1.0, help="share of the training photos")
    add = p.add_argument_group("model").add_argument
    add("--width", type=number(int, 32, 2048), default=128, help="channels of the network")
    add("--residual-width", type=number(int, 4, 2048), default=32, help="channels within a block")
    add("--residual-blocks", type=number(int, 0, 64), default=2, help="more of them see further")
    add("--downs", type=number(int, 1, 6), default=2, help="halvings of the sides before coding")
    add("--codes", type=number(int, 2, 65536), default=512, help="entries of the codebook (K)")
    add("--code-size", type=number(int, 1, 1024), default=64, help="numbers in a code (D)")
    add("--summary", action="store_true", help="print blocks, parameters, multiply-adds, and leave")
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
    add("--out", default="checkpoints/vqvae", help="the run's folder; an older run is kept once")
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

# --- loss and scores ------------------------------------------------------------------------------
def reconstruction_loss(output, x, commitment, variance):
    """Squared error in units of the photos' own variance, so that 1 is what plain grey of their
    mean brightness scores, and the commitment term (VQ-VAE, eq. 3; the codebook term is done by
    averages) -> loss (), normalised error (), both float32."""
    ## In the units of the photos' variance an error means the same for every data set: 0.1 says
    ## that a tenth of the variance of the pixels is lost.
    error = (output.float() - x).square().mean() / variance
    ## Without the commitment the encoder's vectors could drift and grow as they like: the codes, a
    ## few steps behind, would never catch up, and the decoder would see ever coarser copies.
    return error + COMMITMENT * commitment, error

def psnr(error):
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]."""
    return -10 * math.log10(max(error, 1e-12))

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

def progress(text):
    """One rewritten line, on a terminal only; the next print writes over it."""
    if sys.stdout.isatty():
        print(f"\r{text:<39.39}\r", end="", flush=True)

def lr_at(step, steps, peak):
    """Warm-up over the first twentieth of the steps, then half a cosine down to 0."""
    return peak * min((step + 1) / (steps // 20 or 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))

def reconstruct_epoch(model, images, variance, optimizer, args, epoch, amp):
    """One pass over the photos, half of them mirrored -> mean loss, photos a second."""
    model.train()
    torch.manual_seed(args.seed * 100003 + epoch)      # all that is random here: resume is exact
    device, batch = next(model.parameters()).device, min(args.batch_size, len(images))
    steps = len(images) // batch                       # an incomplete last batch is left out
    order = torch.randperm(len(images)).to(images.device)
    ## Nothing but the photos themselves is needed: what goes in is what has to come out. It cannot
    ## just be copied, because the only way through is one of K codes for each cell of the grid.
    total, began = 0.0, time.perf_counter()
    for step in range(steps):
        x = to_float(images[order[step * batch:(step + 1) * batch]].to(device))
        x = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x, x.flip(3))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output, commitment, _ = model(x)
        ## The decoder learns from the error, the encoder from the error (straight through the
        ## lookup) and the commitment; the codes have moved already, inside the forward pass and
        ## without a gradient.
        loss, _ = reconstruction_loss(output, x, commitment, variance)
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
    return total.item() / steps, speed

@torch.inference_mode()
def measure(model, images, variance, amp=False):
    """Loss, normalised error, PSNR, perplexity and codes in use over all validation photos."""
    model.eval()
    ## Perplexity is counted over all photos together: of a single batch it could never exceed the
    ## number of vectors in it.
    device = next(model.parameters()).device
    use = torch.zeros(len(model.quantiser.codes), dtype=torch.long, device=device)
    loss, error = torch.zeros((), device=device), torch.zeros((), device=device)
    for part in images.split(min(64, 2**20 // images[0, 0].numel() or 1)):    # at a time
        x = to_float(part.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output, commitment, ids = model(x)
        both = reconstruction_loss(output, x, commitment, variance)
        loss, error = loss + both[0] * len(x), error + both[1] * len(x)
        use += torch.bincount(ids.flatten(), minlength=len(use))
    ## PSNR is the same error on a scale of decibels: halving the error adds 3 dB. It is unkind to
    ## fine texture: a blurred fur scores better than a sharp one that is shifted by a pixel.
    error = error.item() / len(images)
    return {"loss": loss.item() / len(images), "error": error, "psnr": psnr(error * variance),
            "perplexity": perplexity(use.float()), "used": int((use > 0).sum())}

def code_colours(codes):
    """Codes (K, D) -> colours (K, 3) in [0, 1] by their three main directions: like codes, like
    colours."""
    ## Principal components: the directions in which the codes differ most become red, green, blue.
    ## In codes.png cells of one colour are what the encoder takes for the same: look whether fur,
    ## sky and edges have colours of their own, and whether they move with the animal.
    codes = codes - codes.mean(0)
    axes = codes @ torch.linalg.svd(codes, full_matrices=False)[2][:3].T                # (K, <= 3)
    return F.pad(axes / axes.abs().amax(0).clamp(min=1e-9) * 0.5 + 0.5, (0, 3 - axes.shape[1]))

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

def load_plain(args):
    """The photos of --data -> (N, 3, H, W) uint8; unreadable ones and copies are left out."""
    if args.data == "toy":
        return draw_toy(4096, args.size, SPLIT_SEED + 3)[0]
    folder, names = Path(args.data), None
    if args.data == "pets":
        folder = Path(args.root, "oxford-iiit-pet/images")
        listed = folder.parent / "annotations/trainval.txt"
        if not listed.exists():
            fail(f"{listed} is not there; python unet.py --data pets --root {args.root} fetches it")
        names = {line.split()[0] for line in listed.read_text().splitlines() if line}
    files = [file for file in sorted(folder.rglob("*"))
             if file.suffix.lower() in Image.registered_extensions()
             and (file.parent.name != "masks" if names is None else file.stem in names)]
    if not files:
        fail(f"--data {args.data}: no photos there")
    images, notes = decode_photos(files, args.size)
    for i, reason in list(notes["bad"].items())[:3]:
        print(f"skipped  {files[int(i)]}: {reason}")
    out = {int(i) for i in notes["bad"]} | set(notes["twins"])
    if len(files) - len(out) < 2:
        fail(f"--data {args.data}: {len(files) - len(out)} readable photos, two are needed")
    print(f"photos   {len(files)}, {len(notes['bad'])} unreadable, {len(notes['twins'])} copies")
    return images[[i for i in range(len(files)) if i not in out]]

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
def train_vqvae(args, out):
    ## 1. The settings.
    if args.data == "auto":
        args.data = "pets" if Path(args.root, "oxford-iiit-pet").is_dir() else "toy"
    settle(args, 2 ** args.downs)
    device, amp = pick_device(args.device, args.amp)
    torch.manual_seed(args.seed)
    model = VQVAE(3, args.width, args.residual_width, args.residual_blocks, args.downs, args.codes,
                  args.code_size)
    weights, multiply_adds = summary(model, args.size, args.summary)
    if args.summary:
        return
    print(f"vqvae.py  torch {torch.__version__}  {device}  {'bf16' if amp else 'float32'}  seed "
          f"{args.seed}  {args.epochs} epochs  batch {args.batch_size}  lr {args.lr:g}  -> {out}")
    ## 2. The photos: a tenth for validation, --frac of the others for training.
    images = load_plain(args)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, args.photos = len(images) // 10 or 1, len(images)                 # for --resume: the same
    train = order[held:][:round(args.frac * (len(images) - held)) or 1]
    full = device.type == "cuda" and images.nbytes > 0.6 * torch.cuda.mem_get_info(device)[0]
    images, val = (images[part].to("cpu" if full else device) for part in (train, order[:held]))
    variance = (images[:min(2000, 2**25 // math.prod(args.size))] / 255).var().item()
    print(f"data     {args.data}: train {len(images)}  val {len(val)}  {args.size} pixels  "
          f"variance {variance:.4f}"
          + ("  (drawn; for real photos: --data pets)" if args.data == "toy" else ""))
    ## 3. The model. Plain grey of the photos' mean brightness would score an error of 1.
    model.to(device, memory_format=torch.channels_last)
    bits = math.log2(args.codes) / (24 * 4 ** args.downs)
    print(f"model    {weights:,} parameters, {args.codes} codes of {args.code_size} numbers, which "
          f"take {bits:.2%} of a photo's bits")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    history, best = open_run(args, model, optimizer)
    if args.compile:
        model.compile()
    ## 4. Train; the best epoch is the one with the lowest loss on the validation photos.
    print("   epoch    loss  val_loss   error    PSNR perplexity     used       lr   img/s     sec")
    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        loss, speed = reconstruct_epoch(model, images, variance, optimizer, args, epoch, amp)
        seen = measure(model, val, variance, amp)
        row = {"epoch": epoch + 1, "loss": loss, **{f"val_{key}": seen[key] for key in seen},
               "lr": optimizer.param_groups[0]["lr"], "images_per_second": speed,
               "seconds": time.perf_counter() - began, "memory_gb":
               torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None}
        best = min([*history, row], key=lambda row: row["val_loss"])["epoch"]
        save_epoch(args, model, optimizer, [*history, row], best)
        history.append(row)
        print("{epoch:>4}/{0:<4}{loss:7.4f}{val_loss:10.4f}{val_error:8.4f}{val_psnr:8.2f}"
              "{val_perplexity:11.1f}{val_used:5}/{1}{lr:9.1e}{images_per_second:8,.0f}"
              "{seconds:8.1f}{2}".format(args.epochs, args.codes,
                                         " *" if best == epoch + 1 else "", **row), flush=True)
    ## 5. Report: the best epoch's scores, photos beside their reconstructions, and the codes.
    model.load_state_dict(load_checkpoint(out / "best.pt", Path(__file__).name, "retrain")["model"])
    row = history[best - 1]
    result = {**row, "args": vars(args), "torch": torch.__version__, "parameters": weights,
              "multiply_adds": multiply_adds, "photos": len(images),
              "total_seconds": sum(row["seconds"] for row in history)}
    save(out / "result.json", lambda file: file.write_text(json.dumps(result, indent=1)))
    with torch.inference_mode():
        output, _, ids = model.eval()(to_float(val[:8].to(device)))
    to_bytes = lambda x: x.clamp(0, 1).mul(255).byte()
    draw_samples(out / "samples.png", val[:8], to_bytes(output))
    grid = code_colours(model.quantiser.codes.cpu())[ids.cpu()].movedim(-1, 1)        # (8, 3, h, w)
    draw_samples(out / "codes.png", val[:8], to_bytes(F.interpolate(grid, tuple(args.size))))
    print("best     epoch {epoch}  error {val_error:.4f}  PSNR {val_psnr:.2f} dB  perplexity "
          "{val_perplexity:.0f}  used {val_used}/{0}  {1}  total {2:.0f} s".format(
              args.codes, out / "best.pt", result["total_seconds"], **row))

def main(argv=None):
    """train_vqvae, with one line in the place of a traceback where the machine gives out."""
    args, began = parse_args(argv), time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a scheduler's stop is a Ctrl-C
    try:
        train_vqvae(args, Path(args.out))
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
