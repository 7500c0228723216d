"""The figures on the page of results are those of the committed files."""

import json

import pytest
from conftest import ROOT, load

RESULTS = ROOT / "tests/results"
PAGE = (RESULTS / "README.md").read_text()


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def experiments():
    return load("experiments").names_of(read("experiments"))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=str)
def test_every_file_is_json(path):
    assert json.loads(path.read_text())


@pytest.mark.parametrize("name", experiments())
def test_tables_are_what_experiments_prints(name, capsys):
    """experiments.py --table renders every row and difference that the page shows."""
    load("experiments").main(["--table", str(RESULTS / "experiments.json")])
    printed = capsys.readouterr().out
    lines = load("experiments").markdown(read("experiments"), name).splitlines()
    figures = [line for line in lines if line.startswith(("| ", "- "))]
    assert len(figures) > 2
    for line in figures:
        assert line in PAGE and line in printed


def test_scores_of_the_chain():
    for name, title in [("pets", "pets, 128 px, CPU"), ("toy", "toy, 64 px, CPU")]:
        scores = read(name)[0]["scores"]
        cells = [scores["accuracy"], scores["miou"]]
        cells += [scores["classes"][label]["iou"] for label in ("pet", "background", "border")]
        assert f"| {title} | {' | '.join(f'{value:.3f}' for value in cells)} |" in PAGE


def test_near_duplicates():
    near = read("near_duplicates")
    same = near["sources"]["Oxford-IIIT Pet, trainval"]["test_photos"]
    assert f"{same} of the {near['test']:,} official test photos" in " ".join(PAGE.split())


def test_speed():
    for row in read("bench"):
        if "ratio" in row:
            low, high = row["ratios"][0], row["ratios"][-1]
            assert f"| {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |" in PAGE, row["row"]
