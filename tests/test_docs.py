"""Every command in the README and in the docstrings is accepted by the script's own parser."""
import json, re, shlex, sys, types

import pytest
from PIL import Image

from conftest import NAMES, ROOT, SCRIPTS, SMALL, drawn, load

COMMAND = re.compile(r"(?:^|&& |[$;] | or )(?:python3?|torchrun .*?) ((?:" + "|".join(NAMES) + r")\.py[^#\n;&|]*)", re.M)

def commands():
    """In a docstring, lines that begin with python; in the README, code: blocks and `spans`."""
    for name in SCRIPTS:
        text = re.sub(r"^(RUN IT)? +", "", load(name).__doc__, flags=re.M)
        for found in COMMAND.findall(text):
            yield f"{name}.py", found.split("   ")[0].strip()
    if (ROOT / "README.md").exists():
        text = (ROOT / "README.md").read_text()
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
        for code in blocks + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
            for found in COMMAND.findall(code.replace("\\\n", " ")):
                yield "README.md", found.strip()

COMMANDS = sorted(set(commands()))

def test_there_are_some():
    assert {file for file, _ in COMMANDS} >= {f"{name}.py" for name in SCRIPTS}

@pytest.mark.parametrize("file, command", COMMANDS)
def test_command_is_accepted(file, command):
    script, *argv = shlex.split(command)
    assert (ROOT / script).exists(), f"{file} tells to run {script}, which is not there"
    load(script[:-3]).parse_args(argv)

@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README.md")
def test_readme_names_every_script():
    text = (ROOT / "README.md").read_text()
    assert [name for name in SCRIPTS if f"{name}.py" not in text] == []

# --- the recipes of the README ----------------------------------------------------------------------

def recipe(word):
    """The one Python block of the README that holds the word."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    block, = [block for block in blocks if word in block]
    return block

def test_a_library_s_segmenter_is_scored_beside_ours(here, capsys):
    exec(recipe("deeplabv3").replace("128", "32"), {})
    load("evaluate").main(["mine.pt2", "--data", "toy", "--json", "s.json"])
    record, = json.loads((here / "s.json").read_text())
    assert record["parameters"] > 30e6 and 0 < record["scores"]["miou"] < 0.6

def test_a_photo_of_one_s_own(here):
    load("finetune").main([*SMALL["finetune"], "--size", "32", "--frac", "0.05", "--epochs", "1"])
    drawn(3)[0].save("cat.jpg")
    exec(recipe("cat.jpg").replace("64", "32"), {})
    with Image.open("pet.png") as mask:
        assert mask.mode == "L" and mask.size == (32, 32) and set(mask.tobytes()) <= {0, 255}

def test_a_training_in_tensorboard(here, monkeypatch):
    seen = []
    class SummaryWriter:
        def __init__(self, folder):
            seen.append(folder)
        def add_scalar(self, *row):
            seen.append(row)
        def close(self):
            seen.append("closed")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    load("unet").main([*SMALL["unet"], "--frac", "0.05", "--epochs", "2"])
    exec(recipe("SummaryWriter"), {})
    assert seen[0] == "checkpoints/unet" and seen[-1] == "closed"
    assert {name for name, _, step in seen[1:-1]} >= {"loss", "val_loss", "val_miou", "lr", "images_per_second"}
    assert {step for _, _, step in seen[1:-1]} == {1, 2} and all(isinstance(v, (int, float)) for _, v, _ in seen[1:-1])
