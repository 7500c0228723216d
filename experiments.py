"""Run the other scripts in grids with several seeds, and find out what the pre-training was worth.
WHAT IT DOES    Starts pretrain.py, finetune.py and the others as child processes, keeps every run
  that is finished (a second call skips it, a killed call goes on where it was), has evaluate.py
  read the test photos once at the end, and writes tables and a page with charts.
YOU WILL LEARN
  - what makes a comparison fair: the same steps, the same search, the same seeds -> plan
  - why a difference is taken seed by seed before it is averaged -> paired
  - what the numbers published by the projects before this one really were -> SOURCES
RUN IT          python experiments.py quick                        everything, drawn pets, minutes
                python experiments.py labels masks --data pets --seeds 3
                python experiments.py labels --data pets --dry-run
WHAT TO EXPECT  Tables beside the published numbers in checkpoints/experiments/results.md, the same
  with charts in report.html. On toy data the figures mean little; the README has the real ones.
  A broken run is named with the end of its output, and its log is kept.
"""
import argparse, base64, hashlib, html, json, math, os, re, shlex, signal
import statistics, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
# --- knobs ----------------------------------------------------------------------------------------
## What each kind of data is run with unless told otherwise; photos are what a training set holds,
## unlabelled and labelled, from which the steps of the longer scratch arm follow.
PROTOCOL = {"toy": {"size": 32, "epochs": 6, "pretrain_epochs": 2, "photos": (3687, 999),
                    "lrs": (2e-3,), "fracs": (1.0, 0.1), "unlabelled": "toy"},
            "pets": {"size": 128, "epochs": 40, "pretrain_epochs": 20, "photos": (22974, 3310),
                     "lrs": (1e-3, 3e-3, 1e-2), "fracs": (1.0, 0.5, 0.25, 0.1),
                     "unlabelled": "catdog"}}
HERE = Path(__file__).resolve().parent
MASK = ("--mask-style", "square", "--mask", "0.0625-0.25")     # unless the mask is the question
GRIDS = "labels pretraining imbalance blur masks models camvid retina puzzle".split()
PERCENT = (0, 25, 50, 75, 100)                         # of blur
HELP = type("", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})

## The published figures, each under the definition that it really has (README: how scores are
## defined), beside which the table puts ours under the same definition.
SOURCES = {
    "labels": {"pre-trained, 100 %": "D1 .864 / .769, accuracy .865; again .851 / .752, .853",
               "scratch, 100 %": "D1 .853 / .752, accuracy .857; again .851 / .750, .855",
               "pre-trained, 50 %": "D1 .845 / .742, accuracy .846; again .848 / .746, .850",
               "pre-trained, 25 %": "D1 .829 / .719, accuracy .830"},
    "pretraining": {"all": "D1 .864 / .769, accuracy .865; again .851 / .752, .853",
                    "half": "D1 .855 / .755, accuracy .857; again .829 / .718, .831",
                    "none": "D1 .853 / .752, accuracy .857; again .851 / .750, .855"},
    "imbalance": {"three cat breeds": "D1 .843 / .740, accuracy .846"},
    "blur": {f"VQ-VAE, pre-trained, {percent} %": f"D1 {figures}" for percent, figures in (
        (0, ".851 / .751, accuracy .853"), (25, ".749 / .618, accuracy .750"),
        (50, ".683 / .531, accuracy .683"), (75, ".649 / .494, accuracy .649"),
        (100, ".621 / .466, accuracy .621"))},
    "models": {"VQ-VAE, pre-trained": "D1 .864 / .769, accuracy .865",
               "LinkNet": "D3 .857 / .768 (ImageNet weights, own split)",
               "SegNet": "D2 .511 / .343, accuracy .875"},
    "camvid": {"original": "D7 .676 (validation; test .563)",
               "modified": "D7 .652 (validation; test .509)"},
    "retina": {"U-Net": "D6 1 - .116 = .884 (training photos)"},
    "puzzle": {"transposed": "IoU .925 (one run)", "ResNet-34": "IoU .979 (ImageNet weights)"}}
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
    "puzzle": "Four test photos: differences of half a point mean nothing."}
COLUMNS = {"imbalance": ["lr", "accuracy", "miou", "cat_miou", "dog_miou", "D1_dice"],
           "blur": ["miou", "accuracy", "D1_dice", "D1_iou"],
           "models": ["lr", "accuracy", "miou", "D1_dice", "D2_dice", "D3_dice", "parameters",
                      "multiply_adds", "images_per_second", "memory_gb"],
           "camvid": ["accuracy", "miou", "D7_dice", "images_per_second"],
           "retina": ["dice", "miou", "D6_dice"],
           "puzzle": ["accuracy", "precision", "recall", "f1", "miou"]}
REFERENCE = {"pretraining": ["none", "none, as long"], "masks": ["no pre-training"],
             "imbalance": ["same number, all breeds"]}
TITLES = {"miou": "test mIoU", "train_miou": "training mIoU", "val_miou": "validation mIoU",
          "dice": "Dice", "f1": "F1", "cat_miou": "cats mIoU", "memory_gb": "GB",
          "dog_miou": "dogs mIoU", "multiply_adds": "multiply-adds",
          "images_per_second": "images/s in training"}
USUAL = ["lr", "train_miou", "val_miou", "miou", "accuracy", "D1_dice", "D1_iou"]

def fail(message):
    """Bad input: one line on stderr that says what to do, exit code 2."""
    print(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)

def number(kind, low, high, *words):
    """An argparse type: a number of that kind in [low, high], or one of the words."""
    def numeric(text):
        if text not in words and not low <= kind(text) <= high:      # refuses NaN too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return text if text in words else kind(text)
    return numeric

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HELP, allow_abbrev=False)
    p.error, whole = fail, number(int, 1, 10**6)
    p.add_argument("names", nargs="*", default=[], metavar="NAME",
                   help=f"{', '.join(GRIDS)}; all; quick is the first six on drawn pets, one seed")
    add = p.add_argument_group("data").add_argument
    add("--data", choices=("toy", "pets"), help="default: pets if they lie under --root, else toy")
    add("--root", default="data", help="where the data sets lie; camvid, drive and puzzle too")
    add("--size", type=whole, help="side in pixels; default: 128 for pets, 32 for toy")
    add = p.add_argument_group("protocol").add_argument
    add("--seeds", type=whole, help="runs of each arm, mean and spread; default: 3, quick: 1")
    add("--epochs", type=whole, help="with all labels; with fewer labels as many steps as that")
    add("--pretrain-epochs", type=whole, help="passes over the unlabelled photos")
    add = p.add_argument_group("runtime").add_argument
    add("--jobs", type=whole, default=1, help="children at a time; several fill a large GPU")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first of them that is there")
    add("--dry-run", action="store_true", help="print the commands and how long they may take")
    add = p.add_argument_group("output").add_argument
    add("--out", default="checkpoints/experiments", help="runs, results and the report")
    add("--table", help="only print the tables of a results.json")
    return p.parse_args(argv)
# --- plan -----------------------------------------------------------------------------------------
## An arm is a script with flags, trained once a seed. Two arms of a comparison get the same number
## of optimiser steps, whatever the number of labels, and the same search for a learning rate, on
## the validation photos, with the first seed.

def arm(label, script, *flags, pre=None, epochs=1, lrs=None, like=None, seeds=None):
    """One line of a table; pre: flags of the pre-training it starts from; lrs: rates to search;
    like: the arm whose rate it takes over instead; lr, val: the rate found, its score there."""
    return {"label": label, "script": script, "flags": [str(flag) for flag in flags], "pre": pre,
            "epochs": epochs, "lrs": lrs, "like": like, "seeds": seeds, "lr": None, "val": -1}

def tuned(label, args, frac=1.0, pre=MASK, more=(), **options):
    """An arm of finetune.py; fewer labels, so many more epochs: the steps stay the same."""
    return arm(label, "finetune", "--frac", frac, *more, pre=pre,
               epochs=max(1, round(args.epochs / frac)), **options)

def plan(name, args):
    """The arms of one experiment."""
    unlabelled, labelled = args.photos
    def longer(frac):
        """Scratch with as many steps as pre-training and fine-tuning together."""
        steps = args.pretrain_epochs * unlabelled + args.epochs * labelled
        return arm(f"scratch, as long, {100 * frac:g} %", "finetune", "--frac", frac, "--init",
                   "none", epochs=max(1, round(steps / labelled / frac)),
                   like=f"scratch, {100 * frac:g} %")
    def scratch(label, frac=1.0):
        return tuned(label, args, frac, None, ("--init", "none"))
    if name == "labels":
        arms = []
        for frac in args.fracs:
            arms += [tuned(f"pre-trained, {100 * frac:g} %", args, frac),
                     scratch(f"scratch, {100 * frac:g} %", frac)]
        return arms + [longer(frac) for frac in (args.fracs[0], args.fracs[-1])]
    if name == "pretraining":
        return [tuned("all", args), tuned("half", args, pre=(*MASK, "--frac", "0.5")),
                scratch("none"), longer(1.0) | {"label": "none, as long", "like": "none"}]
    if name == "imbalance":
        three = ("--cats", "Maine_Coon,Birman,Bombay")             # with all dogs, 75.8 % of all
        return [tuned("all photos", args), tuned("same number, all breeds", args, 0.758),
                tuned("three cat breeds", args, more=three) | {
                    "epochs": max(1, round(args.epochs / 0.758))}]
    if name == "masks":
        ## A screening: one seed, the middle rate; experiment gives the best two all seeds.
        rate = {"lrs": [args.lrs[len(args.lrs) // 2]]}
        once = rate | {"seeds": 1}
        grid = [(f"{low}-{high}", patch) for low, high in ((0.05, 0.25), (0.25, 0.5), (0.5, 0.75),
                                                           (0.75, 0.9)) for patch in (8, 16)]
        squares = [(5, 25), (25, 50)]                  # per cent of the side
        if args.data == "toy":                         # 5-25 and 50-75 %, 8 px, and MASK
            grid, squares = grid[:1] + grid[4:5], squares[1:]
        return [scratch("no pre-training", 0.1) | rate] + [
            tuned(f"{mask} of the area, {patch} px", args, 0.1, pre=(
                "--mask", mask, "--patch", str(patch)), **once) for mask, patch in grid] + [
            tuned(f"one square of {low}-{high} % of the side", args, 0.1, pre=(
                "--mask-style", "square", "--mask", f"{low**2 / 1e4:g}-{high**2 / 1e4:g}"), **once)
            for low, high in squares]
    if name in ("models", "blur"):
        small = ("--encoder", "resnet18") if args.data == "toy" else ()
        link = ("--weights", "none", *small)
        others = (("LinkNet", "linknet", link), ("SegNet", "segnet", ()), ("U-Net", "unet", ()),
                  ("LinkNet, sub-pixel", "linknet", (*link, "--up", "subpixel")),
                  ("U-Net, bilinear", "unet", ("--up", "bilinear")))
        arms = [tuned("VQ-VAE, pre-trained", args), scratch("VQ-VAE, scratch")] + [
            arm(label, script, *flags, "--batch-size", 32, epochs=args.epochs)
            for label, script, flags in others]
        return arms if name == "models" else arms[:5]
    folder = Path(args.root, {"retina": "drive"}.get(name, name))
    if not folder.is_dir():
        print(f"skipped  {name}: {folder} is not there (images/ and masks/ under train/ and test/)")
        return []
    own = {"lrs": (1e-3,)}
    if name == "camvid":
        flags = ("--data", folder, "--size", 352, 480, "--ignore", 11, "--encoder", "resnet18",
                 "--weights", "none", "--loss", "wce", "--batch-size", 8)
        return [arm("original", "linknet", *flags, "--weight-decay", 0, epochs=100, **own),
                arm("modified", "linknet", *flags, "--weight-decay", 0.01, "--up", "subpixel",
                    "--schedule", "onecycle", epochs=100, **own)]
    if name == "retina":
        flags = ("--data", folder, "--size", 512, "--loss", "dice+iou", "--batch-size", 2)
        return [arm("LinkNet", "linknet", *flags, "--weights", "none", epochs=100, **own),
                arm("U-Net", "unet", *flags, "--width", 16, epochs=100, **own)]
    flags = ("--data", folder, "--size", 192, 256, "--batch-size", 2)          # puzzle
    return [arm("transposed", "unet", *flags, "--width", 16, epochs=100, **own),
            arm("bilinear", "unet", *flags, "--width", 16, "--up", "bilinear", epochs=100, **own),
            arm("ResNet-34", "unet", *flags, "--encoder", "resnet34", "--up", "bilinear",
                epochs=100, **own)]

# --- run ------------------------------------------------------------------------------------------
def command_of(args, script, flags):
    """The words of a child's command; its folder's name comes from them, so that a run is found
    again if and only if all of its flags are the same (an edited script is not noticed)."""
    words = [f"{script}.py", *flags, "--device", args.device]
    for flag, value in (("--data", args.unlabelled if script == "pretrain" else args.data),
                        ("--root", args.root), ("--size", args.size)):
        words += [] if flag in words else [flag, str(value)]
    key = hashlib.sha256(repr(words).encode()).hexdigest()[:8]
    return [*words, "--out", str(Path(args.out, f"{script}-{key}"))]

def share_of(words):
    """The share of the training photos that a command takes."""
    return float(words[words.index("--frac") + 1]) if "--frac" in words else 1.0

def pretraining_of(args, arm, seed):
    epochs = str(round(args.pretrain_epochs / share_of(arm["pre"])))       # half the photos twice
    return command_of(args, "pretrain", [*arm["pre"], "--epochs", epochs, "--seed", str(seed)])

def training_of(args, arm, seed, lr):
    init = ["--init", f"{pretraining_of(args, arm, seed)[-1]}/best.pt"] if arm["pre"] else []
    return command_of(args, arm["script"], [*arm["flags"], *init, "--epochs", str(arm["epochs"]),
                                            "--lr", f"{lr:g}", "--seed", str(seed)])

def finished(command):
    """The result.json of a finished run, or None."""
    try:
        return json.loads(Path(command[-1], "result.json").read_text())
    except (OSError, ValueError):
        return None

def run_child(args, command, env, search=False):
    """One child until it ends, its output in OUT.log -> its exit code, None if it diverged in a
    search. Its stdout is a pipe of ours, so that a child whose parent was killed ends too, at its
    next epoch."""
    folder, last = Path(command[-1]), ""
    more = ["--resume"] if (folder / "last.pt").exists() else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen([sys.executable, HERE / command[0], *command[1:], *more], env=env,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    args.children.append(child)
    if args.stopped:                                   # meanwhile: nobody will end this one
        child.terminate()
    with open(f"{folder}.log", "a", buffering=1) as log:
        for line in child.stdout:
            log.write(line)
            last = line.strip() or last
    if child.wait() and "another run writes there" in last:
        return run_child(args, command, env, search)   # a child of a killed call was still at it
    if child.returncode and search and "loss is not finite" in last:
        return None                                    # too high a learning rate is an answer too
    if child.returncode not in (0, 130, -signal.SIGINT):
        raise RuntimeError(f"{shlex.join(command)}: {last} (all of it in {folder}.log)")
    return child.returncode

def run_all(args, commands, search=False):
    """Run what is not finished, --jobs at a time -> the results, in the order of the commands; None
    for what diverged in a search."""
    todo = [c for i, c in enumerate(commands) if not finished(c) and c not in commands[:i]]
    if args.dry_run:
        for command in todo:
            print(f"python {shlex.join(command)}")
        args.planned += todo
        return [finished(command) or {} for command in commands]
    cores, began = max(1, (os.cpu_count() or 1) // args.jobs), time.monotonic()
    env = os.environ | ({"OMP_NUM_THREADS": str(cores)} if args.jobs > 1 else {}) | {
        "PYTHONUNBUFFERED": "1"}                       # or an error would come before older lines
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(run_child, args, command, env, search) for command in todo]
        try:
            for i, (command, future) in enumerate(zip(todo, waiting)):
                if future.result():
                    raise KeyboardInterrupt            # the child was stopped, so are we
                print(f"{i + 1:>4}/{len(todo):<4}{time.monotonic() - began:7.0f} s  "
                      f"{shlex.join(command)}", flush=True)
        except BaseException:
            args.stopped = True
            for future in waiting:
                future.cancel()
            for child in args.children:
                child.terminate()                      # what has ended does not mind
            raise
    return [finished(command) for command in commands]

def evaluate_all(args, folders, blur):
    """Have evaluate.py score what has no scores yet -> {folder: record}."""
    name = f"test-{blur:g}.json"
    todo = [folder for folder in folders if not Path(folder, name).exists()]
    if todo:
        collected = Path(args.out, "scores.json")
        subprocess.run([sys.executable, HERE / "evaluate.py", *todo, "--as-published", "--blur",
                        str(blur), "--device", args.device, "--json", collected], check=True,
                       stdout=subprocess.DEVNULL)
        for folder, record in zip(todo, json.loads(collected.read_text())):
            save(Path(folder, name), lambda file: file.write_text(json.dumps(record)))
    return {folder: json.loads(Path(folder, name).read_text()) for folder in folders}

def run_stage(args, arms, seeds):
    """Pre-trainings first, then the trainings of all arms: with the first seed the search for a
    learning rate, which sets arm["lr"], then the other seeds with what was found."""
    pairs = [(a, seed) for a in arms for seed in seeds if seed < (a["seeds"] or args.seeds)]
    run_all(args, [pretraining_of(args, a, seed) for a, seed in pairs if a["pre"]])
    for follows in (False, True):                      # who takes a rate over comes after its owner
        runs, search = [], 0 in seeds and not follows
        for a, seed in pairs:
            if bool(a["like"]) == follows:
                if follows:
                    a["lr"] = next(b["lr"] for b in arms if b["label"] == a["like"])
                rates = [a["lr"]] if a["lr"] else a["lrs"] or args.lrs
                runs += [(a, seed, lr) for lr in rates]
        results = run_all(args, [training_of(args, *run) for run in runs], search)
        for (a, _, lr), result in zip(runs, results) if search else ():
            value = (result or {}).get("val_miou", -1)
            a["val"], a["lr"] = max((a["val"], a["lr"] or 0), (value, lr))
        for a in [a for a, _, _ in runs if search and a["val"] < 0 and not args.dry_run]:
            raise RuntimeError(f"{a['label']}: the loss is not finite at any learning rate")

# --- tables ---------------------------------------------------------------------------------------
def grouped(records, experiment):
    """{arm: {seed: record}} in the order in which they came."""
    groups = {}
    for record in records:
        if record["experiment"] == experiment:
            groups.setdefault(record["arm"], {})[record["seed"]] = record
    return groups

def spread(values):
    """Mean and standard deviation over seeds; 0 for a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

def cell(values):
    """Numbers of several seeds as text: 0.7090 ± 0.0021, or one with its thousands."""
    values = [value for value in values if value is not None]
    mean, std = spread(values) if values else (None, 0)
    if mean is None:
        return "-"
    return f"{mean:,.0f}" if mean >= 10 else f"{mean:.4f}" + (f" ± {std:.4f}" if std else "")

def paired(one, other, key="miou"):
    """Mean and deviation of the differences of two arms, taken seed by seed."""
    ## What a seed does to both arms alike (the order of the photos, the augmentation) cancels. Of
    ## three seeds the mean is known to about two and a half deviations (Student's t, 95 %).
    return spread([one[seed][key] - other[seed][key] for seed in one if seed in other])

def markdown(records, experiment):
    """The rows of one experiment as Markdown, with the published numbers and what they mean."""
    columns, published = COLUMNS.get(experiment, USUAL), SOURCES.get(experiment, {})
    groups = grouped(records, experiment)
    seeds, first = max(map(len, groups.values())), next(iter(groups.values()))[0]
    size = "x".join(map(str, first["size"]))
    lines = [f"### {experiment}", "", f"{first['data']}, {size} pixels, {first['photos']} test "
             f"photos, {first['device']}, torch {first['torch']}, " + (
                 f"{seeds} seeds, mean ± standard deviation" + (" (rows without: one seed)" if min(
                     map(len, groups.values())) < seeds else "") if seeds > 1 else "one seed")
             + ("; drawn pictures, so these are toy scores" if first["data"] == "toy" else "")
             + f". {NOTES[experiment]}", "", "| | " + " | ".join(
                 TITLES.get(column, column.replace("_", " ").replace("iou", "IoU"))
                 for column in columns)
             + " | published |", "|---" * (len(columns) + 2) + "|"]
    for label, group in groups.items():
        values = [cell([record.get(column) for record in group.values()]) for column in columns]
        lines.append(f"| {label} | " + " | ".join(values) + f" | {published.get(label, '')} |")
    lines.append("")
    key = "cat_miou" if experiment == "imbalance" else "miou"
    controls = REFERENCE.get(experiment, [])
    for label, group in groups.items():                # each arm beside its controls
        for other in controls or [
                label.replace("pre-trained", kind) for kind in ("scratch", "scratch, as long")]:
            if other in groups and label not in (other, *controls[:1]):
                mean, std = paired(group, groups[other], key)
                lines.append(f"- {label}: {TITLES[key]} {mean:+.4f}" + (
                    f" ± {std:.4f}" if std else "") + f" against {other}, seed by seed.")
    return "\n".join(lines).strip() + "\n"

# --- page -----------------------------------------------------------------------------------------
PALETTE = ("#d1495b", "#00798c", "#edae49", "#66418e", "#3d5a1e", "#30638e", "#999999", "#000000")
STYLE = """
body{font:15px/1.5 sans-serif;max-width:1250px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .5em;text-align:right;
border-bottom:1px solid #ddd}
td:first-child,td:last-child,th:last-child{text-align:left}
td:not(:last-child){white-space:nowrap}
svg{max-width:760px;display:block;margin:1em 0}
svg text{font:12px sans-serif}svg .t{font-weight:bold}.g{stroke:#eee}img{max-width:340px}
figure{display:inline-block;margin:.5em;vertical-align:top}pre{overflow:auto;background:#f6f6f6}"""

def chart(title, series, across):
    """Inline SVG: {name: [(x, mean, deviation)]} as lines with bars for the spread over seeds."""
    points = [point for line in series.values() for point in line]
    xs, low = [x for x, _, _ in points], min(mean - std for _, mean, std in points)
    high, (left, right) = max(mean + std for _, mean, std in points), (min(xs), max(xs))
    X = lambda x: 60 + 420 * (x - left) / ((right - left) or 1)
    Y = lambda y: 250 - 210 * (y - low) / ((high - low) or 1)
    text = lambda x, y, words, more="": f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'
    out = ['<svg viewBox="0 0 760 300" role="img">', text(60, 20, title, 'class="t"'),
           text(270, 294, across, 'text-anchor="middle"')]
    for i in range(5):
        y = low + (high - low) * i / 4
        out.append(f'<line x1="60" x2="480" y1="{Y(y):.1f}" y2="{Y(y):.1f}" class="g"/>'
                   + text(52, Y(y) + 4, f"{y:.3f}", 'text-anchor="end"'))
    marks = sorted(set(xs))
    for x in [b for a, b in zip([-math.inf, *marks], marks) if X(b) - X(a) > 30]:
        out.append(text(X(x), 270, f"{x:.3g}", 'text-anchor="middle"'))
    for (name, line), colour, row in zip(series.items(), PALETTE * 9, range(99)):
        path = " ".join(f"{X(x):.1f},{Y(mean):.1f}" for x, mean, _ in sorted(line))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, m, s in line:
            out.append(f'<line x1="{X(x):.1f}" x2="{X(x):.1f}" y1="{Y(m - s):.1f}" y2="'
                       f'{Y(m + s):.1f}" stroke="{colour}"/><circle cx="{X(x):.1f}" '
                       f'cy="{Y(m):.1f}" r="4" fill="{colour}"/>')
        out.append(f'<rect x="500" y="{40 + 20 * row}" width="10" height="10" fill="{colour}"/>'
                   + text(516, 49 + 20 * row, html.escape(name)))
    return "".join(out) + "</svg>"

ACROSS = {"labels": "labels, per cent", "blur": "blur, per cent", "masks": "masked area, per cent",
          "models": "multiply-adds of a photo, power of ten"}

def charts(records, experiment):
    """The chart of an experiment that has something to go across: mean IoU on the test photos."""
    series = {}
    for label, group in grouped(records, experiment).items():
        mean, std = spread([record["miou"] for record in group.values()])
        name, _, amount = label.rpartition(", ")
        if experiment == "masks":
            low, high = map(float, re.search(r"([\d.]+)-([\d.]+)", f"{label} 0-0").groups())
            square = "square" in label
            x = (low**2 + high**2) / 200 if square else 50 * (low + high)      # of the area
            name = "one square" if square else f"patches of {amount}" if high else label
        elif experiment == "models":
            name, x = label, math.log10(next(iter(group.values()))["multiply_adds"])
        else:
            x = float(amount.split()[0])
        series.setdefault(name, []).append((x, mean, std))
    return chart(f"{experiment}: mean IoU", series, ACROSS[experiment])

def page(records):
    """One self-contained page: tables, charts, predictions, the command behind each figure."""
    parts = []
    for experiment in dict.fromkeys(record["experiment"] for record in records):
        lines = markdown(records, experiment).splitlines()
        rows = [[html.escape(text.strip()) for text in line.strip("|").split("|")]
                for line in lines if line.startswith("|") and not line.startswith("|---")]
        head = "".join(f"<th>{text}</th>" for text in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{text}</td>" for text in row) + "</tr>"
                       for row in rows[1:])
        notes = "".join(f"<p>{html.escape(line.lstrip('- '))}</p>" for line in lines[1:]
                        if line and line[0] != "|")
        parts.append(f"<h2>{experiment}</h2><table><tr>{head}</tr>{body}</table>{notes}"
                     + (charts(records, experiment) if experiment in ACROSS else ""))
        for label, group in grouped(records, experiment).items():
            record = next(iter(group.values()))
            picture = Path(record["run"], "overlay.png")
            if experiment in ("models", "camvid", "retina", "puzzle") and picture.exists():
                data = base64.b64encode(picture.read_bytes()).decode()
                parts.append(f'<figure><img src="data:image/png;base64,{data}"><figcaption>'
                             f'{html.escape(label)}</figcaption></figure>')
        commands = dict.fromkeys(
            command for record in records if record["experiment"] == experiment
            for command in (record.get("pretraining"), record["command"]) if command)
        parts.append("<details><summary>commands</summary><pre>"
                     + html.escape("\n".join(commands)) + "</pre></details>")
    return f"<!doctype html><meta charset=utf-8><title>Experiments</title><style>{STYLE}</style>" \
        f"<h1>What was the pre-training worth?</h1>{''.join(parts)}"
# --- main -----------------------------------------------------------------------------------------

def save(path, write):
    """write(file) under a temporary name, then rename: a kill leaves the old or the new file."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:           # a full disk is the latter for torch.save
        fail(f"{path}: not written ({str(error).splitlines()[0]}); free space, or another folder")
    finally:
        if temporary.exists():
            temporary.unlink()

def estimate(args, commands):
    """Seconds that the commands may take, from finished runs of the same scripts, or None."""
    amount = lambda words: float(words[words.index("--epochs") + 1]) * share_of(words)
    kind = lambda words: (words[0], *(words[words.index(f) + 1] for f in ("--data", "--size")))
    rate = {}
    for path in Path(args.out).glob("*/result.json"):
        result = json.loads(path.read_text())
        given, name = result["args"], path.parent.name.rpartition("-")[0]
        rate.setdefault((f"{name}.py", given["data"], str(given["size"][0])), []).append(
            result["total_seconds"] / (given["epochs"] * given["frac"]))
    if not {kind(command) for command in commands} <= rate.keys():
        return None
    return sum(statistics.median(rate[kind(command)]) * amount(command) for command in commands)

def experiment(args):
    if args.table:
        try:
            records = json.loads(Path(args.table).read_text())
            names = dict.fromkeys(record["experiment"] for record in records)
            return print("\n".join(markdown(records, name) for name in names))
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--table {args.table}: not a results.json ({error})")
    ## 1. What to run, and how much of it.
    unknown = [name for name in args.names if name not in (*GRIDS, "all", "quick")]
    if unknown or not args.names:
        fail(f"{' '.join(unknown) or 'no name'}: wanted {', '.join(GRIDS)}, all or quick")
    if "quick" in args.names:
        if args.names != ["quick"] or args.data == "pets":
            fail("quick: six experiments on drawn pets; name others in a call of their own")
        args.data, args.seeds = "toy", args.seeds or 1
    args.seeds = args.seeds or 3
    args.data = args.data or ("pets" if Path(args.root, "oxford-iiit-pet").is_dir() else "toy")
    for name, value in PROTOCOL[args.data].items():
        if vars(args).get(name) is None:
            setattr(args, name, value)
    names = GRIDS[:6] if "quick" in args.names else GRIDS if "all" in args.names else \
        list(dict.fromkeys(args.names))
    if args.size % 32 and {"blur", "models"} & {*names}:
        fail(f"--size {args.size}: the networks of blur and models want a multiple of 32")
    args.children, args.planned, args.stopped, out = [], [], False, Path(args.out)
    arms = {name: plan(name, args) for name in names}
    ## The steps of the longer scratch arm follow from the photos that the first pre-training, of
    ## all photos, really had.
    first = [pretraining_of(args, a, 0) for a in sum(arms.values(), []) if a["pre"]]
    for result in ([finished(c) for c in first] if args.dry_run else run_all(args, first))[:1]:
        args.photos = (result["photos"], args.photos[1]) if result else args.photos
    arms |= {name: plan(name, args) for name in names if name in ("labels", "pretraining")}
    every = [a for group in arms.values() for a in group]
    ## 2. The search with the first seed. Of the masks the best two go on to all seeds, and 5-25 %.
    run_stage(args, every, [0])
    screened = sorted([a for a in arms.get("masks", []) if a["pre"]], key=lambda a: -a["val"])
    for a in screened[:2] + [a for a in screened if "0.05-0.25" in a["label"]][:1]:
        a["seeds"] = None
    ## 3. The other seeds, with the learning rates found.
    run_stage(args, every, range(1, args.seeds))
    if args.dry_run:
        seconds = estimate(args, args.planned)
        return print(f"{len(args.planned)} runs, " + (
            "of unknown length: no run of each script is finished yet" if seconds is None else
            f"about {seconds / 60 / args.jobs:.0f} min") + "; later seeds take the learning "
            "rate that the search finds")
    ## 4. The test photos, once, when everything is trained.
    records = []
    for name, group in arms.items():
        runs = [(a, seed, training_of(args, a, seed, a["lr"])) for a in group
                for seed in range(a["seeds"] or args.seeds)]
        for blur in PERCENT if name == "blur" else (0,):
            tested = evaluate_all(args, [command[-1] for _, _, command in runs], blur)
            for a, seed, command in runs:
                result, record = finished(command), tested[command[-1]]
                flat = {key: value for key, value in record["scores"].items()
                        if not isinstance(value, dict)}
                records.append({
                    "experiment": name, "seed": seed, "lr": a["lr"], "run": command[-1],
                    "arm": a["label"] + (f", {blur} %" if name == "blur" else ""),
                    "command": f"python {shlex.join(command)}",
                    "pretraining": f"python {shlex.join(pretraining_of(args, a, seed))}"
                    if a["pre"] else None, **flat,
                    **{key: record[key] for key in ("parameters", "multiply_adds", "device",
                                                    "torch", "size", "data", "photos")},
                    "train_miou": result["miou"],      # of the best epoch, on augmented photos
                    **{key: result[key] for key in ("val_miou", "images_per_second",
                                                    "memory_gb", "total_seconds")}})
    ## 5. Results, tables, page; what other experiments left there stays.
    try:
        earlier = json.loads((out / "results.json").read_text())
    except (OSError, ValueError):
        earlier = []
    records += [record for record in earlier if not arms.get(record["experiment"])]
    records.sort(key=lambda record: GRIDS.index(record["experiment"]))
    tables = {name: markdown(records, name) for name in GRIDS if grouped(records, name)}
    for name, text in (("results.json", json.dumps(records, indent=1)),
                       ("results.md", "\n".join(tables.values())), ("report.html", page(records))):
        save(out / name, lambda file: file.write_text(text, encoding="utf-8"))
    print("\n" + "\n".join(tables[name] for name in names if name in tables)
          + f"\nresults  {out}/results.json, results.md, report.html")

def main(argv=None):
    """experiment, with one line for a traceback where a child or the machine gives out."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a scheduler's stop is a Ctrl-C
    try:
        experiment(args)
    except KeyboardInterrupt:
        print("\nstopped  what is finished is kept: the same command goes on from there")
        raise SystemExit(130)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        fail(error)

if __name__ == "__main__":
    main()
