"""pretrain.py under torchrun: two processes on the CPU do what one does."""
import os, signal, subprocess, sys, time

import pytest
import torch

from conftest import ROOT, SCRIPTS, checkpoint, rows, run

if "pretrain" not in SCRIPTS or not torch.distributed.is_available():
    pytest.skip("no pretrain.py, or a torch without torch.distributed", allow_module_level=True)

FLAGS = ("--data", "toy", "--size", "16", "--frac", "0.1", "--batch-size", "64", "--width", "32", "--residual-width", "8",
         "--mask", "0.5-0.75", "--device", "cpu", "--no-amp", "--distort", "jitter")

def torchrun(*flags, cwd, ranks=2):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                             str(ROOT / "pretrain.py"), *FLAGS, *flags], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def done(child):
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, out + err
    return out

def both(cwd, *flags):
    """The same training by one process and by two -> what the two said."""
    out = done(torchrun(*flags, "--out", "two", cwd=cwd))
    run("pretrain", *FLAGS, *flags, "--out", "one", cwd=cwd)
    return out

def test_two_ranks_give_the_curve_of_one(tmp_path):
    out = both(tmp_path, "--epochs", "2")
    assert out.count("pretrain.py  torch") == 1 and out.count("best     epoch") == 1      # rank 0 alone speaks
    for a, b in zip(*(rows(tmp_path / name) for name in ("one", "two")), strict=True):
        for key in ("loss", "val_loss", "val_masked"):
            assert b[key] == pytest.approx(a[key], rel=1e-3), key

def test_two_ranks_give_the_codebook_of_one(tmp_path):
    """After two steps. Later, rounding decides which of two near codes takes a vector, or whether one is dead,
    and ever more codes are other ones that do as well."""
    both(tmp_path, "--epochs", "1", "--frac", "0.04")
    ours, theirs = (checkpoint(tmp_path / name / "best.pt")["model"] for name in ("one", "two"))
    assert ours.keys() == theirs.keys()               # no "module." before the names
    counts = torch.isclose(theirs["quantiser.counts"], ours["quantiser.counts"], rtol=0.05, atol=0.5)
    codes = torch.isclose(theirs["quantiser.codes"], ours["quantiser.codes"], rtol=0.02, atol=0.02).all(1)
    assert (counts & codes).float().mean() > 0.95

def test_a_dead_rank_ends_the_run_and_another_number_of_ranks_goes_on(tmp_path):
    flags = ("--epochs", "12", "--out", "run")
    child, log = torchrun(*flags, cwd=tmp_path), tmp_path / "run/last.pt"
    end = time.time() + 120
    while not log.exists() and child.poll() is None and time.time() < end:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, err = child.communicate(timeout=120)
    assert child.returncode != 0 and "best     epoch" not in out
    kept = checkpoint(log)
    assert 1 <= kept["epoch"] < 12
    # The other rank ends in the middle of a joined step, or, had it nothing to wait for, by torchrun's SIGTERM.
    assert "finished epochs are kept for --resume" in err or "--resume continues run" in out
    resumed = run("pretrain", *FLAGS, *flags, "--resume", cwd=tmp_path)
    assert f"\n   {kept['epoch'] + 1}/12" in resumed or f"\n  {kept['epoch'] + 1}/12" in resumed
    run("pretrain", *FLAGS, "--epochs", "12", "--out", "whole", cwd=tmp_path)
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "run"), strict=True):
        assert b["val_loss"] == pytest.approx(a["val_loss"], rel=0.01)

def test_a_batch_that_ranks_cannot_share(tmp_path):
    child = torchrun("--batch-size", "63", "--out", "run", cwd=tmp_path)
    _, err = child.communicate(timeout=120)
    assert child.returncode != 0 and "--batch-size a multiple of the 2 processes" in err
    assert not (tmp_path / "run").exists()
