"""How fast the scripts are, beside other ways to do the same. Never part of the test run.

python tests/bench.py                     everything that this machine can run
python tests/bench.py limit quantiser     some of it
python tests/bench.py pipeline --root data

Every row is a ratio of two ways measured in turn, A B A B ..., on this machine in this minute: the
median over --repeats, with the smallest and the largest. pip install -r tests/requirements-bench.txt
adds the other libraries; without them their rows are left out, and said so.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
NAMES = "limit pipeline ladder source quantiser peers scores start growth folder".split()
NET, LOSS = [128, 32, 2, 2], "bce+dice"
ROWS, ARGS = [], argparse.Namespace()  # what was printed, for --json


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock(run, device):
    """Seconds of one call, all of its kernels done."""
    sync(device)
    began = time.perf_counter()
    run()
    sync(device)
    return time.perf_counter() - began


def peak():
    """The most memory that this process has had, in MiB, as Linux counts it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def alone(code, cwd=None):
    """Run code in a process of its own, with this file as b -> the finished process."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, sys.argv[1]); import bench as b; {code}",
            str(ROOT / "tests"),
        ],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def compare(title, ours, theirs, amount, unit, args, goal):
    """One row: amount per second of both in turn, and the ratio pair by pair."""
    ours(), theirs()  # warm-up
    a, b = zip(
        *(
            (amount / clock(ours, args.device), amount / clock(theirs, args.device))
            for _ in range(args.repeats)
        )
    )
    ratios = sorted(x / y for x, y in zip(a, b))
    note(
        title.strip(),
        unit=unit,
        ours=statistics.median(a),
        theirs=statistics.median(b),
        ratio=statistics.median(ratios),
        ratios=ratios,
        goal=goal,
    )
    print(
        f"{title:46}{statistics.median(a):10,.1f}{statistics.median(b):10,.1f} {unit:9}"
        f"{statistics.median(ratios):7.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})   {goal}",
        flush=True,
    )


def note(row, **figures):
    ROWS.append({"name": ARGS.current, "row": row, **figures})


def step_of(model, loss, lr=1e-3, amp=False):
    """A plain training step of model on one batch: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step(x, *more):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            output = model(x)
        optimizer.zero_grad(set_to_none=True)
        loss(output, x, *more).backward()
        optimizer.step()

    return step


def toy_photos(m, n, size, device):
    images, masks = m.draw_toy(n, [size, size], 0)
    return images.to(device), masks.to(device)


# --- limit: our loop against a bare loop on one batch -------------------------------------------------


def limit(args):
    print("limit: images a second of a whole epoch, and of the same network on one resident batch")
    batch, n = (128, 4096) if args.device.type == "cuda" else (32, 512)
    for name, size, build in (
        ("vqvae", 64, lambda m: m.VQVAE(3, NET)),
        ("pretrain", 64, lambda m: m.VQVAE(3, NET)),
        ("finetune", 64, lambda m: m.Segmenter(3, NET)),
        ("unet", 64, lambda m: m.UNet(3, 16)),
        ("linknet", 64, lambda m: m.LinkNet(3, "resnet18")),
        ("segnet", 64, lambda m: m.SegNet(3, 16, 4)),
    ):
        m = load(name)
        torch.manual_seed(0)
        images, masks = toy_photos(m, n, size, args.device)
        flags = [
            "--batch-size",
            str(batch),
            "--epochs",
            "1000",
            "--lr",
            "1e-3",
            "--size",
            str(size),
            "--device",
            str(args.device),
        ]
        flags += {
            "pretrain": ["--mask-style", "patches", "--mask", "0.5-0.75"],
            "finetune": ["--init", "none"],
        }.get(name, [])
        flags = m.parse_args(flags)
        flags.rank, flags.ranks = 0, 1
        amp, nets = m.fast_bf16(args.device), []
        for _ in range(2):
            net = build(m).to(args.device, memory_format=torch.channels_last)
            nets.append((net, torch.optim.AdamW(net.parameters(), lr=1e-3)))
        (net, optimizer), (bare, bare_optimizer) = nets
        variance, index = (images.float() / 255).var().item(), torch.arange(n)
        if name == "vqvae":
            ours = lambda: m.reconstruct_epoch(net, optimizer, images, variance, flags, 0)
        elif name == "pretrain":
            ours = lambda: m.pretrain_epoch(net, optimizer, images, index, variance, flags, 0)
        elif name == "finetune":
            ours = lambda: m.finetune_epoch(net, optimizer, images, masks, flags, 0)
        elif name == "linknet":
            ours = lambda: m.scheduled_epoch(net, optimizer, images, masks, flags, [])
        else:
            ours = lambda: m.train_epoch(net, optimizer, images, masks, flags, 0)
        x, y = images[:batch] / 255, masks[:batch]

        def theirs():
            bare.train()
            for _ in range(n // batch):
                with torch.autocast(args.device.type, torch.bfloat16, enabled=amp):
                    output = bare(x)
                if name in ("vqvae", "pretrain"):
                    loss = (output[0].float() - x).square().mean() / variance + 0.25 * output[1]
                elif name == "finetune":
                    loss = m.segmentation_loss(output[0], y, LOSS) + 0.25 * output[1]
                else:
                    loss = m.segmentation_loss(output, y, LOSS)
                bare_optimizer.zero_grad(set_to_none=True)
                loss.backward()
                bare_optimizer.step()

        compare(
            f"  {name}, {size} px, batch {batch}", ours, theirs, n, "images/s", args, "goal 0.95"
        )


# --- pipeline: against the usual data set, transforms and loader --------------------------------------


class Photos(torch.utils.data.Dataset):
    """The usual way: open, resize and flip a photo and its mask with PIL whenever they are asked for."""

    def __init__(self, pairs, size):
        self.pairs, self.size = pairs, size

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        from torchvision.transforms import functional as T

        photo, mask = (Image.open(file) for file in self.pairs[i])
        photo, mask = (
            photo.convert("RGB").resize((self.size,) * 2, 2),
            mask.resize((self.size,) * 2, 0),
        )
        if torch.rand(()) < 0.5:
            photo, mask = T.hflip(photo), T.hflip(mask)
        contrast = 0.6 + 0.8 * torch.rand(()).item()
        return T.adjust_contrast(T.to_tensor(photo), contrast), torch.from_numpy(np.array(mask)) - 1


def pet_pairs(m, root):
    """The pet photos to train on and to validate with."""
    parts = m.list_photos(argparse.Namespace(data="pets", root=root))
    return parts["train"] + parts["val"]


def decoded(m, pairs, size):
    """-> (N, 4, H, W) uint8: photos and trimaps."""
    return torch.from_numpy(np.stack([m.read_pair(pair, [size, size]) for pair in pairs])).movedim(
        3, 1
    )


def pipeline(args):
    m, size, batch = load("finetune"), 64, 32
    if not Path(args.root, "oxford-iiit-pet").is_dir():
        return print("pipeline: left out, no oxford-iiit-pet under --root")
    pairs = pet_pairs(m, args.root)
    print(
        f"pipeline: one epoch of the small VQ-VAE on {len(pairs)} pet photos, {size} px, ours against a DataLoader "
        "with two workers, float32, default layout"
    )
    loader = torch.utils.data.DataLoader(
        Photos(pairs, size), batch, shuffle=True, num_workers=2, drop_last=True
    )
    flags = m.parse_args(
        ["--init", "none", "--batch-size", str(batch), "--epochs", "1000", "--lr", "1e-3"]
    )
    torch.manual_seed(0)
    theirs_net = m.Segmenter(3, NET).to(args.device)
    net = copy.deepcopy(theirs_net).to(memory_format=torch.channels_last)
    optimizer, other = (torch.optim.AdamW(n.parameters(), lr=1e-3) for n in (net, theirs_net))
    began = time.perf_counter()
    both = decoded(m, pairs, size)
    decoding = time.perf_counter() - began
    images, masks = both[:, :3].to(args.device), both[:, 3].to(args.device) - 1

    def theirs():
        theirs_net.train()
        for x, y in loader:
            x, y = x.to(args.device), y.to(args.device)
            logits, commitment = theirs_net(x)
            loss = m.segmentation_loss(logits, y, LOSS) + 0.25 * commitment
            other.zero_grad()
            loss.backward()
            other.step()
            loss.item()

    compare(
        "  an epoch, decoded before",
        lambda: m.finetune_epoch(net, optimizer, images, masks, flags, 0),
        theirs,
        len(pairs),
        "images/s",
        args,
        "goal 3 (5 with decoding)",
    )
    print(f"  decoding once, one thread: {decoding:.1f} s")


# --- ladder: one trick after the other ----------------------------------------------------------------

RUNGS = (
    "photos opened in every epoch, by two workers",
    "decoded once, uint8 in memory",
    "channels_last",
    "bfloat16",
    "the loss is read once in 50 steps",
    "--compile",
)


def climb(rung, root, device, photos=960, batch=32, size=64):
    """Train the small VQ-VAE with the first `rung` of the tricks -> images a second, peak memory in MiB."""
    m, device = load("finetune"), torch.device(device)
    torch.manual_seed(0)
    layout = torch.channels_last if rung >= 2 else torch.contiguous_format
    net = m.Segmenter(3, NET).to(device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    amp = rung >= 3 and m.fast_bf16(device)
    pairs = pet_pairs(m, root)[:photos]
    if rung == 0:
        batches = torch.utils.data.DataLoader(
            Photos(pairs, size), batch, shuffle=True, num_workers=2, drop_last=True
        )
    else:
        both = decoded(m, pairs, size).to(device)
        batches = [slice(i, i + batch) for i in range(0, photos, batch)]
    if rung == 5:
        net.compile()

    def epoch():
        for i, part in enumerate(batches):
            x, y = (
                (part[0].to(device), part[1].to(device))
                if rung == 0
                else m.augment(both[part, :3], both[part, 3] - 1)
            )
            x = x.contiguous(memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits, commitment = net(x)
            loss = m.segmentation_loss(logits, y, LOSS) + 0.25 * commitment
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if rung < 4 or i % 50 == 49:
                loss.item()

    epoch()  # warm-up
    speed = statistics.median(photos / clock(epoch, device) for _ in range(3))
    print(speed, torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak())


def ladder(args):
    if not Path(args.root, "oxford-iiit-pet").is_dir():
        return print("ladder: left out, no oxford-iiit-pet under --root")
    print(
        "ladder: fine-tuning the small VQ-VAE on pets at 64 px, each row with one trick more, in a process of its own"
    )
    for rung, title in enumerate(RUNGS):
        done = alone(f"b.climb({rung}, {args.root!r}, {str(args.device)!r})")
        if done.returncode:
            print(f"  {title:46}left out: {done.stderr.strip().splitlines()[-1][:60]}")
            continue
        speed, mib = map(float, done.stdout.split()[-2:])
        print(f"  {title:46}{speed:10,.0f} images/s   {mib:8,.0f} MiB at most", flush=True)
        note(title, images_per_second=speed, mib=mib)


# --- source: the same network as its authors trained it -----------------------------------------------


def matrix_speed(device, dtype):
    """GFLOP/s of a large matrix product, the most that a network may hope for."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return statistics.median(2e-9 * side**3 / clock(lambda: a @ b, device) for _ in range(5))


class OneHot(nn.Module):
    """The quantiser as the ports write it: all distances, a one-hot matrix, Laplace-smoothed averages."""

    def __init__(self, K, D):
        super().__init__()
        self.register_buffer("codes", torch.randn(K, D))
        self.register_buffer("counts", torch.zeros(K))
        self.register_buffer("sums", torch.randn(K, D))

    def forward(self, z, keep=None):
        B, D, H, W = z.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, D)
        distance = flat.square().sum(1, True) + self.codes.square().sum(1) - 2 * flat @ self.codes.T
        ids = distance.argmin(1)
        hot = F.one_hot(ids, len(self.codes)).float()
        if self.training:
            with torch.no_grad():
                self.counts.mul_(0.99).add_(hot.sum(0), alpha=0.01)
                self.sums.mul_(0.99).add_(hot.T @ flat, alpha=0.01)
                n = self.counts.sum()
                self.codes.copy_(
                    self.sums / ((self.counts + 1e-5) / (n + len(self.codes) * 1e-5) * n)[:, None]
                )
        q = hot @ self.codes
        commitment = F.mse_loss(q.detach(), flat)
        q = flat + (q - flat).detach()
        return q.view(B, H, W, D).permute(0, 3, 1, 2), commitment, ids.view(B, H, W)


def source(args):
    print(
        "source: the VQ-VAE at 120 px, batch 64, ours against float32, default layout, one-hot statistics"
    )
    m, batch = load("vqvae"), 64
    amp = m.fast_bf16(args.device)
    for widths in ((256, 256, 4, 2), (128, 32, 2, 2)):
        torch.manual_seed(0)
        theirs_net = m.VQVAE(3, widths).to(args.device).train()
        theirs_net.quantiser = OneHot(512, 64).to(args.device)
        ours_net = m.VQVAE(3, widths).to(args.device, memory_format=torch.channels_last).train()
        x = torch.rand(batch, 3, 120, 120, device=args.device)
        loss = lambda output, x: (output[0].float() - x).square().mean() + 0.25 * output[1]
        ours, theirs = step_of(ours_net, loss, amp=amp), step_of(theirs_net, loss)
        fast = x.contiguous(memory_format=torch.channels_last)
        compare(
            f"  widths {widths[0]} / {widths[1]} / {widths[2]}",
            lambda: ours(fast),
            lambda: theirs(x),
            batch,
            "images/s",
            args,
            "goal 4 on a CPU with AVX512-BF16",
        )
        ## How near to the processor's limit: multiplications and additions of a step, by images a second.
        with FlopCounterMode(display=False) as counter:
            theirs(x)
        work, row = counter.get_total_flops() / batch / 1e9, ROWS[-1]
        limits = [
            matrix_speed(args.device, dtype)
            for dtype in (torch.bfloat16 if amp else torch.float32, torch.float32)
        ]
        print(
            f"    {work:.1f} GFLOP an image: ours {row['ours'] * work:,.0f} of {limits[0]:,.0f} GFLOP/s of a large matrix "
            f"product, theirs {row['theirs'] * work:,.0f} of {limits[1]:,.0f} (float32)"
        )
        row |= {"gflop_per_image": work, "matrix_gflops": limits}


# --- quantiser: time and memory -----------------------------------------------------------------------


def quantiser_of(name):
    m = load("vqvae")
    if name == "ours":
        return m.Quantiser(512, 64)
    if name == "one-hot":
        return OneHot(512, 64)
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(
        dim=64,
        codebook_size=512,
        decay=0.9,
        commitment_weight=0.25,
        rotation_trick=False,
        accept_image_fmap=True,
    )


def quantise(name, device):
    """A step of one quantiser on 65,536 vectors, ready to be called."""
    torch.manual_seed(0)
    layer = quantiser_of(name).to(device).train()
    z = torch.randn(64, 64, 32, 32, device=device).requires_grad_()

    def step():
        q, *rest = layer(z)
        loss = rest[0] if name != "library" else rest[1]
        (q.square().mean() + 0.25 * loss.sum()).backward()

    return step


def quantiser(args):
    print("quantiser: forward and backward of 65,536 vectors, 512 codes of 64 numbers")
    ours = quantise("ours", args.device)
    for name in ("one-hot", "library"):
        try:
            theirs = quantise(name, args.device)
        except ImportError:
            print("  left out: vector-quantize-pytorch is not installed")
            continue
        compare(
            f"  ours against {name}",
            ours,
            theirs,
            65536,
            "vectors/s",
            args,
            "goal 2" if name == "one-hot" else "goal 1",
        )
    for name in ("ours", "one-hot", "library"):
        if args.device.type == "cuda":
            try:
                step = quantise(name, args.device)
            except ImportError:
                continue
            step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        else:
            peak = child(f"b.quantise({name!r}, torch.device('cpu'))", "step()")
        print(f"  peak memory, {name:10}" + ("left out" if peak is None else f"{peak:10.0f} MiB"))
        note(f"memory, {name}", mib=peak)
    m = load("vqvae")
    layer, z = m.Quantiser(512, 64).train(), torch.randn(8, 64, 32, 32)
    layer(z)
    layer.eval()
    flat = z.permute(0, 2, 3, 1).reshape(-1, 64)
    exact = torch.cdist(flat.double(), layer.codes.double()).argmin(1)
    same = (layer(z)[2].flatten() == exact).float().mean().item()
    print(f"  same codes as exact distances in float64: {same:.6f} of the vectors")
    note("same codes", share=same)


def child(prepare, run):
    """MiB by which `run` raises the peak memory of a fresh process above that of `prepare`, or None."""
    done = alone(
        f"import torch; torch.set_num_threads(2); step = {prepare}; before = b.peak(); {run}; print(b.peak() - before)"
    )
    return float(done.stdout) if done.returncode == 0 else None


# --- peers: segmentation-models-pytorch ---------------------------------------------------------------


def peers(args):
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        return print("peers: left out, segmentation-models-pytorch is not installed")
    link, unet, size = load("linknet"), load("unet"), 128
    batch = 64 if args.device.type == "cuda" else 16
    amp = link.fast_bf16(args.device)
    print(f"peers: training step and inference at {size} px, batch {batch}, with the same encoder")
    for title, ours_net, theirs_net in (
        ("LinkNet-34", link.LinkNet(3), smp.Linknet("resnet34", encoder_weights=None, classes=3)),
        (
            "U-Net on ResNet-34",
            unet.UNet(3, encoder="resnet34", up="bilinear"),
            smp.Unet("resnet34", encoder_weights=None, classes=3),
        ),
    ):
        y = torch.randint(3, (batch, size, size), device=args.device).byte()
        x = torch.rand(batch, 3, size, size, device=args.device)
        fast = x.contiguous(memory_format=torch.channels_last)
        loss = lambda output, x, y: link.segmentation_loss(output, y, LOSS)
        for setting, layout, low, inputs in (
            ("same setting", torch.contiguous_format, False, x),
            ("each at its best", torch.channels_last, amp, fast),
        ):
            nets = [
                copy.deepcopy(net).to(args.device, memory_format=layout)
                for net in (ours_net, theirs_net)
            ]
            steps = [step_of(net.train(), loss, amp=low) for net in nets]
            compare(
                f"  {title}, training, {setting}",
                lambda: steps[0](inputs, y),
                lambda: steps[1](inputs, y),
                batch,
                "images/s",
                args,
                "goal 1",
            )

            def look(net):
                with (
                    torch.inference_mode(),
                    torch.autocast(args.device.type, torch.bfloat16, enabled=low),
                ):
                    net.eval()(inputs)

            compare(
                f"  {title}, inference, {setting}",
                lambda: look(nets[0]),
                lambda: look(nets[1]),
                batch,
                "images/s",
                args,
                "goal 1",
            )


# --- scores: against torchmetrics ---------------------------------------------------------------------


def scores(args):
    try:
        from torchmetrics.classification import (
            MulticlassAccuracy,
            MulticlassF1Score,
            MulticlassJaccardIndex,
        )
    except ImportError:
        return print("scores: left out, torchmetrics is not installed")
    m, n = load("finetune"), 3669
    print(f"scores: accuracy, IoU and Dice of {n} masks at 128 px, against torchmetrics")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 3, 128, 128, generator=g).to(args.device)
    masks = torch.randint(3, (64, 128, 128), generator=g).byte().to(args.device)
    kinds = [
        kind(num_classes=3, average=average, validate_args=False).to(args.device)
        for kind, average in (
            (MulticlassAccuracy, "micro"),
            (MulticlassJaccardIndex, "none"),
            (MulticlassF1Score, "none"),
        )
    ]

    def ours():
        return m.scores(sum(m.confusion(logits, masks) for _ in range(n // 64)))

    def theirs():
        for kind in kinds:
            kind.reset()
        for _ in range(n // 64):
            for kind in kinds:
                kind.update(logits, masks)
        return [kind.compute() for kind in kinds]

    compare("  confusion matrix", ours, theirs, n // 64 * 64, "masks/s", args, "goal 5")


# --- start: until the first batch -----------------------------------------------------------------------

START = """
import time; began = time.perf_counter()
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("finetune", sys.argv[1]); m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m); imported = time.perf_counter() - began
args = m.parse_args(["--init", "none", "--data", "pets", "--root", sys.argv[2], "--size", "128"])
(images, masks), _ = m.load_data(args); m.augment(images[:32], masks[:32])
print(imported, time.perf_counter() - began)
"""


def start(args):
    if not Path(args.root, "oxford-iiit-pet").is_dir():
        return print("start: left out, no oxford-iiit-pet under --root")
    print("start: seconds of finetune.py until its first batch of pets at 128 px")
    with tempfile.TemporaryDirectory() as folder:
        for title, repeats in (("nothing cached", 1), ("cached", args.repeats)):
            times = []
            for _ in range(repeats):
                done = subprocess.run(
                    [
                        sys.executable,
                        "-c",
                        START,
                        str(ROOT / "finetune.py"),
                        str(Path(args.root).resolve()),
                    ],
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                times.append([float(word) for word in done.stdout.split()[-2:]])
            imported, total = (statistics.median(column) for column in zip(*times))
            print(
                f"  {title:20} import {imported:5.1f} s   first batch {total:5.1f} s"
                + ("   goal 3" if title == "cached" else "")
            )
            note(title, imported=imported, first_batch=total)


# --- growth: time and memory as the set grows -----------------------------------------------------------

GROWTH = """
import importlib.util, sys, time
import numpy as np, torch
spec = importlib.util.spec_from_file_location("pretrain", sys.argv[1]); m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
images = torch.from_numpy(np.load(sys.argv[2], mmap_mode="c"))
args = m.parse_args(["--size", "32", "--batch-size", "64", "--epochs", "1000", "--mask-style", "patches", "--mask", "0.5-0.75"])
args.device, args.rank, args.ranks = "cpu", 0, 1
net = m.VQVAE(3, [16, 8, 1, 2]); optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
index = torch.randperm(len(images))[:int(sys.argv[3])]
began = time.perf_counter(); m.pretrain_epoch(net, optimizer, images, index, 0.06, args, 0)
speed, status = len(index) / (time.perf_counter() - began), open("/proc/self/status").read()
print(speed, *(int(status.split(name)[1].split()[0]) / 1024 for name in ("RssAnon:", "RssFile:")))
"""


def growth(args):
    print(
        "growth: pre-training from a memory-mapped file of drawn photos at 32 px, a small network, 4,096 of them a time"
    )
    with tempfile.TemporaryDirectory() as folder:
        for n in (1_000, 4_000, 16_000, 64_000, 1_000_000):
            path = Path(folder, "photos.npy")
            array = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 3, 32, 32))
            some = load("pretrain").draw_toy(256, [32, 32], 0)[0].numpy()
            for i in range(0, n, 256):
                array[i : i + 256] = some[: n - i]
            array.flush()
            del array
            done = subprocess.run(
                [sys.executable, "-c", GROWTH, str(ROOT / "pretrain.py"), str(path), "4096"],
                capture_output=True,
                text=True,
                check=True,
            )
            speed, own, mapped = (float(word) for word in done.stdout.split()[-3:])
            note(
                f"{n:,} photos",
                images_per_second=speed,
                own_mib=own,
                mapped_mib=mapped,
                file_mib=path.stat().st_size / 2**20,
            )
            print(
                f"  {n:>9,} photos, {path.stat().st_size / 2**20:7,.0f} MiB on disk: {speed:8,.0f} images/s, "
                f"memory {own:6,.0f} MiB, and {mapped:6,.0f} MiB of pages of files, which the system takes "
                "back when it needs them",
                flush=True,
            )
            path.unlink()


# --- folder: from so many files to the first batch --------------------------------------------------------


def fill(photos):
    """Decode a folder into the cache below, start again from that -> seconds, seconds, MiB, number of photos."""
    m = load("pretrain")
    args = m.parse_args(["--data", photos, "--size", "32"])
    before, began = peak(), time.perf_counter()
    index = m.load_unlabelled(args)[1]
    first, more, began = time.perf_counter() - began, peak() - before, time.perf_counter()
    m.load_unlabelled(args)
    print(first, time.perf_counter() - began, more, len(index))


def folder(args):
    print(
        "folder: pretrain.py decodes a folder of JPEG files of 32 px into its cache, and starts from it again"
    )
    with tempfile.TemporaryDirectory() as place:
        rng, made = np.random.default_rng(0), 0
        for n in (1_000, 10_000, 100_000):
            while made < n:
                file = Path(place, "photos", f"{made // 1000}", f"{made}.jpg")
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize(
                    (32, 32)
                ).save(file)
                made += 1
            done = alone(f"b.fill({str(Path(place, 'photos'))!r})", place)
            done.check_returncode()
            first, again, mib, taken = map(float, done.stdout.split()[-4:])
            print(
                f"  {n:>9,} files: {n / first:8,.0f} a second, {mib:6,.0f} MiB more than before; again {again:6.1f} s",
                flush=True,
            )
            note(f"{n:,} files", files_per_second=n / first, mib=mib, again=again, taken=taken)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("names", nargs="*", default=[], help=", ".join(NAMES))
    p.add_argument("--root", default="data")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", help="write the rows to this file too")
    args = p.parse_args(namespace=ARGS)
    args.device = torch.device(args.device)
    name = (
        torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    print(
        f"torch {torch.__version__}  {args.device}  {name}  medians of {args.repeats}\n"
        f"{'':46}{'ours':>10}{'theirs':>10} {'':9}{'ratio':>7}"
    )
    for args.current in args.names or NAMES:
        globals()[args.current](args)
    if args.json:
        head = {
            "torch": str(torch.__version__),
            "device": str(args.device),
            "threads": torch.get_num_threads(),
        }
        Path(args.json).write_text(json.dumps([head | row for row in ROWS], indent=1))


if __name__ == "__main__":
    main()
