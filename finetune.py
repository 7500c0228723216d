"""Fine-tune the pre-trained VQ-VAE until it segments pets: stage 2 of 3.
WHAT IT DOES    Photos (B, 3, H, W) go in, logits (B, C, H, W) come out. The VQ-VAE of pretrain.py
  (van den Oord et al. 2017) gets a new head, a channel for each class; all of it is then trained.
YOU WILL LEARN  - what is taken over from the pre-training, and what never -> take_over
  - cross-entropy, Dice and IoU by hand -> bce, dice_loss, iou_loss
  - scores that no batch size can change -> confusion; a resume exact to the bit -> finetune_epoch
RUN IT          python finetune.py --frac 0.5                     half of the labels
                python finetune.py --frac 0.5 --resume
WHAT TO EXPECT  Test mIoU 0.634 on toy (99 s), mIoU 0.709 on pets (128 px, 55 min); CPU, torch 2.15.
  A broken run stays at the baseline that is printed first.
DIFFERS FROM THE PAPER  The paper draws with its codes; to segment with them is tried out here.
"""
import argparse, copy, hashlib, json, math, os, shutil, signal, sys, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed as dist, nn
# --- knobs ----------------------------------------------------------------------------------------
AUTO = {"toy": {"size": [64], "epochs": 40, "batch_size": 32, "lr": 1e-3},        # what auto means:
        "folder": {"size": [128], "epochs": 60, "batch_size": 32, "lr": 1e-3}}
WIDTHS = {"width": 128, "residual_width": 32, "residual_blocks": 2, "downs": 2}   # as in Sonnet
DECAY = 0.9                      # of the codebook's averages; 0.99 in Sonnet, see README
COMMITMENT = 0.25                # weight of the commitment loss, as in the paper
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
    add("--cats", help="of the cats train on these alone, such as Maine_Coon,Birman,Bombay")
    add("--ignore", type=number(int, 0, 255), help="label in a folder's masks that does not count")
    add = p.add_argument_group("model").add_argument
    add("--init", default="checkpoints/pretrain/best.pt", help="what to start from, or none")
    add("--take", choices=("encoder", "all", "none"), default="encoder",
        help="encoder: and its codebook; none: its widths only")
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
    add("--out", default="checkpoints/finetune", help="the run's folder; an older run is kept once")
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

class Logits(nn.Sequential):
    """A VQVAE as a plain segmenter, (B, 3, H, W) -> logits alone, as scores and export want it."""
    def forward(self, x):
        return self[0](x)[0]
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
def take_over(model, state, take, vectors):
    """Copy the pre-trained encoder and codebook, with "all" the decoder too, into model; never the
    head, which spoke in colours and must now speak in classes -> number of tensors taken."""
    parts = ("encoder.", "quantiser.", "decoder.")[:{"none": 0, "encoder": 2, "all": 3}[take]]
    own = model.state_dict()
    taken = {name: tensor for name, tensor in state.items() if name.startswith(parts)
             and name in own and tensor.shape == own[name].shape}
    missing, _ = model.load_state_dict(taken, strict=False)
    ## Masked cells were not counted, and photos may have been smaller: with the old counts, codes
    ## in use would look unused to revive.
    model.quantiser.counts *= vectors / model.quantiser.counts.sum().clamp(min=1e-9)
    wrong = [name for name in missing if name.startswith(parts)]
    return fail(f"--init: these tensors do not fit: {wrong}") if wrong else len(taken)
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
def finetune_epoch(model, images, masks, losses, optimizer, args, epoch, amp):
    """One pass over the training photos -> loss (with commitment), counts (C, C), img/s."""
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
        loss = segmentation_loss(logits, y, losses) + COMMITMENT * commitment
        lr = lr_at(epoch * steps + step, args.epochs * steps, args.lr)
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
def finetune_vqvae(args, out):
    ## 1. The settings: widths come from the pre-trained network, the rest hangs on the data.
    start = (out / "last.pt", "finetune.py", "start without --resume") if args.resume else (
        args.init, "pretrain.py", "run python pretrain.py first, or give --init none")
    source = {} if args.init == "none" else load_checkpoint(*start)
    vars(args).update(widths := {name: source.get("args", WIDTHS)[name] for name in WIDTHS})
    if args.data == "auto":
        args.data = "pets" if Path(args.root, "oxford-iiit-pet").is_dir() else "toy"
    settle(args, 2 ** widths["downs"])
    device, amp = pick_device(args.device, args.amp)
    print(f"finetune.py  torch {torch.__version__}  {device}  {'bf16' if amp else 'float32'}  seed "
          f"{args.seed}  {args.epochs} epochs  batch {args.batch_size}  lr {args.lr:g}  -> {out}")
    ## 2. The data, train and val, never test; on the device if the photos fit 40 % of what is free.
    (images, masks, breeds, classes), (val_images, val_masks, _, more) = (
        load_split(args.data, args.root, part, args.size, args.ignore) for part in ("train", "val"))
    args.photos, args.classes = len(breeds), (classes := max(classes, more, key=len))    # is saved
    cats = args.cats.split(",") if args.cats else CATS
    if args.cats and not set(cats) <= set(CATS) & set(breeds):
        fail(f"--cats {args.cats}: wanted breeds of pets or toy, out of {', '.join(CATS)}")
    keep = [i for i, breed in enumerate(breeds) if breed in cats or not breed[:1].isupper()]
    keep = [keep[i] for i in subset([breeds[i] for i in keep], args.frac)[0]]
    full = device.type == "cuda" and images.nbytes > 0.4 * torch.cuda.mem_get_info(device)[0]
    images, masks, val_images, val_masks = (t.to("cpu" if full else device) for t in (
        images[keep], masks[keep], val_images, val_masks))
    print(f"data     {args.data}: train {len(images)}  val {len(val_images)}  {args.size} pixels"
          + ("  (drawn; for real photos: --data pets)" if args.data == "toy" else ""))
    ## 3. The model: pre-trained but for its head. The baseline is the best constant answer.
    losses = [LOSSES[name] for name in args.loss.split("+")]
    torch.manual_seed(args.seed)
    model = VQVAE(len(classes), **widths)
    segmenter = Logits(model).eval()
    if source and not args.resume:
        vectors = min(args.batch_size, len(images)) * math.prod(args.size) // 4 ** widths["downs"]
        taken = take_over(model, source["model"], args.take, vectors)
        trained = source["args"]["data"]
        bad = "; warning: drawn photos" if trained == "toy" and args.data != "toy" else ""
        print(f"init     {taken} of {len(source['model'])} tensors of {args.init}, {trained}{bad}")
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
        loss, counts, speed = finetune_epoch(model, images, masks, losses, optimizer, args,
                                             epoch, amp)
        val_loss, val_counts = validate(segmenter.eval(), val_images, val_masks, losses, amp)
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
    final = export(segmenter, args, losses, val_images, val_masks)
    result = {**history[best - 1], "metrics": final, "args": vars(args),
              "parameters": sum(weight.numel() for weight in model.parameters()),
              "train_masks": hashlib.sha256(masks.cpu().numpy().tobytes()).hexdigest()[:16],
              "total_seconds": sum(row["seconds"] for row in history), "torch": torch.__version__}
    save(out / "result.json", lambda file: file.write_text(json.dumps(result, indent=1)))
    logits = torch.no_grad()(segmenter)(to_float(val_images[:8].to(device)))
    hard = logits.argmax(1) if len(classes) > 1 else logits[:, 0] < 0           # 0 is orange
    draw_samples(out / "samples.png", val_images[:8], val_masks[:8] ^ (len(classes) == 1), hard)
    print(f"best     epoch {best}  accuracy {final['accuracy']:.4f}  mIoU {final['miou']:.4f}  "
          f"{out / 'model.pt2'}   total {result['total_seconds']:.0f} s")
def main(argv=None):
    """finetune_vqvae, with one line in the place of a traceback where the machine gives out."""
    args, began = parse_args(argv), time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a scheduler's stop is a Ctrl-C
    try:
        finetune_vqvae(args, Path(args.out))
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
