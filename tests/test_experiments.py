"""experiments.py: fair plans, nothing run twice, tables from records. The children are stubs but
for the last tests."""

import json
import math
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import load, start

e = load("experiments")
QUICK = ["labels", "--data", "pets", "--seeds", "2"]


def flag(command, name, default=None):
    if name in command:
        return command[command.index(name) + 1]
    return default


def planned(*argv):
    """The arguments of one experiment, and {label: arm} of its plan."""
    args = e.parse_args([*map(str, argv)])
    return args, {arm["label"]: arm for arm in e.plan(args, args.names[0])}


# --- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["toy", "pets"])
@pytest.mark.parametrize("name", e.EXPERIMENTS)
def test_every_command_is_accepted(name, data, here, monkeypatch):
    """By the parser of the script that it starts; with the data of all experiments there."""
    for folder in e.FOLDERS:
        Path("data", folder).mkdir(parents=True)
    args, arms = planned(name, "--data", data)
    if name == "imbalance" and data == "toy":
        assert not arms  # drawn pets have no breeds
        return
    assert len(arms) >= 2
    monkeypatch.setattr(
        load("finetune"), "load_checkpoint", lambda *_: {"args": {"net": [32, 8, 1, 2]}}
    )
    monkeypatch.setattr(Path, "exists", lambda path: True)  # that of the pre-training
    for arm in arms.values():
        command = e.training_of(args, arm, 1, 1e-3)
        script = command[0].removesuffix(".py")
        parsed = load(script).parse_args(command[1:])
        assert (parsed.seed, parsed.lr, parsed.epochs) == (1, 1e-3, arm["epochs"])
        if arm["pre"]:
            before = e.words_of(args, arm["pre"], 1)
            assert load("pretrain").parse_args(before[1:]).seed == 1
            assert parsed.init == f"{before[-1]}/best.pt"
        else:
            assert parsed.init == "none"


@pytest.mark.parametrize("data", ["toy", "pets"])
def test_both_arms_take_as_many_steps(data):
    args, arms = planned("labels", "--data", data)
    for frac in e.FRACS[data]:
        one, other = arms[f"pre-trained, {100 * frac:g} %"], arms[f"scratch, {100 * frac:g} %"]
        assert one["epochs"] == other["epochs"]
        assert one["epochs"] * frac == pytest.approx(args.epochs, rel=0.05)
    unlabelled, labelled = e.PHOTOS[data]
    steps = args.pretrain_epochs * unlabelled + args.epochs * labelled
    for frac in [1.0, 0.1]:
        longer = arms[f"scratch, as long, {100 * frac:g} %"]
        assert longer["epochs"] * frac * labelled == pytest.approx(steps, rel=0.05)
        assert longer["like"]["label"] == f"scratch, {100 * frac:g} %"


def test_half_of_the_photos_as_many_steps():
    args, arms = planned("pretraining", "--data", "pets")
    half, whole = [e.words_of(args, arms[label]["pre"], 0) for label in ("half", "all")]
    assert (flag(half, "--frac"), flag(whole, "--frac")) == ("0.5", "1.0")
    assert int(flag(half, "--epochs")) == 2 * int(flag(whole, "--epochs"))


def test_the_control_has_as_many_photos_as_the_imbalanced_set():
    """Of breeds of equal size: 12 of cats, of which 3 are kept, and 25 of dogs."""
    _, arms = planned("imbalance", "--data", "pets")
    share = float(flag(arms["same number, all breeds"]["command"].split(), "--frac"))
    assert share == pytest.approx((3 + 25) / (12 + 25), abs=0.005)


def test_a_folder_belongs_to_its_flags():
    folders = set()
    for size, seed, lr in [(32, 0, 1e-3), (64, 0, 1e-3), (32, 1, 1e-3), (32, 0, 2e-3)]:
        args, arms = planned("labels", "--size", size)
        arm = arms["scratch, 100 %"]
        folders.add(e.training_of(args, arm, seed, lr)[-1])
        assert e.training_of(args, arm, seed, lr)[-1] in folders
    assert len(folders) == 4


# --- with stubs in the place of the children -----------------------------------------------------


@pytest.fixture
def stubs(here, monkeypatch):
    """run_child and evaluate.py write made-up results -> the list of commands that ran. mIoU falls
    with the distance of the learning rate from 1e-3 and rises with the seed and pre-training."""
    ran = []

    def run_child(command, env, may_diverge):
        ran.append(command)
        rate, folder = float(flag(command, "--lr")), Path(command[-1])
        value = 0.6 - abs(math.log10(rate / 1e-3)) / 10 + int(flag(command, "--seed")) / 100
        if flag(command, "--init") != "none":
            value += 0.05
        folder.mkdir(parents=True)
        result = {"metrics": {"val_miou": value}, "args": {}}
        (folder / "result.json").write_text(json.dumps(result))
        row = {"epoch": 1, "seconds": 60.0, "val_miou": value}
        (folder / "log.jsonl").write_text(json.dumps(row) + "\n")

    def evaluate(words, **_):
        words, records = [str(word) for word in words], []
        for word in words:
            if Path(word, "result.json").exists():
                value = (
                    e.result_of([word])["metrics"]["val_miou"] - float(flag(words, "--blur")) / 1000
                )
                keys = ["accuracy", "miou", "cat_miou", "dice", "D1_dice", "D1_iou"]
                record = {"parameters": 7, "multiply_adds": 10**6, "device": "cpu", "torch": "2"}
                record |= {"size": [32, 32], "data": "toy", "photos": 5, "run": word}
                records.append(record | {"scores": dict.fromkeys(keys, value) | {"classes": {}}})
        Path(flag(words, "--json")).write_text(json.dumps(records))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(e, "run_child", run_child)
    monkeypatch.setattr(subprocess, "run", evaluate)
    return ran


def results():
    return json.loads(Path("checkpoints/experiments/results.json").read_text())


def test_search_seeds_and_tables(stubs, capsys):
    e.main(["labels", "--data", "pets", "--seeds", "3"])
    pre = [command for command in stubs if command[0] == "pretrain.py"]
    tuned = [command for command in stubs if command[0] == "finetune.py"]
    assert [flag(command, "--seed") for command in pre] == ["0", "1", "2"] and stubs[0] is pre[0]
    assert len(tuned) == 4 * 2 * (3 + 2) + 2 * 3  # a search in two arms, none in the longer one
    later = [command for command in tuned if flag(command, "--seed") != "0"]
    assert {flag(command, "--lr") for command in later} == {"0.001"}
    assert len(results()) == (4 * 2 + 2) * 3 and {record["lr"] for record in results()} == {1e-3}
    out = capsys.readouterr().out
    assert "| pre-trained, 10 % | 0.0010 | 0.6600 ± 0.0100 | 0.6600 ± 0.0100 |" in out
    assert "pre-trained, 10 %: test mIoU +0.0500" in out and "D1 .829 / .719" in out
    assert Path("checkpoints/experiments/results.md").read_text() in out
    page = Path("checkpoints/experiments/report.html").read_text()
    assert page.count("<svg") == 1 and "http" not in page
    for record in results():  # the page shows how each figure came about
        assert record["command"] in page and (record["pretraining"] or "") in page


def test_nothing_is_run_twice(stubs):
    e.main(QUICK)
    before = len(stubs)
    e.main(QUICK)
    assert len(stubs) == before
    e.main(["pretraining", *QUICK[1:]])
    new = stubs[before:]
    assert {flag(command, "--frac") for command in new if command[0] == "pretrain.py"} == {"0.5"}
    kept = dict.fromkeys(record["experiment"] for record in results())
    assert list(kept) == ["labels", "pretraining"]  # what else stands there stays
    assert "### labels" in Path("checkpoints/experiments/results.md").read_text()


def test_a_rate_that_is_too_high_loses_the_search(stubs, monkeypatch, refuse):
    good, bad = e.run_child, {1e-3}

    def run_child(command, env, may_diverge):
        if command[0] == "pretrain.py" or float(flag(command, "--lr")) not in bad:
            good(command, env, may_diverge)

    monkeypatch.setattr(e, "run_child", run_child)
    e.main(["pretraining", *QUICK[1:]])
    assert {record["lr"] for record in results()} == {3e-3}
    bad |= {3e-3, 1e-2}
    assert "not finite at any" in refuse("experiments", "blur", *QUICK[1:])


def test_masks_are_screened_with_one_seed(stubs):
    e.main(["masks", "--data", "pets", "--seeds", "3"])
    seeds = {label: len(group) for label, group in e.grouped(results(), "masks").items()}
    assert sorted(seeds.values()) == [1] * 8 + [3] * 3 and seeds["no pre-training"] == 3


def test_blur_scores_without_training(stubs):
    e.main(["models", "--seeds", "1"])
    before = len(stubs)
    e.main(["blur", "--seeds", "1"])
    assert len(stubs) == before
    blurred = [record for record in results() if record["experiment"] == "blur"]
    assert len(blurred) == 5 * 5 and blurred[-1]["arm"].endswith(", 100 %")


def test_dry_run(stubs, capsys):
    e.main([*QUICK, "--dry-run"])
    out = capsys.readouterr().out
    assert stubs == [] and not Path("checkpoints").exists()
    assert out.count("python pretrain.py") == 2
    e.main(["quick", "--dry-run"])
    assert "--data toy" in capsys.readouterr().out


def test_table_of_a_file(stubs, capsys):
    e.main(QUICK)
    capsys.readouterr()
    e.main(["--table", "checkpoints/experiments/results.json"])
    want = Path("checkpoints/experiments/results.md").read_text()
    assert capsys.readouterr().out.strip() == want.strip()


def test_a_ctrl_c_says_how_to_go_on(stubs, monkeypatch, refuse):
    def stopped(command, env, may_diverge):
        raise KeyboardInterrupt

    monkeypatch.setattr(e, "run_child", stopped)
    assert "goes on" in refuse("experiments", *QUICK)


def test_bad_input(refuse):
    assert "labels" in refuse("experiments")
    assert "everything" in refuse("experiments", "everything")
    assert "alone" in refuse("experiments", "quick", "camvid")
    assert "multiple of 32" in refuse("experiments", "labels", "--size", "100")


# --- statistics ----------------------------------------------------------------------------------


def test_a_difference_is_taken_seed_by_seed():
    one = {0: {"miou": 0.52}, 1: {"miou": 0.62}, 2: {"miou": 0.72}}
    other = {0: {"miou": 0.5}, 1: {"miou": 0.6}, 2: {"miou": 0.7}}
    assert e.paired(one, other) == (pytest.approx(0.02), pytest.approx(0, abs=1e-12))
    assert e.spread([0.5, 0.6, 0.7])[1] == pytest.approx(0.1)
    assert e.cell([0.5, 0.6, 0.7]) == "0.6000 ± 0.1000" and e.cell([0.5]) == "0.5000"
    assert e.cell([1234567]) == "1,234,567" and e.cell([None]) == "-"


def made_up(experiment, scores):
    """Records of one experiment: {arm: mIoU of each seed}."""
    records = []
    for arm, values in scores.items():
        for seed, miou in enumerate(values):
            record = {"experiment": experiment, "arm": arm, "seed": seed, "miou": miou}
            record |= {"size": [32, 32], "data": "toy", "photos": 9, "device": "cpu", "torch": "2"}
            records.append(record)
    return records


def differences(records):
    lines = e.markdown(records, records[0]["experiment"]).splitlines()
    return [line for line in lines if line.startswith("- ")]


def test_differences_stand_below_the_table():
    """Of every arm that has one beside which it stands, with the spread of its differences."""
    scores = {
        "pre-trained, 10 %": [0.52, 0.621],
        "scratch, 10 %": [0.5, 0.6],
        "scratch, as long, 10 %": [0.55, 0.651],
    }
    assert differences(made_up("labels", scores)) == [
        "- pre-trained, 10 %: test mIoU +0.0205 ± 0.0007 against scratch, 10 %, seed by seed.",
        "- pre-trained, 10 %: test mIoU -0.0300 against scratch, as long, 10 %, seed by seed.",
    ]
    scores = {"all": [0.5], "half": [0.625], "none": [0.25], "none, as long": [0.75]}
    assert differences(made_up("pretraining", scores)) == [
        "- all: test mIoU +0.2500 against none, seed by seed.",
        "- all: test mIoU -0.2500 against none, as long, seed by seed.",
        "- half: test mIoU +0.3750 against none, seed by seed.",
        "- half: test mIoU -0.1250 against none, as long, seed by seed.",
        "- none, as long: test mIoU +0.5000 against none, seed by seed.",
    ]


def test_a_chart_shows_every_run():
    groups = e.grouped(made_up("labels", {"x & y": [0.5, 0.6], "z": [0.4]}), "labels")
    svg = e.chart(groups)
    assert svg.count("<circle") == 3 and "x &amp; y" in svg
    assert "nan" not in e.chart({"alone": groups["z"]})


# --- children ------------------------------------------------------------------------------------


@pytest.fixture
def child(here, monkeypatch):
    """child(text): run_child starts a script with that text -> what run_all answers."""
    monkeypatch.setattr(e, "HERE", here)
    args = e.parse_args(["labels"])

    def run(text, may_diverge=False):
        Path("unet.py").write_text(f"import sys\n{text}\n")
        e.run_all(args, [["unet.py", "--out", "checkpoints/unet-1"]], may_diverge)

    return run


def test_the_error_of_a_child_is_its_last_line(child):
    with pytest.raises(SystemExit, match="no data"):
        child("print('a header', flush=True)\nsys.exit('no data')")
    assert Path("checkpoints/unet-1.log").read_text().splitlines() == ["a header", "no data"]


def test_a_child_that_diverges_ends_a_training_but_not_a_search(child):
    text = "sys.exit('the loss of epoch 2 is not finite: try --lr 1e-4')"
    child(text, may_diverge=True)
    with pytest.raises(SystemExit, match="not finite"):
        child(text)


@pytest.mark.slow
def test_a_grid_survives_kills(tmp_path, kills=8):
    """Stopped at random moments: what is finished is never done again, and the end is reached."""
    words = ["pretraining", "--epochs", "1", "--pretrain-epochs", "1"]
    g, done = random.Random(kills), {}

    def finished():
        found = tmp_path.glob("checkpoints/experiments/*/result.json")
        return {path: path.stat().st_mtime_ns for path in found}

    for number in range(kills + 1):
        child = start("experiments", *words, cwd=tmp_path)
        if number < kills:
            time.sleep(g.uniform(2, 12))
            child.send_signal(g.choice([signal.SIGINT, signal.SIGKILL]))
        out, err = child.communicate(timeout=600)
        assert child.returncode in (0, 1, -9) and "Traceback" not in err, out + err
        assert {path: finished()[path] for path in done} == done
        done = finished()
    assert child.returncode == 0
    assert (tmp_path / "checkpoints/experiments/results.json").exists()


def test_no_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        e.parse_args(["quick", "--seeds", "0"])
    assert "--seeds" in capsys.readouterr().err
