"""How fast the scripts are, beside other ways to do the same. Never part of the test run.

python tests/bench.py                     everything that this machine can run
python tests/bench.py limit quantiser     some of it
python tests/bench.py pipeline --root data

Every row is a ratio of two ways measured in turn, A B A B ..., on this machine in this minute: the
median over --repeats, with the smallest and the largest. requirements-bench.txt beside this file
lists the other libraries; without them their rows are left out, and said so.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as T

ROOT = Path(__file__).resolve().parent.parent
NET = [128, 32, 2, 2]  # the small VQ-VAE
ROWS, ARGS = [], argparse.Namespace()  # what was printed, for --json; what was typed


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def can_bf16(device):
    return device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


def clock(run, device):
    """Seconds of one call, all of its kernels done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak():
    """The most memory that this process has had, in MiB, as Linux counts it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def alone(code):
    """Run code in a process of its own, with this file as b -> the finished process."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import bench as b; {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def note(row, **figures):
    ROWS.append({"name": ARGS.current, "row": row, **figures})


def compare(title, ours, theirs, amount, unit, goal):
    """One row: amount per second of both in turn, and the ratio pair by pair."""
    ours(), theirs()  # warm-up
    a, b = [], []
    for _ in range(ARGS.repeats):
        a.append(amount / clock(ours, ARGS.device))
        b.append(amount / clock(theirs, ARGS.device))
    ratios = sorted(x / y for x, y in zip(a, b))
    one, other, ratio = [statistics.median(values) for values in (a, b, ratios)]
    note(title, unit=unit, ours=one, theirs=other, ratio=ratio, ratios=ratios, goal=goal)
    print(
        f"  {title:44}{one:10,.1f}{other:10,.1f} {unit:9}"
        f"{ratio:7.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})   {goal}",
        flush=True,
    )


def step_of(model, loss, lr=1e-3, bf16=False):
    """A plain training step of model on one batch: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step(x, *more):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            output = model(x)
        optimizer.zero_grad()
        loss(output, x, *more).backward()
        optimizer.step()

    return step


# --- limit: our loop against a bare loop on one batch --------------------------------------------

LOOPS = {
    "vqvae": (lambda m: m.VQVAE(3, *NET), "reconstruct_epoch"),
    "pretrain": (lambda m: m.VQVAE(3, *NET), "pretrain_epoch"),
    "finetune": (lambda m: m.Segmenter(3, *NET), "finetune_epoch"),
    "unet": (lambda m: m.UNet(3, 16), "train_epoch"),
    "linknet": (lambda m: m.LinkNet(3), "linknet_epoch"),
    "segnet": (lambda m: m.SegNet(3, 16), "segnet_epoch"),
}


def limit():
    """Photos a second of a whole epoch, and of the same network on one resident batch."""
    n = ARGS.photos
    batch = min(n, 128 if ARGS.device.type == "cuda" else 32)
    for name, (build, epoch) in LOOPS.items():
        m = load(name)
        torch.manual_seed(0)
        images, masks = m.draw_toy(n, [64, 64], 0)
        argv = ["--batch-size", str(batch), "--epochs", "1000", "--device", str(ARGS.device)]
        if name == "finetune":
            argv += ["--init", "none"]
        args = m.parse_args(argv)
        args.variance = (images / 255).var().item()
        photos = [images]  # pretrain.py keeps them on the CPU
        if name != "pretrain":
            photos = [images.to(ARGS.device)]
        if name not in ("vqvae", "pretrain"):
            photos.append(masks.to(ARGS.device))
        if name == "linknet":
            args.weights = m.class_weights(masks, 3)
        net = build(m).to(ARGS.device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        x, y = images[:batch].to(ARGS.device) / 255, masks[:batch].to(ARGS.device)

        def loss(output, x):
            if name in ("vqvae", "pretrain"):
                return (output[0].float() - x).square().mean() / args.variance + 0.25 * output[1]
            if name == "finetune":
                return m.segmentation_loss(output[0], y) + 0.25 * output[1]
            if name == "linknet":
                return m.weighted_ce(output, y, args.weights)
            return m.segmentation_loss(output, y)

        step = step_of(copy.deepcopy(net).train(), loss, bf16=args.bf16)

        def ours():
            getattr(m, epoch)(net, optimizer, *photos, args, 0)

        def theirs():
            for _ in range(n // batch):
                step(x)

        compare(f"{name}, 64 px, batch {batch}", ours, theirs, n, "images/s", "goal 0.95")


# --- pipeline: against the usual data set, transforms and loader ---------------------------------


class Photos(torch.utils.data.Dataset):
    """The usual way: open, resize and flip a photo and its mask whenever they are asked for."""

    def __init__(self, pairs, size):
        self.pairs, self.size = pairs, size

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        photo, mask = [Image.open(file) for file in self.pairs[i]]
        photo = photo.convert("RGB").resize((self.size, self.size), Image.BILINEAR)
        mask = mask.resize((self.size, self.size), Image.NEAREST)
        if torch.rand(()) < 0.5:
            photo, mask = T.hflip(photo), T.hflip(mask)
        contrast = 0.6 + 0.8 * torch.rand(()).item()
        return T.adjust_contrast(T.to_tensor(photo), contrast), torch.tensor(np.array(mask)) - 1


def loader(pairs, size, batch):
    return torch.utils.data.DataLoader(Photos(pairs, size), batch, shuffle=True, num_workers=2)


def pet_pairs(m, root):
    """The pet photos to train on and to validate with, or none."""
    if not Path(root, "oxford-iiit-pet").is_dir():
        print("  left out: no oxford-iiit-pet under --root")
        return []
    parts = m.list_photos(argparse.Namespace(data="pets", root=root))
    return parts["train"] + parts["val"]


def decoded(m, pairs, size, device):
    """-> photos (N, 3, H, W) and labels (N, H, W), uint8."""
    args = argparse.Namespace(data="pets", size=[size, size], ignore=None)
    pixels = torch.tensor(np.stack([m.read_pair(pair, args) for pair in pairs])).movedim(3, 1)
    return pixels[:, :3].to(device), pixels[:, 3].to(device)


def pipeline():
    """An epoch of the small VQ-VAE on pets at 64 px, decoded before, against a DataLoader with two
    workers, in the default layout."""
    m, batch = load("finetune"), 32
    pairs = pet_pairs(m, ARGS.root)
    if not pairs:
        return
    argv = ["--init", "none", "--batch-size", str(batch), "--epochs", "1000"]
    args = m.parse_args([*argv, "--device", str(ARGS.device)])
    torch.manual_seed(0)
    theirs_net = m.Segmenter(3, *NET).to(ARGS.device).train()
    net = copy.deepcopy(theirs_net).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    step = step_of(theirs_net, lambda out, x, y: m.segmentation_loss(out[0], y) + 0.25 * out[1])
    began = time.perf_counter()
    photos = decoded(m, pairs, 64, ARGS.device)
    decoding = time.perf_counter() - began

    def ours():
        m.finetune_epoch(net, optimizer, *photos, args, 0)

    def theirs():
        for x, y in loader(pairs, 64, batch):
            step(x.to(ARGS.device), y.to(ARGS.device))

    compare("an epoch, decoded before", ours, theirs, len(pairs), "images/s", "goal 3")
    print(f"  decoding once, one thread: {decoding:.1f} s")


# --- source: the same network as its authors trained it ------------------------------------------


def matrix_speed(device, dtype):
    """GFLOP/s of a large matrix product, the most that a network may hope for."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    a @ b
    return statistics.median(2e-9 * side**3 / clock(lambda: a @ b, device) for _ in range(5))


class OneHot(nn.Module):
    """The quantiser as the ports write it: all distances, a one-hot matrix, smoothed averages."""

    def __init__(self, K, D):
        super().__init__()
        self.register_buffer("codes", torch.randn(K, D))
        self.register_buffer("counts", torch.zeros(K))
        self.register_buffer("sums", torch.randn(K, D))

    def forward(self, z):
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
                counts = (self.counts + 1e-5) / (n + len(self.codes) * 1e-5) * n  # Laplace
                self.codes.copy_(self.sums / counts[:, None])
        q = hot @ self.codes
        commitment = F.mse_loss(q.detach(), flat)
        q = flat + (q - flat).detach()
        return q.view(B, H, W, D).permute(0, 3, 1, 2), commitment, ids.view(B, H, W)


def source():
    """The VQ-VAE at 120 px, batch 64, against float32, default layout and one-hot statistics."""
    m, batch, bf16 = load("vqvae"), 64, can_bf16(ARGS.device)

    def loss(output, x):
        return (output[0].float() - x).square().mean() + 0.25 * output[1]

    for net in ([256, 256, 4, 2], NET):
        torch.manual_seed(0)
        theirs_net = m.VQVAE(3, *net).to(ARGS.device).train()
        theirs_net.quantiser = OneHot(512, 64).to(ARGS.device)
        ours_net = m.VQVAE(3, *net).to(ARGS.device, memory_format=torch.channels_last).train()
        ours, theirs = step_of(ours_net, loss, bf16=bf16), step_of(theirs_net, loss)
        x = torch.rand(batch, 3, 120, 120, device=ARGS.device)
        fast = x.contiguous(memory_format=torch.channels_last)
        title = f"--net {' '.join(map(str, net))}"
        compare(title, lambda: ours(fast), lambda: theirs(x), batch, "images/s", "goal 1")
        # How near to the processor's limit: multiplications and additions of a step, by its time.
        with FlopCounterMode(display=False) as counter:
            theirs(x)
        work, row = counter.get_total_flops() / batch / 1e9, ROWS[-1]
        kinds = [torch.bfloat16 if bf16 else torch.float32, torch.float32]
        limits = [matrix_speed(ARGS.device, dtype) for dtype in kinds]
        print(
            f"    {work:.1f} GFLOP an image: ours {row['ours'] * work:,.0f} of {limits[0]:,.0f} "
            f"GFLOP/s of a large matrix product, theirs {row['theirs'] * work:,.0f} of "
            f"{limits[1]:,.0f} (float32)"
        )
        row |= {"gflop_per_image": work, "matrix_gflops": limits}


# --- quantiser: time and memory ------------------------------------------------------------------


def quantise(name, device):
    """A step of one quantiser on 65,536 vectors, ready to be called."""
    torch.manual_seed(0)
    if name == "ours":
        layer = load("vqvae").Quantiser(512, 64)
    elif name == "one-hot":
        layer = OneHot(512, 64)
    else:
        from vector_quantize_pytorch import VectorQuantize

        options = {"decay": 0.9, "commitment_weight": 0.25, "rotation_trick": False}
        layer = VectorQuantize(dim=64, codebook_size=512, accept_image_fmap=True, **options)
    layer = layer.to(device).train()
    z = torch.randn(64, 64, 32, 32, device=device).requires_grad_()

    def step():
        q, *rest = layer(z)
        commitment = rest[1] if name == "library" else rest[0]
        (q.square().mean() + 0.25 * commitment.sum()).backward()

    return step


def memory_of(name):
    """MiB at most of one step of a quantiser, or None; on a CPU in a process of its own."""
    if ARGS.device.type == "cpu":
        prepare = f"import torch; step = b.quantise({name!r}, torch.device('cpu'))"
        done = alone(f"{prepare}; before = b.peak(); step(); print(b.peak() - before)")
        return float(done.stdout) if done.returncode == 0 else None
    step = quantise(name, ARGS.device)
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def quantiser():
    """Forward and backward of 65,536 vectors, 512 codes of 64 numbers; and the memory of it."""
    names, ours = ["ours"], quantise("ours", ARGS.device)
    for name, goal in [("one-hot", "goal 2"), ("library", "goal 1")]:
        try:
            theirs = quantise(name, ARGS.device)
        except ImportError:
            print("  left out: vector-quantize-pytorch is not installed")
            continue
        names.append(name)
        compare(f"ours against {name}", ours, theirs, 65536, "vectors/s", goal)
    for name in names:
        mib = memory_of(name)
        print(f"  peak memory, {name:10}" + ("left out" if mib is None else f"{mib:10.0f} MiB"))
        note(f"memory, {name}", mib=mib)
    layer, z = load("vqvae").Quantiser(512, 64).train(), torch.randn(8, 64, 32, 32)
    layer(z)
    layer.eval()
    vectors = z.movedim(1, 3).reshape(-1, 64)
    exact = torch.cdist(vectors.double(), layer.codes.double()).argmin(1)
    share = (layer(z)[2].flatten() == exact).float().mean().item()
    print(f"  same codes as exact distances in float64: {share:.6f} of the vectors")
    note("same codes", share=share)


# --- peers: segmentation-models-pytorch ----------------------------------------------------------


def peers():
    """Training and inference of LinkNet-34 at 128 px, against segmentation-models-pytorch."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        print("  left out: segmentation-models-pytorch is not installed")
        return
    m, bf16 = load("linknet"), can_bf16(ARGS.device)
    batch = 64 if ARGS.device.type == "cuda" else 16
    both = [m.LinkNet(3, "resnet34"), smp.Linknet("resnet34", encoder_weights=None, classes=3)]
    y = torch.randint(3, (batch, 128, 128), device=ARGS.device).byte()
    x = torch.rand(batch, 3, 128, 128, device=ARGS.device)

    def loss(output, x, y):
        return m.weighted_ce(output, y, [1.0, 1.0, 1.0])

    @torch.inference_mode()
    def look(net, x, low):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            net.eval()(x)

    for setting, layout, low in [
        ("same setting", torch.contiguous_format, False),
        ("each at its best", torch.channels_last, bf16),
    ]:
        a, b = [copy.deepcopy(net).to(ARGS.device, memory_format=layout) for net in both]
        photos = x.contiguous(memory_format=layout)
        ours, theirs = [step_of(net.train(), loss, bf16=low) for net in (a, b)]
        for title, one, other in [
            ("training", lambda: ours(photos, y), lambda: theirs(photos, y)),
            ("inference", lambda: look(a, photos, low), lambda: look(b, photos, low)),
        ]:
            compare(f"{title}, {setting}", one, other, batch, "images/s", "goal 1")


# --- scores: against torchmetrics ----------------------------------------------------------------


def scores():
    """Accuracy, IoU and Dice of 3,648 masks at 128 px, against torchmetrics."""
    try:
        from torchmetrics import classification
    except ImportError:
        print("  left out: torchmetrics is not installed")
        return
    m, g = load("finetune"), torch.Generator().manual_seed(0)
    logits = torch.randn(64, 3, 128, 128, generator=g).to(ARGS.device)
    masks = torch.randint(3, (64, 128, 128), generator=g).byte().to(ARGS.device)
    options = {"num_classes": 3, "validate_args": False}
    kinds = [classification.MulticlassAccuracy(average="micro", **options)]
    kinds.append(classification.MulticlassJaccardIndex(average="none", **options))
    kinds.append(classification.MulticlassF1Score(average="none", **options))
    for kind in kinds:
        kind.to(ARGS.device)

    def ours():
        m.scores(sum(m.confusion(logits, masks) for _ in range(57)))

    def theirs():
        for kind in kinds:
            kind.reset()
            for _ in range(57):
                kind.update(logits, masks)
            kind.compute()

    compare("confusion matrix", ours, theirs, 57 * 64, "masks/s", "goal 5")


# --- start: until the first batch ----------------------------------------------------------------


def begin(root):
    """What finetune.py does until it has a batch of pets."""
    m = load("finetune")
    args = m.parse_args(["--init", "none", "--data", "pets", "--root", root, "--size", "128"])
    (images, masks), _ = m.load_data(args)
    m.augment(images[:32], masks[:32])


def start():
    """Seconds of a new process with finetune.py until its first batch of pets at 128 px."""
    if not pet_pairs(load("finetune"), ARGS.root):
        return
    began = time.perf_counter()
    alone(f"b.begin({ARGS.root!r})").check_returncode()
    seconds = time.perf_counter() - began
    print(f"  first batch after {seconds:.1f} s")
    note("start", first_batch=seconds)


MODES = [limit, pipeline, source, quantiser, peers, scores, start]
MODES = {mode.__name__: mode for mode in MODES}


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("names", nargs="*", default=[], help=", ".join(MODES))
    p.add_argument("--root", default="data")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--photos", type=int, default=512, help="of an epoch of limit; a GPU: 4096")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", help="write the rows to this file too")
    p.parse_args(namespace=ARGS)
    ARGS.device = torch.device(ARGS.device)
    threads = torch.get_num_threads()
    machine = f"{threads} threads"
    if ARGS.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}  {ARGS.device}  {machine}  medians of {ARGS.repeats}")
    print(f"{'':46}{'ours':>10}{'theirs':>10} {'':9}{'ratio':>7}")
    for name in ARGS.names or MODES:
        ARGS.current = name
        print(f"{name}: {MODES[name].__doc__}")
        MODES[name]()
    if ARGS.json:
        head = {"torch": torch.__version__, "device": str(ARGS.device), "threads": threads}
        Path(ARGS.json).write_text(json.dumps([head | row for row in ROWS], indent=1))


if __name__ == "__main__":
    main()
