"""Stopped and continued equals uninterrupted, to the bit; a kill leaves files that load."""
import json, os, random, shutil, signal, subprocess, sys, time, zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import LIGHT, ROOT, SEGMENTERS, SMALL, TRAINING, checkpoint, interrupt, load, rows, start, write_folder

each = pytest.mark.parametrize("name", TRAINING)
few = pytest.mark.parametrize("name", LIGHT)
TIMES = ("seconds", "images_per_second", "memory_gb")

@pytest.fixture
def argv(here):
    """argv(name, *flags): a training of seconds on thirty photos."""
    folder = write_folder(here / "photos", 30)
    def build(name, *flags):
        data = folder if name in SEGMENTERS else folder / "images"
        return ["--data", str(data), *SMALL[name], "--epochs", "4", "--batch-size", "4", *flags]
    return build

def timeless(folder):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows(folder)]

def same_weights(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)

@each
def test_resumed_equals_uninterrupted(name, argv, monkeypatch, capsys):
    m = load(name)
    with monkeypatch.context() as patch:
        steps = interrupt(patch, None)
        m.main(argv(name, "--out", "straight"))
    with monkeypatch.context() as patch:
        interrupt(patch, steps[0] // 2 + steps[0] // 8)          # in the middle of epoch 3 of 4
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            m.main(argv(name, "--out", "stopped"))
    out = capsys.readouterr().out
    assert stop.value.code == 130 and "--resume continues" in out
    assert len(rows("stopped")) == 2 and not Path("stopped/result.json").exists()
    m.main(argv(name, "--out", "stopped", "--resume"))
    out = capsys.readouterr().out
    assert "  3/4" in out and "  2/4" not in out
    for file in ("last.pt", "best.pt"):
        a, b = checkpoint(f"straight/{file}"), checkpoint(f"stopped/{file}")
        assert same_weights(a["model"], b["model"]) and a["epoch"] == b["epoch"], file
    assert timeless("straight") == timeless("stopped") and len(rows("stopped")) == 4
    a, b = (checkpoint(f"{folder}/last.pt")["optimizer"]["state"] for folder in ("straight", "stopped"))
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])

@few
def test_stopped_in_the_first_epoch(name, argv, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(SystemExit) as stop:
            load(name).main(argv(name, "--out", "run"))
    assert stop.value.code == 130 and "no epoch yet" in capsys.readouterr().out
    assert not Path("run/last.pt").exists()

@few
def test_a_finished_run_just_reports(name, argv, monkeypatch, capsys):
    m = load(name)
    m.main(argv(name, "--out", "run", "--epochs", "1"))
    before, files = timeless("run"), sorted(os.listdir("run"))
    steps = interrupt(monkeypatch, None)
    capsys.readouterr()
    m.main(argv(name, "--out", "run", "--epochs", "1", "--resume"))
    assert steps == [0] and timeless("run") == before and sorted(os.listdir("run")) == files
    assert "\nbest " in capsys.readouterr().out

@few
def test_other_arguments_are_named(name, argv, refuse):
    load(name).main(argv(name, "--out", "run", "--epochs", "1"))
    before = Path("run/last.pt").read_bytes()
    line = refuse(name, *argv(name, "--out", "run", "--epochs", "2", "--lr", "0.02", "--resume"))
    assert "--lr" in line and "0.02" in line and "--epochs" in line and "--seed" not in line
    assert Path("run/last.pt").read_bytes() == before and not Path("run.prev").exists()

def test_resume_after_another_pretraining(argv, refuse):
    """Whatever became of --init meanwhile: the widths and the weights are in last.pt."""
    before = ["--data", "photos/images", *SMALL["pretrain"], "--epochs", "1", "--out", "pre"]
    load("pretrain").main(before)
    flags = argv("finetune", "--out", "run", "--epochs", "1", "--init", "pre/best.pt")
    load("finetune").main(flags)
    weights = checkpoint("run/last.pt")["model"]
    load("pretrain").main([*before, "--width", "64"])
    load("finetune").main([*flags, "--resume"])
    Path("pre/best.pt").unlink()
    load("finetune").main([*flags, "--resume"])
    assert same_weights(checkpoint("run/last.pt")["model"], weights)
    assert "run python pretrain.py first" in refuse("finetune", *flags)

@each
def test_the_pictures_need_no_gradients(name, argv, monkeypatch):
    """Eight photos whose maps are kept for a backward can take more memory than the training."""
    m, grads = load(name), []
    def watch(*args, **kwargs):
        grads.append(torch.is_grad_enabled())
        return drawn(*args, **kwargs)
    drawn = torch.nn.functional.conv2d
    def pictures(*args, **kwargs):
        assert grads and not grads[-1]
    monkeypatch.setattr(m, "draw_samples", pictures)
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: watch(
        x, weight, bias, self.stride, self.padding, self.dilation, self.groups))
    m.main(argv(name, "--out", "run", "--epochs", "1"))

@each
def test_resume_with_other_photos_is_refused(name, argv, refuse, here):
    """Another training set would be split anew, and photos of training would stand in validation."""
    load(name).main(argv(name, "--out", "run", "--epochs", "1"))
    write_folder(here / "photos", 3, first=30)
    before = Path("run/last.pt").read_bytes()
    assert "photos" in refuse(name, *argv(name, "--out", "run", "--epochs", "1", "--resume"))
    assert Path("run/last.pt").read_bytes() == before and not Path("run.prev").exists()

@few
def test_a_moved_run_resumes(name, argv):
    load(name).main(argv(name, "--out", "run", "--epochs", "1"))
    shutil.move("run", "elsewhere")
    load(name).main(argv(name, "--out", "elsewhere", "--epochs", "1", "--resume"))
    assert len(rows("elsewhere")) == 1

@few
def test_leftover_temporary_files_are_ignored(name, argv):
    load(name).main(argv(name, "--out", "run", "--epochs", "1"))
    for file in ("best.pt", "last.pt", "log.jsonl", "model.pt2"):
        Path(f"run/.4711.{file}").write_bytes(b"half a fi")
    load(name).main(argv(name, "--out", "run", "--epochs", "1", "--resume"))
    load(name).main(argv(name, "--out", "run", "--epochs", "1"))
    assert Path("run.prev/best.pt").exists() and len(rows("run")) == 1

@few
def test_leftovers_do_not_grow(name, argv):
    """What killed processes left in a run is gone once it is resumed."""
    load(name).main(argv(name, "--out", "run", "--epochs", "1"))
    Path("run/.4711.last.pt").write_bytes(b"half a fi")
    load(name).main(argv(name, "--out", "run", "--epochs", "1", "--resume"))
    assert not list(Path("run").glob(".*"))

@few
def test_two_runs_in_one_folder(name, argv, refuse, monkeypatch):
    """The one that finds another's epochs there ends; the files are all of the other."""
    m, saved = load(name), load(name).save_epoch
    def late(args, *rest):
        monkeypatch.setattr(m, "save_epoch", saved)
        if args.seed == 0:                             # meanwhile the second run begins and ends
            m.main(argv(name, "--out", "run", "--epochs", "1", "--seed", "1"))
        return saved(args, *rest)
    monkeypatch.setattr(m, "save_epoch", late)
    assert "another run" in refuse(name, *argv(name, "--out", "run", "--epochs", "2"))
    assert checkpoint("run/last.pt")["args"]["seed"] == 1 == len(rows("run"))

@pytest.mark.parametrize("damage", ("best.pt", "last.pt"))
@few
def test_a_broken_file_is_named(name, argv, refuse, damage):
    load(name).main(argv(name, "--out", "run", "--epochs", "1"))
    whole = Path("run", damage).read_bytes()
    Path("run", damage).write_bytes(whole[:len(whole) // 2])
    assert damage in refuse(name, *argv(name, "--out", "run", "--epochs", "1", "--resume"))

@few
def test_one_generation_is_kept(name, argv, capsys):
    for seed in "012":
        load(name).main(argv(name, "--out", "run", "--epochs", "1", "--seed", seed))
    assert checkpoint("run/best.pt")["args"]["seed"] == 2
    assert checkpoint("run.prev/best.pt")["args"]["seed"] == 1
    assert capsys.readouterr().out.count("run.prev") == 2 and not Path("run.prev.prev").exists()

def wait_for(test, child, seconds=120):
    end = time.monotonic() + seconds
    while not test():
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.02)

@each
def test_sigterm_is_a_ctrl_c(name, argv, here):
    child = start(name, *argv(name, "--out", "run", "--epochs", "100000"), cwd=here)
    try:
        wait_for(lambda: Path("run/last.pt").exists(), child)
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and "--resume" in out and "Traceback" not in err
    assert checkpoint("run/last.pt")["epoch"] == len(rows("run"))

@few
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_saving(name, argv):
    """Twenty kills at random moments of a process that does nothing but save."""
    m, before = load(name), set()
    m.main(argv(name, "--out", "run", "--epochs", "1"))
    last = checkpoint("run/last.pt")
    args = m.parse_args([])
    vars(args).update(last["args"], out="run")
    net = torch.nn.Linear(400, 400)
    optimizer = torch.optim.AdamW(net.parameters())
    g = random.Random(0)
    for number in range(20):
        child = os.fork()
        if child == 0:
            try:
                for epoch in range(len(rows("run")) + 1, 10**6):
                    m.save_epoch(args, net, optimizer, last["history"] * epoch, epoch)
            finally:
                os._exit(1)
        time.sleep(g.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])           # it was still saving
        files = [file for file in Path("run").iterdir() if not file.name.startswith(".")]
        assert {"best.pt", "last.pt", "log.jsonl"} <= {file.name for file in files}
        for file in files:
            if file.suffix == ".pt":
                state = checkpoint(file)
                before.add((file.name, state["epoch"]))
        assert all(row["epoch"] == 1 for row in rows("run"))
    assert len(before) > 4                                       # it did save, at different epochs

def whole(folder):
    """Every file that is not a temporary one can be read to its end."""
    for file in Path(folder).rglob("[!.]*"):
        if file.suffix == ".pt":
            checkpoint(file)
        elif file.suffix in (".json", ".jsonl"):
            [json.loads(line) for line in file.read_text().splitlines() if file.suffix == ".jsonl"] or \
                json.loads(file.read_text())
        elif file.suffix == ".pt2":
            assert zipfile.ZipFile(file).testzip() is None
        elif file.suffix == ".png":
            Image.open(file).load()

FORKER = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
from conftest import LIGHT, load
signal.signal(signal.SIGINT, signal.default_int_handler)       # a background job ignores it
mains = {name: load(name).main for name in LIGHT}
for line in sys.stdin:
    name, folder, words = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            mains[name](words)
            os._exit(0)
        except SystemExit as stop:
            os._exit(stop.code)
        finally:
            os._exit(9)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""

@pytest.fixture(scope="module")
def forked():
    """forked(script, words) -> the number of a process in which its main runs, and a function that waits for the
    status. It is forked from one that imports the scripts and trains nothing: once autograd has threads (after an
    export, for instance), it refuses to work in a fork."""
    forker = subprocess.Popen([sys.executable, "-c", FORKER, str(ROOT / "tests")], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    answer = lambda: int(forker.stdout.readline())
    def call(name, words):
        print(json.dumps([name, os.getcwd(), words]), file=forker.stdin, flush=True)
        return answer(), answer
    yield call
    forker.stdin.close()
    forker.wait()

@few
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", (3, pytest.param(40, marks=pytest.mark.slow)))
def test_killed_at_any_moment(name, argv, here, kills, forked):
    """Reading photos, training, saving, exporting: killed and stopped at random moments and continued,
    a run loses no whole epoch and ends like one that was left alone, bit by bit."""
    m, g = load(name), random.Random(kills)
    words, began = argv(name, "--epochs", "6"), time.monotonic()
    m.main([*words, "--out", "straight"])
    length = time.monotonic() - began
    caches = {file: file.read_bytes() for file in Path("data/cache").iterdir()}
    shutil.rmtree("data")
    epochs, number = 0, 0
    while number < kills or not Path("run/result.json").exists():
        if number < kills and Path("run/result.json").exists():        # done too early: once more
            shutil.rmtree("run")
            epochs = 0
        more = ["--resume"] if Path("run/last.pt").exists() else []
        child, status_of = forked(name, [*words, "--out", "run", *more])
        if number < kills:
            time.sleep(g.uniform(0, length / 2))
            os.kill(child, g.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT)))
            number += 1
        status = status_of()
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, 130), status
        whole("run")
        now = checkpoint("run/last.pt")["epoch"] if Path("run/last.pt").exists() else 0
        assert now >= epochs, "a finished epoch is lost"
        epochs = now
    assert timeless("run") == timeless("straight")
    assert same_weights(checkpoint("run/last.pt")["model"], checkpoint("straight/last.pt")["model"])
    assert not list(Path("run").glob(".*"))
    assert all(file.read_bytes() == content for file, content in caches.items())

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", (4, pytest.param(40, marks=pytest.mark.slow)))
def test_killed_while_evaluating(argv, kills):
    """Scores and pictures are the old or the new ones, and the next call gives the same scores."""
    load("unet").main(argv("unet", "--out", "run", "--epochs", "1"))
    words, began = ["run", "--as-published", "--json", "scores.json"], time.monotonic()
    load("evaluate").main(words)
    length, g = time.monotonic() - began, random.Random(kills)
    scores = [record["scores"] for record in json.loads(Path("scores.json").read_text())]
    for number in range(kills):
        child = os.fork()
        if child == 0:
            try:
                load("evaluate").main(words)
            finally:
                os._exit(0)
        time.sleep(g.uniform(0, length))
        os.kill(child, g.choice((signal.SIGKILL, signal.SIGINT)))
        os.waitpid(child, 0)
        whole("run")
        assert [record["scores"] for record in json.loads(Path("scores.json").read_text())] == scores
    load("evaluate").main(words)
    assert [record["scores"] for record in json.loads(Path("scores.json").read_text())] == scores
