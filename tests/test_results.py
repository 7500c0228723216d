"""The figures in the README and in the docstrings are those of the committed results."""
import json, statistics

import pytest

from conftest import ROOT, load

RESULTS = ROOT / "tests/results"

def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())

def sentences():
    """Every figure the README and the docstrings give, as (file, text that must stand in it)."""
    pets, toy = (read(name)[0]["scores"] for name in ("pets", "toy"))
    for scores, name in ((pets, "pets, 128 px, CPU"), (toy, "toy, 64 px, CPU")):
        each = [scores["classes"][label]["iou"] for label in ("pet", "background", "border")]
        yield "README.md", f"| {name} | " + " | ".join(
            f"{value:.3f}" for value in (scores["accuracy"], scores["miou"], *each)) + " |"
        yield "evaluate.py", f"accuracy {scores['accuracy']:.3f}, mIoU {scores['miou']:.3f}"
    yield "finetune.py", f"mIoU {toy['miou']:.3f}"
    scratch = read("toy")[1]["scores"]
    yield "README.md", f"| the same from scratch | {scratch['accuracy']:.3f} | {scratch['miou']:.3f} |"
    yield "finetune.py", f"mIoU {pets['miou']:.3f}"
    yield "README.md", (f"a Dice of {pets['D1_dice']:.3f} (D1; theirs 0.864), {pets['D2_dice']:.3f} (D2), "
                        f"{pets['D3_dice']:.3f} (D3) and {pets['D7_dice']:.3f} (D7)")
    base = read("pets_baseline")
    yield "README.md", (f"| all background | {base['accuracy']:.3f} | {base['miou']:.3f} | 0.000 | "
                        f"{base['background']:.3f} | 0.000 |")
    pre = read("pretrain")
    yield "README.md", (f"| `pretrain.py` | {pre['val_masked']:.3f} | {pre['val_mean_fill_masked']:.3f} | "
                        f"{pre['val_perplexity']:.0f} | {pre['val_used']}/512 |")
    yield "pretrain.py", (f"masked {pre['val_masked']:.3f} (mean colour "
                          f"{pre['val_mean_fill_masked']:.3f}), perplexity {pre['val_perplexity']:.0f}")
    vqvae = read("vqvae")
    yield "README.md", (f"| `vqvae.py` | {vqvae['val_error']:.3f} | {vqvae['val_psnr']:.1f} dB | "
                        f"{vqvae['val_perplexity']:.0f} | {vqvae['val_used']}/512 |")
    yield "vqvae.py", (f"error {vqvae['val_error']:.3f}, PSNR {vqvae['val_psnr']:.1f} dB, perplexity "
                       f"{vqvae['val_perplexity']:.0f}")
    for arm in read("codebook"):
        yield "README.md", (f"| {arm['variant']} | {arm['val_error']:.3f} | {arm['val_perplexity']:.0f} | "
                            f"{arm['val_used']}/512 |")
    grids, e = read("experiments"), load("experiments")
    for name in dict.fromkeys(run["experiment"] for run in grids):      # what --table prints
        for line in e.markdown(grids, name).splitlines():
            if line[:2] in ("| ", "- "):
                yield "README.md", line
    arms = {name: e.grouped(grids, name) for name in ("labels", "imbalance", "masks", "models", "blur")}
    lead = lambda name, one, other, key="miou": 100 * abs(e.paired(arms[name][one], arms[name][other], key)[0])
    gains = sorted(lead("labels", f"pre-trained, {share} %", f"scratch, {share} %") for share in (10, 25, 50, 100))
    couples = [[arms["labels"][f"{kind}, {share} %"] for kind in ("pre-trained", "scratch")] for share in (10, 25, 50, 100)]
    assert sum(one[seed]["miou"] > other[seed]["miou"] for one, other in couples for seed in one) == 11
    assert all(mean < 2.48 * std for mean, std in (e.paired(one, other, "miou") for one, other in couples))       # 95 %, three seeds
    yield "README.md", "in eleven of the twelve pairs of runs"
    tenth, every = (lead("labels", f"pre-trained, {share} %", f"scratch, as long, {share} %") for share in (10, 100))
    cats = lead("imbalance", "three cat breeds", "same number, all breeds", "cat_miou")
    for text in (f"is {gains[0]:.1f} to {gains[-1]:.1f} points higher after it", f"beat that by {tenth:.1f} points (a tenth of "
                 f"the labels) to {every:.1f} (all)", f"ahead in all four shares, by {gains[0]:.1f} to {gains[-1]:.1f} points",
                 f"that gains {tenth:.1f} points over the pre-trained network with a tenth of them, {every:.1f} with all",
                 f"three cat breeds costs {cats:.1f} points on cats", f"The imbalance costs {cats:.1f} points on cats"):
        yield "README.md", text
    dice = [statistics.fmean(run[key] for run in arms["models"]["U-Net"].values()) for key in ("D1_dice", "D2_dice", "D3_dice")]
    yield "README.md", "of the U-Net's {:.3f}, {:.3f} and {:.3f} (D1, D2, D3)".format(*dice)
    yield "README.md", "What the variants change, {:.1f} points for sub-pixel and {:.1f} for bilinear up-sampling".format(
        lead("models", "LinkNet, sub-pixel", "LinkNet"), lead("models", "U-Net, bilinear", "U-Net"))
    yield "README.md", "had one bad run each (test mean IoU {:.3f} and {:.3f})".format(
        *(min(run["miou"] for run in arms["models"][name].values()) for name in ("SegNet", "VQ-VAE, scratch")))
    behind = sorted(lead("blur", f"VQ-VAE, pre-trained, {blur} %", f"VQ-VAE, scratch, {blur} %") for blur in (50, 75, 100))
    yield "README.md", f"on average by {behind[0]:.1f} to {behind[-1]:.1f} points"
    yield "README.md", f"too, is behind in every seed, {behind[0]:.1f} to {behind[-1]:.1f} points on average"
    assert min(lead("blur", f"U-Net, {blur} %", f"VQ-VAE, scratch, {blur} %") for blur in (50, 75, 100)) > 14
    assert all(run["miou"] < arms["blur"][f"VQ-VAE, scratch, {blur} %"][seed]["miou"] for blur in (50, 75, 100)
               for seed, run in arms["blur"][f"VQ-VAE, pre-trained, {blur} %"].items())
    sharp, soft = (statistics.fmean(run["accuracy"] for run in arms["blur"][f"VQ-VAE, pre-trained, {blur} %"].values()) for blur in (0, 100))
    yield "README.md", f"our pre-trained network from {sharp:.3f} to {soft:.3f}"
    everywhere = arms["blur"]["U-Net, 100 %"][0]
    yield "README.md", (f"finds {100 * everywhere['D5_recall']:.0f} % of the pets' pixels, but only {100 * everywhere['D5_precision']:.0f} % of what it calls pet")
    speeds = [run["images_per_second"] for run in arms["models"]["LinkNet"].values()]
    yield "README.md", f"(LinkNet had {min(speeds):.0f} to {max(speeds):.0f} of them)"
    squares = [f"one square of {side} % of the side" for side in ("5-25", "25-50")]
    yield "README.md", f"with three the two are even ({lead('masks', *squares):.1f} points apart)"
    assert max(arms["masks"], key=lambda label: arms["masks"][label][0]["val_miou"]) == squares[1]
    filled = {run["command"].split(" --epochs")[0]: run["val_masked"] for run in read("masks")}
    yield "README.md", "({:.3f} of the variance is wrong after pre-training, of patches of 16 {:.3f})".format(
        *(filled[f"python pretrain.py --mask 0.05-0.25 --patch {patch}"] for patch in (8, 16)))
    steps = {}                                          # the table of few steps, long pre-training and more seeds
    for run in read("steps"):
        steps.setdefault((run["frac"], run["steps"]), {}).setdefault(run["arm"], {})[run["seed"]] = run
    ahead = lambda group, name: [100 * value for value in e.paired(group[name], group["scratch"])]      # mean, deviation
    for (frac, count), group in steps.items():
        if count == 600:                                # the first three seeds are those of labels
            for ours, kind in (("scratch", "scratch"), ("3 epochs", "pre-trained")):
                group.setdefault(ours, {}).update(arms["labels"][f"{kind}, {100 * frac:g} %"])
        three = {name: {seed: group[name][seed] for seed in range(3)} for name in ("scratch", "3 epochs", "12 epochs")}
        yield "README.md", f"| {100 * frac:g} % | {count} | {e.cell([run['miou'] for run in three['scratch'].values()])} | " + " | ".join(
            f"{e.cell([run['miou'] for run in three[name].values()])} | " + "{:+.1f} ± {:.1f}".format(
                *ahead(three, name)) for name in ("3 epochs", "12 epochs")) + " |"
    for frac in (0.1, 1.0):
        group = steps[frac, 600]
        gain, deviation = ahead(group, "3 epochs")
        half = 2.571 * deviation / 6**0.5               # Student's t, 95 %, six seeds
        assert {*group["3 epochs"]} == {*group["scratch"]} == {*range(6)}
        assert all(run["miou"] > group["scratch"][seed]["miou"] for seed, run in group["3 epochs"].items())      # each is ahead
        yield "README.md", f"{gain:.1f} with " + ("a tenth of the labels" if frac < 1 else "all of them")
        yield "README.md", f"{gain:.1f} ± {deviation:.1f} points (95 %: {gain - half:.1f} to {gain + half:.1f})"
    few = sorted(ahead(steps[0.1, count], name)[0] for count in (100, 200) for name in ("3 epochs", "12 epochs"))
    yield "README.md", f"{few[0]:.1f} to {few[-1]:.1f} points after 100 and 200 steps"
    masked = [statistics.fmean(run["val_masked"] for run in steps[0.1, 200][name].values()) for name in ("12 epochs", "3 epochs")]
    yield "README.md", "(error {:.3f} in place of {:.3f})".format(*masked)
    distorted = steps[0.1, 600]["3 epochs, distorted"][0]
    yield "README.md", f"{distorted['val_miou']:.3f} on the validation photos in place of {arms['masks'][squares[1]][0]['val_miou']:.3f}"
    for row in read("recipe")["rows"]:
        yield "README.md", (f"| {row['first_weights']} | {row['loss']} | {row['masks']} | {row['network']} | {row['pretrain_epochs']} | "
                            f"{row['take']} | {row['steps']:,} | {row['scratch']:.3f} | {row['pretrained']:.3f} |")
    yield "README.md", f"scratch reaches {read('recipe')['without_quantiser']['scratch']:.3f} in 600 steps"
    today = arms["masks"]["0.5-0.75 of the area, 8 px"][0]["val_miou"]
    yield "README.md", (f"has {today:.3f} with today's code, and {read('recipe')['pretrained_at_3e-3']['val_miou']:.3f} after "
                        "pre-training at 3e-3 in place of 1e-3")
    for run in read("baselines"):
        scores, each = run["scores"], run["scores"]["classes"]
        yield "README.md", (
            f"| {run['name']} | {run['size'][0]} px | {run['parameters'] / 1e6:.2f} M | "
            f"{run['multiply_adds'] / 1e9:.2f} G | {run['train_images_per_second']:.0f} | {scores['accuracy']:.3f} | "
            f"{scores['miou']:.3f} | " + " | ".join(f"{each[c]['iou']:.3f}" for c in ("pet", "background", "border")) + " |")
        yield run["command"].split()[1], f"pets mIoU {scores['miou']:.3f} ({run['size'][0]} px"
        if run["name"].startswith("LinkNet"):
            yield "README.md", f"are {scores['D3_dice']:.3f} and {scores['D3_iou']:.3f} for the LinkNet of the table"
        if run["name"].startswith("SegNet"):
            yield "README.md", (f"accuracy of {scores['accuracy']:.3f}, scores {scores['D2_dice']:.3f} and "
                                f"{scores['D2_iou']:.3f} when it is measured")
    for run in read("toy_baselines"):
        yield "README.md", f"{run['name']} {'has a mean IoU of ' * (run['name'] == 'U-Net')}{run['scores']['miou']:.3f}"
        yield run["command"].split()[1], f"Toy mIoU {run['scores']['miou']:.3f} ({run['total_seconds']:.0f} s)"
    four, five = (run["scores"]["miou"] for run in read("segnet_stages"))
    yield "README.md", f"reach a mean IoU of {five:.3f} in the epochs in which four reach {four:.3f}"
    yield "segnet.py", f"with --stages 5 mIoU {five:.3f}"
    yield "README.md", "training takes " + " and ".join(
        f"{run['peak_gb']:.1f} GB ({run['name']})" for run in read("memory"))
    near = read("near_duplicates")
    yield "README.md", (f"{near['sources']['Oxford-IIIT Pet, trainval']['test_photos']} of the {near['test']:,} official test photos")
    yield "README.md", f"{near['sources']['Microsoft']['test_photos'] or 'none'} among the {near['sources']['Microsoft']['photos']:,}"
    for run in read("camvid"):
        scores = run["scores"]
        yield "README.md", (f" | {scores['accuracy']:.3f} | {scores['miou']:.3f} | {scores['D7_dice']:.3f} | "
                            f"{run['train_images_per_second']:.1f} |")
        yield "README.md", f"`{run['command']}`"
    bench = {(row["name"], row["row"]): row for row in read("bench")}
    for (name, title), row in bench.items():
        if "ratio" in row:
            ours, theirs = (f"{v:,.0f}" if v >= 100 else f"{v:.1f}" for v in (row["ours"], row["theirs"]))
            yield "README.md", (f"| {name}: {title} | {ours} | {theirs} {row['unit']} | {row['ratio']:.2f} "
                                f"({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f}) |")
        if name == "source" and "256" in title:
            limits = row["matrix_gflops"]
            yield "README.md", (f"trains at {row['ours'] * row['gflop_per_image']:.0f} GFLOP/s, where a large bfloat16 matrix product "
                                f"reaches {limits[0]:.0f}; the other way has {row['theirs'] * row['gflop_per_image']:.0f} of {limits[1]:.0f} in float32")
        if name == "pipeline":                          # forward and backward are three times the forward's work
            work = 3 * 2 * read("toy")[0]["multiply_adds"] / 1e9
            yield "README.md", f"the small network trains at about {round(row['ours'] * work, -1):.0f} GFLOP/s"
        if name == "folder" and title == "100,000 files":
            yield "README.md", (f"at {row['files_per_second']:,.0f} files a second with {row['mib']:.0f} MiB more memory than before, and "
                                f"opened again in {row['again']:.1f} s")
        if name == "ladder":
            yield "README.md", f"| {title} | {row['images_per_second']:.0f} | {row['mib']:,.0f} MiB |"
        if name == "growth":
            yield "README.md", (f"| {title} | {row['file_mib']:,.0f} MiB | {row['images_per_second']:,.0f} | "
                                f"{row['own_mib']:,.0f} MiB | {row['mapped_mib']:,.0f} MiB |")
    memory = [bench["quantiser", f"memory, {way}"]["mib"] for way in ("ours", "one-hot", "library")]
    yield "README.md", f"raise the memory by {memory[0]:.0f} MiB, theirs by {memory[1]:.0f} and {memory[2]:.0f}"
    cached, new = (bench["start", way]["first_batch"] for way in ("cached", "nothing cached"))
    yield "README.md", f"of pets after {cached:.1f} s, or {new:.1f} s where nothing is cached"
    for run in read("segnet_pretrain"):
        yield "README.md", f"| {run['name']} | {run['scores']['accuracy']:.3f} | {run['scores']['miou']:.3f} |"
    yield "README.md", f"U-Net of *Vessels* below has {read('drive')[0]['scores']['D6_dice']:.3f} under D6"
    for run in read("drive"):
        yield "README.md", f"| {run['name']} | {run['scores']['dice']:.3f} | {run['scores']['miou']:.3f} |"
    for name in dict.fromkeys(run["name"] for run in read("puzzle")):
        runs = [run["scores"] for run in read("puzzle") if run["name"] == name]
        assert len(runs) == 3
        yield "README.md", f"| {name} | " + " | ".join(
            f"{statistics.fmean(s[key] for s in runs):.3f} ± {statistics.stdev(s[key] for s in runs):.3f}"
            for key in ("accuracy", "precision", "recall", "f1", "miou")) + " |"

@pytest.mark.parametrize("file, text", sorted(set(sentences())))
def test_figure_is_the_measured_one(file, text):
    assert " ".join(text.split()) in " ".join((ROOT / file).read_text().split())       # wherever a line ends

def test_commands_of_the_results_are_accepted():
    for result in (read("pretrain"), read("vqvae"), *(run for name in (
            "codebook", "masks", "memory", "baselines", "toy_baselines", "drive", "puzzle", "camvid", "segnet_pretrain",
            "experiments", "steps") for run in read(name))):
        for command in filter(None, (result["command"], result.get("pretraining"))):
            script, *argv = command.split()[1:]
            load(script[:-3]).parse_args(argv)

def test_mask_of_the_results_is_that_of_the_code():
    mask = " ".join(load("experiments").MASK)
    runs = [run for run in read("experiments") if run["experiment"] != "masks" and run["pretraining"]]
    assert runs and all(mask in run["pretraining"] for run in runs)
