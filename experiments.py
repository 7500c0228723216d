"""Run the other scripts in grids, with several seeds, and compare them fairly.

WHAT IT DOES  Starts pretrain.py, finetune.py and the others as child processes
and keeps every run that is finished: a second call skips it, and a killed call
goes on where it was. When all are trained, evaluate.py reads the test photos,
and the scores become tables, with the published figures beside ours.

YOU WILL LEARN  what makes a comparison fair: the same steps and the same seeds
-> plan; why a difference is taken seed by seed before it is averaged -> paired;
what the figures published by the projects before this one really were ->
PUBLISHED, NOTES

RUN IT  python experiments.py quick              four of them, on drawn pets
        python experiments.py labels masks --data pets --jobs 2
        python experiments.py labels --data pets --dry-run
        python experiments.py --table checkpoints/experiments/results.json

WHAT TO EXPECT  `quick` takes less than ten minutes on two cores.
Drawn pets show that everything runs, and little else. A run that breaks is
named with its last line, and OUT/SCRIPT-HASH.log has all that it printed.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICK = ["labels", "pretraining", "blur", "models"]
CAMVID = "linknet --encoder resnet18 --size 352 480 --ignore 11 --batch-size 8"
FOLDERS = {  # experiments on a data set of the same name under --root
    "camvid": {"original": CAMVID, "modified": f"{CAMVID} --up subpixel"},
    "retina": {
        "LinkNet": "linknet --size 512 --batch-size 2",
        "U-Net": "unet --width 16 --size 512 --batch-size 2",
    },
    "puzzle": {
        "transposed": "unet --width 16 --size 192 256 --batch-size 2",
        "bilinear": "unet --width 16 --up bilinear --size 192 256 --batch-size 2",
        "LinkNet": "linknet --size 192 256 --batch-size 2",
    },
}
EXPERIMENTS = ["labels", "pretraining", "imbalance", "blur", "masks", "models", *FOLDERS]


def parse_args(argv=None):
    names = f"{', '.join(EXPERIMENTS)}; or all; or quick: {', '.join(QUICK)} on drawn pets"
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help=names)
    p.add_argument("--data", choices=["toy", "pets"], default="toy", help="of the first six")
    p.add_argument("--root", default="data", help="where the data sets lie")
    p.add_argument("--size", type=int, default=64, help="side in pixels; quick: 32")
    p.add_argument("--seeds", type=int, default=3, help="runs of each arm; quick: 1")
    p.add_argument("--epochs", type=int, default=6, help="with all labels; quick: 2")
    p.add_argument("--pretrain-epochs", type=int, default=3, help="with all photos; quick: 1")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time; several fill a large GPU")
    p.add_argument("--dry-run", action="store_true", help="only print the commands")
    p.add_argument("--table", metavar="FILE", help="only print the tables of a results.json")
    p.add_argument("--out", default="checkpoints/experiments", help="runs and results")
    args = p.parse_args(argv)
    if args.names == ["quick"]:
        p.set_defaults(size=32, seeds=1, epochs=2, pretrain_epochs=1)
        args = p.parse_args(argv)  # what is typed wins
        args.names = QUICK
    elif args.names == ["all"]:
        args.names = EXPERIMENTS
    wrong = [name for name in args.names if name not in EXPERIMENTS]
    if wrong or not (args.names or args.table):
        p.error(f"{wrong or 'no name'}: wanted {', '.join(EXPERIMENTS)}, or all or quick alone")
    return args


# --- plan ----------------------------------------------------------------------------------------
## Two arms of a comparison differ in one thing. They get the same number of optimiser steps,
## whatever the number of labels, the same seeds, and the same learning rate. An arm is a line of a
## table: its label, the command of its training, and that of the pre-training that it starts from.

FRACS = {"toy": [1.0, 0.1], "pets": [1.0, 0.5, 0.25, 0.1]}
PHOTOS = {"toy": (3686, 1000), "pets": (22974, 3329)}  # to train on, without labels and with them
MASK_FLAGS = {"one square": "", "patches of 8 pixels": "--patch 8", "patches of 16": "--patch 16"}


def pretraining(args, frac=1.0, mask=""):
    """The command of a pre-training. Half the photos are passed over twice as often."""
    return f"pretrain --frac {frac} --epochs {round(args.pretrain_epochs / frac)} {mask}"


def tuned(args, label, pre, frac=1.0, more=0.0):
    """Fine-tuning, from scratch if pre is None. Fewer labels, so many more epochs."""
    epochs = round((args.epochs + more) / frac)
    return {"label": label, "command": f"finetune --frac {frac} --epochs {epochs}", "pre": pre}


def longer(args, label, frac=1.0):
    """Scratch with as many steps as pre-training and fine-tuning together: is it the unlabelled
    photos that help, or the time?"""
    unlabelled, labelled = PHOTOS[args.data]
    return tuned(args, label, None, frac, more=args.pretrain_epochs * unlabelled / labelled)


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
        command += f" --epochs {args.epochs}"
        arms.append({"label": label, "command": command, "pre": None})
    return arms


def plan(args, name):
    """The arms of one experiment."""
    pre, arms = pretraining(args), []
    if name == "labels":  # what is pre-training worth, by the share of the labels?
        for frac in FRACS[args.data]:
            share = f"{100 * frac:g} %"
            arms.append(tuned(args, f"pre-trained, {share}", pre, frac))
            arms.append(tuned(args, f"scratch, {share}", None, frac))
            arms.append(longer(args, f"scratch, as long, {share}", frac))
    elif name == "pretraining":  # do more unlabelled photos help?
        arms = [tuned(args, "all", pre), tuned(args, "half", pretraining(args, 0.5))]
        arms += [tuned(args, "none", None), longer(args, "none, as long")]
    elif name == "masks":  # which mask, with a tenth of the labels?
        arms = [tuned(args, "no pre-training", None, 0.1)]
        for label, flags in MASK_FLAGS.items():
            arms.append(tuned(args, label, pretraining(args, mask=flags), 0.1))
    elif name == "models":
        arms = plan_models(args)
    elif name == "blur":  # who still sees something in blurred photos?
        arms = plan_models(args)[:5]  # without the variants
    elif name == "imbalance" and args.data == "toy":
        print("skipped  imbalance: drawn pets have no breeds; try --data pets")
    elif name == "imbalance":  # 0.758 of the photos show a dog or a cat of the three breeds
        control = tuned(args, "same number, all breeds", pre, 0.758)
        few = tuned(args, "three cat breeds", pre)
        few["command"] = control["command"].replace(
            "--frac 0.758", "--cats Maine_Coon Birman Bombay"
        )
        arms = [tuned(args, "all photos", pre), control, few]
    elif not Path(args.root, name).is_dir():
        print(f"skipped  {args.root}/{name} is not there (images/, masks/ in train/ and test/)")
    else:
        for label, command in FOLDERS[name].items():
            command += f" --epochs 100 --data {shlex.quote(f'{args.root}/{name}')}"
            arms.append({"label": label, "command": command, "pre": None})
    return arms


# --- run -----------------------------------------------------------------------------------------

BLURS = [0, 25, 50, 75, 100]  # per cent
TESTED = ["parameters", "multiply_adds", "device", "torch", "size", "data", "photos"]


def words_of(args, command, seed, init="none"):
    """The words of a child's command. The last is its folder, named by a hash of the others: a run
    is found again if all of its flags are the same (an edited script is not noticed)."""
    script, *words = shlex.split(command)
    usual = {"--data": args.data, "--size": str(args.size), "--init": init}
    if script == "pretrain" and args.data == "pets":
        usual["--data"] = "catdog"
    if script != "finetune":
        del usual["--init"]
    for flag, value in usual.items():
        if flag not in words:
            words += [flag, value]
    words = [f"{script}.py", *words, "--root", args.root, "--seed", str(seed)]
    key = zlib.crc32(shlex.join(words).encode())
    return [*words, "--out", f"{args.out}/{script}-{key:08x}"]


def training_of(args, arm, seed):
    """The words of an arm's training."""
    if arm["pre"]:
        weights = Path(words_of(args, arm["pre"], seed)[-1], "best.pt")
        return words_of(args, arm["command"], seed, str(weights))
    return words_of(args, arm["command"], seed)


def run_child(words, threads):
    """One child until it ends; all that it prints goes to FOLDER.log."""
    folder, began = Path(words[-1]), time.time()
    typed = [sys.executable, HERE / words[0], *words[1:]]
    if (folder / "last.pt").exists():  # it was killed
        typed.append("--resume")
    with open(f"{folder}.log", "a") as log:
        env = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        child = subprocess.run(typed, env=env, stdout=log, stderr=subprocess.STDOUT)
    if child.returncode:
        last = Path(f"{folder}.log").read_text().strip().rpartition("\n")[2]
        sys.exit(f"{shlex.join(words)}: {last} (all of it in {folder}.log)")
    print(f"{time.time() - began:7.0f} s  {shlex.join(words)}", flush=True)


def run_all(args, commands):
    """Run what is not finished, each folder once, --jobs at a time."""
    todo = {}
    for words in commands:
        if not Path(words[-1], "result.json").exists():
            todo[words[-1]] = words
    if args.dry_run:
        print("\n".join(f"python {shlex.join(words)}" for words in todo.values()))
        return
    Path(args.out).mkdir(parents=True, exist_ok=True)
    threads = str(max(1, os.cpu_count() // args.jobs))  # or each of them would take all cores
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run_child, todo.values(), repeat(threads)))


def evaluate(args, folders, blur):
    """Have evaluate.py score the runs that have no scores yet -> {folder: record}."""
    name, collected = f"test-{blur}.json", Path(args.out, "scores.json")
    todo = [folder for folder in folders if not Path(folder, name).exists()]
    if todo:
        typed = [sys.executable, HERE / "evaluate.py", *todo, "--as-published"]
        typed += ["--blur", str(blur), "--json", collected]
        subprocess.run(typed, stdout=subprocess.DEVNULL, check=True)
        for folder, record in zip(todo, json.loads(collected.read_text())):
            save(Path(folder, name), lambda file: file.write_text(json.dumps(record)))
    return {folder: json.loads(Path(folder, name).read_text()) for folder in folders}


def collect(args, name, arms):
    """A flat record for each run of an experiment, and for each blur: what it is, its scores."""
    runs, records = {}, []
    for arm in arms:
        for seed in range(args.seeds):
            words = training_of(args, arm, seed)
            runs[words[-1]] = (arm, seed, f"python {shlex.join(words)}")
    for blur in BLURS if name == "blur" else [0]:
        tested = evaluate(args, list(runs), blur)
        for folder, (arm, seed, command) in runs.items():
            result = json.loads(Path(folder, "result.json").read_text())
            record = {"experiment": name, "arm": arm["label"], "seed": seed, "run": folder}
            record |= {"command": command, "pretraining": None, "lr": result["args"]["lr"]}
            if name == "blur":
                record["arm"] += f", {blur} %"
            if arm["pre"]:
                record["pretraining"] = f"python {shlex.join(words_of(args, arm['pre'], seed))}"
            for key, score in tested[folder]["scores"].items():
                if not isinstance(score, dict):  # but not those of each class
                    record[key] = score
            record |= {key: tested[folder][key] for key in TESTED}
            for key in ["val_miou", "seconds"]:
                record[key] = result["metrics"][key]
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
    "masks": "The published mask is a square of at most 6 % of the area and was in the target.",
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
    ## What a seed does to both arms alike (the order of the photos, the augmentation) cancels. With
    ## three seeds the 95 % interval of the mean is ± 2.5 deviations (Student's t).
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
        as_long = label.replace("pre-trained", "scratch, as long")
        controls = CONTROLS.get(name, [scratch, as_long])
        for control in controls:  # no arm stands against itself, nor the first control at all
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


# --- main ----------------------------------------------------------------------------------------


def save(path, write):
    """write(file), then rename it: a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    write(temporary)
    temporary.replace(path)


def names_of(records):
    """The experiments in records."""
    return list(dict.fromkeys(record["experiment"] for record in records))


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        records = json.loads(Path(args.table).read_text())
        print("\n".join(markdown(records, name) for name in names_of(records)))
        return

    ## 1. Train all arms with all seeds: what is finished is not run again.
    plans = {name: plan(args, name) for name in args.names}
    runs = []
    for arms in plans.values():
        runs += [(arm, seed) for arm in arms for seed in range(args.seeds)]
    run_all(args, [words_of(args, arm["pre"], seed) for arm, seed in runs if arm["pre"]])
    run_all(args, [training_of(args, arm, seed) for arm, seed in runs])
    if args.dry_run:
        return

    ## 2. The test photos, once, when everything is trained.
    records = []
    for name, arms in plans.items():
        records += collect(args, name, arms)

    ## 3. The tables. What other experiments left there stays.
    out, new = Path(args.out), names_of(records)
    if (out / "results.json").exists():
        for record in json.loads((out / "results.json").read_text()):
            if record["experiment"] not in new:
                records.append(record)
    tables = {name: markdown(records, name) for name in names_of(records)}
    save(out / "results.json", lambda file: file.write_text(json.dumps(records, indent=1)))
    save(out / "results.md", lambda file: file.write_text("\n".join(tables.values())))
    print("\n" + "\n".join(tables[name] for name in new))
    print(f"results  {out}/results.json, results.md")


if __name__ == "__main__":
    main()
