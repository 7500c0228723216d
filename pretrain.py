"""Masked pre-training of a VQ-VAE on photos without labels: stage 1 of 3.

WHAT IT DOES  Photos (B, 3, H, W) with a grey square go in, whole photos come
out: what is hidden must be guessed from what is around it (Pathak et al. 2016,
He et al. 2022), through the codes of a VQ-VAE (van den Oord et al. 2017).
finetune.py takes over what the network learned.

    photo --+--------------- clean, the target ------------------+
            |                                                    |
          mask -> encoder -> codes -> decoder -> photo -> error of what
                                                          was hidden

YOU WILL LEARN  why the target must be the clean photo -> pretrain_epoch; how to
mask -> draw_masks; why the codebook must not see what is masked ->
VQVAE.forward; how to tell that the network fills in rather than copies -> check

RUN IT  python pretrain.py --mask 0.05-0.25      drawn cats and dogs
        python pretrain.py --resume --epochs 12  goes on where the run ended
        python pretrain.py --data catdog --download --size 128 --epochs 20
        torchrun --nproc-per-node 2 pretrain.py  a process for each GPU
        python finetune.py --frac 0.5            stage 2

WHAT TO EXPECT  TODO
A broken run: `masked` stays near the baseline, `used` below 50/512.
DIFFERS FROM THE PAPER  The codebook's averages forget faster (0.9 a step,
Sonnet: 0.99), codes start from data, unused ones move to data.
"""

import argparse
import hashlib
import io
import json
import math
import os
import random
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed as dist
from torch import nn
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import save_image

SCRIPT = "pretrain.py"
ENDINGS = Image.registered_extensions()
LABELS = {"masks", "labels", "annotations", "trimaps", "SegmentationClass", "SegmentationObject"}
COLLECTIONS = {  # of catdog, by the folder that is unpacked; a fourth is torchvision's CIFAR-10
    "Images": "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar",
    "cats_and_dogs_filtered": "https://storage.googleapis.com/mledu-datasets/"
    "cats_and_dogs_filtered.zip",
    "PetImages": "https://download.microsoft.com/download/3/E/1/"
    "3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip",
}
NET = [128, 32, 2, 2]  # width, residual width, residual blocks, halvings; as in Sonnet
DECAY = 0.9  # of the codebook's averages; Sonnet: 0.99
COMMITMENT = 0.25  # weight of the commitment loss, as in the paper
FILL = 0.5  # grey, in the place of what is hidden


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def flag(name, default, help):
        p.add_argument(name, default=default, type=type(default), help=help)

    names = ("WIDTH", "RESIDUAL", "BLOCKS", "DOWNS")
    flag("--data", "toy", "toy, catdog, pets, or a folder of images")
    flag("--root", "data", "where catdog and pets lie or are downloaded to")
    p.add_argument("--size", type=int, nargs="+", default=[64], help="side in pixels, or H W")
    flag("--frac", 1.0, "share of the training photos")
    p.add_argument("--download", action="store_true", help="fetch what is missing of catdog")
    flag("--mask", "0.05-0.25", "LO-HI, share of a photo's area to hide")
    p.add_argument("--mask-style", choices=["square", "patches"], default="square")
    flag("--patch", 8, "side of a hidden patch in pixels")
    p.add_argument(
        "--distort", nargs="*", choices=list(CHANGES), default=[], help="what else to undo"
    )
    p.add_argument("--net", type=int, nargs=4, default=NET, metavar=names, help="sizes, see VQVAE")
    flag("--epochs", 6, "passes over the training photos")
    flag("--batch-size", 32, "halve it if memory runs out")
    flag("--lr", 1e-3, "peak of the learning rate; halve it if the loss jumps")
    flag("--seed", 0, "moves weights, order and masks")
    flag("--device", str(torch.accelerator.current_accelerator(True) or "cpu"), "cuda, mps, cpu")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, same flags")
    flag("--out", "checkpoints/pretrain", "the run's folder")
    args = p.parse_args(argv)
    if args.resume:  # the run's own flags, but those that are typed win
        last = load_checkpoint(Path(args.out, "last.pt"), SCRIPT)
        p.set_defaults(**last["args"] | {"out": args.out, "device": args.device})
        args = p.parse_args(argv)
    args.size = (args.size * 2)[:2]  # H, W
    if args.size[0] % 2 ** args.net[3] or args.size[1] % 2 ** args.net[3]:
        p.error(f"--size {args.size}: the sides are halved {args.net[3]} times")
    if not 0 < args.frac <= 1:
        p.error(f"--frac {args.frac}: wanted more than 0, at most 1")
    try:
        low, high = args.mask.split("-")
        args.low, args.high = float(low), float(high)
    except ValueError:
        p.error(f"--mask {args.mask}: wanted LO-HI, such as 0.05-0.25")
    if not (0 <= args.low <= args.high and 0.01 <= args.high <= 0.95):
        p.error(f"--mask {args.mask}: wanted 0 <= LO <= HI and 0.01 <= HI <= 0.95")
    return args


# --- model ---------------------------------------------------------------------------------------
## An auto-encoder with a dictionary in the middle: the encoder turns a photo into a small grid of
## vectors, the quantiser replaces each by the nearest of K codes, the decoder draws from the codes.


class Residual(nn.Sequential):
    """x + conv1x1(relu(conv3x3(relu(x)))): (B, width, H, W) in and out."""

    def __init__(self, width, hidden):
        wide, narrow = nn.Conv2d(width, hidden, 3, padding=1), nn.Conv2d(hidden, width, 1)
        super().__init__(nn.ReLU(), wide, nn.ReLU(), narrow)
        nn.init.zeros_(narrow.weight)  # a new block is x and a constant

    def forward(self, x):
        return x + super().forward(x)


class Quantiser(nn.Module):
    """Nearest-code lookup (VQ-VAE, eq. 1 and 2) in a codebook that follows the encoder by moving
    averages, without gradients (appendix A.1). z (B, D, H, W), keep None or (B, H, W), 0 where
    masked -> q (B, D, H, W), commitment (), ids (B, H, W). In eval mode no code moves."""

    def __init__(self, K, D):
        super().__init__()
        self.register_buffer("codes", torch.zeros(K, D))
        self.register_buffer("shares", torch.zeros(K))  # of the vectors, moving averages

    def forward(self, z, keep=None):
        B, D, H, W = z.shape
        with torch.autocast(z.device.type, enabled=False):  # in bf16 near codes would be mixed up
            flat = z.float().movedim(1, 3).reshape(-1, D)  # (N, D), N = B H W
            weights = torch.ones_like(flat[:, 0]) if keep is None else keep.flatten().float()
            if self.training:
                self.revive(flat.detach(), weights)
            ## |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every code e.
            squares = self.codes.square().sum(1)  # (K,)
            ids = torch.addmm(squares, flat, self.codes.T, alpha=-2).argmin(1)  # (N,)
            q = self.codes[ids]  # (N, D)
            if self.training:
                self.follow(flat.detach(), ids, weights)
            commitment = F.mse_loss(flat, q)  # stay near the codes, masked or not
            ## A lookup has no gradient, so the decoder's goes straight through to the encoder:
            ## forward this is q, backward the bracket is a constant and it is flat.
            q = flat + (q - flat).detach()
        return q.view(B, H, W, D).movedim(3, 1), commitment, ids.view(B, H, W)

    @torch.no_grad()
    def revive(self, flat, weights):
        """A code that is nearest to no vector would never move again: so codebooks collapse. Such a
        code goes to a random vector, with the usual share; at first all do, a start from data."""
        K = len(self.codes)
        rows = torch.multinomial(weights, K, replacement=True)  # never a masked one
        candidates = flat[rows]  # (K, D)
        if dist.is_initialized():  # under torchrun all processes take those of the first
            dist.broadcast(candidates, 0)
        dead = self.shares < 0.1 / K  # tuned; 0.9^22 = 0.1: not used for 22 steps
        self.codes.copy_(torch.where(dead[:, None], candidates, self.codes))
        self.shares.masked_fill_(dead, 1 / K)

    @torch.no_grad()
    def follow(self, flat, ids, weights):
        """Share and sum of each code's vectors decay and take in this batch's, code = sum / share
        (eq. 6 to 8). The sum is not stored: it is code x share."""
        counts = torch.zeros_like(self.shares).index_add_(0, ids, weights)  # (K,)
        sums = torch.zeros_like(self.codes).index_add_(0, ids, flat * weights[:, None])  # (K, D)
        if dist.is_initialized():  # under torchrun each learns from the vectors of all
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        N = counts.sum()
        old = self.codes * self.shares[:, None]
        self.shares.copy_(DECAY * self.shares + (1 - DECAY) * counts / N)
        self.codes.copy_((DECAY * old + (1 - DECAY) * sums / N) / self.shares[:, None])


class VQVAE(nn.Module):
    """Encoder, quantiser, decoder, head (Sonnet's example); net: width, width within a residual
    block, number of blocks, halvings of the sides. x (B, 3, H, W) in [0, 1], keep None or
    (B, 1, H, W), 0 where masked -> output (B, out_channels, H, W), commitment (), ids (B, h, w)."""

    def __init__(self, out_channels, net, K=512, D=64):
        super().__init__()
        width, hidden, blocks, self.downs = net
        widths = [width // 2**step for step in reversed(range(self.downs))]  # 64, 128
        encoder, decoder = [], []
        for a, b in zip([3] + widths, widths):
            encoder += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU()]  # halves H and W
        encoder.append(nn.Conv2d(width, width, 3, padding=1))
        encoder += [Residual(width, hidden) for _ in range(blocks)]
        encoder += [nn.ReLU(), nn.Conv2d(width, D, 1)]
        decoder.append(nn.Conv2d(D, width, 3, padding=1))
        decoder += [Residual(width, hidden) for _ in range(blocks)]
        decoder.append(nn.ReLU())
        for a, b in zip(reversed(widths), reversed(widths[:-1])):
            decoder += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.ReLU()]  # doubles
        self.encoder = nn.Sequential(*encoder)
        self.quantiser = Quantiser(K, D)
        self.decoder = nn.Sequential(*decoder)
        self.head = nn.ConvTranspose2d(widths[0], out_channels, 4, stride=2, padding=1)
        ## No layer normalises: plain convolutions get He's weights (2015); those zeroed keep 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.weight.any():
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x, keep=None):
        if keep is not None:  # a cell is masked if all its pixels are: no code learns grey
            keep = F.max_pool2d(keep.float(), 2**self.downs)  # (B, 1, h, w)
        z = self.encoder(x - 0.5)  # (B, D, h, w), h = H / 2^downs
        q, commitment, ids = self.quantiser(z, keep)
        return self.head(self.decoder(q)), commitment, ids


# --- loss and scores -----------------------------------------------------------------------------


def hidden_error(output, x, keep):
    """Mean squared error of the values that are hidden, where keep (B, 1, H, W) is False."""
    squares = (output.float() - x).square() * ~keep  # (B, 3, H, W)
    return squares.sum() / (3 * (~keep).sum()).clamp(min=1)


def mean_fill(x, keep):
    """What a network that only copies may hope for: what is hidden gets the mean visible colour."""
    colour = (x * keep).sum((2, 3), keepdim=True) / keep.sum((2, 3), keepdim=True)  # (B, 3, 1, 1)
    return torch.where(keep, x, colour)


def perplexity(use):
    """exp of the entropy of the codes' use (K,): K if all are used alike, 1 if only one is."""
    share = use / use.sum()
    return torch.exp(-torch.xlogy(share, share).sum()).item()


# --- training ------------------------------------------------------------------------------------


def fast_bf16(device):
    """Whether the hardware computes in bfloat16, which takes half the time and memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


def lr_at(step, steps, peak):
    """Warm-up over the first twentieth of the steps, then half a cosine down to 0."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def draw_masks(B, args, device):
    """B masks that hide a share of the area between args.low and args.high -> (B, 1, H, W) bool,
    True where the photo stays visible."""
    H, W = args.size
    share = args.low + (args.high - args.low) * torch.rand(B, device=device)
    if args.mask_style == "square":  # one, at a random place
        side = (share * H * W).sqrt().round().clamp(max=min(H, W) - 1)[:, None]  # (B, 1)
        top, left = torch.rand(2, B, 1, device=device)
        rows = torch.arange(H, device=device) - (top * (H - side)).round()  # (B, H)
        columns = torch.arange(W, device=device) - (left * (W - side)).round()  # (B, W)
        rows = (rows >= 0) & (rows < side)
        columns = (columns >= 0) & (columns < side)
        return ~(rows[:, None, :, None] & columns[:, None, None, :])
    ## Each patch has a place in a random order; the first ones are hidden, but never all.
    h, w = math.ceil(H / args.patch), math.ceil(W / args.patch)
    hidden = (share * h * w).round().clamp(max=h * w - 1)[:, None]  # (B, 1)
    order = torch.rand(B, h * w, device=device).argsort(1)
    keep = (order >= hidden).view(B, 1, h, w)
    keep = keep.repeat_interleave(args.patch, 2).repeat_interleave(args.patch, 3)
    return keep[:, :, :H, :W]


CHANGES = {
    "rotate": v2.RandomChoice([v2.RandomRotation([angle, angle]) for angle in (0, 90, 180, 270)]),
    "jitter": v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1),
    "grey": v2.RandomGrayscale(0.2),
}


def change(x, kinds):
    """x (B, 3, H, W) in [0, 1] -> the same, each photo changed in all the ways that kinds name."""
    for kind in kinds:
        x = torch.stack([CHANGES[kind](image) for image in x])
    return x


def pretrain_epoch(model, optimizer, images, index, variance, args, epoch):
    """One pass over images[index] -> mean loss, and the learning rate at its end. Under torchrun
    each process takes its own part of each batch, and their gradients are averaged."""
    model.train()
    ## All that is random in an epoch hangs on this number: a run that was stopped goes on exactly
    ## as it would have, and no generator's state has to be kept.
    seed = args.seed * 100003 + epoch
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed + 10007 * args.rank)  # the order of all is one, their masks are not
    steps = max(1, len(index) // args.batch_size)  # an incomplete last batch is left out
    total = 0.0
    for step in range(steps):
        batch = order[step * args.batch_size :][: args.batch_size][args.rank :: args.ranks]
        x = images[index[batch]].to(args.device) / 255
        ## A cat in a mirror is a cat. Mirrors and masks are new in each pass: no learning by heart.
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
        ## Nobody can know how a photo was turned, so the target turns too; its colours stay.
        x = change(x, [kind for kind in args.distort if kind == "rotate"])
        seen = change(x, [kind for kind in args.distort if kind != "rotate"])
        keep = draw_masks(len(x), args, x.device)
        seen = torch.where(keep, seen, FILL)
        lr = lr_at(epoch * steps + step, args.epochs * steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(x.device.type, torch.bfloat16, enabled=fast_bf16(x.device)):
            output, commitment, _ = model(seen, keep)
        ## The target is the photo as it was; what can be seen does not count, as copying it teaches
        ## little (He et al. 2022). Had the mask been written into x itself, grey would be right
        ## wherever the loss looks, and nothing be learned. (A student project did that.)
        loss = hidden_error(output, x, keep) / variance + COMMITMENT * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    if not total.isfinite():  # sync: once an epoch
        sys.exit(f"the loss of epoch {epoch + 1} is not finite: try --lr {args.lr / 3:.0e}")
    return {"loss": total.item() / steps, "lr": lr}


@torch.inference_mode()
def check(model, images, index, keeps, variance, args):
    """The photos images[index] under their masks keeps (N, 1, H, W), which never change -> loss,
    error of what is hidden, that of mean_fill, perplexity and codes in use."""
    model.eval()
    use, hidden, masked, fill, total = 0, 0, 0.0, 0.0, 0.0
    for batch, keep in zip(index.split(args.batch_size), keeps.split(args.batch_size)):
        x, keep = images[batch].to(args.device) / 255, keep.to(args.device)
        output, commitment, ids = model(torch.where(keep, x, FILL), keep)
        pixels = (~keep).sum().item()
        hidden += pixels
        masked += hidden_error(output, x, keep).item() * pixels / variance
        fill += hidden_error(mean_fill(x, keep), x, keep).item() * pixels / variance
        total += commitment.item() * len(x)
        visible = F.max_pool2d(keep.float(), 2**model.downs)[:, 0] > 0  # cells not all hidden
        use += torch.bincount(ids[visible], minlength=len(model.quantiser.codes))  # (K,)
    return {
        "val_loss": masked / hidden + COMMITMENT * total / len(index),
        "val_masked": masked / hidden,
        "val_mean_fill": fill / hidden,
        "val_perplexity": perplexity(use),
        "val_used": (use > 0).sum().item(),
    }


def join_ranks(args):
    """Set args.rank and args.ranks: 0 and 1, or under torchrun this process's number and how many
    there are. Each has a GPU of its own, if there are GPUs; all but the first are silent."""
    args.rank, args.ranks = 0, 1
    if "RANK" in os.environ:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        args.rank, args.ranks = dist.get_rank(), dist.get_world_size()
    if args.rank > 0:
        sys.stdout = io.StringIO()
    if args.batch_size < args.ranks:
        sys.exit(f"--batch-size {args.batch_size}: less than one photo for each process")


@torch.inference_mode()
def draw_filled(model, images, keeps, args):
    """Of the best epoch: samples.png, photos, what of them is seen, and hidden parts filled in;
    result.json."""
    out, x, keep = Path(args.out), images / 255, keeps[: len(images)]
    result = load_checkpoint(out / "best.pt", SCRIPT)
    model.load_state_dict(result.pop("model"))
    seen = torch.where(keep, x, FILL)
    output, _, _ = model.cpu().eval()(seen)
    rows = torch.cat([x, seen, torch.where(keep, x, output)])
    save(partial(save_image, rows), out / "samples.png")
    result["torch"] = torch.__version__
    save(partial(Path.write_text, data=json.dumps(result, indent=1)), out / "result.json")
    best = result["metrics"]
    print(
        f"best     epoch {best['epoch']}  masked {best['val_masked']:.4f}, "
        f"mean colour {best['val_mean_fill']:.4f}  {out / 'best.pt'}"
    )


# --- data ----------------------------------------------------------------------------------------
# Drawn pets as in every script; lists and images the same in vqvae.py and pretrain.py.


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


def hash_of(pair):
    """A number in [0, 1) that hangs on the name of the photo alone."""
    return int(hashlib.sha256(pair[0].stem.encode()).hexdigest()[:8], 16) / 16**8


def list_pets(root):
    """The trainval photos of Oxford-IIIT Pet."""
    base = Path(root, "oxford-iiit-pet")
    try:
        datasets.OxfordIIITPet(root, download=True)
    except Exception as error:  # no network, a full disk, a broken archive
        url = "https://www.robots.ox.ac.uk/~vgg/data/pets"
        sys.exit(f"{error}: unpack images.tar.gz, annotations.tar.gz of {url} in {base} by hand")
    names = (base / "annotations/trainval.txt").read_text().split()[::4]
    return [base / f"images/{name}.jpg" for name in names]


def list_folder(folder):
    """All images under a folder, but for those in folders of labels."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in ENDINGS]
    photos = [path for path in paths if not LABELS.intersection(path.relative_to(folder).parts)]
    if not photos:
        sys.exit(f"--data {folder}: no images there")
    return photos


def read_image(photo, size):
    """A photo -> RGB (3, H, W) uint8, stretched to size, or black if it cannot be read."""
    try:
        with Image.open(photo) as image:
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits")
            image.draft("RGB", (2 * size[1], 2 * size[0]))  # a JPEG: decoded at 1/2, 1/4 or 1/8
            image = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(image.resize(size[::-1], Image.BILINEAR)).transpose(2, 0, 1)
    except Exception:  # whatever a broken file can provoke
        return np.zeros((3, *size), np.uint8)


def write_images(cache, photos, size):
    """Decode all photos, in threads, into an array on the disk."""
    array = np.lib.format.open_memmap(cache, "w+", np.uint8, (len(photos), 3, *size))
    with ThreadPoolExecutor() as pool:
        for i, pixels in enumerate(pool.map(read_image, photos, [size] * len(photos))):
            array[i] = pixels
    array.flush()


def read_images(photos, size):
    """All photos -> (N, 3, H, W) uint8. They are decoded once and kept in data/cache/, under a name
    that hangs on what was read. Only what is looked at is in memory; the rest is on the disk."""
    key = str(size)
    for photo in photos:
        key += f"{photo} {photo.stat().st_mtime}"
    cache = Path(f"data/cache/{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy")
    if not cache.exists():
        save(partial(write_images, photos=photos, size=size), cache)
    return torch.from_numpy(np.load(cache, mmap_mode="c"))


def unpack_cifar(args):
    """The cats and dogs of CIFAR-10, which come in one array, become files in data/cache/."""
    cifar = datasets.CIFAR10(args.root, download=args.download)
    for i, (image, label) in enumerate(cifar):
        photo = Path(f"data/cache/cifar-10/{cifar.classes[label]}/{i}.png")
        if cifar.classes[label] in ("cat", "dog") and not photo.exists():
            save(image.save, photo)


def list_catdog(args):
    """{photo: (collection, "cat" or "dog")} of the four collections, those that are there."""
    found, folders = {}, [Path(args.root, name) for name in COLLECTIONS]
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    try:
        if args.download or Path(args.root, "cifar-10-batches-py").exists():
            unpack_cifar(args)
            folders.append(Path("data/cache/cifar-10"))
        for name, url in COLLECTIONS.items():
            if args.download and not Path(args.root, name).exists():
                part = Path(args.root, "unpacking")  # renamed when it is whole
                datasets.utils.download_and_extract_archive(url, part, remove_finished=True)
                os.replace(part / name, Path(args.root, name))
    except Exception as error:  # no network, a full disk, a broken archive
        sys.exit(f"{error}: unpack {url} in {args.root} by hand, or leave out --download")
    for folder in folders:
        for photo in sorted(folder.rglob("*.[jp][pn]g")):
            is_cat = photo.parent.name.lower().startswith("cat")
            found[photo] = (folder.name, "cat" if is_cat else "dog")
    return found


def load_mapped(args):
    """images (N, 3, H, W) uint8, and the numbers of those to train on and to validate with. Sets
    args.photos, which tells --resume whether the photos are the same."""
    if args.data == "toy":
        found, images = {}, draw_toy(4096, args.size, seed=3)[0]
        taken = list(range(len(images)))
    else:
        if args.data == "catdog":
            found = list_catdog(args)
        elif args.data == "pets":
            photos = [photo for photo in list_pets(args.root) if not 0.1 <= hash_of([photo]) < 0.2]
            found = dict.fromkeys(photos, ("pets", "photo"))  # not those finetune.py validates on
        else:
            found = {photo: (photo.parent, "photo") for photo in list_folder(args.data)}
        images, taken = choose_photos(found, args)
    if len(taken) < 2:
        sys.exit(f"--data {args.data}: {len(taken)} photos there, two are needed")
    names = "".join(photo.name for photo in found)
    args.photos = hashlib.sha256(f"{args.frac} {len(taken)} {names}".encode()).hexdigest()
    order = torch.randperm(len(taken), generator=torch.Generator().manual_seed(0))
    index = torch.tensor(taken)[order]
    held = min(2000, math.ceil(len(index) / 10))
    few = math.ceil(args.frac * (len(index) - held))  # the first ones: a quarter lies in the half
    print(f"data     {args.data}: train {few}  val {held}  {args.size} pixels")
    return images, index[held:][:few], index[:held]


def choose_photos(found, args):
    """{photo: (collection, species)} -> images (N, 3, H, W), and the numbers of those that can be
    read and are no copies: of cats and dogs, equally many."""
    if not found:
        sys.exit(f"--data {args.data}: no photos under --root {args.root}; try --download")
    images = read_images(list(found), args.size)
    known, good, counts = set(), {"cat": [], "dog": [], "photo": []}, {}
    for i, (collection, species) in enumerate(found.values()):
        counts.setdefault(collection, Counter())
        digest = hashlib.sha256(images[i].numpy()).digest()
        if not images[i].any():  # all black
            species = "unreadable"
        elif digest in known:
            species = "copy"
        else:
            known.add(digest)
            good[species].append(i)
        counts[collection][species] += 1
    for collection, count in counts.items():
        print(f"photos   {collection}:", ", ".join(f"{n} {what}" for what, n in count.items()))
    fewer = min(len(good["cat"]), len(good["dog"]))
    for species in ["cat", "dog"]:
        random.Random(0).shuffle(good[species])
        if fewer > 0:
            del good[species][fewer:]
    return images, good["cat"] + good["dog"] + good["photo"]


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
    join_ranks(args)
    print(f"{SCRIPT}  torch {torch.__version__}  {args.device}  seed {args.seed}  -> {out}")

    ## 1. The photos: a tenth of them to validate with, under masks that never change.
    if args.rank > 0:
        dist.barrier()  # the first process downloads and decodes, the others find it done
    images, train, val = load_mapped(args)
    if args.rank == 0 and args.ranks > 1:
        dist.barrier()
    variance = (images[train[:2000]] / 255).var().item()
    torch.manual_seed(0)
    keeps = draw_masks(len(val), args, "cpu")

    ## 2. The network and its optimizer, and what --resume puts into them.
    torch.manual_seed(args.seed)
    model = VQVAE(3, args.net)
    model.to(args.device, memory_format=torch.channels_last)
    args.parameters = sum(weight.numel() for weight in model.parameters())
    print(f"model    VQ-VAE {args.net}, {args.parameters / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    history = []
    if args.rank == 0 or args.resume:
        history = open_run(args, model, optimizer)
    trained = model
    if args.ranks > 1:
        trained = nn.parallel.DistributedDataParallel(model)

    ## 3. Train. The best epoch is the one with the lowest loss on the validation photos.
    baseline = check(model, images, val, keeps, variance, args)["val_mean_fill"]
    print(f"baseline mean visible colour: error {baseline:.4f} of what is hidden")
    print(" epoch    loss  val_loss  masked  perplexity     used       lr     sec")
    try:
        for epoch in range(len(history), args.epochs):
            began = time.time()
            row = {"epoch": epoch + 1}
            row |= pretrain_epoch(trained, optimizer, images, train, variance, args, epoch)
            row |= check(model, images, val, keeps, variance, args)
            row["seconds"] = time.time() - began
            history.append(row)
            best = row["val_loss"] == min(old["val_loss"] for old in history)
            if args.rank == 0:
                save_epoch(args, model, optimizer, history, best)
            print(
                f"{epoch + 1:3}/{args.epochs:<3}{row['loss']:7.4f}{row['val_loss']:10.4f}"
                f"{row['val_masked']:8.4f}{row['val_perplexity']:12.1f}{row['val_used']:5}/512"
                f"{row['lr']:9.1e}{row['seconds']:8.1f}{' *' if best else ''}"
            )
    except KeyboardInterrupt:
        again = f"python {SCRIPT} --resume --out {out}"
        sys.exit(f"stopped  {again} goes on; with --epochs {len(history)} it ends here")

    ## 4. Pictures of the best epoch.
    if args.rank == 0:
        draw_filled(model, images[val[:8]], keeps, args)
    if args.ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
