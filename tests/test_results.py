"""The figures on the page of results are those of the committed files."""

import json

import pytest
import torch
from conftest import NAMES, ROOT, load

RESULTS = ROOT / "tests/results"
PAGE = (RESULTS / "README.md").read_text()
README = (ROOT / "README.md").read_text()


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def typed(record):
    """The command of a run, without its folder."""
    return record["command"].rpartition(" --out")[0]


def experiments():
    return list(dict.fromkeys(record["experiment"] for record in read("experiments")))


def rows(text):
    """The lines of a table."""
    figures = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(figures) > 2
    return figures


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=str)
def test_every_file_is_json(path):
    assert json.loads(path.read_text())


@pytest.mark.parametrize("name", experiments())
def test_tables_are_what_experiments_prints(name, tmp_path, capsys):
    """experiments.py --table renders every row of the page, and the charts beside it."""
    copy = tmp_path / "experiments.json"
    copy.write_text((RESULTS / copy.name).read_text())
    e = load("experiments")
    e.main(["--table", str(copy)])
    printed = capsys.readouterr().out
    for line in rows(e.markdown(read("experiments"), name)):
        assert line in PAGE and line in printed
    if name in e.CHARTS:
        assert (tmp_path / f"{name}.svg").read_text() == (RESULTS / f"{name}.svg").read_text()


def test_published_figures():
    """Ours beside theirs, with the command and the minutes of each run."""
    records = read("published")
    for line in rows(load("experiments").published(records)):
        assert line in PAGE
    for record in records:
        assert f"| {record['minutes']} | `{record['command']}` |" in PAGE
        if record["pretraining"]:
            assert f"| {record['pretraining_minutes']} | `{record['pretraining']}` |" in PAGE


@pytest.mark.parametrize(
    "name, arm, key",
    [
        ("labels", "pre-trained, 100 %", "D4_accuracy"),
        ("labels", "pre-trained, 100 %", "D1_dice"),
        ("models", "SegNet", "D2_dice"),
        ("models", "LinkNet", "D3_dice"),
    ],
)
def test_the_published_figures_of_the_readme(name, arm, key):
    e = load("experiments")
    (ours,) = e.grouped(read("published"), name)[arm].values()
    assert f"| {e.PUBLISHED[name, arm][key]:.3f} | {ours[key]:.4f} |" in README


def test_the_vessels_of_the_test_photos():
    """D6 is a figure of training photos."""
    (record,) = [record for record in read("published") if record["experiment"] == "retina"]
    assert record["split"] == "train"
    assert f"Dice of {record['test_dice_of_vessels']:.4f}" in PAGE
    assert f"mean IoU of {record['test_miou']:.4f}" in PAGE


@pytest.mark.parametrize("arm", ["scratch", "pre-trained"])
def test_a_smaller_network_on_blurred_photos(arm):
    """Beside the published figures."""
    e = load("experiments")
    groups = e.grouped(read("experiments"), "blur")
    means = []
    for percent in (25, 50, 75, 100):
        group = groups[f"VQ-VAE, {arm}, {percent} %"].values()
        means.append(f"{e.spread([record['D1_dice'] for record in group])[0]:.3f}")
    assert f"{', '.join(means[:3])} and {means[3]}" in PAGE


def test_the_loss_behind_d1():
    """Each run with the loss of that project, on sharp and on blurred photos."""
    e, loss = load("experiments"), read("loss")
    groups = e.grouped(read("experiments"), "blur")
    usual = [list(groups[f"VQ-VAE, scratch, {blur} %"].values()) for blur in (0, 25, 50, 75, 100)]
    sharp = " | ".join(e.cell([r[key] for r in usual[0]]) for key in ("miou", "accuracy"))
    dice = [f"{e.spread([r['D1_dice'] for r in group])[0]:.3f}" for group in usual]
    assert f"| BCE + Dice, three seeds | {sharp} | {' | '.join(dice)} |" in PAGE
    assert loss["line"] in PAGE and f"`{loss['command']}`" in PAGE
    for seed in range(3):
        runs = [run for run in loss["runs"] if run["seed"] == seed]
        assert [run["blur"] for run in runs] == [0, 25, 50, 75, 100]
        dice = " | ".join(f"{run['D1_dice']:.3f}" for run in runs)
        sharp = f"{runs[0]['miou']:.4f} | {runs[0]['accuracy']:.4f}"
        assert f"| theirs, seed {seed} | {sharp} | {dice} |" in PAGE


def test_the_retina_with_dice_alone():
    (tried,) = [row for row in read("tuning") if "D6_dice" in row]
    (record,) = [record for record in read("published") if record["experiment"] == "retina"]
    before, after = tried["D6_dice"]
    assert before == round(record["D6_dice"], 4)
    assert f"rises from {before:.3f} to {after:.3f}" in " ".join(PAGE.split())
    assert f"(D6 of {before:.3f}, {after:.3f})" in tried["what"]


def test_what_was_tried():
    for row in read("tuning"):
        values = ", ".join(map(str, row["values"]))
        scores = ", ".join(f"{value:.3f}" for value in row["miou"])
        assert f"| {row['what']} | {values} | {scores} |" in PAGE


def test_near_duplicates():
    near = read("near_duplicates")
    same = near["sources"]["Oxford-IIIT Pet, trainval"]["test_photos"]
    assert f"{same} of the {near['test']:,} official test photos" in " ".join(PAGE.split())


def test_speed():
    for row in read("bench"):
        if "ratio" in row:
            low, high = row["ratios"][0], row["ratios"][-1]
            assert f"| {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |" in PAGE, row["row"]


# --- the defaults, in the docstrings and in the README -------------------------------------------

DEFAULTS = read("defaults")["runs"]
MAIN_SCORE = {"vqvae": "val_error", "pretrain": "val_hidden"}


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_to_expect(name):
    run = DEFAULTS[name]
    if name in MAIN_SCORE:
        score = run["metrics"][MAIN_SCORE[name]]
    else:
        score = run["scores"]["miou"]
    assert f" {score:.2f}" in load(name).__doc__.partition("WHAT TO EXPECT")[2]
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}.py`")]
    assert f"{score:.3f}" in row
    assert f"in {run['seconds']:.0f} s" in row and run["seconds"] < 120
    assert f"| `{run['command']}` | {run['seconds']:.0f} |" in PAGE and f"{score:.4f}" in PAGE


def test_the_noise_of_the_drawings(monkeypatch):
    """Of 512 drawn photos, in the units of the error: what is not there without their noise."""
    draw_toy, randn = load("vqvae").draw_toy, torch.randn
    noisy = draw_toy(512, (64, 64), 1)[0] / 255
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: 0 * randn(*shape, **options))
    share = (noisy - draw_toy(512, (64, 64), 1)[0] / 255).square().mean() / noisy.var()
    assert f"The noise in the drawings alone is {share:.2f}." in load("vqvae").__doc__


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_counts_the_lines(name):
    lines = (ROOT / f"{name}.py").read_text().count("\n")
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}.py`")]
    assert f"| {lines} |" in row


def test_the_quick_start_is_that_of_the_committed_run():
    scores, quick = DEFAULTS["finetune"]["scores"], read("defaults")["quick_start_seconds"]
    for key in ["accuracy", "miou"]:
        assert f"{key:24}{scores[key]:21.4f}" in README
    assert scores["miou"] > read("defaults")["baseline_miou"] + 0.2 and quick < 240
    scratch = read("defaults")["scratch"]["scores"]["miou"]
    assert f"has {scratch:.3f}" in README and f"{scratch:.2f}" in load("finetune").__doc__


def test_the_laptop_run():
    run = read("laptop")
    assert run["command"] in README and f"{run['miou']:.3f}" in README
    assert f"{run['seconds']:.0f} seconds" in PAGE
    commands = [typed(record) for record in read("experiments")]
    assert commands.count(run["command"]) == 1  # it is one of `minutes`


def test_the_longest_run_of_minutes():
    (run,) = [r for r in read("experiments") if r["arm"] == "U-Net, 160 minutes"]
    assert f"takes 160 and has {run['miou']:.3f} and {run['accuracy']:.3f}" in README
    assert typed(run).endswith("--size 96 --width 32 --epochs 84")


def test_the_commands_of_minutes():
    """They are not in experiments.py, so the page has them."""
    for record in read("experiments"):
        if record["experiment"] == "minutes":
            assert typed(record) in PAGE.splitlines()


def test_the_demonstration():
    """The run in which pre-training helps is that of the committed scores."""
    demo = read("demonstration")
    assert all(command in README for command in demo["commands"])
    assert demo["pretrained"] > demo["scratch"]
    for key in ["pretrained", "scratch"]:
        assert f"{demo[key]:.3f}" in README


@pytest.mark.parametrize(
    "name, arm",
    [("labels", "scratch, as long, 100 %")]
    + [("models", network) for network in ["U-Net", "LinkNet", "SegNet"]],
)
def test_the_sentence_under_the_table(name, arm):
    e = load("experiments")
    group = e.grouped(read("experiments"), name)[arm]
    assert e.cell([record["miou"] for record in group.values()])[:6] in README
