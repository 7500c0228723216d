"""How fast the scripts are, beside other ways to do the same. Never part of the test run.

python tests/bench.py limit quantiser peers    all of it, or some

A row is a ratio of two ways measured in turn, A B A B ..., on this machine in this minute: medians
of --repeats, with the smallest and the largest. Libraries of requirements-bench.txt that are not
installed are left out, and a line says so.
"""

import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
NET = [128, 32, 2, 2, 512]  # the small VQ-VAE
ROWS, ARGS = [], Namespace()  # what was printed, for --json; what was typed


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clock(run):
    """Seconds of one call, all of its kernels done."""
    if ARGS.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if ARGS.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(title, ours, theirs, amount, unit, goal):
    """One row: amount per second of both in turn, and the ratio pair by pair."""
    ours(), theirs()  # warm-up
    a, b = [], []
    for _ in range(ARGS.repeats):
        a.append(amount / clock(ours))
        b.append(amount / clock(theirs))
    ratios = sorted(x / y for x, y in zip(a, b))
    row = {"name": ARGS.current, "row": title, "unit": unit, "goal": goal, "ratios": ratios}
    for key, values in [("ours", a), ("theirs", b), ("ratio", ratios)]:
        row[key] = statistics.median(values)
    ROWS.append(row)
    speeds = f"{row['ours']:10,.1f}{row['theirs']:10,.1f} {unit:9}{row['ratio']:7.2f}"
    print(f"  {title:44}{speeds} ({ratios[0]:.2f} - {ratios[-1]:.2f})   {goal}", flush=True)


def loss_of(m, output, x, y):
    """The loss of a script on what its network puts out in training."""
    if hasattr(m, "weighted_ce"):
        return m.weighted_ce(output, y, [1.0, 1.0, 1.0])
    if hasattr(m, "segmentation_loss"):
        logits, commitment = output if m.SCRIPT == "finetune.py" else (output, 0.0)
        return m.segmentation_loss(logits, y) + 0.25 * commitment
    return (output[0].float() - x).square().mean() + 0.25 * output[1]


def step_of(m, model, bf16):
    """A plain training step of model on one batch: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x, y):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            output = model(x)
        optimizer.zero_grad()
        loss_of(m, output, x, y).backward()
        optimizer.step()

    return step


LOOPS = {
    "vqvae": (lambda m: m.VQVAE(3, *NET), "reconstruct_epoch"),
    "pretrain": (lambda m: m.VQVAE(3, *NET), "pretrain_epoch"),
    "finetune": (lambda m: m.Segmenter(3, *NET), "finetune_epoch"),
    "unet": (lambda m: m.UNet(3, 16), "train_epoch"),
    "linknet": (lambda m: m.LinkNet(3), "linknet_epoch"),
    "segnet": (lambda m: m.SegNet(3, 16), "segnet_epoch"),
}


def limit():
    """Our loop against a bare loop: a whole epoch, and the same network on one resident batch."""
    n, batch = ARGS.photos, min(ARGS.photos, 128 if ARGS.device == "cuda" else 32)
    for name, (build, epoch) in LOOPS.items():
        m = load(name)
        torch.manual_seed(0)
        argv = ["--batch-size", str(batch), "--epochs", "1000", "--device", ARGS.device]
        if name == "finetune":
            argv += ["--init", "none"]
        args = m.parse_args(argv)
        args.variance, args.weights = 1.0, [1.0, 1.0, 1.0]
        data = [tensor.to(ARGS.device) for tensor in m.draw_toy(n, [64, 64], 0)]
        x, y = data[0][:batch] / 255, data[1][:batch]
        if name in ("vqvae", "pretrain"):
            data.pop()
        if name == "pretrain":
            data = [data[0].cpu()]  # its photos stay there
        net = build(m).to(ARGS.device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        step = step_of(m, copy.deepcopy(net).train(), args.bf16)

        def ours():
            getattr(m, epoch)(net, optimizer, *data, args, 0)

        def theirs():
            for _ in range(n // batch):
                step(x, y)

        compare(f"{name}, 64 px, batch {batch}", ours, theirs, n, "images/s", "goal 0.95")


class OneHot(nn.Module):
    """The quantiser as the ports write it: all distances, a one-hot matrix, smoothed averages."""

    def __init__(self, K, D):
        super().__init__()
        self.register_buffer("codes", torch.randn(K, D))
        self.register_buffer("counts", torch.zeros(K))
        self.register_buffer("sums", torch.randn(K, D))

    def forward(self, z):
        z = z.movedim(1, 3).contiguous()  # (B, H, W, D)
        distances = z.square().sum(3, True) + self.codes.square().sum(1) - 2 * z @ self.codes.T
        hot = F.one_hot(distances.argmin(3), len(self.codes)).float()
        with torch.no_grad():
            self.counts.mul_(0.99).add_(hot.sum((0, 1, 2)), alpha=0.01)
            self.sums.mul_(0.99).add_(hot.flatten(0, 2).T @ z.flatten(0, 2), alpha=0.01)
            self.codes.copy_(self.sums / (self.counts[:, None] + 1e-5))
        q = hot @ self.codes
        return (z + (q - z).detach()).movedim(3, 1), F.mse_loss(q.detach(), z)


def quantise(name):
    """A step of one quantiser on 65,536 vectors, ready to be called."""
    torch.manual_seed(0)
    if name == "ours":
        layer = load("vqvae").Quantiser(512, 64)
    elif name == "one-hot":
        layer = OneHot(512, 64)
    else:
        library = importlib.import_module("vector_quantize_pytorch")
        options = {"decay": 0.9, "accept_image_fmap": True, "rotation_trick": False}
        layer = library.VectorQuantize(dim=64, codebook_size=512, **options)
    layer = layer.to(ARGS.device).train()
    z = torch.randn(64, 64, 32, 32, device=ARGS.device).requires_grad_()

    def step():
        q, *rest = layer(z)
        commitment = rest[1] if name == "library" else rest[0]
        (q.square().mean() + 0.25 * commitment.sum()).backward()

    return step


def peak():
    """The most memory that this process has had, in MiB, as Linux counts it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def memory_of(name):
    """MiB at most of one step of a quantiser, on a CPU in a process of its own."""
    code = f"import bench as b; b.ARGS.device = 'cpu'; step = b.quantise({name!r})"
    child = [sys.executable, "-c", f"{code}; old = b.peak(); step(); print(b.peak() - old)"]
    return float(subprocess.check_output(child, cwd=ROOT / "tests"))


def quantiser():
    """Forward and backward of 65,536 vectors, 512 codes of 64 numbers; and the memory of it."""
    others = {"one-hot": "goal 2", "library": "goal 1"}
    if not importlib.util.find_spec("vector_quantize_pytorch"):
        print("  left out: vector-quantize-pytorch is not installed")
        del others["library"]
    for name, goal in others.items():
        compare(f"ours against {name}", quantise("ours"), quantise(name), 65536, "vectors/s", goal)
    for name in ["ours", *others]:
        ROWS.append({"name": "quantiser", "row": f"memory, {name}", "mib": memory_of(name)})
        print(f"  peak memory on a CPU, {name:10}{ROWS[-1]['mib']:10.0f} MiB")


def peers():
    """Training and inference of LinkNet-34 at 128 px, against segmentation-models-pytorch."""
    if not importlib.util.find_spec("segmentation_models_pytorch"):
        print("  left out: segmentation-models-pytorch is not installed")
        return
    smp = importlib.import_module("segmentation_models_pytorch")
    m, batch = load("linknet"), 64 if ARGS.device == "cuda" else 16
    bf16 = m.parse_args(["--device", ARGS.device]).bf16
    nets = [m.LinkNet(3, "resnet34"), smp.Linknet("resnet34", encoder_weights=None, classes=3)]
    y = torch.randint(3, (batch, 128, 128), device=ARGS.device).byte()
    x = torch.rand(batch, 3, 128, 128, device=ARGS.device)

    @torch.inference_mode()
    def look(net, x, low):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            net.eval()(x)

    for setting, layout, low in [
        ("same setting", torch.contiguous_format, False),
        ("each at its best", torch.channels_last, bf16),
    ]:
        a, b = [copy.deepcopy(net).to(ARGS.device, memory_format=layout) for net in nets]
        photos = x.contiguous(memory_format=layout)
        ours, theirs = [step_of(m, net.train(), low) for net in (a, b)]
        for title, one, other in [
            ("training", lambda: ours(photos, y), lambda: theirs(photos, y)),
            ("inference", lambda: look(a, photos, low), lambda: look(b, photos, low)),
        ]:
            compare(f"{title}, {setting}", one, other, batch, "images/s", "goal 1")


MODES = {"limit": limit, "quantiser": quantiser, "peers": peers}


def main():
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", default=[], help=", ".join(MODES))
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--photos", type=int, default=512, help="of an epoch of limit; a GPU: 4096")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", help="write the rows to this file too")
    p.parse_args(namespace=ARGS)
    head = {"torch": torch.__version__, "device": ARGS.device, "threads": torch.get_num_threads()}
    print(*[f"{key} {value} " for key, value in head.items()], f"medians of {ARGS.repeats}")
    print(f"{'':46}{'ours':>10}{'theirs':>10} {'':9}{'ratio':>7}")
    for name in ARGS.names or MODES:
        ARGS.current = name
        print(f"{name}: {MODES[name].__doc__}")
        MODES[name]()
    if ARGS.json:
        Path(ARGS.json).write_text(json.dumps([head | row for row in ROWS], indent=1))


if __name__ == "__main__":
    main()
