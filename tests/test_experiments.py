"""experiments.py: fair plans, nothing run twice, tables from records; the children are stubs but for
the slow test."""
import html, json, math, random, re, signal, subprocess, sys, time
from pathlib import Path

import pytest

from conftest import ROOT, SCRIPTS, load, start

if "experiments" not in SCRIPTS:
    pytest.skip("no experiments.py", allow_module_level=True)
e = load("experiments")

def settled(*argv):
    """The arguments as main settles them."""
    args = e.parse_args([*map(str, argv)])
    args.data = args.data or "toy"
    for name, value in e.PROTOCOL[args.data].items():
        if vars(args).get(name) is None:
            setattr(args, name, value)
    args.children, args.planned, args.stopped = [], [], False
    return args

def flag(command, name, default=None):
    return command[command.index(name) + 1] if name in command else default

@pytest.mark.parametrize("data", ("toy", "pets"))
@pytest.mark.parametrize("name", e.GRIDS)
def test_every_command_is_accepted(name, data, tmp_path):
    """By the parser of the script that it starts; with the data of all experiments there."""
    for folder in ("camvid", "drive", "puzzle"):
        (tmp_path / folder).mkdir()
    args = settled("--data", data, "--root", tmp_path)
    arms = e.plan(name, args)
    assert len(arms) >= 2 and len({a["label"] for a in arms}) == len(arms)
    for a in arms:
        command = e.training_of(args, a, 1, 1e-3)
        parsed = load(command[0][:-3]).parse_args(command[1:])
        assert parsed.seed == 1 and parsed.lr == 1e-3 and parsed.epochs == a["epochs"]
        if a["pre"]:
            before = e.pretraining_of(args, a, 1)
            assert load("pretrain").parse_args(before[1:]).seed == 1 and parsed.init == f"{before[-1]}/best.pt"
        elif a["script"] == "finetune":
            assert parsed.init == "none"

@pytest.mark.parametrize("data", ("toy", "pets"))
def test_both_arms_take_as_many_steps(data):
    args = settled("--data", data)
    arms = {a["label"]: a for a in e.plan("labels", args)}
    for frac in args.fracs:
        one, other = (arms[f"{kind}, {100 * frac:g} %"] for kind in ("pre-trained", "scratch"))
        assert one["epochs"] == other["epochs"]
        assert one["epochs"] * frac == pytest.approx(args.epochs, rel=0.05)
    unlabelled, labelled = args.photos
    for frac in (args.fracs[0], args.fracs[-1]):
        longer = arms[f"scratch, as long, {100 * frac:g} %"]
        assert longer["epochs"] * frac * labelled == pytest.approx(
            args.pretrain_epochs * unlabelled + args.epochs * labelled, rel=0.05)
        assert longer["like"] == f"scratch, {100 * frac:g} %"

def test_half_of_the_photos_as_many_steps():
    args = settled("--data", "pets")
    whole, half = [a for a in e.plan("pretraining", args) if a["label"] in ("all", "half")]
    share, epochs = (lambda a, name: float(flag(e.pretraining_of(args, a, 0), name, 1))), "--epochs"
    assert share(half, "--frac") == 0.5 and share(half, epochs) == 2 * share(whole, epochs) == 2 * args.pretrain_epochs

def test_quick_keeps_to_drawn_pets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("camvid", "drive", "puzzle"):
        Path("data", name).mkdir(parents=True)
    e.main(["quick", "--dry-run"])
    out = capsys.readouterr().out
    assert "--data toy" in out and not {"camvid", "drive", "puzzle"} & {word.rpartition("/")[2] for word in out.split()}

def test_the_control_has_as_many_photos_as_the_imbalanced_set():
    """Of 3,310 training photos, a tenth of each breed being held back."""
    cats, dogs, kept = 12, 25, 3
    control = next(a for a in e.plan("imbalance", settled("--data", "pets")) if "same number" in a["label"])
    assert float(flag(control["flags"], "--frac")) == pytest.approx((kept + dogs) / (cats + dogs), abs=0.005)

def test_a_folder_belongs_to_its_flags():
    args, other = settled(), settled("--size", 48)
    a, b = e.plan("labels", args)[0], e.plan("labels", other)[0]
    folder = lambda args, a, seed=0, lr=1e-3: e.training_of(args, a, seed, lr)[-1]
    assert folder(args, a) == folder(args, a)
    assert len({folder(args, a), folder(other, b), folder(args, a, 1), folder(args, a, 0, 2e-3)}) == 4

# --- with stubs in the place of the children --------------------------------------------------------

@pytest.fixture
def stubs(here, monkeypatch):
    """run_child and evaluate.py write made-up results -> the list of commands that ran. mIoU falls
    with the distance of the learning rate from 1e-3 and rises with the seed."""
    ran = []
    def child(args, command, env, search):
        ran.append(command)
        seed, lr = int(flag(command, "--seed")), float(flag(command, "--lr", 1e-3))
        Path(command[-1]).mkdir(parents=True)
        value = 0.6 - abs(math.log10(lr / 1e-3)) / 10 + seed / 100 + (flag(command, "--init") != "none") / 20
        Path(command[-1], "result.json").write_text(json.dumps({
            "miou": value + 0.1, "val_miou": value, "total_seconds": 60.0, "images_per_second": 9.0, "memory_gb": None,
            "photos": 22974, "args": {"data": flag(command, "--data"), "size": [int(flag(command, "--size"))] * 2,
                                      "epochs": int(flag(command, "--epochs")),
                                      "frac": float(flag(command, "--frac", 1))}}))
        return 0
    def evaluate(command, **_):
        folders = [word for word in map(str, command) if Path(word, "result.json").exists()]
        blur = float(flag([*map(str, command)], "--blur"))
        Path(flag([*map(str, command)], "--json")).write_text(json.dumps([{
            "parameters": 7, "multiply_adds": 10**6, "device": "cpu", "torch": "2", "size": [32, 32], "data": "toy",
            "photos": 5, "scores": {key: json.loads(Path(f, "result.json").read_text())["val_miou"] - blur / 1000
                                    for key in ("accuracy", "miou", "cat_miou", "dice", "D1_dice", "D1_iou")}}
            for f in folders]))
    monkeypatch.setattr(e, "run_child", child)
    monkeypatch.setattr(subprocess, "run", evaluate)
    return ran

def test_search_seeds_tables(stubs, monkeypatch, capsys):
    e.main(["labels", "--data", "pets", "--seeds", "3"])
    pre = [c for c in stubs if c[0] == "pretrain.py"]
    tuned = [c for c in stubs if c[0] == "finetune.py"]
    assert [flag(c, "--seed") for c in pre] == ["0", "1", "2"] and stubs[0] is pre[0]
    assert len(tuned) == 4 * 2 * (3 + 2) + 2 * 3                       # a search in two arms, none in the longer one
    assert {flag(c, "--lr") for c in tuned if flag(c, "--seed") != "0"} == {"0.001"}
    records = json.loads(Path("checkpoints/experiments/results.json").read_text())
    assert len(records) == (4 * 2 + 2) * 3 and {r["lr"] for r in records} == {1e-3}
    out = capsys.readouterr().out
    assert "| pre-trained, 10 % | 0.0010 | 0.7600 ± 0.0100 | 0.6600 ± 0.0100 | 0.6600 ± 0.0100 |" in out
    assert "pre-trained, 10 %: test mIoU +0.0500" in out
    assert "D1 .829 / .719" in out and Path("checkpoints/experiments/results.md").read_text() in out
    page = Path("checkpoints/experiments/report.html").read_text()
    assert page.count("<svg") == 1 and "python finetune.py" in page and "http" not in page
    for r in records:                                                  # the report shows how each figure came about
        assert r["pretraining"] is None if r["arm"].startswith("scratch") else html.escape(r["pretraining"]) in page
        assert html.escape(r["command"]) in page
    before = len(stubs)
    e.main(["labels", "--data", "pets", "--seeds", "3"])               # nothing is run twice
    assert len(stubs) == before
    e.main(["labels", "pretraining", "--data", "pets", "--seeds", "3"])
    assert {flag(c, "--frac") for c in stubs[before:]} == {"0.5", "1.0"}    # only half the photos is new
    assert len(stubs) - before == 3 + 5
    before = len(stubs)
    e.main(["imbalance", "--data", "pets", "--seeds", "1"])            # what else stands there stays
    records = json.loads(Path("checkpoints/experiments/results.json").read_text())
    assert list(dict.fromkeys(r["experiment"] for r in records)) == ["labels", "pretraining", "imbalance"]
    assert "### labels" in Path("checkpoints/experiments/results.md").read_text()

def test_results_of_what_is_skipped_stay(stubs, here):
    (here / "disk/drive").mkdir(parents=True)
    e.main(["retina", "--data", "toy", "--seeds", "1", "--root", "disk"])
    e.main(["retina", "imbalance", "--data", "toy", "--seeds", "1", "--root", "elsewhere"])
    records = json.loads(Path("checkpoints/experiments/results.json").read_text())
    assert {r["experiment"] for r in records} == {"retina", "imbalance"}

def test_a_network_that_finds_nothing_has_a_score(stubs, monkeypatch):
    """A validation score of 0 is not a loss that is not finite."""
    good = e.run_child
    def child(args, command, env, search):
        code = good(args, command, env, search)
        path = Path(command[-1], "result.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"val_miou": 0.0}))
        return code
    monkeypatch.setattr(e, "run_child", child)
    e.main(["imbalance", "--data", "toy", "--seeds", "1"])
    assert Path("checkpoints/experiments/results.json").exists()

def test_a_rate_that_is_too_high_loses_the_search(stubs, monkeypatch, refuse):
    good = e.run_child
    def child(args, command, env, search):
        if command[0] != "pretrain.py" and float(flag(command, "--lr")) in bad:
            if search:
                return None
            raise RuntimeError(f"{command[0]}: the loss is not finite")
        return good(args, command, env, search)
    monkeypatch.setattr(e, "run_child", child)
    bad = {1e-3}                                                       # the best one of the stubs
    e.main(["pretraining", "--data", "pets", "--seeds", "2"])
    assert {r["lr"] for r in json.loads(Path("checkpoints/experiments/results.json").read_text())} == {3e-3}
    bad |= {3e-3, 1e-2}
    assert "not finite at any" in refuse("experiments", "blur", "--data", "pets", "--seeds", "1")

def test_the_longer_arm_follows_from_the_photos_that_were_there(stubs, monkeypatch):
    good = e.run_child
    def child(args, command, env, search):
        code = good(args, command, env, search)
        path = Path(command[-1], "result.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"photos": 2 * 3310}))
        return code
    monkeypatch.setattr(e, "run_child", child)
    e.main(["labels", "--data", "pets", "--seeds", "1", "--epochs", "3", "--pretrain-epochs", "5"])
    assert any(flag(c, "--frac") == "1.0" and flag(c, "--epochs") == str(3 + 2 * 5) for c in stubs)
    assert any(flag(c, "--frac") == "0.1" and flag(c, "--epochs") == str(10 * (3 + 2 * 5)) for c in stubs)

def test_masks_are_screened_with_one_seed(stubs):
    e.main(["masks", "--data", "pets", "--seeds", "3"])
    records = json.loads(Path("checkpoints/experiments/results.json").read_text())
    seeds = {label: len(group) for label, group in e.grouped(records, "masks").items()}
    assert len(seeds) == 11 and sorted(seeds.values()) in ([1] * 8 + [3] * 3, [1] * 7 + [3] * 4)
    assert seeds["no pre-training"] == 3
    assert max(n for label, n in seeds.items() if "0.05-0.25" in label) == 3

def test_blur_scores_without_training(stubs):
    e.main(["models", "--data", "toy", "--seeds", "1"])
    before = len(stubs)
    e.main(["blur", "--data", "toy", "--seeds", "1"])
    assert len(stubs) == before
    records = json.loads(Path("checkpoints/experiments/results.json").read_text())
    records = [record for record in records if record["experiment"] == "blur"]
    assert len(records) == 5 * 5 and records[-1]["arm"] == "U-Net, 100 %"

def test_dry_run(stubs, capsys):
    e.main(["labels", "--data", "pets", "--seeds", "2", "--dry-run"])
    out = capsys.readouterr().out
    assert stubs == [] and not Path("checkpoints").exists()
    assert out.count("python pretrain.py") == 2 and "unknown length" in out
    e.main(["labels", "--data", "pets", "--seeds", "1"])
    e.main(["labels", "--data", "pets", "--seeds", "2", "--dry-run"])
    assert re.search(r"11 runs, about \d+ min", capsys.readouterr().out)
    Path("data/puzzle").mkdir(parents=True)             # U-Net on pets says nothing of ten photos
    e.main(["models", "--data", "pets", "--seeds", "1"])
    capsys.readouterr()
    e.main(["puzzle", "--data", "pets", "--seeds", "1", "--dry-run"])
    assert "unknown length" in capsys.readouterr().out

def test_a_child_that_fails_is_named(stubs, monkeypatch, refuse):
    def broken(args, command, env, search):
        raise RuntimeError(f"{command[0]}: no space left")
    monkeypatch.setattr(e, "run_child", broken)
    assert "pretrain.py: no space left" in refuse("experiments", "labels", "--data", "toy")

def test_a_stop_starts_nothing_more(stubs, monkeypatch, capsys):
    started = []
    def stopped(args, command, env, search):
        started.append(command)
        time.sleep(0.2)
        return 130
    monkeypatch.setattr(e, "run_child", stopped)
    with pytest.raises(SystemExit) as stop:
        e.main(["labels", "--data", "pets", "--seeds", "1"])
    waiting = settled("--data", "pets")
    commands = [e.pretraining_of(waiting, a, seed) for a in e.plan("masks", waiting)[1:] for seed in (0, 1)]
    with pytest.raises(KeyboardInterrupt):
        e.run_all(waiting, commands)
    assert stop.value.code == 130 and "goes on" in capsys.readouterr().out
    assert len(started) <= 1 + 2 < len(commands)      # one each, and one that the worker had taken already

def test_bad_input(refuse, here):
    assert "labels" in refuse("experiments")
    assert "everything" in refuse("experiments", "everything")
    assert "--seeds" in refuse("experiments", "quick", "--seeds", "0")
    assert "drawn pets" in refuse("experiments", "quick", "camvid")
    assert "multiple of 32" in refuse("experiments", "labels", "models", "--data", "pets", "--size", "100")
    assert "drawn pets" in refuse("experiments", "quick", "--data", "pets")
    Path("r.json").write_text("[1, 2]")
    assert "r.json" in refuse("experiments", "--table", "r.json")
    assert "nowhere" in refuse("experiments", "--table", "nowhere.json")

def test_table_of_a_file(stubs, capsys):
    e.main(["imbalance", "--data", "toy", "--seeds", "2"])
    capsys.readouterr()
    e.main(["--table", "checkpoints/experiments/results.json"])
    assert capsys.readouterr().out.strip() == Path("checkpoints/experiments/results.md").read_text().strip()

def test_differences_stand_below_the_table():
    """Every arm that has one beside which it stands, with the spread of its differences."""
    def record(arm, seed, miou, experiment):
        return {"experiment": experiment, "arm": arm, "seed": seed, "miou": miou, "size": [32, 32], "data": "toy",
                "photos": 9, "device": "cpu", "torch": "2.11"}
    records = [record(arm, s, base + gain + 0.001 * s * (gain > 0), "labels") for s, base in enumerate((0.5, 0.6))
               for arm, gain in (("pre-trained, 10 %", 0.02), ("scratch, 10 %", 0), ("scratch, as long, 10 %", 0.05))]
    assert [line for line in e.markdown(records, "labels").splitlines() if line.startswith("- ")] == [
        "- pre-trained, 10 %: test mIoU +0.0205 ± 0.0007 against scratch, 10 %, seed by seed.",
        "- pre-trained, 10 %: test mIoU -0.0300 against scratch, as long, 10 %, seed by seed."]
    records = [record(arm, 0, miou, "pretraining") for arm, miou in (("all", 0.5), ("half", 0.625), ("none", 0.25), ("none, as long", 0.75))]
    assert [line for line in e.markdown(records, "pretraining").splitlines() if line.startswith("- ")] == [
        "- all: test mIoU +0.2500 against none, seed by seed.", "- all: test mIoU -0.2500 against none, as long, seed by seed.",
        "- half: test mIoU +0.3750 against none, seed by seed.", "- half: test mIoU -0.1250 against none, as long, seed by seed.",
        "- none, as long: test mIoU +0.5000 against none, seed by seed."]

# --- statistics -------------------------------------------------------------------------------------

def test_a_difference_is_taken_seed_by_seed():
    one, other = ({s: {"miou": v + d} for s, v in enumerate((0.5, 0.6, 0.7))} for d in (0.02, 0))
    mean, std = e.paired(one, other)
    assert mean == pytest.approx(0.02) and std == pytest.approx(0, abs=1e-12)
    assert e.spread([0.5, 0.6, 0.7])[1] == pytest.approx(0.1)
    assert e.cell([0.5, 0.6, 0.7]) == "0.6000 ± 0.1000" and e.cell([0.5]) == "0.5000"
    assert e.cell([1234567]) == "1,234,567" and e.cell([None]) == "-"

def test_chart_shows_every_point():
    svg = e.chart("a", {"x & y": [(1, 0.5, 0.1), (2, 0.6, 0)], "z": [(1, 0.4, 0)]}, "labels")
    assert svg.count("<circle") == 3 and svg.count("<polyline") == 2 and "x &amp; y" in svg
    assert "nan" not in e.chart("one point", {"a": [(1, 0.5, 0)]}, "x")

def test_chart_of_the_masks():
    """No mask stands at 0, the squares at their share of the area, patches at theirs."""
    labels = ("no pre-training", "one square of 5-25 % of the side", "one square of 25-50 % of the side", "0.5-0.75 of the area, 8 px")
    svg = e.charts([{"experiment": "masks", "arm": label, "seed": 0, "miou": 0.5} for label in labels], "masks")
    for text in ("no pre-training", "one square", "patches of 8 px", ">62.5<", ">15.6<", ">0<"):
        assert text in svg
    assert svg.count("<polyline") == 3 and ">3.25<" not in svg         # too near to 0 for a number of its own

# --- a child of our own -----------------------------------------------------------------------------

@pytest.fixture
def child(tmp_path, monkeypatch):
    """write(text): run_all starts a script with that text -> its arguments and one command."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(e, "HERE", tmp_path)
    def write(text):
        Path("unet.py").write_text("import pathlib, sys, time\n" + text)
        return settled(), ["unet.py", "--out", "checkpoints/unet-1"]
    return write

def test_the_error_of_a_child_is_its_last_line(child):
    args, command = child("print('a header')\nprint('unet.py: error: no data', file=sys.stderr)\nsys.exit(2)")
    with pytest.raises(RuntimeError, match="unet.py: error: no data"):
        e.run_all(args, [command])
    assert Path("checkpoints/unet-1.log").read_text().splitlines() == ["a header", "unet.py: error: no data"]

def test_a_child_that_diverges_ends_a_training_but_not_a_search(child):
    args, command = child("print('epoch 1')\nsys.exit('unet.py: error: the loss is not finite in epoch 2')")
    assert e.run_all(args, [command], True) == [None]
    with pytest.raises(RuntimeError, match="not finite"):
        e.run_all(args, [command])

def test_nothing_goes_on_after_a_failure(child):
    args, command = child("pathlib.Path(sys.argv[2]).mkdir(parents=True)\nif sys.argv[2].endswith('1'):\n"
                          "    sys.exit('unet.py: error: no data')\ntime.sleep(60)")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="no data"):
        e.run_all(args, [command[:2] + [f"checkpoints/unet-{i}"] for i in (1, 2, 3)])
    args.stopped = True                            # as another thread would see it that starts one just then
    with pytest.raises(RuntimeError):
        e.run_child(args, [*command[:2], "checkpoints/unet-4"], None)
    assert time.monotonic() - began < 30 and not Path("checkpoints/unet-3").exists()

# --- real children ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_grid_survives_kills(tmp_path, kills=12):
    """Killed and stopped at random moments: what is finished is never done again, and the end is reached,
    also where a child of the killed call is still training when the next call begins."""
    words = "pretraining --data toy --size 16 --epochs 1 --pretrain-epochs 1 --seeds 1".split()
    g, done = random.Random(kills), {}
    def finished():
        return {p: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoints/experiments/*/result.json")}
    for number in range(kills + 1):
        child = start("experiments", *words, cwd=tmp_path)
        if number < kills:
            time.sleep(g.uniform(2, 12))
            child.send_signal(g.choice((signal.SIGINT, signal.SIGKILL)))
        out, err = child.communicate(timeout=600)
        assert child.returncode in (0, 130, -9, -2) and "Traceback" not in err, out + err
        assert {p: finished()[p] for p in done} == done
        done = finished()
    assert child.returncode == 0 and len(done) == 6
    assert len(json.loads((tmp_path / "checkpoints/experiments/results.json").read_text())) == 4

@pytest.mark.slow
def test_quick_survives_a_stop_and_a_kill(tmp_path):
    """Interrupted and killed in the middle, it goes on without repeating what is finished."""
    def finished():
        return {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoints/experiments/*/result.json")}
    for stop in (signal.SIGINT, signal.SIGKILL):
        before = finished()
        child = start("experiments", "quick", cwd=tmp_path)
        while len(finished()) < len(before) + 2:
            assert child.poll() is None
            time.sleep(0.2)
        child.send_signal(stop)
        out, err = child.communicate(timeout=120)
        assert child.returncode == (130 if stop == signal.SIGINT else -9) and "Traceback" not in err
        assert {name: finished()[name] for name in before} == before
    before = finished()
    done = subprocess.run([sys.executable, str(ROOT / "experiments.py"), "quick"], cwd=tmp_path, timeout=1200)
    assert done.returncode == 0 and {name: finished()[name] for name in before} == before
    records = json.loads((tmp_path / "checkpoints/experiments/results.json").read_text())
    assert {r["experiment"] for r in records} == {"labels", "pretraining", "imbalance", "blur", "masks", "models"}
