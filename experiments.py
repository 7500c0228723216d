"""Run the other scripts in grids, with several seeds, and compare them fairly.

WHAT IT DOES  Starts pretrain.py, finetune.py and the others as child processes
and keeps every run that is finished: a second call skips it, and a killed call
goes on where it was. When all are trained, evaluate.py reads the test photos,
and the scores become tables, with the published figures beside ours: results.md
and, with charts, report.html.

YOU WILL LEARN  what makes a comparison fair: the same steps, the same search,
the same seeds -> plan, search; why a difference is taken seed by seed before
it is averaged -> paired; what the figures published by the projects before
this one really were -> PUBLISHED

RUN IT  python experiments.py quick              five of them, on drawn pets
        python experiments.py labels masks --data pets --jobs 2
        python experiments.py labels --data pets --dry-run
        python experiments.py --table checkpoints/experiments/results.json

WHAT TO EXPECT  TODO
Drawn pets show that everything runs, and little else. A run that breaks is
named with its last line, and OUT/SCRIPT-HASH.log has all that it printed.
"""

import argparse
import hashlib
import html
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICK = ["labels", "pretraining", "blur", "masks", "models"]
CAMVID = "linknet --encoder resnet18 --size 352 480 --ignore 11 --loss wce --batch-size 8"
FOLDERS = {  # experiments on a data set of the same name under --root
    "camvid": {"original": CAMVID, "modified": f"{CAMVID} --up subpixel --schedule onecycle"},
    "retina": {
        "LinkNet": "linknet --encoder resnet34 --size 512 --loss dice+iou --batch-size 2",
        "U-Net": "unet --width 16 --size 512 --loss dice+iou --batch-size 2",
    },
    "puzzle": {
        "transposed": "unet --width 16 --size 192 256 --batch-size 2",
        "bilinear": "unet --width 16 --up bilinear --size 192 256 --batch-size 2",
        "ResNet-34": "unet --encoder resnet34 --up bilinear --size 192 256 --batch-size 2",
    },
}
EXPERIMENTS = ["labels", "pretraining", "imbalance", "blur", "masks", "models", *FOLDERS]


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def flag(name, default, help):
        p.add_argument(name, default=default, type=type(default), help=help)

    names = f"{', '.join(EXPERIMENTS)}; or all; or quick: {', '.join(QUICK)} on drawn pets"
    p.add_argument("names", nargs="*", metavar="NAME", help=names)
    p.add_argument("--data", choices=["toy", "pets"], default="toy", help="of the first six")
    flag("--root", "data", "where the data sets lie or are downloaded to")
    flag("--size", 64, "side in pixels; quick: 32")
    flag("--seeds", 3, "runs of each arm; quick: 1")
    flag("--epochs", 6, "with all labels; with fewer labels as many steps as that")
    flag("--pretrain-epochs", 3, "passes over the unlabelled photos; quick: 2")
    flag("--jobs", 1, "runs at a time; several fill a large GPU")
    p.add_argument("--dry-run", action="store_true", help="only print the commands")
    p.add_argument("--table", metavar="FILE", help="only print the tables of a results.json")
    flag("--out", "checkpoints/experiments", "runs, results and report")
    args = p.parse_args(argv)
    if args.names == ["quick"]:
        p.set_defaults(size=32, seeds=1, pretrain_epochs=2)
        args = p.parse_args(argv)  # what is typed wins
        args.names = QUICK
    elif args.names == ["all"]:
        args.names = EXPERIMENTS
    wrong = [name for name in args.names if name not in EXPERIMENTS]
    if wrong or not (args.names or args.table):
        p.error(f"{wrong or 'no name'}: wanted {', '.join(EXPERIMENTS)}, or all or quick alone")
    if min(args.seeds, args.epochs, args.pretrain_epochs, args.jobs) < 1:
        p.error("--seeds, --epochs, --pretrain-epochs and --jobs are at least 1")
    if args.size % 32:
        p.error(f"--size {args.size}: the networks want a multiple of 32")
    return args


# --- plan ----------------------------------------------------------------------------------------
## Two arms of a comparison differ in one thing. They get the same number of optimiser steps,
## whatever the number of labels, and the same search for a learning rate, since the rate that is
## good for one of them may be bad for the other.

LRS = {"toy": [0.002], "pets": [0.001, 0.003, 0.01]}
FRACS = {"toy": [1.0, 0.1], "pets": [1.0, 0.5, 0.25, 0.1]}
PHOTOS = {"toy": (3686, 1000), "pets": (22974, 3310)}  # to train on, without labels and with them
BANDS = {"toy": ["0.25-0.5"], "pets": ["0.05-0.25", "0.25-0.5", "0.5-0.75", "0.75-0.9"]}  # masked
SQUARE = "--mask-style square --mask 0.0625-0.25"  # unless the mask is the question


def make_arm(label, command, epochs, lrs, pre=None):
    """A line of a table: a command, trained once a seed. lrs: the learning rates to try; pre: the
    command of the pre-training that it starts from."""
    made = {"label": label, "command": command, "epochs": epochs, "lrs": lrs, "pre": pre}
    # like: another arm, whose learning rate it takes over; seeds: how many, where it is not
    # --seeds; lr, val: the rate that the search finds, and its mean IoU on the validation photos.
    return made | {"like": None, "seeds": None, "lr": None, "val": -1.0}


def pretraining(args, mask=SQUARE, frac=1.0):
    """The command of a pre-training. Half the photos are passed over twice as often."""
    epochs = round(args.pretrain_epochs / frac)
    return f"pretrain {mask} --frac {frac} --epochs {epochs} --lr 0.001"


def tuned(args, label, pre, frac=1.0):
    """Fine-tuning, from scratch if pre is None. Fewer labels, so many more epochs."""
    epochs = round(args.epochs / frac)
    return make_arm(label, f"finetune --frac {frac}", epochs, LRS[args.data], pre)


def longer(args, label, like, frac=1.0):
    """Scratch with as many steps as pre-training and fine-tuning together: is it the unlabelled
    photos that help, or the time? Where not all four collections lie, it gets even more."""
    unlabelled, labelled = PHOTOS[args.data]
    passes = args.epochs + args.pretrain_epochs * unlabelled / labelled
    return tuned(args, label, None, frac) | {"epochs": round(passes / frac), "like": like}


def plan_labels(args):
    """What is pre-training worth, by the share of the labels?"""
    arms, long, fracs = [], [], FRACS[args.data]
    for frac in fracs:
        share = f"{100 * frac:g} %"
        scratch = tuned(args, f"scratch, {share}", None, frac)
        arms += [tuned(args, f"pre-trained, {share}", pretraining(args), frac), scratch]
        if frac in (fracs[0], fracs[-1]):
            long.append(longer(args, f"scratch, as long, {share}", scratch, frac))
    return arms + long


def plan_masks(args):
    """Which mask? A screening with a tenth of the labels, one seed, one rate; main gives the best
    two all seeds."""
    masks = {"one square of 25-50 % of the side": SQUARE}
    if args.data == "pets":
        masks["one square of 5-25 % of the side"] = "--mask-style square --mask 0.0025-0.0625"
    for band in BANDS[args.data]:
        for patch in [8, 16]:
            flags = f"--mask-style patches --mask {band} --patch {patch}"
            masks[f"{band} of the area, {patch} px"] = flags
    arms = [tuned(args, "no pre-training", None, 0.1)]
    for label, mask in masks.items():
        arms.append(tuned(args, label, pretraining(args, mask), 0.1) | {"seeds": 1})
    middle = LRS[args.data][len(LRS[args.data]) // 2]
    return [arm | {"lrs": [middle]} for arm in arms]


def plan_models(args):
    """All networks of this repository, none of them with weights from elsewhere."""
    encoder, width = "resnet34", 32
    if args.data == "toy":
        encoder, width = "resnet18", 16
    commands = {
        "LinkNet": f"linknet --encoder {encoder}",
        "SegNet": f"segnet --width {width}",
        "U-Net": f"unet --width {width}",
        "LinkNet, sub-pixel": f"linknet --encoder {encoder} --up subpixel",
        "U-Net, bilinear": f"unet --width {width} --up bilinear",
    }
    arms = [tuned(args, "VQ-VAE, pre-trained", pretraining(args))]
    arms.append(tuned(args, "VQ-VAE, scratch", None))
    for label, command in commands.items():
        arms.append(make_arm(label, command, args.epochs, LRS[args.data]))
    return arms


def plan(args, name):
    """The arms of one experiment."""
    pre = pretraining(args)
    if name == "labels":
        return plan_labels(args)
    if name == "masks":
        return plan_masks(args)
    if name == "models":
        return plan_models(args)
    if name == "blur":  # who still sees something in blurred photos?
        return plan_models(args)[:5]
    if name == "pretraining":  # do more unlabelled photos help?
        arms = [tuned(args, "all", pre), tuned(args, "half", pretraining(args, frac=0.5))]
        none = tuned(args, "none", None)
        return [*arms, none, longer(args, "none, as long", none)]
    if name == "imbalance" and args.data == "toy":
        print("skipped  imbalance: drawn pets have no breeds; try --data pets")
        return []
    if name == "imbalance":  # 0.758 of the photos show a dog or a cat of the three breeds
        control = tuned(args, "same number, all breeds", pre, 0.758)
        few = {"label": "three cat breeds", "command": "finetune --cats Maine_Coon,Birman,Bombay"}
        return [tuned(args, "all photos", pre), control, control | few]
    folder = Path(args.root, name)
    if not folder.is_dir():
        print(f"skipped  {folder} is not there (images/ and masks/ under train/ and test/)")
        return []
    arms = []
    for label, command in FOLDERS[name].items():
        command += f" --data {shlex.quote(str(folder))}"
        arms.append(make_arm(label, command, 100, [0.001]))
    return arms


# --- run -----------------------------------------------------------------------------------------

BLURS = [0, 25, 50, 75, 100]  # per cent
TESTED = ["parameters", "multiply_adds", "device", "torch", "size", "data", "photos"]


def words_of(args, command, seed):
    """The words of a child's command. Its folder's name is a hash of them: a run is found again if
    and only if all of its flags are the same (an edited script is not noticed)."""
    script, *words = shlex.split(command)
    data = args.data
    if script == "pretrain" and data == "pets":
        data = "catdog"
    usual = {"--data": data, "--size": args.size, "--batch-size": 32}
    if script != "pretrain":
        usual["--init"] = "none"
    for flag, value in usual.items():
        if flag not in words:
            words += [flag, str(value)]
    words = [f"{script}.py", *words, "--root", args.root, "--seed", str(seed)]
    key = hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]
    return [*words, "--out", f"{args.out}/{script}-{key}"]


def training_of(args, arm, seed, lr):
    """The words of an arm's training."""
    command = f"{arm['command']} --epochs {arm['epochs']} --lr {lr}"
    if arm["pre"]:
        weights = Path(words_of(args, arm["pre"], seed)[-1], "best.pt")
        command += f" --init {shlex.quote(str(weights))}"
    return words_of(args, command, seed)


def result_of(words):
    """The result.json of a finished run, or None."""
    path = Path(words[-1], "result.json")
    if path.exists():
        return json.loads(path.read_text())
    return None


def run_child(words, env, may_diverge):
    """One child until it ends; all that it prints goes to OUT.log."""
    folder, last = Path(words[-1]), ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    typed = [sys.executable, HERE / words[0], *words[1:]]
    if (folder / "last.pt").exists():  # it was killed
        typed.append("--resume")
    ## It prints into a pipe of ours: where we are killed, it ends too, when it next prints.
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(typed, env=env, **pipe)
    with child, open(f"{folder}.log", "a", buffering=1) as log:
        for line in child.stdout:
            log.write(line)
            last = line.strip() or last
    if may_diverge and "is not finite" in last:
        return  # that a learning rate is too high is an answer too
    if child.returncode:
        sys.exit(f"{shlex.join(words)}: {last} (all of it in {folder}.log)")


def run_all(args, commands, may_diverge=False):
    """Run what is not finished, --jobs at a time."""
    todo = {words[-1]: words for words in commands if not result_of(words)}  # each folder once
    if args.dry_run:
        args.planned |= todo
        return
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    if args.jobs > 1:  # or each of them would take all cores
        env["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs))
    child, began = partial(run_child, env=env, may_diverge=may_diverge), time.time()
    with ThreadPoolExecutor(args.jobs) as pool:
        ended = pool.map(child, todo.values())  # a child that fails cancels those that wait
        for i, (words, _) in enumerate(zip(todo.values(), ended)):
            print(f"{i + 1:3}/{len(todo):<3}{time.time() - began:7.0f} s  {shlex.join(words)}")


def search(args, arms):
    """Try the learning rates of each arm with the first seed: sets arm["lr"] and arm["val"]."""
    run_all(args, [words_of(args, arm["pre"], 0) for arm in arms if arm["pre"]])
    tries = []
    for arm in arms:
        if not arm["like"]:
            tries += [(arm, lr) for lr in arm["lrs"]]
    run_all(args, [training_of(args, arm, 0, lr) for arm, lr in tries], may_diverge=True)
    for arm, lr in tries:
        result = result_of(training_of(args, arm, 0, lr))
        if result and result["metrics"]["val_miou"] > arm["val"]:
            arm["lr"], arm["val"] = lr, result["metrics"]["val_miou"]
    for arm in arms:
        if arm["like"]:
            arm["lr"] = arm["like"]["lr"]
        if not arm["lr"] and args.dry_run:
            arm["lr"] = arm["lrs"][0]
        if not arm["lr"]:
            sys.exit(f"{arm['label']}: the loss is not finite at any of {arm['lrs']}")


def train(args, arms):
    """All seeds, with the learning rates found."""
    runs = []
    for arm in arms:
        runs += [(arm, seed) for seed in range(arm["seeds"] or args.seeds)]
    run_all(args, [words_of(args, arm["pre"], seed) for arm, seed in runs if arm["pre"]])
    run_all(args, [training_of(args, arm, seed, arm["lr"]) for arm, seed in runs])


def evaluate(args, folders, blur):
    """Have evaluate.py score the runs that have no scores yet -> {folder: record}."""
    name, collected = f"test-{blur}.json", Path(args.out, "scores.json")
    todo = [folder for folder in folders if not Path(folder, name).exists()]
    if todo:
        typed = [sys.executable, HERE / "evaluate.py", *todo, "--as-published"]
        typed += ["--blur", str(blur), "--json", collected]
        subprocess.run(typed, stdout=subprocess.DEVNULL, check=True)
        for folder, record in zip(todo, json.loads(collected.read_text())):
            save(partial(Path.write_text, data=json.dumps(record)), Path(folder, name))
    return {folder: json.loads(Path(folder, name).read_text()) for folder in folders}


def collect(args, name, arms):
    """A flat record for each run of an experiment, and for each blur: what it is, its scores."""
    runs, records = {}, []
    for arm in arms:
        for seed in range(arm["seeds"] or args.seeds):
            words = training_of(args, arm, seed, arm["lr"])
            runs[words[-1]] = (arm, seed, f"python {shlex.join(words)}")
    for blur in BLURS if name == "blur" else [0]:
        tested = evaluate(args, list(runs), blur)
        for folder, (arm, seed, command) in runs.items():
            record = {"experiment": name, "arm": arm["label"], "seed": seed, "lr": arm["lr"]}
            record |= {"run": folder, "command": command, "pretraining": None}
            if name == "blur":
                record["arm"] += f", {blur} %"
            if arm["pre"]:
                record["pretraining"] = f"python {shlex.join(words_of(args, arm['pre'], seed))}"
            for key, score in tested[folder]["scores"].items():
                if not isinstance(score, dict):  # those of each class
                    record[key] = score
            for key in TESTED:
                record[key] = tested[folder][key]
            record["val_miou"] = result_of([folder])["metrics"]["val_miou"]
            rows = Path(folder, "log.jsonl").read_text().splitlines()
            record["seconds"] = statistics.median(json.loads(row)["seconds"] for row in rows)
            records.append(record)
    return records


# --- tables --------------------------------------------------------------------------------------
## The figures of the projects before this one, each under the definition that it really has (D1 to
## D7, see README: how scores are defined). The tables put ours under the same definition beside it.

PUBLISHED = {
    ("labels", "pre-trained, 100 %"): "D1 .864 / .769, accuracy .865; again .851 / .752, .853",
    ("labels", "scratch, 100 %"): "D1 .853 / .752, accuracy .857; again .851 / .750, .855",
    ("labels", "pre-trained, 50 %"): "D1 .845 / .742, accuracy .846; again .848 / .746, .850",
    ("labels", "pre-trained, 25 %"): "D1 .829 / .719, accuracy .830",
    ("pretraining", "all"): "D1 .864 / .769, accuracy .865; again .851 / .752, .853",
    ("pretraining", "half"): "D1 .855 / .755, accuracy .857; again .829 / .718, .831",
    ("pretraining", "none"): "D1 .853 / .752, accuracy .857; again .851 / .750, .855",
    ("imbalance", "three cat breeds"): "D1 .843 / .740, accuracy .846",
    ("blur", "VQ-VAE, pre-trained, 0 %"): "D1 .851 / .751, accuracy .853",
    ("blur", "VQ-VAE, pre-trained, 25 %"): "D1 .749 / .618, accuracy .750",
    ("blur", "VQ-VAE, pre-trained, 50 %"): "D1 .683 / .531, accuracy .683",
    ("blur", "VQ-VAE, pre-trained, 75 %"): "D1 .649 / .494, accuracy .649",
    ("blur", "VQ-VAE, pre-trained, 100 %"): "D1 .621 / .466, accuracy .621",
    ("models", "VQ-VAE, pre-trained"): "D1 .864 / .769, accuracy .865",
    ("models", "LinkNet"): "D3 .857 / .768 (ImageNet weights, own split)",
    ("models", "SegNet"): "D2 .511 / .343, accuracy .875",
    ("camvid", "original"): "D7 .676 (validation; test .563)",
    ("camvid", "modified"): "D7 .652 (validation; test .509)",
    ("retina", "U-Net"): "D6 1 - .116 = .884 (training photos)",
    ("puzzle", "transposed"): "IoU .925 (one run)",
    ("puzzle", "ResNet-34"): "IoU .979 (ImageNet weights)",
}
NOTES = {
    "labels": "D1 pools all classes: of outputs that are 0 or 1 it is pixel accuracy. The two "
    "published series disagree by more than the effect; no scratch arm has fewer labels.",
    "pretraining": "The published halves point in opposite directions; one seed each.",
    "imbalance": "The published set is also a quarter smaller: the control has its size and all "
    "breeds, so that only the imbalance is left.",
    "blur": "The published codebook went on learning from the blurred test photos.",
    "masks": "The published mask is a square of at most 6 % of the area and was in the target. "
    "Seed 0 chose the two that got all seeds and counts in their means: that flatters.",
    "models": "Three definitions stood in one column; here they stand apart.",
    "camvid": "The published 'IoU' is D7, a mean of Dice values (void is a class there), on the "
    "validation photos; the LinkNet paper lists test IoU of SegNet .652, ENet .683 "
    "(accuracies of classes in ENet's paper), Dilation8 .653, LinkNet .683.",
    "retina": "The published figure is one minus the loss on the training photos.",
    "puzzle": "Four test photos: differences of half a point mean nothing.",
}
USUAL = ["lr", "train_miou", "val_miou", "miou", "accuracy", "D1_dice", "D1_iou"]
MODELS = ["parameters", "multiply_adds", "images_per_second", "memory_gb", "seconds"]
COLUMNS = {
    "imbalance": ["lr", "accuracy", "miou", "cat_miou", "dog_miou", "D1_dice"],
    "blur": ["miou", "accuracy", "D1_dice", "D1_iou"],
    "models": ["lr", "accuracy", "miou", "D1_dice", "D2_dice", "D3_dice", *MODELS],
    "camvid": ["accuracy", "miou", "D7_dice", "seconds"],
    "retina": ["dice", "miou", "D6_dice"],
    "puzzle": ["accuracy", "precision", "recall", "f1", "miou"],
}
TITLES = {
    "miou": "test mIoU",
    "train_miou": "training mIoU",
    "val_miou": "validation mIoU",
    "cat_miou": "cats mIoU",
    "dog_miou": "dogs mIoU",
    "dice": "Dice",
    "f1": "F1",
    "D1_iou": "D1 IoU",
    "multiply_adds": "multiply-adds",
    "images_per_second": "images/s in training",
    "memory_gb": "GB",
    "seconds": "seconds an epoch",
}
CONTROLS = {  # what the other arms are compared with
    "pretraining": ["none", "none, as long"],
    "masks": ["no pre-training"],
    "imbalance": ["same number, all breeds"],
}


def grouped(records, name):
    """The records of an experiment as {arm: {seed: record}}."""
    groups = {}
    for record in records:
        if record["experiment"] == name:
            groups.setdefault(record["arm"], {})[record["seed"]] = record
    return groups


def spread(values):
    """Mean and standard deviation over seeds; 0 for a single one."""
    if len(values) == 1:
        return values[0], 0.0
    return statistics.fmean(values), statistics.stdev(values)


def paired(one, other, key="miou"):
    """Mean and deviation of the differences of two arms, taken seed by seed."""
    ## What a seed does to both arms alike (the order of the photos, the augmentation) cancels. Of
    ## three seeds the mean is known to about two and a half deviations (Student's t, 95 %).
    return spread([one[seed][key] - other[seed][key] for seed in one if seed in other])


def cell(values):
    """A figure of several seeds as text: 0.7090 ± 0.0021, or a large one with its thousands."""
    if None in values:
        return "-"
    mean, std = spread(values)
    if mean >= 10:
        return f"{mean:,.0f}"
    if std:
        return f"{mean:.4f} ± {std:.4f}"
    return f"{mean:.4f}"


def caption(first, groups):
    """The line above a table: what was measured, on what, how often; first is a record."""
    counts = [len(group) for group in groups.values()]
    how = "one seed"
    if max(counts) > 1:
        how = f"{max(counts)} seeds, mean ± standard deviation"
    if max(counts) > min(counts):
        how += " (rows without: one seed)"
    if first["data"] == "toy":
        how += "; drawn pictures, so these are toy scores"
    size = "x".join(str(side) for side in first["size"])
    return (
        f"{first['data']}, {size} pixels, {first['photos']} test photos, {first['device']}, "
        f"torch {first['torch']}, {how}. {NOTES[first['experiment']]}"
    )


def differences(name, groups):
    """A line for each arm and each of its controls."""
    key = "cat_miou" if name == "imbalance" else "miou"
    for label, group in groups.items():
        scratch = label.replace("pre-trained", "scratch")
        longer = label.replace("pre-trained", "scratch, as long")
        controls = CONTROLS.get(name, [scratch, longer])
        for control in controls:
            if control in groups and label not in (control, controls[0]):
                mean, std = paired(group, groups[control], key)
                text = f"{mean:+.4f} ± {std:.4f}" if std else f"{mean:+.4f}"
                yield f"- {label}: {TITLES[key]} {text} against {control}, seed by seed."


def markdown(records, name):
    """The table of one experiment, and the differences of its arms."""
    groups = grouped(records, name)
    first = next(record for record in records if record["experiment"] == name)
    columns = [column for column in COLUMNS.get(name, USUAL) if column in first]
    titles = [TITLES.get(column, column.replace("_", " ")) for column in columns]
    lines = [f"### {name}", "", caption(first, groups), ""]
    lines += [f"| | {' | '.join(titles)} | published |", "|---" * (len(columns) + 2) + "|"]
    for label, group in groups.items():
        cells = [cell([record[column] for record in group.values()]) for column in columns]
        lines.append(f"| {label} | {' | '.join(cells)} | {PUBLISHED.get((name, label), '')} |")
    lines += ["", *differences(name, groups)]
    return "\n".join(lines).strip() + "\n"


# --- page ----------------------------------------------------------------------------------------

STYLE = """
body{font:15px/1.5 sans-serif;max-width:1250px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;font-size:13px}
td,th{padding:.2em .5em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,td:last-child,th:last-child{text-align:left}
td:not(:last-child){white-space:nowrap}
svg{max-width:760px;display:block;margin:1em 0}
svg text{font:12px sans-serif} svg line{stroke:#ddd} circle{fill:#00798c;opacity:.7}
pre{overflow:auto;background:#f6f6f6}"""


def chart(groups):
    """Inline SVG: a row for each arm, a dot for each seed, the test mIoU across."""
    values = []
    for group in groups.values():
        values += [record["miou"] for record in group.values()]
    low, high = min(values), max(values)
    parts = [f'<text x="240" y="15">{low:.3f}</text><text x="720" y="15">{high:.3f}</text>']
    for row, (label, group) in enumerate(groups.items()):
        y = 35 + 20 * row
        parts.append(f'<text x="0" y="{y + 4}">{html.escape(label)}</text>')
        parts.append(f'<line x1="250" x2="730" y1="{y}" y2="{y}"/>')
        for record in group.values():
            x = 250 + 480 * (record["miou"] - low) / max(high - low, 1e-9)
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="5"/>')
    height = 40 + 20 * len(groups)
    return f'<svg viewBox="0 0 760 {height}" role="img">{"".join(parts)}</svg>'


def section(records, name):
    """One experiment of the page: table, chart, the command behind each figure."""
    table, notes, commands = [], [], []
    for line in markdown(records, name).splitlines()[1:]:
        if line.startswith("| "):
            cells = html.escape(line).strip("|").split("|")
            tag = "td" if table else "th"
            table.append("<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in cells) + "</tr>")
        elif line and not line.startswith("|"):
            notes.append(f"<p>{html.escape(line.removeprefix('- '))}</p>")
    for record in records:
        if record["experiment"] == name:
            commands += [record["pretraining"], record["command"]]
    typed = "\n".join(command for command in dict.fromkeys(commands) if command)
    parts = [f"<h2>{name}</h2><table>", *table, "</table>", *notes, "<p>Test mIoU, a dot a seed:"]
    parts.append(chart(grouped(records, name)))
    parts.append(f"<details><summary>commands</summary><pre>{html.escape(typed)}</pre></details>")
    return "\n".join(parts)


def page(records):
    """All experiments as one page that needs nothing else."""
    head = f"<!doctype html><meta charset=utf-8><title>Experiments</title><style>{STYLE}</style>"
    sections = [section(records, name) for name in names_of(records)]
    return "\n".join([head, "<h1>What was the pre-training worth?</h1>", *sections])


# --- main ----------------------------------------------------------------------------------------


def save(write, path):
    """write(file), then rename it: a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    write(temporary)
    os.replace(temporary, path)


def names_of(records):
    """The experiments in records."""
    return list(dict.fromkeys(record["experiment"] for record in records))


def report(args, records):
    """Write results.json, results.md, report.html. What other experiments left there stays."""
    out, new = Path(args.out), names_of(records)
    if (out / "results.json").exists():
        for record in json.loads((out / "results.json").read_text()):
            if record["experiment"] not in new:
                records.append(record)
    records.sort(key=lambda record: EXPERIMENTS.index(record["experiment"]))
    tables = {name: markdown(records, name) for name in names_of(records)}
    files = {"results.json": json.dumps(records, indent=1), "report.html": page(records)}
    files["results.md"] = "\n".join(tables.values())
    for name, text in files.items():
        save(partial(Path.write_text, data=text, encoding="utf-8"), out / name)
    print("\n" + "\n".join(tables[name] for name in new))
    print(f"results  {out}/results.json, results.md, report.html")


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        records = json.loads(Path(args.table).read_text())
        print("\n".join(markdown(records, name) for name in names_of(records)))
        return

    ## 1. What to run.
    args.planned = {}  # what --dry-run prints
    plans = {name: plan(args, name) for name in args.names}
    arms = []
    for group in plans.values():
        arms += group

    try:
        ## 2. The search, with the first seed. The two best masks go on to all seeds.
        search(args, arms)
        masks = [arm for arm in plans.get("masks", []) if arm["pre"]]
        masks.sort(key=lambda arm: arm["val"], reverse=True)
        for arm in masks[:2]:
            arm["seeds"] = None

        ## 3. All seeds, with what was found; those runs that are finished are not run again.
        train(args, arms)
        if args.dry_run:  # what is not known yet: which rate the later seeds get
            print("\n".join(f"python {shlex.join(words)}" for words in args.planned.values()))
            return

        ## 4. The test photos, once, when everything is trained.
        records = []
        for name, group in plans.items():
            records += collect(args, name, group)
    except KeyboardInterrupt:
        sys.exit("\nstopped  what is finished is kept: the same command goes on from there")

    ## 5. Tables and the page.
    report(args, records)


if __name__ == "__main__":
    main()
