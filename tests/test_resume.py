"""Stopped and continued equals uninterrupted, to the bit; a kill leaves files that load."""

import json
import os
import random
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import LIGHT, SEGMENTERS, SMALL, TRAINING, checkpoint, load, rows, start, write_folder
from PIL import Image

each = pytest.mark.parametrize("name", TRAINING)


@pytest.fixture
def typed(here):
    """typed(name, *flags): a training of a second, on 30 photos."""
    folder = write_folder(here / "photos", 30)

    def words(name, *flags):
        data = folder if name in SEGMENTERS else folder / "images"
        return [*SMALL[name], "--data", str(data), "--batch-size", "8", "--epochs", "2", *flags]

    return words


def timeless(folder):
    """The rows of log.jsonl, but for the clock."""
    log = rows(folder)
    for row in log:
        del row["seconds"]
    return log


def assert_same_run(one, two):
    """Weights, averages of the optimizer, scores."""
    for file in ["last.pt", "best.pt"]:
        a, b = checkpoint(f"{one}/{file}"), checkpoint(f"{two}/{file}")
        assert a["model"].keys() == b["model"].keys()
        for key, tensor in a["model"].items():
            assert torch.equal(tensor, b["model"][key]), key
    a, b = [checkpoint(f"{run}/last.pt")["optimizer"]["state"] for run in (one, two)]
    for i, averages in a.items():
        for key, tensor in averages.items():
            assert torch.equal(tensor, b[i][key])
    assert timeless(one) == timeless(two)


def stop_after(monkeypatch, m, epochs):
    """Ctrl-C when so many epochs are saved."""
    saved = m.save_epoch

    def save_epoch(args, model, optimizer, history, best):
        saved(args, model, optimizer, history, best)
        if len(history) == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(m, "save_epoch", save_epoch)


@each
def test_resumed_equals_uninterrupted(name, typed, monkeypatch, capsys):
    m = load(name)
    m.main(typed(name, "--out", "straight"))
    with monkeypatch.context() as patch:
        stop_after(patch, m, 1)
        with pytest.raises(SystemExit, match=f"python {name}.py --resume --out stopped goes on"):
            m.main(typed(name, "--out", "stopped"))
    assert len(rows("stopped")) == 1 and not Path("stopped/result.json").exists()
    capsys.readouterr()
    m.main(["--resume", "--out", "stopped"])
    out = capsys.readouterr().out
    assert "  2/2" in out and "  1/2" not in out
    assert_same_run("straight", "stopped")
    assert not Path("stopped.prev").exists()


@pytest.mark.parametrize("name", LIGHT)
def test_as_many_epochs_as_there_are_end_the_run(name, typed, monkeypatch):
    m = load(name)
    with monkeypatch.context() as patch:
        stop_after(patch, m, 1)
        with pytest.raises(SystemExit):
            m.main(typed(name, "--out", "run", "--epochs", "9"))
    before = timeless("run")
    m.main(["--resume", "--out", "run", "--epochs", "1"])
    assert timeless("run") == before and Path("run/result.json").exists()
    assert Path("run/model.pt2").exists() == (name in SEGMENTERS)


def test_what_is_typed_wins(typed):
    m = load("unet")
    m.main(typed("unet", "--out", "run", "--epochs", "1", "--loss", "bce"))
    m.main(["--resume", "--out", "run", "--epochs", "3", "--lr", "0.001"])
    args = checkpoint("run/last.pt")["args"]
    assert (args["epochs"], args["lr"], args["loss"], args["width"]) == (3, 0.001, "bce", 4)
    assert [row["epoch"] for row in rows("run")] == [1, 2, 3]


@pytest.mark.parametrize("name", LIGHT)
def test_other_photos_are_refused(name, typed, refuse, here):
    """They would be parted anew, and photos of training would stand in validation."""
    load(name).main(typed(name, "--out", "run", "--epochs", "1"))
    write_folder(here / "photos", 20, first=30)
    before = Path("run/last.pt").read_bytes()
    assert "other photos" in refuse(name, "--resume", "--out", "run", "--epochs", "2")
    assert Path("run/last.pt").read_bytes() == before and not Path("run.prev").exists()


def test_the_start_of_a_run_may_be_gone(typed):
    """Whatever became of --init meanwhile: the sizes and the weights are in last.pt."""
    words = ["--data", "photos/images", *SMALL["pretrain"], "--net", "32", "8", "1", "3"]
    load("pretrain").main([*words, "--epochs", "1", "--out", "pre"])
    flags = ["--data", "photos", "--size", "32", "--init", "pre/best.pt", "--out", "run"]
    load("finetune").main([*flags, "--epochs", "1"])
    shutil.rmtree("pre")
    load("finetune").main(["--resume", "--out", "run", "--epochs", "2"])
    assert checkpoint("run/last.pt")["args"]["net"] == [32, 8, 1, 3] and len(rows("run")) == 2


def test_a_moved_run_resumes(typed):
    load("unet").main(typed("unet", "--out", "run", "--epochs", "1"))
    shutil.move("run", "elsewhere")
    load("unet").main(["--resume", "--out", "elsewhere", "--epochs", "2"])
    assert len(rows("elsewhere")) == 2 and not Path("run").exists()


@pytest.mark.parametrize("name", ["pretrain", "unet"])
def test_one_generation_is_kept(name, typed):
    for seed in "012":
        load(name).main(typed(name, "--out", "run", "--epochs", "1", "--seed", seed))
    assert checkpoint("run/best.pt")["args"]["seed"] == 2
    assert checkpoint("run.prev/best.pt")["args"]["seed"] == 1
    assert not Path("run.prev.prev").exists()


# --- kills ---------------------------------------------------------------------------------------


def check_files(folder):
    """Every file that is not a temporary one can be read to its end."""
    for file in Path(folder).glob("[!.]*"):
        if file.suffix == ".pt":
            checkpoint(file)
        elif file.suffix == ".pt2":
            assert zipfile.ZipFile(file).testzip() is None
        elif file.suffix == ".png":
            Image.open(file).load()
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            rows(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_while_saving(typed):
    """Kills at random moments of a process that does nothing but save."""
    m, g = load("unet"), random.Random(0)
    m.main(typed("unet", "--out", "run", "--epochs", "1"))
    args, net = m.parse_args(["--resume", "--out", "run"]), torch.nn.Linear(400, 400)
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(12):
        history = rows("run")
        child = os.fork()
        if child == 0:
            while True:
                history.append(history[-1])
                m.save_epoch(args, net, optimizer, history, True)
        time.sleep(g.uniform(0.05, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check_files("run")
    assert len(checkpoint("run/last.pt")["history"]) > 6  # it did save


def run_and_kill(name, words, after, cwd):
    """Start, wait for one more epoch, go on for so many seconds, SIGKILL."""
    last = cwd / "run/last.pt"
    before = 0
    if last.exists():
        words, before = ["--resume", "--out", "run"], last.stat().st_mtime_ns
    child = start(name, *words, cwd=cwd)
    try:
        end = time.monotonic() + 120
        while not last.exists() or last.stat().st_mtime_ns == before:
            assert child.poll() is None and time.monotonic() < end, child.communicate()
            time.sleep(0.02)
        time.sleep(after)
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    "name", ["unet", *(pytest.param(x, marks=pytest.mark.slow) for x in LIGHT)]
)
def test_killed_at_any_moment(name, typed, here):
    """Whatever it was doing: every file loads, no epoch is lost, and the run can be ended."""
    g, epochs = random.Random(0), 0
    words = typed(name, "--out", "run", "--epochs", "1000")
    for _ in range(3):
        run_and_kill(name, words, g.uniform(0, 0.5), here)
        check_files("run")
        now = len(checkpoint("run/last.pt")["history"])
        assert now > epochs
        epochs = now
    load(name).main(["--resume", "--out", "run", "--epochs", str(epochs)])
    assert len(rows("run")) == epochs and Path("run/result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHT)
def test_killed_often_equals_uninterrupted(name, typed, here):
    """Reading photos, training, saving, exporting: with eight kills it ends as without any."""
    g, words = random.Random(1), typed(name, "--epochs", "6")
    began = time.monotonic()
    start(name, *words, "--out", "straight", cwd=here).communicate()
    length, more = time.monotonic() - began, []
    for _ in range(8):
        child = start(name, *words, *more, "--out", "run", cwd=here)
        time.sleep(g.uniform(0, length))
        child.kill()
        child.communicate()
        if Path("run").exists():
            check_files("run")
        if Path("run/last.pt").exists():
            more = ["--resume"]
    load(name).main([*words, *more, "--out", "run"])
    assert_same_run("straight", "run")
