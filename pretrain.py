"""Masked pre-training of a VQ-VAE on photos without labels: stage 1 of 3.

WHAT IT DOES  Photos (B, 3, H, W) with a grey square go in, and what is under it
comes out, guessed from what is around it (Pathak et al. 2016, He et al. 2022),
by a VQ-VAE (van den Oord et al. 2017). finetune.py takes over what it learned.

    photo --+--------------- clean, the target ------------------+
            |                                                    |
          mask -> encoder -> codes -> decoder -> photo -> error of what
                                                          was hidden

YOU WILL LEARN  why the target must be the clean photo -> pretrain_epoch; how to
tell that a network fills in -> check; how a codebook learns -> Quantiser.learn

RUN IT  python pretrain.py --mask 0.05-0.25      drawn cats and dogs
        python pretrain.py --resume --epochs 12  goes on to epoch 12
        python finetune.py --frac 0.5            stage 2
        python pretrain.py --data catdog --download --size 128 --epochs 20

WHAT TO EXPECT  Toy, after a minute on two cores: an error of 0.51 of what is
hidden (`hidden`), where each photo's mean colour would have 0.75 (`fill`).
A broken run: `hidden` stays near `fill`, `used` below 50 of 512.
DIFFERS FROM THE PAPERS  No adversarial loss, no transformer, less is hidden;
its codes learn as those of vqvae.py do.
"""

import json
import math
import random
import re
import shutil
import sys
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import save_image

SCRIPT = "pretrain.py"
MASKS = {"masks", "labels", "annotations", "trimaps", "SegmentationClass", "SegmentationObject"}
DECAY = 0.9  # of the codebook's averages; 0.99 in appendix A.1 of the paper
COMMITMENT = 0.25  # weight of the commitment loss, as in Sonnet
FILL = 0.5  # grey, in the place of what is hidden
COLLECTIONS = {  # of catdog, beside CIFAR-10: the folder that each unpacks to
    "Images": "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar",
    "cats_and_dogs_filtered": "https://storage.googleapis.com/mledu-datasets/"
    "cats_and_dogs_filtered.zip",
    "PetImages": "https://download.microsoft.com/download/3/E/1/"
    "3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip",
}
DISTORTIONS = {
    "rotate": v2.RandomChoice([v2.RandomRotation([turn, turn]) for turn in (0, 90, 180, 270)]),
    "jitter": v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1),
    "grey": v2.RandomGrayscale(0.2),
}
NET = [128, 32, 2, 2, 512]  # width, hidden width, residual blocks, halvings, codes: Sonnet's


def parse_args(argv=None):
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--data", default="toy", help="toy, catdog, pets, or a folder of images")
    p.add_argument("--root", default="data", help="where pets and catdog lie")
    p.add_argument("--download", action="store_true", help="fetch what is missing of catdog")
    p.add_argument("--size", type=int, nargs="+", default=[64], metavar="PX", help="side, or H W")
    p.add_argument("--net", type=int, nargs=5, default=NET, help="width hidden blocks downs codes")
    p.add_argument("--frac", type=float, default=1.0, help="share of the training photos")
    p.add_argument("--mask", default="0.05-0.25", help="LO-HI, share of a photo's area to hide")
    p.add_argument("--patch", type=int, default=0, help="hide patches of this side, not a square")
    p.add_argument("--distort", nargs="+", choices=DISTORTIONS, default=[], help="besides hiding")
    p.add_argument("--epochs", type=int, default=2, help="passes over the training photos")
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="less saves memory")
    p.add_argument("--lr", type=float, default=1e-3, help="peak of the learning rate")
    p.add_argument("--seed", type=int, default=0, help="of weights, order, masks")
    p.add_argument("--device", default=str(device), help="cuda, mps, cpu")
    p.add_argument("--bf16", action="store_true", help="16 bits, as on GPUs; faster on new CPUs")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its flags")
    p.add_argument("--out", default="checkpoints/pretrain", help="the run's folder")
    args = p.parse_args(argv)
    if args.resume:  # the run's own flags (but for out and device), and those that are typed win
        last = load_checkpoint(Path(args.out, "last.pt"), SCRIPT)
        p.set_defaults(**(last["args"] | {"out": args.out, "device": args.device}))
        args = p.parse_args(argv)
    args.size = (args.size * 2)[:2]  # H, W; one number is both
    factor = 2 ** args.net[3]
    if any(side % factor for side in args.size):
        p.error(f"--size {args.size}: the network wants multiples of {factor}")
    if not 0 < args.frac <= 1:
        p.error(f"--frac {args.frac}: wanted more than 0, at most 1")
    shares = re.fullmatch(r"(0|0?\.\d+)-(0?\.\d+)", args.mask)
    if not shares or float(shares[1]) > float(shares[2]):
        p.error(f"--mask {args.mask}: wanted LO-HI, two shares below 1, such as 0.05-0.25")
    args.bf16 |= args.device.startswith("cuda") and torch.cuda.is_bf16_supported(False)  # natively
    return args


# --- model ---------------------------------------------------------------------------------------
## An auto-encoder with a dictionary in the middle: the encoder turns a photo into a small grid of
## vectors, the quantiser replaces each by the nearest of K codes, the decoder draws from the codes.


class Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))): (B, width, H, W) in and out."""

    def __init__(self, width, hidden):
        super().__init__()
        self.conv3 = nn.Conv2d(width, hidden, 3, padding=1)
        self.conv1 = nn.Conv2d(hidden, width, 1)
        nn.init.zeros_(self.conv1.weight)  # a new block adds its bias only

    def forward(self, x):
        return x + self.conv1(self.conv3(x.relu()).relu())


class Quantiser(nn.Module):
    """Each vector of z becomes the nearest of K codes of D numbers (VQ-VAE, eq. 1 and 2):
    z (B, D, H, W) -> q (B, D, H, W), commitment (), ids (B, H, W)."""

    def __init__(self, K, D):
        super().__init__()
        self.register_buffer("codes", torch.zeros(K, D))  # 0: see learn
        self.register_buffer("shares", torch.zeros(K))  # of the vectors that each gets, averaged

    def forward(self, z):
        B, D, H, W = z.shape
        if len(self.codes) == 0:  # an auto-encoder without a dictionary, to compare with
            return z, z.new_zeros(()), z.new_zeros(B, H, W).long()
        vectors = z.float().movedim(1, 3).reshape(-1, D)  # (N, D), N = B H W; bf16 is too coarse
        ids = torch.cdist(vectors, self.codes).argmin(1)  # (N,), of the nearest codes
        q = self.codes[ids]  # (N, D)
        ## The codes are no parameters and get no gradient. This loss pulls the vectors to them:
        commitment = (vectors - q).square().mean()
        ## A lookup has no gradient. Straight-through estimator: the decoder's gradient goes to the
        ## vectors, as if they were q. Forward the sum is q, backward the bracket is a constant.
        q = vectors + (q - vectors).detach()
        if self.training:  # the codes move in the forward pass, as BatchNorm's averages do
            self.learn(vectors, ids)
        return q.view(B, H, W, D).movedim(3, 1), commitment, ids.view(B, H, W)

    @torch.no_grad()
    def learn(self, vectors, ids):
        """Each code follows the moving average of its vectors (appendix A.1, eq. 6 to 8)."""
        K = len(self.codes)
        new_shares = torch.bincount(ids, minlength=K) / len(ids)  # (K,), of this step
        new_sums = torch.zeros_like(self.codes).index_add_(0, ids, vectors) / len(ids)  # (K, D)
        shares = DECAY * self.shares + (1 - DECAY) * new_shares
        old_sums = self.codes * self.shares[:, None]  # a code is its sum / its share
        sums = DECAY * old_sums + (1 - DECAY) * new_sums
        codes = sums / shares[:, None]
        ## A code that is nearest to no vector would never move again: so codebooks collapse. One
        ## that is hardly used becomes a random vector. In the first step all codes are 0: one of
        ## them is nearest to all vectors, the others become 0 / 0, are dead, and start from data.
        dead = shares < 0.1 / K  # tuned
        picked = vectors[torch.randint(len(vectors), (K,))]  # (K, D)
        self.codes.copy_(torch.where(dead[:, None], picked, codes))
        self.shares.copy_(torch.where(dead, 1 / K, shares))  # from 1 / K, dead in 22 idle steps


class VQVAE(nn.Module):
    """x (B, 3, H, W) in [0, 1] -> output (B, channels, H, W), commitment (), ids (B, h, w), where
    h = H / 2^downs. Encoder and decoder are those of Sonnet's example."""

    def __init__(self, channels, width, hidden, blocks, downs, K, D=64):
        super().__init__()
        widths = [width // 2**step for step in range(downs)]  # 128, 64
        encoder = []
        for a, b in pairwise([3, *reversed(widths)]):  # 3 to 64, 64 to 128
            encoder += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU()]  # halves H and W
        encoder.append(nn.Conv2d(width, width, 3, padding=1))
        encoder += [Residual(width, hidden) for _ in range(blocks)]
        self.encoder = nn.Sequential(*encoder, nn.ReLU(), nn.Conv2d(width, D, 1))
        self.quantiser = Quantiser(K, D)
        decoder = [nn.Conv2d(D, width, 3, padding=1)]
        decoder += [Residual(width, hidden) for _ in range(blocks)]
        for a, b in pairwise(widths):
            decoder += [nn.ReLU(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)]  # doubles
        self.decoder = nn.Sequential(*decoder, nn.ReLU())
        self.head = nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1)
        for module in self.modules():  # no norm layers, so He's weights (2015) in each Conv2d
            if isinstance(module, nn.Conv2d) and module.weight.any():  # spare Residual's zeros
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x):
        z = self.encoder(x - 0.5)  # (B, D, h, w)
        q, commitment, ids = self.quantiser(z)
        return self.head(self.decoder(q)), commitment, ids


# --- loss ----------------------------------------------------------------------------------------


def hidden_error(output, x, hidden):
    """Mean squared error where hidden (B, 1, H, W) is True; output and x are (B, 3, H, W)."""
    squares = (output.float() - x).square() * hidden
    return squares.mean() / hidden.float().mean().clamp(min=1e-9)


def mean_fill(x, hidden):
    """What a network that cannot guess would do: fill in the mean colour of what can be seen."""
    visible = ~hidden
    colour = (x * visible).sum((2, 3)) / visible.sum((2, 3))  # (B, 3)
    return torch.where(hidden, colour[:, :, None, None], x)


# --- training ------------------------------------------------------------------------------------


def draw_masks(B, args):
    """(B, 1, H, W) bool, True where hidden: the share --mask of a photo's area, if that fits."""
    H, W = args.size
    low, high = map(float, args.mask.split("-"))
    share = low + (high - low) * torch.rand(B, 1)
    if args.patch:  # those of the lowest ranks
        h, w = math.ceil(H / args.patch), math.ceil(W / args.patch)
        rank = torch.rand(B, h * w).argsort(1)  # of each patch, random
        hidden = (rank < (share * h * w).round().clamp(max=h * w - 1)).view(B, 1, h, w)
        hidden = hidden.repeat_interleave(args.patch, 2).repeat_interleave(args.patch, 3)
        return hidden[:, :, :H, :W]
    side = (share * H * W).sqrt().clamp(max=min(H, W) - 1).round()  # (B, 1), of one square
    y = torch.arange(H) - (torch.rand(B, 1) * (H - side)).round()  # (B, H), 0 at its top row
    x = torch.arange(W) - (torch.rand(B, 1) * (W - side)).round()  # (B, W), 0 at its left column
    rows, columns = (y >= 0) & (y < side), (x >= 0) & (x < side)
    return rows[:, None, :, None] & columns[:, None, None, :]


def pretrain_epoch(model, optimizer, images, args, epoch):
    """One pass over the training photos -> mean loss, and the learning rate at its end."""
    model.train()
    ## All that is random in an epoch comes from this seed: with the same --epochs, a run that was
    ## stopped goes on as it would have, on a CPU to the bit, and no generator's state is kept.
    torch.manual_seed(args.seed * 100003 + epoch)
    steps = math.ceil(len(images) / args.batch_size)
    total = 0.0
    for step, batch in enumerate(torch.randperm(len(images)).tensor_split(steps)):
        x = images[batch].to(args.device) / 255
        mirror = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        x = torch.where(mirror, x.flip(3), x)
        distorted = x
        for kind in DISTORTIONS:  # rotate comes first
            if kind in args.distort:
                distorted = torch.stack([DISTORTIONS[kind](image) for image in distorted])
            if kind == "rotate":  # the target turns too; jitter and grey are to be undone
                x = distorted
        hidden = draw_masks(len(x), args).to(x.device)
        ## Warm-up over the first twentieth of the run, and half a cosine from the peak to 0.
        done = (epoch + (step + 0.5) / steps) / args.epochs  # from 0 to 1
        lr = args.lr * min(1, 20 * done) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            output, commitment, _ = model(torch.where(hidden, FILL, distorted))
        ## The target is the photo as it was. Only what is hidden counts, as that gives better
        ## features (He et al. 2022). Had the mask been written into x itself, grey would be right
        ## wherever the loss looks, and nothing be learned.
        loss = hidden_error(output, x, hidden) / args.variance + COMMITMENT * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    if not total.isfinite():  # waits for the GPU, once an epoch
        sys.exit(f"the loss of epoch {epoch + 1} is not finite: try --lr {args.lr / 3:.0e}")
    return {"loss": total.item() / steps, "lr": lr}


@torch.inference_mode()
def check(model, images, masks, args):
    """The validation photos under masks that never change -> loss, errors in units of the variance,
    perplexity, codes in use. The network fills in if `hidden` is well below `fill`, the error of
    each photo's own mean colour."""
    model.eval()
    use, guess, fill, commitments = 0, 0.0, 0.0, 0.0
    unit = masks.sum() * args.variance
    for x, hidden in zip(images.split(args.batch_size), masks.split(args.batch_size)):
        x, hidden = x.to(args.device) / 255, hidden.to(args.device)
        output, commitment, ids = model(torch.where(hidden, FILL, x))
        part = hidden.sum() / unit  # of all hidden pixels, for an error in units of the variance
        guess += hidden_error(output, x, hidden) * part
        fill += hidden_error(mean_fill(x, hidden), x, hidden) * part
        commitments += commitment * len(x) / len(images)
        use += torch.bincount(ids.flatten(), minlength=args.net[4])  # (K,)
    ## Perplexity, exp of the entropy of the codes' use, is 512 if all 512 are used alike, 1 if only
    ## one is. It is counted over all photos, as one batch uses fewer.
    share = use / use.sum()
    return {
        "val_loss": (guess + COMMITMENT * commitments).item(),
        "val_hidden": guess.item(),
        "val_mean_fill": fill.item(),
        "val_perplexity": torch.exp(-torch.xlogy(share, share).sum()).item(),
        "val_used": use.count_nonzero().item(),
    }


def pretrain(model, optimizer, history, photos, val, masks, args):
    """The epochs that are not in history yet. Each leaves log.jsonl, and last.pt for --resume;
    one with the lowest loss on the validation photos so far leaves best.pt."""
    out = Path(args.out)
    print(" epoch      loss       lr val_loss   hidden     fill  perplex     used  seconds")
    for epoch in range(len(history), args.epochs):
        began = time.time()
        row = {"epoch": epoch + 1}
        row |= pretrain_epoch(model, optimizer, photos, args, epoch)
        row |= check(model, val, masks, args) | {"seconds": time.time() - began}
        history.append(row)
        best = row["val_loss"] == min(old["val_loss"] for old in history)
        state = {"script": SCRIPT, "args": vars(args), "model": model.state_dict(), "metrics": row}
        if best:
            save(out / "best.pt", lambda file: torch.save(state, file))
        state |= {"optimizer": optimizer.state_dict(), "history": history}
        log = "".join(json.dumps(old) + "\n" for old in history)
        save(out / "log.jsonl", lambda file: file.write_text(log))
        save(out / "last.pt", lambda file: torch.save(state, file))
        numbers = "".join(f"{value:9.4f}" for value in list(row.values())[1:])
        print(f"{epoch + 1:3}/{args.epochs:<3}{numbers}{' *' if best else ''}")


@torch.inference_mode()
def finish_masked(model, images, masks, args):
    """The best epoch's samples.png: photos, what is seen of them, the holes filled; result.json."""
    out, x = Path(args.out), images[:8] / 255
    result = load_checkpoint(out / "best.pt", SCRIPT)
    model.load_state_dict(result.pop("model"))
    masked = torch.where(masks[:8], FILL, x)
    output, _, _ = model.cpu().eval()(masked)
    rows = torch.cat([x, masked, torch.where(masks[:8], output, x)])
    save(out / "samples.png", lambda file: save_image(rows, file, nrow=len(x)))
    text = json.dumps(result | {"torch": torch.__version__}, indent=1)
    save(out / "result.json", lambda file: file.write_text(text))
    print(f"best     epoch {result['metrics']['epoch']}  {out / 'best.pt'}  {out / 'samples.png'}")


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


def list_images(args):
    """The photos of pets, but for those that finetune.py validates and tests on; or all images
    under a folder, its test photos too, but none in folders of masks."""
    if args.data == "pets":
        base = Path(args.root, "oxford-iiit-pet")
        try:
            datasets.OxfordIIITPet(args.root, download=True)
        except Exception as error:  # no network, a full disk, a broken archive
            sys.exit(f"{error}: unpack www.robots.ox.ac.uk/~vgg/data/pets in {base} by hand")
        names = (base / "annotations/trainval.txt").read_text().split()[::4]
        return [base / f"images/{n}.jpg" for n in names if zlib.crc32(n.encode()) % 10 != 1]
    photos = []
    for path in sorted(Path(args.data).rglob("[!.]*")):
        folders = set(path.relative_to(args.data).parts)
        if path.suffix.lower() in Image.registered_extensions() and not MASKS & folders:
            photos.append(path)
    for folder, n in Counter(path.parent for path in photos).items():
        print(f"photos   {folder}: {n}")
    return photos


def read_image(photo, size):
    """A file, or pixels (h, w, 3) -> RGB (3, H, W) uint8, stretched to size, or None if broken."""
    try:
        image = Image.fromarray(photo) if isinstance(photo, np.ndarray) else Image.open(photo)
        image.draft("RGB", (2 * size[1], 2 * size[0]))  # a JPEG: decoded at 1/2, 1/4 or 1/8
        image = ImageOps.exif_transpose(image).convert("RGB").resize(size[::-1], Image.BILINEAR)
        return torch.tensor(np.array(image)).movedim(2, 0)
    except Exception:  # whatever a broken file can provoke
        return None


def read_images(photos, args):
    """All photos that can be read and are no copies, in random order -> (N, 3, H, W) uint8."""
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(read_image, photos, [args.size] * len(photos)))
    unique = list({image.numpy().tobytes(): image for image in read if image is not None}.values())
    print(f"photos   {len(photos)}, of which {len(unique)} can be read and are no copies")
    if len(unique) < 2:
        sys.exit(f"{args.data}: too few photos to train and validate with")
    random.Random(0).shuffle(unique)
    return torch.stack(unique)


def list_catdog(args):
    """The photos of cats and those of dogs in all collections that lie under --root."""
    cats, dogs = [], []
    if args.download or Path(args.root, "cifar-10-batches-py").exists():
        try:
            cifar = datasets.CIFAR10(args.root, download=args.download)
        except Exception as error:
            sys.exit(f"{error}: unpack {datasets.CIFAR10.url} in {args.root} by hand")
        cats += [pixels for pixels, label in zip(cifar.data, cifar.targets) if label == 3]
        dogs += [pixels for pixels, label in zip(cifar.data, cifar.targets) if label == 5]
    part = Path(args.root, "unpacking")
    for name, url in COLLECTIONS.items():
        folder = Path(args.root, name)
        if args.download and not folder.exists():
            shutil.rmtree(part, ignore_errors=True)  # half a file would pass for a whole one
            try:
                datasets.utils.download_and_extract_archive(url, part, remove_finished=True)
            except Exception as error:  # no network, a full disk, a broken archive
                sys.exit(f"{error}: unpack {url} in {args.root} by hand")
            (part / name).rename(folder)  # now it is whole
        photos = sorted(folder.rglob("*.jpg"))
        print(f"photos   {name}: {len(photos)}")
        for photo in photos:
            if photo.parent.name.lower().startswith("cat"):
                cats.append(photo)
            else:
                dogs.append(photo)
    if not cats or not dogs:
        sys.exit(f"{args.root}: no cats or no dogs there; --download fetches four collections")
    return cats, dogs


def load_photos(args):
    """Images (N, 3, H, W) uint8, to train on and to validate with."""
    if args.data == "toy":
        images = draw_toy(4096, args.size, seed=3)[0]
    elif args.data == "catdog":
        species = [read_images(photos, args) for photos in list_catdog(args)]
        fewer = min(len(images) for images in species)
        images = torch.stack([images[:fewer] for images in species], dim=1)  # (N, 2, 3, H, W)
        images = images.flatten(0, 1)  # cat, dog, cat, dog, ...
    else:
        images = read_images(list_images(args), args)
    n = math.ceil(len(images) / 10)
    few = math.ceil(args.frac * (len(images) - n))  # the first: a larger share adds to them
    print(f"data     {args.data}: train {few}  val {n}  {args.size} pixels")
    return images[n:][:few], images[:n]


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

    ## 1. The photos, a tenth of them to validate with, under masks that never change.
    photos, val = load_photos(args)
    args.variance = (photos[:2000] / 255).var().item()  # the unit of errors: one grey has 1
    torch.manual_seed(0)
    masks = draw_masks(len(val), args)

    ## 2. The network and its optimizer. --resume fills both, else an old run moves to OUT.prev.
    torch.manual_seed(args.seed)
    model = VQVAE(3, *args.net)
    model.to(args.device, memory_format=torch.channels_last)  # faster
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    args.parameters = sum(weight.numel() for weight in model.parameters())
    args.checksum = args.parameters + args.net[4] + photos.sum().item() + val.sum().item()
    print(f"model    VQ-VAE {args.net}, {args.parameters / 1e6:.2f} M parameters")
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

    ## 3. Train, and draw what comes out of the best epoch.
    pretrain(model, optimizer, history, photos, val, masks, args)
    finish_masked(model, val, masks, args)


if __name__ == "__main__":
    main()
