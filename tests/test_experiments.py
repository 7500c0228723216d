"""experiments.py: fair plans, nothing run twice, tables from records. The children are stubs but
for the last tests."""

import json
import math
import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import load

e = load("experiments")
TWO = ["labels", "--data", "pets", "--seeds", "2"]


def flag(words, name):
    """The word behind a flag, or None."""
    return words[words.index(name) + 1] if name in words else None


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
    assert len(arms) >= 2 or (name, data) == ("imbalance", "toy")  # drawn pets have no breeds
    state = {"args": {"net": [32, 8, 1, 2, 512]}}
    monkeypatch.setattr(load("finetune"), "load_checkpoint", lambda *_: state)
    for arm in arms.values():
        words = e.training_of(args, arm, 1)
        parsed = load(words[0].removesuffix(".py")).parse_args(words[1:])
        assert parsed.seed == 1 and parsed.out == words[-1]
        if arm["pre"]:
            before = e.words_of(args, arm["pre"], 1)
            assert load("pretrain").parse_args(before[1:]).seed == 1
            assert parsed.init == f"{before[-1]}/best.pt"
        elif words[0] == "finetune.py":
            assert parsed.init == "none"


def photos_passed(command, photos=1):
    """How many photos a training looks at: as many steps, times the batch size."""
    words = command.split()
    return int(flag(words, "--epochs")) * float(flag(words, "--frac")) * photos


@pytest.mark.parametrize("data", ["toy", "pets"])
def test_all_arms_take_as_many_steps(data):
    args, arms = planned("labels", "--data", data)
    unlabelled, labelled = e.PHOTOS[data]
    steps = args.epochs * labelled
    both = args.pretrain_epochs * unlabelled + steps
    for frac in e.FRACS[data]:
        share = f"{100 * frac:g} %"
        tuned, scratch = arms[f"pre-trained, {share}"], arms[f"scratch, {share}"]
        assert tuned["command"] == scratch["command"] and tuned["pre"] and not scratch["pre"]
        assert float(flag(scratch["command"].split(), "--frac")) == frac
        assert photos_passed(scratch["command"], labelled) == pytest.approx(steps, rel=0.05)
    longer = arms["scratch, as long, 100 %"]["command"]
    assert photos_passed(longer, labelled) == pytest.approx(both, rel=0.05)
    _, arms = planned("pretraining", "--data", data)
    assert flag(arms["half"]["pre"].split(), "--frac") == "0.5"
    assert photos_passed(arms["half"]["pre"]) == photos_passed(arms["all"]["pre"])


@pytest.mark.parametrize("data", ["toy", "pets"])
def test_steps_are_those_of_the_label(data):
    _, arms = planned("steps", "--data", data)
    for label, arm in arms.items():
        words = arm["command"].split()
        few = math.ceil(float(flag(words, "--frac")) * e.PHOTOS[data][1])
        steps = int(flag(words, "--epochs")) * math.ceil(few / 16)  # as in finetune_epoch
        assert label.endswith(f", {steps} steps")
        other = label.replace("pre-trained", "scratch")
        assert arm["command"] == arms[other]["command"] and arms[other]["pre"] is None


def test_the_numbers_of_drawn_photos_are_those_of_the_scripts():
    flags, unet, pretrain = ["--size", "32", "--device", "cpu"], load("unet"), load("pretrain")
    unlabelled, _ = pretrain.load_photos(pretrain.parse_args(flags))
    (labelled, _), _ = unet.load_data(unet.parse_args(flags))
    assert (len(unlabelled), len(labelled)) == e.PHOTOS["toy"]


def test_the_control_has_as_many_photos_as_the_imbalanced_set():
    """Of breeds of equal size: 12 of cats, of which 3 are kept, and 25 of dogs."""
    _, arms = planned("imbalance", "--data", "pets")
    control, few = [arms[label] for label in ("same number, all breeds", "three cat breeds")]
    share = flag(control["command"].split(), "--frac")
    assert float(share) == pytest.approx((3 + 25) / (12 + 25), abs=0.005)
    cats = "--cats Maine_Coon Birman Bombay"
    equal = control["command"].replace(share, "1.0").strip() + f" {cats}"
    assert few["command"] == equal and few["pre"] == control["pre"]


def test_a_folder_belongs_to_its_flags():
    folders = set()
    for size, epochs, seed in [(32, 6, 0), (64, 6, 0), (32, 8, 0), (32, 6, 1), (32, 6, 0)]:
        args, arms = planned("labels", "--size", size, "--epochs", epochs)
        folders.add(e.training_of(args, arms["scratch, 100 %"], seed)[-1])
    assert len(folders) == 4


# --- with stubs in the place of the children -----------------------------------------------------


@pytest.fixture
def stubs(here, monkeypatch):
    """run_child and evaluate.py write made-up results -> the list of commands that ran. mIoU rises
    with the seed and with pre-training, and falls with the blur."""
    ran = []

    def run_child(words, threads):
        ran.append(words)
        value, folder = 0.6 + int(flag(words, "--seed")) / 100, Path(words[-1])
        if flag(words, "--init") not in (None, "none"):
            value += 0.05
        folder.mkdir(parents=True)
        result = {"metrics": {"val_miou": value, "seconds": 60.0}}
        (folder / "result.json").write_text(json.dumps(result))

    def evaluate(typed, **_):
        records = []
        for folder in typed[2 : typed.index("--as-published")]:
            result = json.loads(Path(folder, "result.json").read_text())
            value = result["metrics"]["val_miou"] - float(flag(typed, "--blur")) / 1000
            scores = dict.fromkeys(["accuracy", "miou", "dice", "D1_dice", "D1_iou"], value)
            scores |= {"D2_dice": value, "D2_iou": value, "D3_dice": value, "D3_iou": value}
            scores |= {"D4_accuracy": value, "classes": {}}
            record = {"scores": scores, "size": [32, 32], "metrics": result["metrics"]}
            records.append(dict.fromkeys(e.TESTED, 7) | record)
        flag(typed, "--json").write_text(json.dumps(records))

    monkeypatch.setattr(e, "run_child", run_child)
    monkeypatch.setattr(subprocess, "run", evaluate)
    return ran


def results():
    return json.loads(Path("checkpoints/experiments/results.json").read_text())


def test_seeds_and_tables(stubs, capsys):
    e.main(["labels", "--data", "pets", "--seeds", "3"])
    pre, tuned = stubs[:3], stubs[3:]
    started = [(words[0], flag(words, "--seed")) for words in pre]
    assert started == [("pretrain.py", seed) for seed in "012"]
    assert len(tuned) == len(results()) == (4 * 2 + 1) * 3  # shares, arms, as long, seeds
    for words in tuned:  # each starts from the pre-training with its own seed
        if flag(words, "--init") != "none":
            assert flag(words, "--init") == f"{pre[int(flag(words, '--seed'))][-1]}/best.pt"
    out = capsys.readouterr().out
    ours = "0.6600 ± 0.0100"
    assert f"| pre-trained, 10 % | {ours} | {ours} | {ours} | +0.0500" in out
    assert f"| labels: pre-trained, 25 % | D1 dice | 0.829 | {ours} |" in out
    assert Path("checkpoints/experiments/results.md").read_text() in out


def test_a_record_says_how_it_came_about(stubs):
    e.main(TWO)
    ran = {f"python {' '.join(words)}" for words in stubs}
    for record in results():
        assert record["command"] in ran and record["command"].endswith(f"--out {record['run']}")
        assert (record["pretraining"] in ran) == record["arm"].startswith("pre-trained")


def test_nothing_is_run_twice(stubs):
    e.main(TWO)
    before = len(stubs)
    e.main(TWO)
    assert len(stubs) == before
    e.main(["pretraining", *TWO[1:]])
    new = [words for words in stubs[before:] if words[0] == "pretrain.py"]
    assert {flag(words, "--frac") for words in new} == {"0.5"}
    names = {record["experiment"] for record in results()}
    assert names == {"labels", "pretraining"}  # what else stands there stays
    assert "### labels" in Path("checkpoints/experiments/results.md").read_text()


def test_blur_scores_without_training(stubs):
    e.main(["models", "--seeds", "1"])
    before = len(stubs)
    e.main(["blur", "--seeds", "1"])
    assert len(stubs) == before
    blurred = e.grouped(results(), "blur")
    assert len(blurred) == 5 * 5
    assert blurred["U-Net, 100 %"][0]["miou"] == pytest.approx(0.5)


def test_a_chart_shows_every_line(stubs):
    """From left to right in order of x; the axis goes down to 0.50, 300 pixels below its top."""
    e.main(["blur", "--seeds", "1"])
    svg = ElementTree.parse("checkpoints/experiments/blur.svg").getroot()
    lines = svg.findall("{*}polyline")
    assert len(lines) == 5
    points = lines[-1].get("points").split()  # U-Net, from 0.6 to 0.5
    assert points[0] == "60,150" and points[-1] == "500,350" and len(points) == 5
    texts = {text.text for text in svg.findall("{*}text")}
    assert {"U-Net", "LinkNet", "0 %", "100 %", "test mIoU"} <= texts


def test_dry_run(stubs, capsys):
    e.main([*TWO, "--dry-run"])
    assert stubs == [] and not Path("checkpoints").exists()
    assert capsys.readouterr().out.count("python pretrain.py") == 2


# --- statistics ----------------------------------------------------------------------------------


def test_a_difference_is_taken_seed_by_seed():
    one = {0: {"miou": 0.52}, 1: {"miou": 0.62}, 2: {"miou": 0.72}}
    other = {0: {"miou": 0.5}, 1: {"miou": 0.6}, 2: {"miou": 0.7}}
    assert e.paired(one, other) == (pytest.approx(0.02), pytest.approx(0, abs=1e-12))
    assert e.cell([0.5, 0.6, 0.7]) == "0.6000 ± 0.1000" and e.cell([1234567]) == "1,234,567"


def test_published_figures_stand_beside_ours():
    """SegNet is published as Dice .511, IoU .343 and accuracy .875."""
    ours = {"D2_dice": 0.52, "D2_iou": 0.34, "D4_accuracy": 0.8, "miou": 0.7, "data": "pets"}
    records = [ours | {"experiment": "models", "arm": "SegNet", "seed": seed} for seed in (0, 1)]
    rows = e.published(records).splitlines()[4:]
    assert rows == [
        "| models: SegNet | D2 dice | 0.511 | 0.5200 | ahead | 0.7000 |",
        "| models: SegNet | D2 iou | 0.343 | 0.3400 | behind | 0.7000 |",
        "| models: SegNet | D4 accuracy | 0.875 | 0.8000 | behind | 0.7000 |",
    ]


def test_drawn_pets_are_not_compared_with_published_figures(stubs, capsys):
    e.main(["models", "--seeds", "1"])
    out = capsys.readouterr().out
    assert "### models" in out and "### published" in out
    for others in [{"data": "toy"}, {"experiment": "masks"}]:  # drawn, or nothing published
        records = [record | others for record in results()]
        assert "### published" not in e.render(records, Path("checkpoints/experiments"))


@pytest.mark.parametrize("seeds", ["0", "6"])
def test_more_seeds_than_there_are_intervals_for(seeds, capsys):
    with pytest.raises(SystemExit):
        e.parse_args(["labels", "--seeds", seeds])
    assert "--seeds" in capsys.readouterr().err


def test_an_arm_stands_against_all_of_its_controls():
    """With the spread of the differences, where there are several seeds."""

    def groups(**scores):
        found = {}
        for arm, values in scores.items():
            found[arm] = {seed: {"miou": miou} for seed, miou in enumerate(values)}
        return found

    arms = {"pre-trained, 10 %": [0.52, 0.621], "scratch, 10 %": [0.5, 0.6]}
    arms = groups(**arms, **{"scratch, as long, 10 %": [0.55, 0.651]})
    assert e.gains("labels", arms, 0) == {"pre-trained, 10 %": "+0.0205 ± 0.0063"}
    assert e.gains("labels", arms, 1) == {"pre-trained, 10 %": "-0.0300"}
    arms = groups(all=[0.5], none=[0.25], **{"none, as long": [0.75]})
    assert e.gains("pretraining", arms, 0) == {"all": "+0.2500"}
    assert e.gains("pretraining", arms, 1) == {"all": "-0.2500"}
    assert e.gains("camvid", groups(original=[0.5], modified=[0.6]), 0) == {}


# --- children ------------------------------------------------------------------------------------


@pytest.fixture
def child(here, monkeypatch):
    """child(text) runs a script with that text -> what it printed."""
    monkeypatch.setattr(e, "HERE", here)
    args = e.parse_args(["labels", "--jobs", "2", "--out", "runs"])

    def run(text):
        Path("unet.py").write_text(f"import os, sys\n{text}\n")
        e.run_all(args, [["unet.py", "--out", "runs/unet-1"]])
        return Path("runs/unet-1.log").read_text()

    return run


def test_the_error_of_a_child_is_its_last_line(child):
    with pytest.raises(SystemExit, match=r"no data \(all of it in runs/unet-1.log\)"):
        child("print('a header', flush=True)\nsys.exit('no data')")
    assert Path("runs/unet-1.log").read_text().splitlines() == ["a header", "no data"]


def test_a_child_that_was_killed_goes_on(child):
    assert child("print(*sys.argv[1:])") == "--out runs/unet-1\n"
    Path("runs/unet-1").mkdir()
    Path("runs/unet-1/last.pt").touch()
    assert child("print(*sys.argv[1:])").splitlines()[-1] == "--out runs/unet-1 --resume"


def test_jobs_share_the_cores(child, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert child("print(os.environ['OMP_NUM_THREADS'])") == "3\n"


def test_a_run_is_scored(here, monkeypatch):
    """From the command to the record, with the scripts themselves; evaluate.py is a child, since
    torch 2.11 crashes where one process exports and loads."""
    arm = {"label": "U-Net", "command": "unet --width 4 --frac 0.05 --epochs 1", "pre": None}
    monkeypatch.setattr(e, "plan", lambda args, name: [arm])
    monkeypatch.setattr(e, "run_child", lambda words, _: load("unet").main(words[1:]))
    e.main(["models", "--size", "32", "--seeds", "1"])
    (record,) = results()
    assert record["data"] == "toy" and record["photos"] == 256 and record["size"] == [32, 32]
    for key in ["val_miou", "miou", "accuracy", "D1_dice", "cat_miou"]:
        assert 0 < record[key] < 1, key
