"""pretrain.py under torchrun: two processes on the CPU train one network."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, checkpoint, rows, run

FLAGS = ["--size", "32", "--frac", "0.1", "--batch-size", "64", "--net", "32", "8", "1", "2"]
FLAGS += ["--mask", "0.25-0.5", "--mask-style", "patches", "--device", "cpu"]


def torchrun(*flags, cwd):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += [str(ROOT / "pretrain.py"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=cwd, **pipes)


def test_two_processes_learn_as_one(tmp_path):
    """The masks are other ones, so the losses are alike, not equal. The first process speaks."""
    child = torchrun(*FLAGS, "--epochs", "3", "--out", "two", cwd=tmp_path)
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, out + err
    assert out.count("pretrain.py  torch") == out.count("best     epoch") == 1
    run("pretrain", *FLAGS, "--epochs", "3", "--out", "one", cwd=tmp_path)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(two) == 3 and two[-1]["val_loss"] < two[0]["val_loss"]
    assert two[-1]["val_masked"] == pytest.approx(one[-1]["val_masked"], rel=0.2)
    a, b = [checkpoint(tmp_path / name / "best.pt")["model"] for name in ("one", "two")]
    assert a.keys() == b.keys()  # no "module." before the names
    assert all(torch.isfinite(tensor).all() for tensor in b.values())


def test_a_dead_process_ends_the_run_and_one_alone_goes_on(tmp_path):
    last = tmp_path / "run/last.pt"
    child = torchrun(*FLAGS, "--epochs", "400", "--out", "run", cwd=tmp_path)
    end = time.monotonic() + 120
    while not last.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    child.communicate(timeout=120)
    assert child.returncode != 0
    kept = len(checkpoint(last)["history"])
    assert 1 <= kept < 400
    more = ["--resume", "--out", "run", "--epochs", str(kept + 1)]
    run("pretrain", *more, cwd=tmp_path)
    assert len(rows(tmp_path / "run")) == kept + 1


def test_a_batch_that_is_too_small_to_share(tmp_path):
    child = torchrun("--batch-size", "1", "--device", "cpu", cwd=tmp_path)
    _, err = child.communicate(timeout=120)
    assert child.returncode != 0 and "--batch-size 1" in err
    assert not (tmp_path / "checkpoints").exists()
