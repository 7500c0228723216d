"""VQ-VAE: photos drawn from a small grid of codes.

WHAT IT DOES  Photos (B, 3, H, W) go in, the same photos come out, and on the
way each patch of 4 x 4 pixels is one of 512 codes: (B, H/4, W/4) numbers of 9
bits stand for the photo (van den Oord et al. 2017, arXiv:1711.00937).

    3 x 64 x 64                                     3 x 64 x 64
      64 x 32 x 32                               64 x 32 x 32
        128 x 16 x 16                         128 x 16 x 16
          z 64 x 16 x 16 -> ids 16 x 16 -> q 64 x 16 x 16
            encoder        nearest of 512      decoder

YOU WILL LEARN  how a lookup that has no gradient is trained all the same ->
Quantiser.forward; how a codebook learns without an optimizer -> follow; why
codebooks collapse, and what keeps this one alive -> revive; how to read a
perplexity: 512 if all codes are used alike, 1 if only one is -> perplexity

RUN IT  python vqvae.py                          drawn cats and dogs
        python vqvae.py --resume --epochs 12     goes on where the run ended
        python vqvae.py --data pets --epochs 12
        python vqvae.py --net 256 256 4 2        a larger network

WHAT TO EXPECT  TODO
A broken run: `used` stays below 50/512, the codebook has collapsed.
DIFFERS FROM THE PAPER  The codebook's averages forget faster (0.9 a step,
Sonnet: 0.99): a young encoder runs away from slow codes. Codes start from data,
unused ones move to data. Convolutions start with He's weights.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
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
from torchvision.utils import save_image

SCRIPT = "vqvae.py"
ENDINGS = Image.registered_extensions()
LABELS = {"masks", "labels", "annotations", "trimaps", "SegmentationClass", "SegmentationObject"}
NET = [128, 32, 2, 2]  # width, residual width, residual blocks, halvings; as in Sonnet
DECAY = 0.9  # of the codebook's averages; Sonnet: 0.99
COMMITMENT = 0.25  # weight of the commitment loss, as in the paper


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def flag(name, default, help):
        p.add_argument(name, default=default, type=type(default), help=help)

    flag("--data", "toy", "toy, pets, or a folder of images")
    flag("--root", "data", "where pets lie or are downloaded to")
    p.add_argument("--size", type=int, nargs="+", default=[64], help="side in pixels, or H W")
    flag("--frac", 1.0, "share of the training photos")
    names = ("WIDTH", "RESIDUAL", "BLOCKS", "DOWNS")
    p.add_argument("--net", type=int, nargs=4, default=NET, metavar=names, help="sizes, see VQVAE")
    flag("--codes", 512, "entries of the codebook (K)")
    flag("--code-size", 64, "numbers in a code (D)")
    flag("--epochs", 6, "passes over the training photos")
    flag("--batch-size", 32, "halve it if memory runs out")
    flag("--lr", 1e-3, "peak of the learning rate; halve it if the loss jumps")
    flag("--seed", 0, "moves weights, order and augmentation")
    flag("--device", str(torch.accelerator.current_accelerator(True) or "cpu"), "cuda, mps, cpu")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, same flags")
    flag("--out", "checkpoints/vqvae", "the run's folder")
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


def reconstruction_loss(output, x, commitment, variance):
    """Squared error in units of the photos' own variance, so that 1 is what plain grey of their
    mean brightness scores, and the commitment term (VQ-VAE, eq. 3; the codebook term is done by
    averages) -> loss (), error (), both float32."""
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


def reconstruct_epoch(model, optimizer, images, variance, args, epoch):
    """One pass over the training photos -> mean loss, and the learning rate at its end."""
    model.train()
    ## All that is random in an epoch hangs on this number: a run that was stopped goes on exactly
    ## as it would have, and no generator's state has to be kept.
    torch.manual_seed(args.seed * 100003 + epoch)
    order = torch.randperm(len(images)).to(images.device)
    steps = max(1, len(images) // args.batch_size)  # an incomplete last batch is left out
    total = 0.0
    for step in range(steps):
        ## Nothing but the photos themselves is needed: what goes in is what has to come out. It
        ## cannot just be copied: the only way through is one of K codes for each cell of the grid.
        x = images[order[step * args.batch_size :][: args.batch_size]] / 255
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
        lr = lr_at(epoch * steps + step, args.epochs * steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(x.device.type, torch.bfloat16, enabled=fast_bf16(x.device)):
            output, commitment, _ = model(x)
        ## The decoder learns from the error, the encoder from the error (straight through the
        ## lookup) and the commitment; the codes have moved already, in the forward pass and without
        ## a gradient.
        loss, _ = reconstruction_loss(output, x, commitment, variance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    if not total.isfinite():  # sync: once an epoch
        sys.exit(f"the loss of epoch {epoch + 1} is not finite: try --lr {args.lr / 3:.0e}")
    return {"loss": total.item() / steps, "lr": lr}


@torch.inference_mode()
def measure(model, images, variance, args):
    """Loss, error, PSNR, perplexity and codes in use over a whole split."""
    model.eval()
    ## Perplexity is counted over all photos together: of a single batch it could never exceed the
    ## number of vectors in it.
    use, total_loss, total_error = 0, 0.0, 0.0
    for batch in images.split(args.batch_size):
        x = batch / 255
        output, commitment, ids = model(x)
        loss, error = reconstruction_loss(output, x, commitment, variance)
        total_loss += loss.item() * len(x)
        total_error += error.item() * len(x)
        use += torch.bincount(ids.flatten(), minlength=args.codes)  # (K,)
    ## PSNR is the same error on a scale of decibels: halving the error adds 3 dB. It is unkind to
    ## fine texture: a blurred fur scores better than a sharp one that is shifted by a pixel.
    error = total_error / len(images)
    return {
        "val_loss": total_loss / len(images),
        "val_error": error,
        "val_psnr": psnr(error * variance),
        "val_perplexity": perplexity(use),
        "val_used": (use > 0).sum().item(),
    }


def code_colours(codes):
    """Codes (K, D) -> colours (K, 3) in [0, 1] by their three main directions: like codes, like
    colours."""
    ## Principal components: the directions in which the codes differ most become red, green, blue.
    ## In codes.png cells of one colour are what the encoder takes for the same: look whether fur,
    ## sky and edges have colours of their own, and whether they move with the animal.
    codes = codes - codes.mean(0)
    directions = torch.linalg.svd(codes, full_matrices=False)[2][:3]  # (3, D)
    places = codes @ directions.T  # (K, 3), or fewer if D or K is less than 3
    places = F.pad(places, (0, 3 - places.shape[1]))
    return 0.5 + 0.5 * places / places.abs().amax(0).clamp(min=1e-9)


@torch.inference_mode()
def draw_codes(model, images, args):
    """Of the best epoch: samples.png, photos and what came out; codes.png, photos and their codes
    in colours; result.json."""
    out, x = Path(args.out), images[:8].cpu() / 255
    result = load_checkpoint(out / "best.pt", SCRIPT)
    model.load_state_dict(result.pop("model"))
    output, _, ids = model.cpu().eval()(x)
    save(partial(save_image, torch.cat([x, output])), out / "samples.png")
    colours = code_colours(model.quantiser.codes)[ids].movedim(3, 1)  # (8, 3, h, w)
    colours = F.interpolate(colours, args.size)  # (8, 3, H, W)
    save(partial(save_image, torch.cat([x, colours])), out / "codes.png")
    result["torch"] = torch.__version__
    save(partial(Path.write_text, data=json.dumps(result, indent=1)), out / "result.json")
    best = result["metrics"]
    print(
        f"best     epoch {best['epoch']}  error {best['val_error']:.4f}  "
        f"PSNR {best['val_psnr']:.2f} dB  used {best['val_used']}/{args.codes}  {out / 'best.pt'}"
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


def load_images(args):
    """(N, 3, H, W) uint8 on the device, to train on and to validate with. Sets args.photos, which
    tells --resume whether the photos are the same."""
    if args.data == "toy":
        photos, images = [], draw_toy(4096, args.size, seed=3)[0]
    else:
        photos = list_pets(args.root) if args.data == "pets" else list_folder(args.data)
        images = read_images(photos, args.size)
        readable = images.flatten(1).any(1).bool()  # not all black
        print(f"skipped  {(~readable).sum()} of {len(photos)} photos, which cannot be read")
        images = images[readable]
    if len(images) < 2:
        sys.exit(f"--data {args.data}: {len(images)} photos there, two are needed")
    names = "".join(photo.name for photo in photos)
    args.photos = hashlib.sha256(f"{args.frac} {len(images)} {names}".encode()).hexdigest()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held = math.ceil(len(images) / 10)
    few = math.ceil(args.frac * (len(images) - held))  # the first ones: a quarter lies in the half
    print(f"data     {args.data}: train {few}  val {held}  {args.size} pixels")
    images = images[order].to(args.device)
    return images[held:][:few], images[:held]


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
    print(f"{SCRIPT}  torch {torch.__version__}  {args.device}  seed {args.seed}  -> {out}")

    ## 1. The photos: a tenth of them to validate with.
    train, val = load_images(args)
    variance = (train[:2000] / 255).var().item()

    ## 2. The network and its optimizer, and what --resume puts into them.
    torch.manual_seed(args.seed)
    model = VQVAE(3, args.net, args.codes, args.code_size)
    model.to(args.device, memory_format=torch.channels_last)
    args.parameters = sum(weight.numel() for weight in model.parameters())
    bits = math.log2(args.codes) / (3 * 8 * 4 ** args.net[3])  # of a cell, of its pixels
    print(
        f"model    VQ-VAE {args.net}, {args.parameters / 1e6:.2f} M parameters, {bits:.1%} of bits"
    )
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    history = open_run(args, model, optimizer)

    ## 3. Train. The best epoch is the one with the lowest loss on the validation photos.
    print("baseline grey of mean brightness: error 1")
    print(" epoch    loss  val_loss   error    PSNR  perplexity     used       lr     sec")
    try:
        for epoch in range(len(history), args.epochs):
            began = time.time()
            row = {"epoch": epoch + 1}
            row |= reconstruct_epoch(model, optimizer, train, variance, args, epoch)
            row |= {**measure(model, val, variance, args), "seconds": time.time() - began}
            history.append(row)
            best = row["val_loss"] == min(old["val_loss"] for old in history)
            save_epoch(args, model, optimizer, history, best)
            print(
                f"{epoch + 1:3}/{args.epochs:<3}{row['loss']:7.4f}{row['val_loss']:10.4f}"
                f"{row['val_error']:8.4f}{row['val_psnr']:8.2f}{row['val_perplexity']:12.1f}"
                f"{row['val_used']:5}/{args.codes}{row['lr']:9.1e}{row['seconds']:8.1f}"
                f"{' *' if best else ''}"
            )
    except KeyboardInterrupt:
        again = f"python {SCRIPT} --resume --out {out}"
        sys.exit(f"stopped  {again} goes on; with --epochs {len(history)} it ends here")

    ## 4. Pictures of the best epoch.
    draw_codes(model, val, args)


if __name__ == "__main__":
    main()
