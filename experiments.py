"""Run the other scripts in grids, with several seeds, and compare them fairly.

WHAT IT DOES  Starts the other scripts as child processes and keeps every run
that is finished: a second call skips it, a killed call goes on where it was. At
the end evaluate.py reads the test photos, for tables beside published figures.

YOU WILL LEARN  what makes a comparison fair: the same steps and the same seeds
-> plan; why a difference is taken seed by seed before it is averaged -> paired;
what earlier projects published, under its true definition -> PUBLISHED

RUN IT  python experiments.py quick              four experiments, on drawn pets
        python experiments.py labels steps --data pets --jobs 2
        python experiments.py --table checkpoints/experiments/results.json

WHAT TO EXPECT  `quick` takes a few minutes on two cores. A run that breaks is
named with its last line, and OUT/SCRIPT-HASH.log has all that it printed.
"""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
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
CHARTS = ["labels", "steps", "blur", "minutes"]  # minutes is no experiment, see tests/results
ON_PETS = ["labels", "steps", "codebook", "pretraining", "imbalance", "blur", "masks", "models"]
EXPERIMENTS = [*ON_PETS, *FOLDERS]


def parse_args(argv=None):
    names = f"{', '.join(EXPERIMENTS)}; or all; or quick: {', '.join(QUICK)} on drawn pets"
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help=names)
    p.add_argument("--data", choices=["toy", "pets"], default="toy", help="not for the last three")
    p.add_argument("--root", default="data", help="where the data sets lie")
    p.add_argument("--size", type=int, default=64, help="side in pixels; quick: 32")
    p.add_argument("--seeds", type=int, choices=range(1, 6), default=3, help="per arm; quick: 1")
    p.add_argument("--epochs", type=int, default=6, help="with all labels; not for steps; quick: 2")
    p.add_argument("--pretrain-epochs", type=int, default=4, help="with all photos; quick: 1")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time; several fill a large GPU")
    p.add_argument("--dry-run", action="store_true", help="only print the commands")
    p.add_argument("--table", metavar="FILE", help="print tables, draw charts of a results.json")
    p.add_argument("--out", default="checkpoints/experiments", help="runs and results")
    args = p.parse_args(argv)
    if args.names == ["quick"]:
        p.set_defaults(size=32, seeds=1, epochs=2, pretrain_epochs=1, out="checkpoints/quick")
        args = p.parse_args(argv)  # what is typed wins
        args.names = QUICK
    elif args.names == ["all"]:
        args.names = EXPERIMENTS
    wrong = [name for name in args.names if name not in EXPERIMENTS]
    if wrong or not (args.names or args.table):
        p.error(f"{wrong or 'no name'}: wanted {', '.join(EXPERIMENTS)}, or all or quick alone")
    return args


# --- plan ----------------------------------------------------------------------------------------
## Two arms of a comparison differ in one thing. Seeds and learning rate are the same, the steps
## with labels nearly so. (Networks side by side differ in everything.) An arm is a line of a table:
## its label, the command of its training, and that of the pre-training before it, if there is one.

FRACS = {"toy": [1.0, 0.1], "pets": [1.0, 0.5, 0.25, 0.1]}
PHOTOS = {"toy": (3686, 1000), "pets": (22974, 3329)}  # unlabelled (PetImages, about), labelled
NETWORKS = {"LinkNet": "linknet", "SegNet": "segnet", "U-Net": "unet"}
VARIANTS = {"LinkNet, sub-pixel": "linknet --up subpixel", "U-Net, bilinear": "unet --up bilinear"}
NO_CODES = "--net 128 32 2 2 0"  # 0 codes: an ordinary auto-encoder
THREE_CATS = "--cats Maine_Coon Birman Bombay"
MASK_FLAGS = {"one square": "", "patches of 8 pixels": "--patch 8", "patches of 16": "--patch 16"}


def pretraining(args, frac=1.0, flags=""):
    """The command of a pre-training. Half the photos are passed over twice as often."""
    return f"pretrain --frac {frac} --epochs {round(args.pretrain_epochs / frac)} {flags}"


def tuned(label, pre, frac, epochs, flags=""):
    """Fine-tuning, from scratch if pre is None: frac of the labels, 1 / frac of the epochs."""
    command = f"finetune --frac {frac} --epochs {round(epochs / frac)} {flags}"
    return {"label": label, "command": command, "pre": pre}


def two_arms(args, x, frac, epochs, kind="", flags=""):
    """Pre-trained and from scratch; x is what a chart has across."""
    pre = pretraining(args, flags=flags)
    return [
        tuned(f"{kind}pre-trained, {x}", pre, frac, epochs, flags),
        tuned(f"{kind}scratch, {x}", None, frac, epochs, flags),
    ]


def longer(args, label):
    """Scratch with as many steps as both stages: is it the photos that help, or the time?"""
    unlabelled, labelled = PHOTOS[args.data]
    return tuned(label, None, 1.0, args.epochs + args.pretrain_epochs * unlabelled / labelled)


def plan_models(args, networks):
    """The VQ-VAE beside other networks, none of them with weights from elsewhere."""
    arms = [tuned("VQ-VAE, pre-trained", pretraining(args), 1.0, args.epochs)]
    arms.append(tuned("VQ-VAE, scratch", None, 1.0, args.epochs))
    for label, command in networks.items():
        arms.append({"label": label, "command": f"{command} --epochs {args.epochs}", "pre": None})
    return arms


def plan(args, name):
    """The arms of one experiment."""
    pre, arms = pretraining(args), []
    if name == "labels":  # what is pre-training worth, by the share of the labels?
        for frac in FRACS[args.data]:
            arms += two_arms(args, f"{100 * frac:g} %", frac, args.epochs)
        arms.append(longer(args, "scratch, as long, 100 %"))
    elif name == "steps":  # how long does its lead last, with codes and without?
        steps = math.ceil(0.1 * PHOTOS[args.data][1] / 16)  # an epoch: a tenth, in batches of 16
        for epochs in [5, 10, 30, 120]:
            x = f"{epochs * steps} steps"
            arms += two_arms(args, x, 0.1, 0.1 * epochs)
            arms += two_arms(args, x, 0.1, 0.1 * epochs, "no codes, ", NO_CODES)
    elif name == "codebook":  # what do the codes cost?
        for frac in [1.0, 0.25]:
            arms += two_arms(args, f"{100 * frac:g} %", frac, args.epochs, "codes, ")
            arms += two_arms(args, f"{100 * frac:g} %", frac, args.epochs, "no codes, ", NO_CODES)
    elif name == "pretraining":  # do more unlabelled photos help?
        arms = [tuned("all", pre, 1.0, args.epochs)]
        arms.append(tuned("half", pretraining(args, 0.5), 1.0, args.epochs))
        arms += [tuned("none", None, 1.0, args.epochs), longer(args, "none, as long")]
    elif name == "masks":  # which mask, with few labels and few steps, where pre-training helps?
        arms = [tuned("no pre-training", None, 0.1, args.epochs / 6)]
        for label, flags in MASK_FLAGS.items():
            arms.append(tuned(label, pretraining(args, flags=flags), 0.1, args.epochs / 6))
    elif name == "models":
        arms = plan_models(args, NETWORKS | VARIANTS)
    elif name == "blur":  # who still sees something in blurred photos?
        arms = plan_models(args, NETWORKS)
    elif name == "imbalance" and args.data == "toy":
        print("skipped  imbalance: drawn pets have no breeds; try --data pets")
    elif name == "imbalance":  # 0.7617 of the photos show a dog or a cat of the three breeds
        arms = [tuned("all photos", pre, 1.0, args.epochs)]
        arms.append(tuned("same number, all breeds", pre, 0.7617, args.epochs))
        arms.append(tuned("three cat breeds", pre, 1.0, args.epochs / 0.7617, THREE_CATS))
    elif not Path(args.root, name).is_dir():
        print(f"skipped  {args.root}/{name} is not there (images/, masks/ in train/ and test/)")
    else:
        for label, command in FOLDERS[name].items():
            command += f" --epochs 100 --data {shlex.quote(f'{args.root}/{name}')}"
            arms.append({"label": label, "command": command, "pre": None})
    return arms


# --- run -----------------------------------------------------------------------------------------

BLURS = {"blur": [0, 25, 50, 75, 100]}  # per cent; the other experiments have sharp photos
TESTED = ["parameters", "multiply_adds", "device", "torch", "size", "data", "photos"]


def words_of(args, command, seed, init="none"):
    """The words of a child's command. The last is its folder, named by a hash of the others: a run
    is found again if all of its flags are the same (an edited script is not noticed)."""
    script, *words = shlex.split(command)
    usual = {"--data": args.data, "--size": str(args.size)}
    if script == "pretrain" and args.data == "pets":
        usual["--data"] = "catdog"
    if script == "finetune":  # the folder of its pre-training, and so all flags of that
        usual["--init"] = init
    for flag, value in usual.items():
        if flag not in words:
            words += [flag, value]
    words = [f"{script}.py", *words, "--root", args.root, "--seed", str(seed)]
    key = zlib.crc32(shlex.join(words).encode())
    return [*words, "--out", f"{args.out}/{script}-{key:08x}"]


def training_of(args, arm, seed):
    """The words of an arm's training."""
    init = "none"
    if arm["pre"]:
        init = words_of(args, arm["pre"], seed)[-1] + "/best.pt"
    return words_of(args, arm["command"], seed, init)


def run_child(words, threads):
    """One child until it ends; all that it prints goes to FOLDER.log."""
    folder, began = Path(words[-1]), time.time()
    typed = [sys.executable, HERE / words[0], *words[1:]]
    if (folder / "last.pt").exists():  # it was stopped
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
    todo = {words[-1]: words for words in commands if not Path(words[-1], "result.json").exists()}
    if args.dry_run:
        print("\n".join(f"python {shlex.join(words)}" for words in todo.values()))
        return
    Path(args.out).mkdir(parents=True, exist_ok=True)
    threads = str(max(1, os.cpu_count() // args.jobs))  # or each of them would take all cores
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run_child, todo.values(), [threads] * len(todo)))  # list() waits, and raises


def evaluate(args, folders, blur):
    """Have evaluate.py score the runs that have no scores yet -> {folder: what it wrote}."""
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
    trained, records = {}, []
    for arm in arms:
        for seed in range(args.seeds):
            words = training_of(args, arm, seed)
            trained[words[-1]] = (arm, seed, f"python {shlex.join(words)}")
    for blur in BLURS.get(name, [0]):
        tested = evaluate(args, list(trained), blur)
        for folder, (arm, seed, command) in trained.items():
            record = {"experiment": name, "arm": arm["label"], "seed": seed, "run": folder}
            record |= {"command": command, "pretraining": None}
            if name == "blur":
                record["arm"] += f", {blur} %"
            if arm["pre"]:
                record["pretraining"] = f"python {shlex.join(words_of(args, arm['pre'], seed))}"
            for key, score in tested[folder]["scores"].items():
                if not isinstance(score, dict):  # but not those of each class
                    record[key] = score
            record |= {key: tested[folder][key] for key in TESTED}
            record["val_miou"] = tested[folder]["metrics"]["val_miou"]
            records.append(record)
    return records


# --- tables --------------------------------------------------------------------------------------
## What the projects before this one published, {(experiment, arm): {score: theirs}}. D1 to D7 are
## the definitions that their figures really have, see evaluate.py: published_scores.

PUBLISHED = {
    ("labels", "pre-trained, 100 %"): {"D1_dice": 0.864, "D1_iou": 0.769, "D4_accuracy": 0.865},
    ("labels", "scratch, 100 %"): {"D1_dice": 0.853, "D1_iou": 0.752, "D4_accuracy": 0.857},
    ("labels", "pre-trained, 50 %"): {"D1_dice": 0.845, "D1_iou": 0.742, "D4_accuracy": 0.846},
    ("labels", "pre-trained, 25 %"): {"D1_dice": 0.829, "D1_iou": 0.719, "D4_accuracy": 0.830},
    ("pretraining", "half"): {"D1_dice": 0.855, "D1_iou": 0.755, "D4_accuracy": 0.857},
    ("imbalance", "three cat breeds"): {"D1_dice": 0.843, "D1_iou": 0.740, "D4_accuracy": 0.846},
    ("blur", "VQ-VAE, pre-trained, 0 %"): {"D1_dice": 0.851, "D4_accuracy": 0.853},
    ("blur", "VQ-VAE, pre-trained, 25 %"): {"D1_dice": 0.749, "D4_accuracy": 0.750},
    ("blur", "VQ-VAE, pre-trained, 50 %"): {"D1_dice": 0.683, "D4_accuracy": 0.683},
    ("blur", "VQ-VAE, pre-trained, 75 %"): {"D1_dice": 0.649, "D4_accuracy": 0.649},
    ("blur", "VQ-VAE, pre-trained, 100 %"): {"D1_dice": 0.621, "D4_accuracy": 0.621},
    ("models", "LinkNet"): {"D3_dice": 0.857, "D3_iou": 0.768},
    ("models", "SegNet"): {"D2_dice": 0.511, "D2_iou": 0.343, "D4_accuracy": 0.875},
    ("camvid", "original"): {"D7_dice": 0.676},  # theirs: of validation photos
    ("camvid", "modified"): {"D7_dice": 0.652},  # the same
    ("retina", "U-Net"): {"D6_dice": 0.884},  # theirs: of training photos
    ("puzzle", "transposed"): {"D5_iou": 0.925},
}
NOTES = {
    "steps": "A tenth of the labels.",
    "codebook": "The gain is that of no codes over codes.",
    "imbalance": "The control has as many photos, of all breeds.",
    "puzzle": "With four test photos, differences of half a point mean nothing.",
}
USUAL = ["val_miou", "miou", "accuracy"]
COLUMNS = {
    "imbalance": ["miou", "cat_miou", "dog_miou"],
    "blur": ["miou", "accuracy"],
    "models": [*USUAL, "dice", "parameters", "multiply_adds"],
    "puzzle": [*USUAL, "D5_iou"],
}
TITLES = {"miou": "test mIoU", "val_miou": "validation mIoU"}
INTERVAL = {1: 0.0, 2: 8.98, 3: 2.48, 4: 1.59, 5: 1.24}  # t / sqrt(n), by the number of seeds
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


def paired(one, other):
    """Mean of the differences of two arms, taken seed by seed, and half its 95 % interval."""
    ## What a seed does to both alike, such as the order of the photos, cancels. The interval is
    ## t s / sqrt(n), with Student's t for n - 1: it speaks of other seeds, not of other photos.
    ahead = [one[seed]["miou"] - other[seed]["miou"] for seed in one if seed in other]
    mean, std = spread(ahead)
    return mean, std * INTERVAL[len(ahead)]


def cell(values):
    """A figure of several seeds as text: 0.7090 ± 0.0021, or a large one with its thousands."""
    mean, std = spread(values)
    if mean >= 10:
        return f"{mean:,.0f}"
    return f"{mean:.4f} ± {std:.4f}" if std else f"{mean:.4f}"


def controls_of(name, label):
    """The arms that an arm is compared with."""
    if name in CONTROLS and label not in CONTROLS[name]:
        return CONTROLS[name]
    if name == "codebook":
        return [label.removeprefix("no ")]
    if "pre-trained" in label:
        return [label.replace("pre-trained", arm) for arm in ("scratch", "scratch, as long")]
    return []


def gains(name, groups, number):
    """{arm: by how much it is ahead of its first (0) or second (1) control}, as text."""
    found = {}
    for label, group in groups.items():
        for control in controls_of(name, label)[number : number + 1]:  # one or none
            if control in groups and control != label:
                mean, half = paired(group, groups[control])
                found[label] = f"{mean:+.4f} ± {half:.4f}" if half else f"{mean:+.4f}"
    return found


def markdown(records, name):
    """The table of one experiment."""
    groups = grouped(records, name)
    records = [record for record in records if record["experiment"] == name]
    first = records[0]
    seeds = len({record["seed"] for record in records})
    sizes = dict.fromkeys("x".join(map(str, record["size"])) for record in records)
    text = f"{first['data']}, {' or '.join(sizes)} pixels, {first['photos']} test photos, "
    text += f"{first['device']}, torch {first['torch']}, seeds: {seeds}. {NOTES.get(name, '')}"
    lines = [f"### {name}", "", text.strip(), ""]
    columns = COLUMNS.get(name, USUAL)
    titles = [TITLES.get(column, column.replace("_", " ")) for column in columns]
    more = {"gain (95 %)": gains(name, groups, 0), "gain, as long (95 %)": gains(name, groups, 1)}
    more = {title: found for title, found in more.items() if found}
    lines.append(f"| | {' | '.join([*titles, *more])} |")
    lines.append("|---" * (1 + len(titles) + len(more)) + "|")
    for label, group in groups.items():
        cells = [cell([record[column] for record in group.values()]) for column in columns]
        cells += [found.get(label, "") for found in more.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def published(records):
    """The published figures, ours under the same definition, and our plain mIoU."""
    lines = ["### published", "", "| | score | theirs | ours | | our mIoU |", "|---" * 6 + "|"]
    for (name, arm), theirs in PUBLISHED.items():
        group = grouped(records, name).get(arm)
        if not group:
            continue
        miou = cell([record["miou"] for record in group.values()])
        for key, value in theirs.items():
            ours = [record[key] for record in group.values()]
            ahead = "ahead" if statistics.fmean(ours) > value else "behind"
            row = [f"{name}: {arm}", key.replace("_", " "), f"{value:.3f}", cell(ours), ahead, miou]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def chart(records, name):
    """An SVG of the test mIoU of arms that are labelled "LINE, X": a line for each LINE."""
    lines = {}
    for label, group in grouped(records, name).items():
        line, _, x = label.rpartition(", ")
        mean = statistics.fmean(record["miou"] for record in group.values())
        lines.setdefault(line, {})[x] = mean
    xs = {x for line in lines.values() for x in line}
    xs = sorted(xs, key=lambda x: float(x.split()[0]))  # evenly spaced, whatever they are
    ys = [y for line in lines.values() for y in line.values()]
    low, high = math.floor(20 * min(ys)) / 20, math.ceil(20 * max(ys)) / 20  # of the axis
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" width="760" height="400" font-size="14">']
    svg.append("<style>text { font-family: sans-serif } polyline { fill: none }</style>")
    svg.append('<rect width="760" height="400" fill="white"/><text x="60" y="20">test mIoU</text>')
    for i in range(round(20 * (high - low)) + 1):
        y = round(350 - 300 * i / 20 / (high - low))
        svg.append(f'<text x="16" y="{y + 5}">{low + i / 20:.2f}</text>')
        svg.append(f'<path d="M 60 {y} H 540" stroke="lightgrey"/>')
    for i, x in enumerate(xs):
        svg.append(f'<text x="{60 + 110 * i}" y="380">{x}</text>')
    for i, (line, points) in enumerate(lines.items()):
        colour = ["black", "red", "blue", "green", "orange", "purple"][i % 6]
        svg.append(f'<text x="560" y="{60 + 24 * i}" fill="{colour}">{line}</text>')
        path = []
        for text, mean in points.items():
            x = 60 + 110 * xs.index(text)
            y = round(350 - 300 * (mean - low) / (high - low))
            path.append(f"{x},{y}")
            svg.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
        svg.append(f'<polyline points="{" ".join(path)}" stroke="{colour}"/>')
    return "\n".join([*svg, "</svg>"])


# --- main ----------------------------------------------------------------------------------------


def save(path, write):
    """write(file), then rename it: a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    write(temporary)
    temporary.replace(path)


def render(records, folder):
    """All tables as text; the charts go into the folder."""
    names = list(dict.fromkeys(record["experiment"] for record in records))
    for name in CHARTS:
        if name in names:
            drawn = chart(records, name)
            save(folder / f"{name}.svg", lambda file: file.write_text(drawn))
    tables = [markdown(records, name) for name in names]
    real = [record for record in records if record["data"] != "toy"]
    if any((record["experiment"], record["arm"]) in PUBLISHED for record in real):
        tables.append(published(real))
    return "\n".join(tables)


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        print(render(json.loads(Path(args.table).read_text()), Path(args.table).parent))
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

    ## 2. The test photos, last, when everything is trained.
    records = []
    for name, arms in plans.items():
        records += collect(args, name, arms)

    ## 3. The tables. What other experiments left there stays.
    out = Path(args.out)
    if (out / "results.json").exists():
        for record in json.loads((out / "results.json").read_text()):
            if not plans.get(record["experiment"]):
                records.append(record)
    save(out / "results.json", lambda file: file.write_text(json.dumps(records, indent=1)))
    text = render(records, out)
    save(out / "results.md", lambda file: file.write_text(text))
    print(f"\n{text}\nresults  {out}/results.json, results.md")


if __name__ == "__main__":
    main()
