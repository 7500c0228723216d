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
from conftest import (
    LIGHT,
    SEGMENTERS,
    SMALL,
    checkpoint,
    interrupt,
    load,
    rows,
    start,
    write_folder,
)
from PIL import Image

LINKNET = pytest.param("linknet", marks=pytest.mark.slow)
EXTRA = {  # so that what is random in them, and the step from filling in to segmenting, is resumed
    "pretrain": ["--distort", "rotate", "jitter", "grey"],
    "segnet": ["--pretrain", "1"],
}


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
    """Weights, averages of the optimizer, scores, and what the run ends with."""
    for file in ["last.pt", "best.pt"]:
        a, b = checkpoint(f"{one}/{file}"), checkpoint(f"{two}/{file}")
        assert a["model"].keys() == b["model"].keys()
        for key, tensor in a["model"].items():
            assert torch.equal(tensor, b["model"][key]), key
    a, b = [checkpoint(f"{run}/last.pt")["optimizer"]["state"] for run in (one, two)]
    assert a.keys() == b.keys()
    for i, averages in a.items():
        for key, tensor in averages.items():
            assert torch.equal(tensor, b[i][key])
    assert timeless(one) == timeless(two)
    a, b = [{file.name for file in Path(run).glob("[!.]*")} for run in (one, two)]
    assert a == b and "result.json" in a


@pytest.mark.parametrize("name", [*LIGHT, LINKNET])
def test_resumed_equals_uninterrupted(name, typed, monkeypatch, capsys):
    """Stopped in the middle of the second of two epochs."""
    m, extra = load(name), EXTRA.get(name, [])
    with monkeypatch.context() as patch:
        steps = interrupt(patch, at=None)
        m.main(typed(name, *extra, "--out", "straight"))
    with monkeypatch.context() as patch:
        interrupt(patch, at=steps[0] // 2 + 2)
        with pytest.raises(KeyboardInterrupt):
            m.main(typed(name, *extra, "--out", "stopped"))
    assert len(rows("stopped")) == 1 and not Path("stopped/result.json").exists()
    capsys.readouterr()
    m.main(["--resume", "--out", "stopped"])
    out = capsys.readouterr().out
    assert "  2/2" in out and "  1/2" not in out
    assert_same_run("straight", "stopped")
    assert not Path("stopped.prev").exists()


@pytest.mark.parametrize("name", LIGHT)
def test_as_many_epochs_as_there_are_end_the_run(name, typed, monkeypatch):
    """A run of nine epochs that is long enough after one: its program is written."""
    m = load(name)
    with monkeypatch.context() as patch:
        interrupt(patch, at=6)  # an epoch has three or four steps
        with pytest.raises(KeyboardInterrupt):
            m.main(typed(name, "--out", "run", "--epochs", "9"))
    before = timeless("run")
    assert len(before) == 1
    m.main(["--resume", "--out", "run", "--epochs", "1"])
    assert timeless("run") == before and Path("run/result.json").exists()
    assert Path("run/model.pt2").exists() == (name in SEGMENTERS)


def test_what_is_typed_wins(typed):
    m = load("unet")
    m.main(typed("unet", "--out", "run", "--epochs", "1", "--seed", "5"))
    m.main(["--resume", "--out", "run", "--epochs", "3", "--lr", "0.001"])
    args = checkpoint("run/last.pt")["args"]
    assert (args["epochs"], args["lr"], args["seed"], args["width"]) == (3, 0.001, 5, 4)
    assert [row["epoch"] for row in rows("run")] == [1, 2, 3]


@pytest.mark.parametrize("name", [*LIGHT, LINKNET])
def test_sixteen_bits_go_on(name, typed, monkeypatch):
    """With --bf16 a convolution has 16-bit outputs, also after --resume; the weights have 32."""
    seen, forward = set(), torch.nn.Conv2d.forward

    def watched(conv, x):
        y = forward(conv, x)
        if conv.training:
            seen.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    for flags in (typed(name, "--bf16", "--epochs", "1"), ["--resume", "--epochs", "2"]):
        load(name).main([*flags, "--out", "run"])
        assert seen == {torch.bfloat16}
        seen.clear()
    assert len(rows("run")) == 2
    for tensor in checkpoint("run/best.pt")["model"].values():
        assert tensor.dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize("name", [*LIGHT, LINKNET])
def test_other_photos_are_refused(name, typed, refuse, here):
    """They would be parted anew, and photos of training would stand in validation."""
    load(name).main(typed(name, "--out", "run", "--epochs", "1"))
    write_folder(here / "photos", 20, first=30)
    before = Path("run/last.pt").read_bytes()
    assert "other photos" in refuse(name, "--resume", "--out", "run", "--epochs", "2")
    assert Path("run/last.pt").read_bytes() == before and not Path("run.prev").exists()


def test_another_validation_photo_is_refused(tmp_path, refuse):
    """The best epoch was chosen on the others."""
    write_folder(tmp_path / "mine/train", 8)
    write_folder(tmp_path / "mine/val", 3)
    flags = ["--size", "32", "--width", "4", "--data", str(tmp_path / "mine")]
    load("unet").main([*flags, "--out", str(tmp_path / "run"), "--epochs", "1"])
    write_folder(tmp_path / "mine/val", 1, first=3)
    assert "other photos" in refuse("unet", "--resume", "--out", str(tmp_path / "run"))


def test_the_start_of_a_run_may_be_gone(typed):
    """Whatever became of --init meanwhile: the sizes and the weights are in last.pt."""
    load("pretrain").main(
        typed("pretrain", "--net", "32", "8", "1", "3", "512", "--epochs", "1", "--out", "pre")
    )
    load("finetune").main(
        typed("finetune", "--init", "pre/best.pt", "--epochs", "1", "--out", "run")
    )
    shutil.rmtree("pre")
    load("finetune").main(["--resume", "--out", "run", "--epochs", "2"])
    assert checkpoint("run/last.pt")["args"]["net"] == [32, 8, 1, 3, 512] and len(rows("run")) == 2


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


def stop_in_save(monkeypatch, m, at):
    """Ctrl-C in save number `at`, with a part of the file written -> the names of what is saved."""
    save, saved = m.save, []

    def stop(path, write):
        saved.append(path.name)
        if len(saved) == at:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}").write_bytes(b"PK, and no more")
            raise KeyboardInterrupt
        save(path, write)

    monkeypatch.setattr(m, "save", stop)
    return saved


@pytest.mark.parametrize("name", ["vqvae", pytest.param("unet", marks=pytest.mark.slow)])
def test_stopped_in_any_of_the_saves(name, typed, monkeypatch):
    """Every file loads, and the run ends as without the stop."""
    m = load(name)
    with monkeypatch.context() as patch:
        saved = stop_in_save(patch, m, at=None)
        m.main(typed(name, "--out", "straight"))
    assert saved.count("last.pt") == 2 and saved[-1] == "result.json"
    for at in range(1, len(saved) + 1):
        shutil.rmtree("run", ignore_errors=True)
        with monkeypatch.context() as patch:
            stop_in_save(patch, m, at)
            with pytest.raises(KeyboardInterrupt):
                m.main(typed(name, "--out", "run"))
        check_files("run")
        resume = ["--resume"] if Path("run/last.pt").exists() else []
        m.main(typed(name, *resume, "--out", "run"))
        assert_same_run("straight", "run")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_while_saving(here):
    """Kills at random moments of a process that does nothing but save."""
    m, g, file, written = load("unet"), random.Random(0), Path("run/last.pt"), 0
    for _ in range(12):
        child = os.fork()
        if child == 0:
            while True:
                written += 1
                state = {"written": written, "model": torch.full([200_000], written)}
                m.save(file, lambda file: torch.save(state, file))
        time.sleep(g.uniform(0.05, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = checkpoint(file)
        assert state["written"] > written and (state["model"] == state["written"]).all()
        written = state["written"]


def test_killed_while_training(typed, here):
    """Every file loads, and the run goes on from there."""
    last = here / "run/last.pt"
    child = start("unet", *typed("unet", "--out", "run", "--epochs", "999"), cwd=here)
    try:
        end = time.monotonic() + 120
        while not last.exists():
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.7)
    finally:
        child.kill()
        child.communicate()
    check_files("run")
    epochs = len(checkpoint(last)["history"]) + 1
    load("unet").main(["--resume", "--out", "run", "--epochs", str(epochs)])
    assert len(rows("run")) == epochs and Path("run/result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LIGHT, LINKNET])
def test_killed_often_equals_uninterrupted(name, typed, here):
    """Reading photos, training, saving, exporting: with eight kills it ends as without any."""
    g, words = random.Random(1), typed(name, *EXTRA.get(name, []), "--epochs", "6")
    began = time.monotonic()
    start(name, *words, "--out", "straight", cwd=here).communicate()
    length, more = time.monotonic() - began, []
    for _ in range(8):
        child = start(name, *words, *more, "--out", "run", cwd=here)
        time.sleep(g.uniform(0, length))
        child.kill()
        child.communicate()
        check_files("run")
        if Path("run/last.pt").exists():
            more = ["--resume"]
    load(name).main([*words, *more, "--out", "run"])
    assert_same_run("straight", "run")
