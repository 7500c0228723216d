"""Score finished segmenters on photos they have never seen: stage 3 of 3.

WHAT IT DOES    Reads model.pt2 files, programs made by torch.export that turn photos (B, 3, H, W)
  in [0, 1] into logits (B, C, H, W), and counts pixels: one confusion matrix a photo, all scores
  from these (but D1, D2, D6). It holds no architecture: any other segmenter is scored too.
YOU WILL LEARN
  - why a file can run code, and what to look at before it is loaded -> inspect_program
  - that every score is a few sums over one integer matrix -> image_counts, class_scores
  - how one network gets seven scores, most called "Dice", from seven definitions
    -> published_scores
RUN IT          python evaluate.py                                  every run under checkpoints/
                python evaluate.py checkpoints/finetune --split val
                python evaluate.py --blur 50 --as-published --json scores.json
WHAT TO EXPECT  CPU, torch 2.15, seed 0. Pets at 128 px: accuracy 0.881, mIoU 0.709; toy:
  accuracy 0.850, mIoU 0.634.
  A broken run stands level with a baseline: all background is right on over half the pixels.
"""
import argparse, hashlib, io, json, math, os, re, sys, time, zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.export.passes import move_to_device_pass
from torch.utils.flop_counter import FlopCounterMode
# --- knobs ----------------------------------------------------------------------------------------
SPLIT_SEED = 0                   # of splits and subsets, which --seed does not move
CACHE = Path("data/cache")       # decoded photos; delete it whenever you like
PETS = ["pet", "background", "border"]
MEANS = {"accuracy": "accuracy", "mIoU": "miou", "Dice": "dice", "precision": "precision",
         "recall": "recall", "F1": "f1", "mIoU/photo": "image_miou"}         # column: key
CONVENTIONS = {"pet, no border": "pet_iou_without_border", "pet + border": "pet_iou_border_as_pet",
               "cats mIoU": "cat_miou", "dogs mIoU": "dog_miou"}
PUBLISHED = [{key.replace("_", " "): key for key in keys.split()} for keys in (
    "D1_dice D1_iou D2_dice D2_iou D3_dice D3_iou",
    "D4_accuracy D5_f1 D5_iou D6_dice D6_iou D7_dice")]
IGNORE = 255                     # label of pixels that count neither in a loss nor in a score
FORMAT = 1                       # of the checkpoints
CATS = ("Abyssinian Bengal Birman Bombay British_Shorthair Egyptian_Mau Maine_Coon Persian Ragdoll "
        "Russian_Blue Siamese Sphynx").split()       # the names of the 25 dog breeds begin small
HELP = type("", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})

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
    p.error = fail
    p.add_argument("runs", nargs="*", default=[], help="run folders or .pt2 files; none: every "
                   "finished run directly under checkpoints/")
    add = p.add_argument_group("data").add_argument
    add("--data", help="toy, pets or a folder; without it, what each program was trained on")
    add("--root", help="where the data sets lie; without it, where they lay in training, or data")
    add("--split", choices=("test", "val"), default="test",
        help="test is for the end; choose on val")
    add("--blur", type=number(float, 0, 100), default=0.0,
        help="percent, in steps of ten; 100 is 10 pixels at 120")
    add = p.add_argument_group("runtime").add_argument
    add("--batch-size", type=number(int, 1, 10**6), default=64, help="changes no score")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first of them that is there")
    add = p.add_argument_group("output").add_argument
    add("--as-published", action="store_true", help="also the definitions behind published numbers")
    add("--json", help="write the scores to this file too, a list with an object for each run")
    return p.parse_args(argv)
# --- programs -------------------------------------------------------------------------------------
## A .pt2 file is a zip archive with weights and a graph, and torch.export.load trusts it: pickles
## in it run code, size expressions are evaluated, operators are looked up anywhere in torch,
## libraries are loaded. So each such place is looked at first; what is odd is refused.

NAMES = re.compile(r"(archive_format|archive_version|byteorder|\.data/\w+|\.format_version|"
                   r"\.storage_alignment|models/model\.json|data/sample_inputs/model\.pt|"
                   r"data/(weights|constants)/((weight|tensor)_\d+|model_\w+_config\.json)|"
                   r"extra/meta\.json)")
SYMBOL = re.compile(r"Symbol\('\w+'(, (positive|integer|nonnegative)=True)*\)")
SIZES = re.compile(r"((Integer|Add|Mul|FloorDiv|CleanDiv|CeilDiv|Mod|PythonMod|Max|Min)\b|"
                   r"[-\d\s(),])*")
LAYOUT = {"type": (None, "builtins.tuple", "builtins.dict"), "context": (None, "null", "[]")}
TARGETS = re.compile(            # but for what reads and writes files
    r"torch\.ops\.aten\.(?!from_file|save)(_?[a-z]\w*|__(and|or|xor)__)(\.[A-Za-z]\w*)?|"
    r"torch\.ops\.(torchvision\.deform_conv2d|higher_order\.wrap_with_(autocast|set_grad_enabled))"
    r"(\.default)?|_operator\.(getitem|add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge)")

def walk(node, key=None):
    """Every (key, value) anywhere inside a JSON value; members of a list have the list's key."""
    for name, value in node.items() if isinstance(node, dict) else [(key, value) for value in node]:
        yield name, value
        if isinstance(value, (dict, list)):
            yield from walk(value, name)

def inspect_program(path):
    """Look into the archive without running anything of it -> its meta.json, and a copy in memory
    of what was looked at (another reader might find other members in the file). ValueError names
    what was refused."""
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if len(infos) < len(archive.infolist()):
            raise ValueError("it holds a member twice")
        if sum(info.file_size for info in infos.values()) > 2 * os.path.getsize(path):
            raise ValueError("it unpacks to far more than its size")
        for name in infos:
            if not NAMES.fullmatch(name):
                raise ValueError(f"it holds {name!r}, which a plain program does not")
        members = {name: archive.read(info) for name, info in infos.items()}
    for kind in ("weights", "constants"):
        for key, value in walk(json.loads(members[f"data/{kind}/model_{kind}_config.json"])):
            if key == "use_pickle" and value is not False:
                raise ValueError(f"its {kind} are pickled")
            if key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", value):
                raise ValueError(f"its {kind} hold the object {value!r}")
    for key, value in walk(json.loads(members["models/model.json"])):
        text = value if isinstance(value, str) else ""
        if key == "expr_str" and not SIZES.fullmatch(SYMBOL.sub("1", text)):
            raise ValueError(f"the size {text!r} is more than arithmetic")
        if key == "target" and text and not TARGETS.fullmatch(text) or key == "as_operator":
            raise ValueError(f"it calls {value!r}")
        if key.endswith(("name", "names")) and re.search(r"[^\w.-]", text):
            raise ValueError(f"the name {text!r} could be code")
        if key in ("in_spec", "out_spec"):             # once decoded: JSON can write "(" as \u0028
            for name, part in walk(json.loads(text)):
                if name in LAYOUT and part not in LAYOUT[name]:
                    raise ValueError(f"one tensor in and one out are wanted, not {text!r}")
        if key == "guards_code" and value:
            raise ValueError(f"it brings code (is more than the batch left free?): {value!r}")
    try:
        torch.load(io.BytesIO(members["data/sample_inputs/model.pt"]), weights_only=True)
    except Exception as error:
        raise ValueError("its sample inputs are more than tensors") from error
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)
    copy.seek(0)
    return json.loads(members["extra/meta.json"]), copy

def open_program(path, device):
    """A .pt2 file -> segment(x), from (B, 3, H, W) float in [0, 1] to logits (B, C, H, W), and
    its meta.json with classes, size as [H, W] and ignore."""
    try:
        meta, archive = inspect_program(path)
        meta["size"] = [meta["size"]] * 2 if isinstance(meta["size"], int) else list(meta["size"])
        names, args = meta["classes"], meta.get("args", {})
        if not all(type(side) is int and 0 < side <= 4096 for side in meta["size"]):
            raise ValueError(f"size {meta['size']} in meta.json")
        if not (type(names) is list and 0 < len(names) == len({*names}) <= 256
                and all(type(name) is str and name.isprintable() for name in names)):
            raise ValueError(f"classes {names!r} in meta.json; wanted a list of different names")
        if json.dumps(meta["ignore"]) not in ("null", *map(str, range(256))) or not (
                type(args) is dict and {type(args.get(k, "")) for k in ("data", "root")} == {str}):
            raise ValueError(f"ignore {meta['ignore']!r} or args {args!r} in meta.json")
        program = torch.export.load(archive)
        if device.type != "cpu":
            program = move_to_device_pass(program, device)
        segment, light = program.module(), torch.tensor([0.1, 0.5, 1], device=device)
        x = torch.rand(3, 3, *meta["size"], device=device) * light.view(3, 1, 1, 1)
        answer = segment(x)
        if not answer.isfinite().all():
            raise ValueError("its answers are not finite numbers: the training diverged")
        with FlopCounterMode(display=False) as counter:
            alone = segment(x[:1])
        if (alone - answer[:1]).abs().mean() > 0.05 * answer[:1].abs().mean():
            raise ValueError("an answer depends on the batch: call model.eval() before export")
    except FileNotFoundError:
        fail(f"{path}: no such file; train first, for instance with python finetune.py")
    except KeyError as error:
        fail(f"{path}: refused: {error} is missing; wanted a program as finetune.py exports it")
    except Exception as error:
        fail(f"{path}: refused: {(str(error).splitlines() or [type(error).__name__])[0][:150]}")
    wanted = (3, len(meta["classes"]), *meta["size"])
    if tuple(answer.shape) != wanted:
        fail(f"{path}: refused: for 3 photos it answers {tuple(answer.shape)}, wanted {wanted}")
    meta["cost"] = {"parameters": sum(weight.numel() for weight in program.parameters()),
                    "multiply_adds": counter.get_total_flops() // 2}        # of one photo
    return segment, meta

# --- scores ---------------------------------------------------------------------------------------
def image_counts(hard, masks, C):
    """(B, H, W) predicted and true labels -> (B, C, C) int64, pixels by truth (down) and prediction
    (across) of each image; pixels of the label IGNORE are in none."""
    B = len(masks)
    cell = torch.where(masks == IGNORE, C * C, masks.long() * C + hard)               # (B, H, W)
    cell = cell + torch.arange(B, device=cell.device).view(B, 1, 1) * (C * C + 1)
    counts = torch.bincount(cell.flatten(), minlength=B * (C * C + 1))
    return counts.view(B, C * C + 1)[:, :-1].view(B, C, C)

def ratio(top, bottom):
    """top / bottom, nan where bottom is 0."""
    return top.double() / bottom.double()

def class_scores(counts, names):
    """Scores of a whole split from its matrices (N, C, C); names are those of the classes that
    count, the last of C. A class that never occurs is nan and left out of the means; these are 1
    where no class occurs."""
    n, whole = len(names), counts.sum(0)
    hit, truth, guess = whole.diag()[-n:], whole.sum(1)[-n:], whole.sum(0)[-n:]
    each = {"iou": ratio(hit, truth + guess - hit), "dice": ratio(2 * hit, truth + guess),
            "precision": ratio(hit, guess), "recall": ratio(hit, truth)}
    each["f1"] = 2 * each["precision"] * each["recall"] / (each["precision"] + each["recall"])
    seen = truth + guess > 0
    for name in ("precision", "recall", "f1"):         # never guessed, or never right: 0
        each[name] = torch.where(seen, each[name].nan_to_num(), torch.nan)
    out = {"accuracy": ratio(whole.diag().sum(), whole.sum()).item(),
           "miou": each["iou"].nanmean().nan_to_num(1).item()}
    out |= {name: each[name].nanmean().nan_to_num(1).item()
            for name in ("dice", "precision", "recall", "f1")}
    hit, both = counts.diagonal(dim1=1, dim2=2)[:, -n:], (counts.sum(1) + counts.sum(2))[:, -n:]
    out["image_miou"] = ratio(hit, both - hit).nan_to_num(1).mean().item()     # empty on empty: 1
    out["image_dice"] = ratio(2 * hit, both).nan_to_num(1).mean().item()
    out["classes"] = {label: {name: values[i].item() if seen[i] else None
                              for name, values in each.items()} for i, label in enumerate(names)}
    return out

def pet_scores(counts, breeds):
    """For the pets: the pet alone, with border pixels left out and with border counted as pet, and
    mean IoU for each species (the names of cat breeds begin with a capital)."""
    c = counts.sum(0).double()
    inner = (c[0, 0] / (c[0].sum() + c[1, 0])).item()          # wrong outside: only on background
    outer = (c[::2, ::2].sum() / (c.sum() - c[1, 1])).item()   # rows and columns 0 and 2 are one
    cat = torch.tensor([breed[0].isupper() for breed in breeds])
    return {"pet_iou_without_border": inner, "pet_iou_border_as_pet": outer,
            **{f"{kind}_{key}": value for kind, which in (("cat", cat), ("dog", ~cat))
               for key, value in class_scores(counts[which], PETS).items() if key != "classes"}}

def soft_sums(logits, masks):
    """(B, 2, 3): |P and T|, |P|, |T| summed over channels and pixels of each image, with P the
    sigmoid of the logits, and with P the sigmoid of that."""
    C = logits.shape[1]
    labels = torch.arange(C, device=masks.device).view(1, -1, 1, 1) + (C == 1)
    y, valid = (masks[:, None] == labels).float(), (masks[:, None] != IGNORE).float()
    sums = [torch.stack([(p * y).sum((1, 2, 3)), (p * valid).sum((1, 2, 3)), y.sum((1, 2, 3))], 1)
            for p in (logits.sigmoid(), logits.sigmoid().sigmoid())]
    return torch.stack(sums, 1)

def published_scores(counts, soft, names):
    """The definitions behind the numbers of five earlier projects, on this network's answers. Most
    of them are called Dice or IoU there. D1, D2 and D6 take sigmoids of the logits, so they mean
    nothing for a network that was trained with a softmax; the published D6 is one minus this."""
    n = len(names)
    hit = lambda c: c.diagonal(dim1=1, dim2=2)[:, -n:]
    both = lambda c: (c.sum(1) + c.sum(2))[:, -n:]
    pooled = lambda x, size: torch.stack([part.sum(0) for part in x.split(size)])
    out = {}
    for key, (i, p, t) in (("D1", soft[:, 0].T.double()), ("D2", soft[:, 1].T.double())):
        out[f"{key}_dice"] = (2 * (i + 1e-5) / (p + t + 1e-5)).mean().item()
        out[f"{key}_iou"] = ((i + 1e-5) / (p + t - i + 1e-5)).mean().item()
    c = pooled(counts, 32).double()                    # D3: hard, macro, batches of 32
    out["D3_dice"] = (2 * hit(c) / both(c)).nanmean(1).nanmean().nan_to_num(1).item()
    out["D3_iou"] = ((hit(c) + 1e-6) / (both(c) - hit(c) + 1e-6)).mean().item()
    right = counts.diagonal(dim1=1, dim2=2).sum(1)     # D4: mean accuracy of the images
    out["D4_accuracy"] = ratio(right, counts.sum((1, 2))).nanmean().item()
    thing = names[-1 if n == 2 else 0]                 # D5: pooled, of the class that is looked for
    thing = class_scores(counts, names)["classes"][thing]
    out |= {f"D5_{name}": thing[name] or 0.0 for name in ("precision", "recall", "f1", "iou")}
    i, p, t = pooled(soft[:, 0], 4).T.double()         # D6: soft, pooled over batches of 4
    out["D6_dice"] = ((2 * i + 1e-6) / (p + t + 1e-6)).mean().item()
    out["D6_iou"] = ((i + 1e-6) / (p + t - i + 1e-6)).mean().item()
    present = counts.sum(2)[:, -n:] > 0                # D7: classes in the truth, batches of 8
    dice = (2 * hit(counts).double() / both(counts)).nan_to_num(0) * present
    each = dice.sum(1) / present.sum(1)                # nan of a photo without any: left out
    each = torch.stack([part.nanmean() for part in each.split(8)])
    out["D7_dice"] = each.nanmean().nan_to_num(1).item()
    return out

def pick_device(name, amp):
    """'auto' takes cuda or mps where it is there, else cpu -> device, whether bfloat16 is fast."""
    there = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.empty(1, device=there if name == "auto" else name).device
    except Exception as error:                         # each backend has its own
        fail(f"--device {name}: not here ({str(error).splitlines()[0]:.99}); try --device cpu")
    if device.type == "cuda":
        return device, amp and torch.cuda.get_device_capability(device)[0] >= 8
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device, amp and device.type == "cpu" and fast

def progress(text):
    """One rewritten line, on a terminal only; the next print writes over it."""
    if sys.stdout.isatty():
        print(f"\r{text:<39.39}\r", end="", flush=True)

# --- labelled data --------------------------------------------------------------------------------
def subset(breeds, share):
    """Indices of a seeded share of each breed, at least one, and of the rest; 25 % is in 50 %."""
    g, size, seen, lists = torch.Generator(), Counter(breeds), Counter(), ([], [])
    for i in torch.randperm(len(breeds), generator=g.manual_seed(SPLIT_SEED)).tolist():
        lists[seen[breeds[i]] >= share * size[breeds[i]]].append(i)      # list 0: chosen
        seen[breeds[i]] += 1
    return sorted(lists[0]), sorted(lists[1])

def draw_toy(n, size, seed):
    """n drawn cats and dogs -> images (n, 3, H, W), masks (n, H, W) 0 pet, 1 background, 2 border,
    both uint8, and breeds. Fur, ground and a ball share colours: shape tells pet from ball."""
    images, masks = torch.empty(n, 3, *size).byte(), torch.empty(n, *size).byte()
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
    for i in range(0, n, 256):
        g, b = torch.Generator().manual_seed(seed * 100003 + i), min(256, n - i)
        u = lambda low, high, c=1: low + (high - low) * torch.rand(b, c, 1, 1, generator=g)
        cat, zoom = ((i + torch.arange(b)) % 37 < 12).view(b, 1, 1, 1), u(0.55, 0.9)
        X, Y = u(-1, 1).sign() * (x - u(-0.3, 0.3)) / zoom, (y - u(-0.25, 0.25)) / zoom
        disc = lambda cx, cy, rx, ry: ((X - cx) / rx) ** 2 + ((Y - cy) / ry) ** 2 < 1
        tips = (((X + 0.45).abs() - 0.23).abs() < 0.4 * (Y + 1.05)) & (Y < -0.45)     # (b, 1, H, W)
        pet = torch.where(cat, tips, disc(-0.85, -0.2, 0.14, 0.4) | disc(-0.05, -0.2, 0.14, 0.4))
        pet = pet | disc(-0.45, -0.3, 0.4, 0.38) | disc(0.3, 0.3, 0.75, 0.4) | disc(
            1.1, 0, 0.1, 0.45) | disc(-0.1, 0.7, 0.12, 0.4) | disc(0.7, 0.7, 0.12, 0.4)
        wave = lambda low, high: torch.sin((x * u(-1, 1, 3) + y * u(-1, 1, 3)) * u(low, high, 3)
                                           + u(0, 6.3, 3)).mean(1, True) + u(-0.2, 0.2, 3)
        fur, tint = pet | disc(u(-1.4, 1.4), u(-1.2, 1.2), 0.3, 0.3), u(0.2, 0.8, 3)    # and a ball
        paint = torch.where(fur, 0.25 * wave(20, 40), 0.3 * wave(2, 12)) + tint
        paint += 0.04 * torch.randn(b, 1, *size, generator=g)
        images[i:i + b] = paint.clamp(0, 1).mul(255).byte()
        k = 2 * max(1, min(size) // 48) + 1                                    # border, in pixels
        grown, rest = (F.max_pool2d(m.float(), k, 1, k // 2) for m in (pet, ~pet))
        masks[i:i + b] = torch.where(grown + rest > 1, 2, 1 - pet.long())[:, 0].byte()
    return images, masks, [(CATS + [f"dog_{d}" for d in range(25)])[i % 37] for i in range(n)]

def pet_files(root, part):
    """Oxford-IIIT Pet, official split, a tenth of trainval for validation -> pairs, breeds."""
    base = Path(root, "oxford-iiit-pet")
    if not (base / "annotations/trainval.txt").exists():
        from torchvision.datasets import OxfordIIITPet       # here: importing it takes a while
        try:
            OxfordIIITPet(root, download=True)
        except Exception as error:
            fail(f"pets: no download ({error}); unpack images.tar.gz and annotations.tar.gz of "
                 f"https://www.robots.ox.ac.uk/~vgg/data/pets in {base}, or take --data toy")
    lines = (base / f"annotations/{'test' if part == 'test' else 'trainval'}.txt").read_text()
    names = [line.split()[0] for line in lines.splitlines() if line and line[0] != "#"]
    breeds = [name.rsplit("_", 1)[0] for name in names]
    keep = range(len(names)) if part == "test" else subset(breeds, 0.1)[part == "train"]
    return [(base / f"images/{names[i]}.jpg", base / f"annotations/trimaps/{names[i]}.png")
            for i in keep], [breeds[i] for i in keep]

def folder_files(folder, part):
    """images/ and masks/, flat or under train/ val/ test/ (see README) -> pairs, breeds ("")."""
    flat, cut = Path(folder, "images").is_dir(), not Path(folder, "val").is_dir()
    base = Path(folder, "" if flat else "train" if cut and part == "val" else part)
    files = [sorted(base.glob(pattern)) for pattern in ("images/[!.]*", "masks/[!.]*")]
    photos, masks = ({file.stem: file for file in kind} for kind in files)
    count = Counter(file.stem for kind in files for file in kind)
    odd = [s for s in sorted(count) if count[s] > 2 or s not in photos or s not in masks]
    if odd or not photos:
        fail(f"{base}: '{odd[0] if odd else 'a photo'}' wanted once in images/ and once in masks/")
    every, stems = range(len(photos)), list(photos)
    test, rest = subset([""] * len(photos), 0.1) if flat else (every, every)
    val, train = subset([""] * len(rest), 0.1) if flat or cut else (every, every)
    keep = test if part == "test" else [rest[i] for i in (val if part == "val" else train)]
    pairs = [(photos[stems[i]], masks[stems[i]]) for i in keep]
    return (pairs, [""] * len(pairs)) if pairs else fail(f"{folder}: too few photos for {part}")

def read_pair(pair, size):
    """(photo, mask) files -> (4, H, W) uint8, RGB and labels, stretched and turned upright."""
    try:
        with Image.open(pair[0]) as photo, Image.open(pair[1]) as mask:
            full = photo.size[::-1 if photo.getexif().get(274, 1) > 4 else 1]  # 274: orientation
            if mask.mode not in ("1", "L", "P") or photo.mode[0] == "I" or mask.size != full:
                raise OSError(f"wrong mode or size: {photo.mode} {full}, {mask.mode} {mask.size}")
            photo.draft("RGB", (2 * size[1], 2 * size[0]))    # JPEG: decodes at 1/2, 1/4 or 1/8
            rgb = ImageOps.exif_transpose(photo).convert("RGB").resize(size[::-1], Image.BILINEAR)
            return np.dstack([rgb, mask.resize(size[::-1], Image.NEAREST)]).transpose(2, 0, 1)
    except Exception as error:                         # whatever a broken file can provoke
        raise OSError(f"{pair[0]}, {pair[1].name}: {error}") from error

def decode(pairs, size):
    """Read every pair once, in threads -> (N, 4, H, W) uint8, kept in data/cache/ under a name made
    from the paths, sizes and times of what was read."""
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime) for p in pairs for f in p]
    key = hashlib.sha256(repr((FORMAT, size, stats)).encode()).hexdigest()[:16]
    cache, began, shape = CACHE / f"{key}.bin", time.perf_counter(), (len(pairs), 4, *size)
    if cache.exists() and cache.stat().st_size == math.prod(shape):
        return torch.from_numpy(np.memmap(cache, np.uint8, "c", shape=shape))
    array = np.empty(shape, np.uint8)
    with ThreadPoolExecutor() as pool:
        for i, pixels in enumerate(pool.map(lambda pair: read_pair(pair, size), pairs)):
            array[i] = pixels
            progress(f" decoding {i}/{len(pairs)}")
    save(cache, array.tofile)
    print(f"decoded  {len(pairs)} photos in {time.perf_counter() - began:.1f} s -> {cache}")
    return torch.from_numpy(array)

def load_split(data, root, part, size, ignore):
    """-> images (N, 3, H, W), masks (N, H, W) of labels, IGNORE; uint8; breeds (N); class names."""
    if data == "toy" and (ignore in (None, IGNORE) or fail("--ignore: not for drawn pets")):
        images, masks, breeds = draw_toy(*((256, size, 1) if part == "test" else (1110, size, 2)))
        keep = range(256) if part == "test" else subset(breeds, 0.1)[part == "train"]
        return images[keep], masks[keep], [breeds[i] for i in keep], PETS
    pairs, breeds = pet_files(root, part) if data == "pets" else folder_files(data, part)
    images, masks = decode(pairs, size).split((3, 1), 1)
    table, masks = torch.arange(256).byte(), masks[:, 0]                # (N, H, W)
    found = torch.bincount(masks.flatten(), minlength=256).nonzero().flatten().tolist()
    top = max(values := set(found) - {ignore} or fail(f"{data}: --ignore ignores every label"))
    if data == "pets":
        table -= 1                                     # trimap 1, 2, 3: pet, background, border
    elif values <= {0, 255}:
        table[255] = top = 1                           # a black and white mask
    elif top > 99:
        i = (masks == top).flatten(1).any(1).nonzero()[0].item()
        fail(f"{pairs[i][1]}: {masks[i].unique().tolist()[-9:]}; wanted 0, 255 or 0..C-1, --ignore")
    if ignore is not None:
        table[ignore] = IGNORE
    names = [str(label) for label in range(top + 1)] if top > 1 else ["foreground"]
    return images, table[masks.int()], breeds, PETS if data == "pets" else names

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

# --- pictures -------------------------------------------------------------------------------------
COLOURS = torch.randint(40, 255, (256, 3), generator=torch.Generator().manual_seed(4)).byte()
COLOURS[:3] = torch.tensor([[255, 120, 0], [0, 0, 0], [255, 255, 255]])      # pet, ground, border

def draw_overlay(path, images, masks, hard, binary):
    """Photo, truth over it and prediction over it for N photos, a row each, what is looked for in
    orange (label 0, or 1 of two); wrong pixels in red."""
    photo = images.movedim(1, -1).float()                                    # (N, H, W, 3)
    over = [(photo + COLOURS[torch.where(m < 2, m ^ int(binary), m).long()]) / 2
            for m in (masks, hard)]
    wrong = ((hard != masks) & (masks != IGNORE))[..., None]
    last = torch.where(wrong, torch.tensor([255.0, 0, 0]), photo)
    rows = torch.cat([photo, *over, last], 2).flatten(0, 1).byte().numpy()   # (N H, 4 W, 3)
    scale = max(1, 128 // images.shape[3])
    picture = Image.fromarray(rows).resize((rows.shape[1] * scale, rows.shape[0] * scale), 0)
    page = Image.new("RGB", (picture.width, picture.height + 20), "white")
    page.paste(picture, (0, 20))
    for i, title in enumerate(("photo", "truth", "prediction", "wrong in red")):
        ImageDraw.Draw(page).text((i * picture.width // 4 + 6, 4), title, "black")
    save(path, lambda file: page.save(file, "PNG"))

def draw_curves(path, rows):
    """Loss and mean IoU over the epochs, of training (grey) and validation (orange)."""
    page = Image.new("RGB", (860, 330), "white")
    draw = ImageDraw.Draw(page)
    for left, title, keys in ((50, "loss", ("loss", "val_loss")),
                              (470, "mean IoU", ("miou", "val_miou"))):
        values = [row[key] for row in rows for key in keys]
        low, high = (min(values), max(values) + 1e-9) if title == "loss" else (0, 1)
        draw.text((left, 8), f"{title}: training grey, validation orange", "black")
        for i in range(5):                                                   # grid and labels
            y = 280 - 62 * i
            draw.line((left, y, left + 360, y), "lightgrey")
            draw.text((left - 36, y - 6), f"{low + (high - low) * i / 4:.2f}", "black")
        for key, colour in zip(keys, ("grey", "darkorange")):
            points = [(left + 360 * (i + 0.5) / len(rows),
                       280 - 248 * (row[key] - low) / (high - low)) for i, row in enumerate(rows)]
            draw.line(points, colour, 3)
            x, y = points[-1]
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        draw.text((left, 290), "epoch 1", "black")
        draw.text((left + 320, 290), f"epoch {len(rows)}", "black")
    save(path, lambda file: page.save(file, "PNG"))

# --- main -----------------------------------------------------------------------------------------
def blur_photos(images, percent):
    """PIL's Gaussian blur, radius int(percent / 10) pixels on a photo of 120, more on a larger."""
    if percent < 10:
        return images
    radius = int(percent / 10) * min(images.shape[2:]) / 120
    soft = lambda image: np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(soft, images.movedim(1, -1).contiguous().numpy()))
    return torch.from_numpy(np.stack(rows)).movedim(-1, 1)

@torch.inference_mode()
def run_program(segment, images, masks, C, batch, device):
    """A program over a whole split -> hard labels (N, H, W) uint8, matrices (N, C', C'), soft sums
    (N, 2, 3), seconds."""
    hard, counts, soft, began = [], [], [], time.perf_counter()
    for x, y in zip(images.split(batch), masks.split(batch)):
        x, y = x.to(device).float().div_(255), y.to(device)
        logits = segment(x).float()
        ## max(1).indices is argmax(1), which on a CPU is eight times slower in this layout.
        label = logits.max(1).indices if C > 1 else (logits[:, 0] > 0).long()     # (B, H, W)
        hard.append(label.byte().cpu())
        counts.append(image_counts(label, y, max(2, C)).cpu())
        soft.append(soft_sums(logits, y).cpu())
        progress(f" {sum(map(len, hard))} of {len(images)} photos")
    return torch.cat(hard), torch.cat(counts), torch.cat(soft), time.perf_counter() - began

def table(title, columns, rows, value):
    """Aligned columns of numbers under a title; rows are (name, scores), None or nan is a dash."""
    width = max(len(title), *(len(name) for name, _ in rows)) + 1
    print("\n" + title.ljust(width) + "".join(f"{c:>{max(10, len(c) + 2)}}" for c in columns))
    for name, each in rows:
        values = [(value(each, column), max(10, len(column) + 2)) for column in columns]
        print(name.ljust(width) + "".join(
            f"{'-' if v is None or v != v else f'{v:.4f}':>{size}}" for v, size in values))

def all_scores(counts, soft, names, breeds, as_published):
    """All scores of a split: of the classes, for pets of the species, if asked the published."""
    out = class_scores(counts, names)
    out |= pet_scores(counts, breeds) if names == PETS else {}
    return out | (published_scores(counts, soft, names) if as_published else {})

def evaluate(args):
    ## 1. The programs: those named, or every finished run.
    paths = [Path(run, "model.pt2") if Path(run).is_dir() else Path(run) for run in args.runs] or \
        [path for path in sorted(Path("checkpoints").glob("*/model.pt2"))
         if path.parent.suffix != ".prev"]
    if not paths:
        fail("no finished run under checkpoints/; train one first: python pretrain.py and then "
             "python finetune.py")
    if args.json and Path(args.json).is_dir():
        fail(f"--json {args.json}: a folder; wanted a file")
    device, _ = pick_device(args.device, False)
    print(f"evaluate.py  torch {torch.__version__}  {device}  {args.split}  blur {args.blur:g} %")
    programs = [(path, *open_program(path, device)) for path in paths]
    ## 2. Each on its data; photos that several share are read once.
    sets, records, pictures = {}, [], []
    for path, segment, meta in programs:
        trained = meta.get("args", {})
        data = args.data or trained.get("data") or fail(f"{path}: names no data; give --data")
        root, C = args.root or trained.get("root", "data"), len(meta["classes"])
        key = (data, str(root), *meta["size"], meta["ignore"], *meta["classes"])
        if key not in sets:
            images, masks, breeds, names = load_split(data, root, args.split, meta["size"],
                                                      meta["ignore"])
            sets[key] = blur_photos(images, args.blur), masks, breeds, names, [], []
        images, masks, breeds, names, group, constants = sets[key]
        if len(names) > C or (names == PETS) != (meta["classes"] == PETS):
            fail(f"{path}: its classes are {', '.join(meta['classes'])}, those of {data} are "
                 f"{', '.join(names)}; each must occur in the photos that it is trained on")
        hard, counts, soft, seconds = run_program(segment, images, masks, C, args.batch_size,
                                                  device)
        records.append({
            "run": str(path.parent if path.name == "model.pt2" else path), "data": data,
            "split": args.split, "photos": len(images), "size": meta["size"], "blur": args.blur,
            "script": meta.get("script"), "device": str(device), "torch": str(torch.__version__),
            "images_per_second": len(images) / seconds, **meta["cost"],
            "scores": all_scores(counts, soft, meta["classes"], breeds, args.as_published)})
        group.append((records[-1]["run"], records[-1]["scores"]))
        if not constants:        # what every constant answer scores, beside the networks
            for label, name in enumerate(["background"] * (C == 1) + meta["classes"]):
                constant = torch.zeros_like(counts)
                constant[:, :, label] = counts.sum(2)
                constants.append((f"all {name}", all_scores(
                    constant, soft * torch.nan, meta["classes"], breeds, args.as_published)))
        some = torch.linspace(0, len(images) - 1, min(6, len(images))).long()
        pictures.append((path, images[some], masks[some], hard[some], C <= 2))
    if args.json:
        save(Path(args.json), lambda file: file.write_text(json.dumps(records, indent=1)))
    ## 3. Tables: all classes, each class, and for pets the conventions and the species.
    for (data, _, H, W, *_), (images, _, _, _, group, constants) in sets.items():
        group += constants
        print(f"\n{data}, {args.split}: {len(images)} photos at {H}x{W}"
              + ("  (drawn pictures: toy scores)" if data == "toy" else ""))
        table("mean over classes", MEANS, group, lambda s, column: s[MEANS[column]])
        table("IoU", group[0][1]["classes"], group, lambda s, column: s["classes"][column]["iou"])
        for title, columns in (("pets", CONVENTIONS), ("as published", PUBLISHED[0]),
                               ("as published", PUBLISHED[1])):
            if set(columns.values()) <= group[0][1].keys():
                table(title, columns, group, lambda s, column: s[columns[column]])
    print(f"\nscores   {args.json}" if args.json else "")
    ## 4. Pictures beside each program: a few answers, and the curves of its training.
    kind = "-val" * (args.split == "val") + f"-blur{args.blur:g}" * (args.blur > 0)
    for path, *some in pictures:
        stem = "" if path.name == "model.pt2" else f"{path.stem}-"
        draw_overlay(picture := path.with_name(f"{stem}overlay{kind}.png"), *some)
        print(f"picture  {picture}")
        curves, log = path.with_name("curves.png"), path.with_name("log.jsonl")
        if path.name == "model.pt2" and log.exists():
            try:
                draw_curves(curves, [json.loads(row) for row in log.read_text().splitlines()])
            except (KeyError, TypeError, ValueError):
                print(f"note     {log}: no curves, as its rows are not those of our scripts")

def main(argv=None):
    """evaluate, with one line in the place of a traceback where the machine gives out."""
    try:
        evaluate(parse_args(argv))
    except KeyboardInterrupt:
        raise SystemExit(130)
    except AssertionError as e:                        # a program's: not made for such a batch
        fail(f"{str(e).splitlines()[0] if str(e) else 'a program fails'}; another --batch-size?")
    except (OSError, MemoryError, RuntimeError) as e:      # the last is torch's, for memory too
        if not isinstance(e, RuntimeError) or any(w in str(e).lower() for w in ("alloc", "of mem")):
            fail(e if isinstance(e, OSError) else "out of memory; halve --batch-size")
        raise

if __name__ == "__main__":
    main()
