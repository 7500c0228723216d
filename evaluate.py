"""Stage 3 of 3: how good is a finished segmenter, on photos it has never seen?

WHAT IT DOES  Reads programs, the model.pt2 of finetune.py, unet.py and others,
which turn photos (B, 3, H, W) in [0, 1] into logits (B, C, H, W). It counts the
pixels of each photo by truth and answer, and computes the scores from these
counts (N, C, C). It knows no architecture: anybody's program is scored.

YOU WILL LEARN  why a file can run code, and what to look at before it is loaded
-> inspect_program; that a score is a few sums over one matrix of counts ->
class_scores; seven published ways to score one network -> published_scores

RUN IT  python evaluate.py                       every run under checkpoints/
        python evaluate.py checkpoints/finetune --split val
        python evaluate.py --blur 50 --as-published --json scores.json
        python evaluate.py checkpoints/unet --photos cat.jpg holiday/

WHAT TO EXPECT  A table in ten seconds, and overlay.png beside the program.
A broken run only equals the column "all background", itself over half right.
"""

import io
import json
import re
import sys
import zipfile
import zlib
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch.export.passes import move_to_device_pass
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets

IGNORE = 255  # label of pixels that count neither in a loss nor in a score
PETS = ["pet", "background", "border"]
SUMMARY = ["accuracy", "miou", "dice", "precision", "recall"]


def parse_args(argv=None):
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", help="run folders or .pt2 files; none: all of checkpoints/")
    p.add_argument("--data", help="toy, pets or a folder; without it, that of the training")
    p.add_argument("--root", help="where pets lie; without it, where they lay in the training")
    p.add_argument("--split", choices=["test", "val", "train"], default="test", help="tune on val")
    p.add_argument("--blur", type=float, default=0.0, help="by tens; 100: radius 10 of 120 pixels")
    p.add_argument("--batch-size", type=int, default=64, metavar="N", help="less saves memory")
    p.add_argument("--device", default=str(device), help="cuda, mps, cpu")
    p.add_argument("--as-published", action="store_true", help="also what published numbers mean")
    p.add_argument("--json", help="write the scores to this file too, a list of all runs")
    p.add_argument("--photos", nargs="+", default=[], help="photos or folders to segment with RUN")
    p.add_argument("--out", help="folder for what --photos draws; without it, beside each photo")
    return p.parse_args(argv)


# --- programs ------------------------------------------------------------------------------------
## A .pt2 file is a zip archive with weights and a graph, and torch.export.load trusts it. It
## unpickles, which can call any function; it evaluates sizes, argument names and guards as Python;
## it looks operators up anywhere in torch; it loads libraries. So names of files, and all that is
## evaluated or looked up, are compared with those of a plain program before it is loaded.

MEMBERS = (
    r"archive_format|archive_version|byteorder|\.data/\w+|\.format_version|\.storage_alignment|"
    r"data/(weights|constants)/((weight|tensor)_\d+|model_\w+_config\.json)|"
    r"data/sample_inputs/model\.pt|models/model\.json|extra/meta\.json"
)
# such as [1, {"type": "builtins.tuple", "context": "null", "children_spec": []}]
LAYOUT = r'([][{}:, 1]|null|"(type|context|children_spec|builtins\.(tuple|dict)|null|\[\])")*'
ALLOWED = {  # key in one of the JSON files: the type of its value, and all that it may be
    "use_pickle": r"bool False",
    "path_name": r"str (weight|tensor)_\d+",
    "expr_str": r"str (Symbol\('\w+'(, (positive|integer|nonnegative)=True)*\)|[-\d\s(),]|"
    r"(Integer|Add|Mul|FloorDiv|CleanDiv|CeilDiv|Mod|PythonMod|Max|Min)\b)*",
    "target": r"NoneType None|"
    r"str (torch\.ops\.aten\.(?!from_file|save)(_?[a-z]\w*|__(and|or|xor)__)(\.[A-Za-z]\w*)?|"
    r"torch\.ops\.(torchvision\.deform_conv2d|higher_order\.wrap_with_(autocast|set_grad_enabled))"
    r"(\.default)?|_operator\.(getitem|add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge))",
    "in_spec": f"str {LAYOUT}",
    "out_spec": f"str {LAYOUT}",
    "guards_code": r"list \[\]",
    "as_operator": r"never",
}
META = {  # the same for meta.json and the args in it, as JSON
    "classes": r"""\[("[\w ,.:()/&'-]+"(, )?)+\]""",
    "size": r"[1-9]\d{0,3}|\[[1-9]\d{0,3}, [1-9]\d{0,3}\]",
    "ignore": r"null|\d\d?|1\d\d|2[0-4]\d|25[0-5]",
    "data": r'".*"',
    "root": r'".*"',
}


def check_pairs(pairs):
    """Called with the (key, value) pairs of every object in a JSON file: refuse what is odd."""
    for key, value in pairs:
        pattern = ALLOWED.get(key, ".*")
        if key.endswith(("name", "names")) and key not in ALLOWED:  # these become Python's names
            pattern = r"str [\w.-]*|list \[('[\w.-]*'(, )?)*\]|NoneType None"
        found = f"{type(value).__name__} {value}"
        if not re.fullmatch(pattern, found, re.DOTALL) or not re.fullmatch(r"[\w.-]*", key):
            raise ValueError(f"{key} {value!r:.99}: wanted one tensor in, one out, any batch size")
    return dict(pairs)


def inspect_program(path):
    """Look into a .pt2 file, running nothing of it -> what meta.json and its args say, and a copy
    in memory of what was looked at, as torch's reader might see other members than zipfile."""
    members, copy = {}, io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        if sum(info.file_size for info in old.infolist()) > 2 * path.stat().st_size:
            raise ValueError("it unpacks to far more than its size")
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            if name in members or not re.fullmatch(MEMBERS, name):
                raise ValueError(f"it holds {name!r}, which a plain program does not, or not twice")
            members[name] = old.read(info)
            new.writestr(f"model/{name}", members[name])
            if name.endswith(".json"):
                json.loads(members[name], object_pairs_hook=check_pairs)
    torch.load(io.BytesIO(members["data/sample_inputs/model.pt"]), weights_only=True)  # or raises
    meta = json.loads(members["extra/meta.json"])
    meta = {"data": "", "root": "data"} | meta.get("args", {}) | meta
    for key, pattern in META.items():
        if not re.fullmatch(pattern, json.dumps(meta[key], ensure_ascii=False)):
            raise ValueError(f"its meta.json says {key} {meta[key]!r:.99}")
    copy.seek(0)
    return meta, copy


def open_program(path, device):
    """A .pt2 file -> segment(x), x (B, 3, H, W) in [0, 1] -> logits (B, C, H, W), and its meta.json
    with classes, size as [H, W], ignore, data, root, parameters and multiply_adds."""
    try:
        meta, archive = inspect_program(path)
        program = move_to_device_pass(torch.export.load(archive), device)
        network = program.module()

        def segment(x):
            logits = network(x).float()
            if logits.shape[1] == 1:  # a sigmoid of x is a softmax of 0 and x
                logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
            return logits

        if isinstance(meta["size"], int):
            meta["size"] = [meta["size"]] * 2
        x = torch.rand(3, 3, *meta["size"], device=device)
        x[0] *= 0.1  # dark: would another photo of the batch change the answer?
        logits = segment(x)
        with FlopCounterMode(display=False) as counter:
            alone = segment(x[:1])
        if len(meta["classes"]) == 1:
            meta["classes"].insert(0, "background")
        if list(logits.shape) != [3, len(meta["classes"]), *meta["size"]]:
            raise ValueError(f"3 photos give logits {logits.shape} for classes {meta['classes']}")
        change = (alone - logits[:1]).abs().mean()
        if not logits.isfinite().all() or change > 0.05 * alone.abs().mean():
            raise ValueError("answers depend on the batch (call model.eval()), or are not finite")
    except FileNotFoundError:
        sys.exit(f"{path}: no such file: run python finetune.py, or end a stopped run by --resume")
    except Exception as error:  # whatever a foreign file can provoke
        message = re.split(r"\n|\. ", str(error))[0]  # the first sentence
        sys.exit(f"{path}: refused: {type(error).__name__}: {message:.300}")
    meta["parameters"] = sum(weight.numel() for weight in program.parameters())
    meta["multiply_adds"] = counter.get_total_flops() // 2  # of one photo
    return segment, meta


# --- scores --------------------------------------------------------------------------------------


def confusion(logits, masks):
    """(C, C) pixels by truth (down) and prediction (across). These counts are summed over a split
    before any score is taken: means of the scores of batches would depend on the batch size."""
    C = logits.shape[1]
    cell = masks.long() * C + logits.argmax(1)  # (B, H, W), a number for each pair of labels
    cell[masks == IGNORE] = C * C  # one more, for what does not count
    return torch.bincount(cell.flatten(), minlength=C * C + 1)[:-1].view(C, C)


def class_scores(counts, classes):
    """Scores of a split from its matrices (N, C, C), of each class and as means over the classes. A
    class that neither occurs nor is answered is None, and left out of the means."""
    total = counts.sum(0).double()  # (C, C), all photos together
    both, truth, answer = total.diag(), total.sum(1), total.sum(0)
    table = {
        "iou": both / (truth + answer - both),  # |P and T| / |P or T|
        "dice": 2 * both / (truth + answer),  # 2 |P and T| / (|P| + |T|)
        "precision": both / answer,  # of what is answered, how much is right
        "recall": both / truth,  # of what is there, how much is found
    }
    ## F1 = 2 precision recall / (precision + recall): put the fractions in, and Dice is left.
    seen = truth + answer > 0
    result = {"accuracy": (both.sum() / total.sum()).item()}
    result["classes"] = {name: {} for name in classes}
    for key, values in table.items():
        values = values.nan_to_num(0)  # the precision of what is never answered
        result[key] = values[seen].mean().item()
        for i, name in enumerate(classes):
            result["classes"][name][key] = values[i].item() if seen[i] else None
    result["miou"] = result.pop("iou")
    return result


def pet_scores(counts, cats):
    """The scores of each species; cats (N,) tells which photos show a cat."""
    result = {}
    for species, chosen in [("cat", cats), ("dog", ~cats)]:
        for key, value in class_scores(counts[chosen], PETS).items():
            if key != "classes":
                result[f"{species}_{key}"] = value
    return result


def first_of(C):
    """The number of the first class that counts: 1 (foreground) of two, else 0 (of pets: pet)."""
    return 1 if C == 2 else 0


def soft_sums(logits, masks):
    """|P and T| and |P| + |T| of each photo, over all its pixels and the classes that count, with P
    the sigmoid of the logits, and with P the sigmoid of that: (B, sigmoids, sums)."""
    C = logits.shape[1]
    labels = torch.arange(first_of(C), C, device=masks.device).view(-1, 1, 1)
    masks = masks[:, None, None]  # (B, 1, 1, H, W)
    y, valid = (masks == labels).float(), (masks != IGNORE).float()
    p = logits[:, first_of(C) :].sigmoid()
    p = torch.stack([p, p.sigmoid()], dim=1) * valid  # (B, 2, those of C that count, H, W)
    return torch.stack([(p * y).sum((2, 3, 4)), (p + y).sum((2, 3, 4))], dim=2)


def published_scores(counts, soft, classes):
    """Seven ways in which five earlier projects scored, for this network's answers. D1, D2, and
    D6 take sigmoids, so they mean nothing for a network that was trained with a softmax."""
    first = first_of(len(classes))
    counts, soft = counts.double(), soft.double()
    result = {}

    def pooled(sums, size):  # batches of photos counted together
        return torch.stack([part.sum(0) for part in sums.split(size)])

    # D1: soft, of each photo, its classes counted together. Of one-hot outputs of three classes it
    # is the accuracy. D2: a second sigmoid: P is 0.5 to 0.73, Dice is low even if all is right.
    # D6: as D1, but 4 photos are counted together; published as a loss, 1 - D6.
    pools = {"D1": soft[:, 0], "D2": soft[:, 1], "D6": pooled(soft[:, 0], 4)}
    for key, sums in pools.items():
        i, s = sums.T  # |P and T|, |P| + |T|
        result[f"{key}_dice"] = ((2 * i + 1e-6) / (s + 1e-6)).mean().item()
        result[f"{key}_iou"] = ((i + 1e-6) / (s - i + 1e-6)).mean().item()
    right = counts.diagonal(dim1=1, dim2=2)  # (N, C)
    both = right[:, first:]
    total = (counts.sum(1) + counts.sum(2))[:, first:]
    # D3: hard, mean over classes, batches of 32 photos counted together. Absent: no Dice, IoU 1.
    i, s = pooled(both, 32), pooled(total, 32)
    result["D3_dice"] = (2 * i / s).nanmean(1).nanmean().item()
    result["D3_iou"] = ((i + 1e-6) / (s - i + 1e-6)).mean().item()
    # D4: accuracy of each photo, mean over photos.
    result["D4_accuracy"] = (right.sum(1) / counts.sum((1, 2))).nanmean().item()
    # D5: hard, all photos counted together, the first class alone.
    result["D5_iou"] = class_scores(counts, classes)["classes"][classes[first]]["iou"]
    # D7: hard, of each photo the mean over the classes that are in it, mean over batches of 8.
    there = counts.sum(2)[:, first:] > 0
    dice = (2 * both / total).where(there, torch.nan).nanmean(1)  # (N,)
    batches = torch.stack([part.nanmean() for part in dice.split(8)])
    result["D7_dice"] = batches.nanmean().item()
    return result


@torch.inference_mode()
def run_program(segment, images, masks, args):
    """A program over a whole split -> matrices (N, C, C), soft sums (N, 2, 2)."""
    counts, soft = [], []
    for x, truth in zip(images.split(args.batch_size), masks.split(args.batch_size)):
        x, truth = x.to(args.device) / 255, truth.to(args.device)
        logits = segment(x)
        counts += map(confusion, logits.split(1), truth.split(1))  # of each photo
        soft.append(soft_sums(logits, truth))
    return torch.stack(counts).cpu(), torch.cat(soft).cpu()


# --- data (the same in every script that has it) -------------------------------------------------


def draw_toy(n, size, seed):
    """n drawn cats and dogs -> images (n, 3, H, W), masks (n, H, W), uint8: 0 pet, 1 background, 2
    their border. The ears of a cat are diamonds, those of a dog ellipses."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.linspace(-1, 1, size[0])[:, None], torch.linspace(-1, 1, size[1])
    a, b, c, d = torch.rand(4, n, 1, 1, generator=g) - 0.5  # the pet's place, and the ball's
    X, Y = abs(x - a), y - b  # (n, 1, W), (n, H, 1); abs mirrors one ear into two, y points down
    # A form is where its formula is below 1; minimum joins two. From 0.8 to 1.2 is the border.
    body, head = 5 * X**2 + 5 * (Y - 0.4) ** 2, 8 * X**2 + 8 * (Y + 0.2) ** 2
    cat, dog = 6 * abs(X - 0.25) + 2.5 * abs(Y + 0.5), 40 * (X - 0.35) ** 2 + 8 * (Y + 0.1) ** 2
    ears = torch.where(torch.arange(n).view(n, 1, 1) % 2 == 0, cat, dog)
    pet = body.minimum(head).minimum(ears)
    ball = 15 * (x - 2 * c) ** 2 + 15 * (y - 2 * d) ** 2  # in the pet's colour, to mislead
    masks = torch.ones(n, *size, dtype=torch.uint8)
    masks[pet < 1.2] = 2
    masks[pet < 0.8] = 0
    coat, ground = 0.2 + 0.6 * torch.rand(2, n, 3, 1, 1, generator=g)
    images = torch.where((pet.minimum(ball) < 1)[:, None], coat, ground)
    images = images + 0.1 * torch.randn(images.shape, generator=g)
    return (255 * images.clamp(0, 1)).byte(), masks


def list_folder(folder):
    """[(photo, mask) paths] of equal names in images/ and masks/; x_mask.png is a mask of x.jpg."""
    pairs = {}
    for kind in ["images", "masks"]:
        for path in sorted(Path(folder, kind).glob("[!.]*")):
            if path.suffix.lower() in Image.registered_extensions():
                name = path.stem.removesuffix("_mask").removesuffix("_gt")
                pairs.setdefault(name, []).append(path)
    odd = [name for name, pair in pairs.items() if len(pair) != 2]
    if odd or not pairs:
        sys.exit(f"{folder}: wanted pairs in images/ and masks/; {odd[:5] or 'none there'}")
    return [tuple(pair) for pair in pairs.values()]


def list_photos(args):
    """The (photo, mask) paths of "train", "val" and "test". A missing val or test is a tenth of
    train, by a hash of the names: a photo that is added later moves no other."""
    parts = {}
    if args.data == "pets":
        base = Path(args.root, "oxford-iiit-pet")
        try:
            datasets.OxfordIIITPet(args.root, download=True)
        except Exception as error:  # no network, a full disk, a broken archive
            sys.exit(f"{error}: unpack www.robots.ox.ac.uk/~vgg/data/pets in {base} by hand")
        for part, file in [("train", "trainval.txt"), ("test", "test.txt")]:
            names = (base / "annotations" / file).read_text().split()[::4]  # the 1st of 4 words
            photos, masks = base / "images", base / "annotations/trimaps"
            parts[part] = [(photos / f"{name}.jpg", masks / f"{name}.png") for name in names]
    else:
        for folder in ["train", "val", "valid", "test"]:  # valid is kept as val
            if Path(args.data, folder, "images").exists():
                parts[folder.removesuffix("id")] = list_folder(Path(args.data, folder))
    train = parts.get("train") or list_folder(args.data)
    hashes = {pair: zlib.crc32(pair[0].stem.encode()) for pair in train}
    for part, number in [("test", 0), ("val", 1)]:
        if part not in parts:
            parts[part] = [pair for pair in train if hashes[pair] % 10 == number] or train[:1]
            train = sorted(set(train) - set(parts[part]))
    if not train:
        sys.exit(f"{args.data}: too few photos to train, validate and test with")
    # Names sort by breed, hashes do not: the first photos, any --frac of them, are of all breeds.
    return parts | {"train": sorted(train, key=hashes.get)}


def read_pair(pair, args):
    """(photo, mask) paths -> RGB and labels (H, W, 4) uint8, stretched to --size."""
    try:
        photo, mask = ImageOps.exif_transpose(Image.open(pair[0])), Image.open(pair[1])
        if photo.size != mask.size or photo.mode[0] in "IF" or mask.format == "JPEG":
            raise ValueError(f"{photo.size} {photo.mode} with {mask.size} {mask.format}")
        photo = photo.convert("RGB").resize(args.size[::-1], Image.BILINEAR)
        # The labels are the grey values, or the numbers that a PNG with a palette has for its
        # colours, say 1 for red. (With just two colours, the greys: white may be number 0.)
        labels = np.array(mask.convert("L").resize(args.size[::-1], Image.NEAREST))
        if mask.mode == "P" and mask.format == "PNG" and len(mask.palette.colors) > 2:
            labels = np.array(mask.resize(args.size[::-1], Image.NEAREST))
        return np.dstack([photo, labels])
    except Exception as error:  # whatever a broken file can provoke
        sys.exit(f"{pair[0]}, {pair[1]}: {error}; wanted an 8-bit photo, a PNG mask of its size")


def load_split(args, part):
    """Photos of train, val or test -> images (N, 3, H, W), masks (N, H, W), uint8."""
    if args.data == "toy":
        n, seed = {"train": (1000, 0), "val": (110, 1), "test": (256, 2)}[part]
        return draw_toy(n, args.size, seed)
    pairs = list_photos(args)[part]
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(read_pair, pairs, [args] * len(pairs))))
    masks = pixels[..., 3]
    void = masks == args.ignore  # False everywhere without --ignore
    if args.data == "pets":
        masks -= 1  # trimap 1, 2, 3: pet, background, border
    elif set(np.unique(masks[~void])) <= {0, 255}:
        masks //= 255  # black and white; in other masks 255 does not count, as in VOC
    masks[void] = IGNORE
    return torch.tensor(pixels[..., :3]).movedim(3, 1), torch.tensor(masks)


def find_cats(args, part, n):
    """Which of n photos show a cat: (n,) bool. Cats' files begin with a capital letter."""
    if args.data == "toy":
        return torch.arange(n) % 2 == 0
    return torch.tensor([photo.name[0].isupper() for photo, _ in list_photos(args)[part]])


def blur_photos(images, percent):
    """PIL's Gaussian blur, radius int(percent / 10) of 120 pixels, as published; 25 % is as 20."""
    blur = ImageFilter.GaussianBlur(int(percent / 10) * min(images.shape[2:]) / 120)
    photos = [Image.fromarray(pixels).filter(blur) for pixels in images.movedim(1, 3).numpy()]
    return torch.tensor(np.stack(photos)).movedim(3, 1)


def save(path, write):
    """write(file), then rename it: a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    write(temporary)
    temporary.replace(path)


# --- pictures ------------------------------------------------------------------------------------
COLOURS = torch.randint(40, 255, (256, 3), generator=torch.Generator().manual_seed(4)).byte()
COLOURS[:3] = torch.tensor([[255, 120, 0], [0, 0, 0], [255, 255, 255]])  # pet, ground, border
COLOURS[254:] = 0  # 255, ignored; with two classes, rolled by one: 254 ignored, 255 background


def draw_overlay(path, images, masks, answers, first):
    """A row a photo: the photo, the truth over it, the answer over it. Pet, foreground: orange."""
    photos, colours = images.movedim(1, 3), COLOURS.roll(first, 0)  # (N, H, W, 3)
    truth = photos // 2 + colours[masks.long()] // 2
    answer = photos // 2 + colours[answers] // 2
    page = torch.cat([photos, truth, answer], dim=2).flatten(0, 1)  # (N H, 3 W, 3)
    save(path, Image.fromarray(page.numpy()).save)


@torch.inference_mode()
def segment_photos(segment, meta, args):
    """Writes NAME_predicted.png, labels in the photo's own size, and NAME_overlay.jpg."""
    paths = []
    no_photos = ("_predicted", "_overlay", "_mask", "_gt")
    for name in args.photos:
        found = sorted(Path(name).glob("[!.]*.*"))
        paths += [path for path in found if not path.stem.endswith(no_photos)] or [Path(name)]
    for path in paths:
        try:
            photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except Exception as error:  # whatever a broken file can provoke
            print(f"skipped  {path}: {error}")
            continue
        pixels = np.array(photo.resize(meta["size"][::-1], Image.BILINEAR))  # (H, W, 3)
        logits = segment(torch.tensor(pixels, device=args.device).movedim(2, 0)[None] / 255)
        logits = F.interpolate(logits, photo.size[::-1], mode="bilinear")  # at the photo's size
        mask = Image.fromarray(np.uint8(logits[0].argmax(0).cpu()))
        mask.putpalette(COLOURS.roll(first_of(len(meta["classes"])), 0).flatten().tolist())
        overlay = Image.blend(photo, mask.convert("RGB"), 0.5)
        out = Path(args.out or path.parent)
        save(out / f"{path.stem}_predicted.png", mask.save)
        save(out / f"{path.stem}_overlay.jpg", overlay.save)
        print(f"drawn    {out / path.stem}_predicted.png, {path.stem}_overlay.jpg")


# --- main ----------------------------------------------------------------------------------------


def print_table(columns):
    """A line for each score, a column for each of {name: scores}."""
    lines = {"": " " * 24}
    for name, scores in columns.items():
        flat = dict(scores)
        for label, each in flat.pop("classes", {}).items():
            flat |= {f"{key} of {label}": each[key] for key in each}
        lines[""] += f" {name:>14}"
        for key, value in flat.items():
            cell = "-" if value is None else f"{value:.4f}"
            lines[key] = lines.get(key, f"{key:24}") + cell.rjust(1 + max(14, len(name)))
    print(*lines.values(), sep="\n")


def main(argv=None):
    args = parse_args(argv)
    print(
        f"evaluate.py  torch {torch.__version__}  {args.device}  {args.split}  blur {args.blur:g} %"
    )

    ## 1. The programs: those named, or every finished run.
    runs = [Path(run) for run in args.runs]
    if not runs:
        found = sorted(Path("checkpoints").glob("*/model.pt2"))
        runs = [path.parent for path in found if path.parent.suffix != ".prev"]
    if not runs:
        sys.exit("no finished run under checkpoints/: run python pretrain.py, python finetune.py")
    if args.photos and len(runs) > 1:
        sys.exit("--photos: name one run")

    records = []
    for run in runs:
        path = run / "model.pt2" if run.is_dir() else run
        if path.suffix.lower() in Image.registered_extensions():
            sys.exit(f"{path}: wanted a run: python evaluate.py RUN --photos {path}")
        segment, meta = open_program(path, args.device)
        classes = meta["classes"]
        if args.photos:
            return segment_photos(segment, meta, args)

        ## 2. Its photos: the data set of its training, at the size that it takes.
        for key in ["data", "root"]:
            meta[key] = getattr(args, key) or meta[key]
        if not meta["data"]:
            sys.exit(f"{path}: names no data; give --data")
        data = Namespace(**meta)  # data, root, size and ignore are read
        images, masks = load_split(data, args.split)
        top = masks[masks != IGNORE].max()
        if top >= len(classes) or (meta["data"] in ("toy", "pets")) != (classes[0] == "pet"):
            sys.exit(f"{path}: its classes are {classes}; {meta['data']} has 0 to {top}")
        images = blur_photos(images, args.blur)

        ## 3. The scores, and those of predictions that need no network: the same for every pixel.
        counts, soft = run_program(segment, images, masks, args)
        answers = {str(run): (counts, soft)}
        for label, name in enumerate(classes):
            constant = torch.zeros_like(counts)
            constant[:, :, label] = counts.sum(2)
            answers[f"all {name}"] = (constant, soft * torch.nan)  # it has no logits
        cats = find_cats(data, args.split, len(images))
        scores = {}
        for name, (matrices, sums) in answers.items():
            scores[name] = class_scores(matrices, classes)
            if classes == PETS:
                scores[name] |= pet_scores(matrices, cats)
            if args.as_published:
                scores[name] |= published_scores(matrices, sums, classes)
        print(f"\n{meta['data']}, {args.split}: {len(images)} photos, {meta['size']} pixels")
        print_table(scores)
        record = {"run": str(run), "photos": len(images), "scores": scores[str(run)]}
        records.append(vars(args) | meta | record)

        ## 4. A picture beside the program.
        some = slice(0, None, len(images) // 6 + 1)
        labels = segment(images[some].to(args.device) / 255).argmax(1).cpu()
        overlay = path.with_name("overlay.png")
        draw_overlay(overlay, images[some], masks[some], labels, first_of(len(classes)))
        print(f"\npicture  {overlay}: photo, truth, prediction")
    if args.json:
        text = json.dumps(records, indent=1)
        save(Path(args.json), lambda file: file.write_text(text))
    print("\nall runs")
    print_table({r["run"]: {key: r["scores"][key] for key in SUMMARY} for r in records})


if __name__ == "__main__":
    main()
