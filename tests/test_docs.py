"""Every command in README.md and in the docstrings is accepted by the script's own parser, every
Python block of README.md runs, and every link leads somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, load
from PIL import Image

README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"python ((?:" + "|".join(NAMES) + r")\.py[^#\n&|`]*)")


def commands():
    """(file, command) of every `python SCRIPT.py ...` in README.md and in the docstrings."""
    found = [("README.md", command) for command in COMMAND.findall(README)]
    for name in NAMES:
        for command in COMMAND.findall(load(name).__doc__):
            found.append((f"{name}.py", command.split("  ")[0]))  # what it does stands behind
    return sorted({(file, command.strip()) for file, command in found})


@pytest.mark.parametrize("name", ["segnet", "linknet"])
def test_as_many_lines_are_new_as_the_readme_says(name):
    typed = ["diff", "unet.py", f"{name}.py"]
    found = subprocess.run(typed, cwd=ROOT, capture_output=True, text=True).stdout
    new = sum(line.startswith(">") for line in found.splitlines())
    assert re.search(rf"`{' '.join(typed)}` (shows )?what is new in \w+, {new} lines", README)


def test_there_are_commands_in_every_docstring():
    assert {file for file, _ in commands()} >= {f"{name}.py" for name in NAMES}


@pytest.mark.parametrize("file, command", commands())
def test_a_command_is_accepted(file, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints/pretrain").mkdir(parents=True)  # which finetune.py reads its widths from
    state = {"script": "pretrain.py", "args": {"net": [128, 32, 2, 2, 512]}, "model": {}}
    torch.save(state, "checkpoints/pretrain/best.pt")
    script, *argv = shlex.split(command)
    argv = [word for word in argv if word != "--resume"]  # which reads the run that is there
    load(script.removesuffix(".py")).parse_args(argv)


def test_the_readme_names_every_script():
    assert [name for name in NAMES if f"`{name}.py`" not in README] == []


def test_the_readme_is_short():
    assert README.count("\n") <= 220 and len(README) <= 14_000


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_labels_are_renumbered_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.array([[0, 38], [75, 38]], np.uint8)).save("mask.png")
    (code,) = [block for block in BLOCKS if "mask.png" in block]
    exec(code, {})
    assert np.asarray(Image.open("mask.png")).tolist() == [[0, 1], [2, 1]]


def test_another_network_as_the_readme_says(tmp_path):
    """A copy of unet.py with another section "model" trains, goes on, and is scored."""
    (code,) = [block for block in BLOCKS if "deeplab" in block]
    text = (ROOT / "unet.py").read_text()
    start, end = text.index("# --- model ---"), text.index("# --- loss and scores ")
    text = text[:start] + code + text[end:]
    assert text.count('SCRIPT = "unet.py"') == 1
    copy = tmp_path / "deeplab.py"
    copy.write_text(text.replace('SCRIPT = "unet.py"', 'SCRIPT = "deeplab.py"'))

    def typed(*words):
        words = [sys.executable, *map(str, words)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    flags = ["--size", "32", "--frac", "0.02", "--out", "checkpoints/deeplab"]
    typed(copy, *flags, "--epochs", "1")
    typed(copy, *flags, "--resume", "--epochs", "2")
    assert len((tmp_path / "checkpoints/deeplab/log.jsonl").read_text().splitlines()) == 2
    assert "checkpoints/deeplab" in typed(ROOT / "evaluate.py")
