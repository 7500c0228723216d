"""The rules of layout and style that a parser can check. (Budgets: ../shared/check.py.)"""

import ast
import re
import subprocess
import sys
from argparse import ArgumentParser

import pytest
from conftest import NAMES, ROOT, SEGMENTERS, TRAINING, load
from torch import nn

ALLOWED = {"torch", "torchvision", "numpy", "PIL"} | sys.stdlib_module_names
ALLOWED -= {"importlib", "runpy"}
FORBIDDEN = ["exec", "eval", "compile", "__import__", "sys.path"]
SCORES = "loss and scores (the same in every script that has them)"
DATA = "data (the same in every script that has it)"
CHECKPOINTS = "checkpoints (the same in every script that has it)"
OWN = ["main", "parse_args"]
BANNERS = ["model", SCORES, "training", DATA, CHECKPOINTS, "main"]
each_script = pytest.mark.parametrize("name", NAMES)


def source(name):
    return (ROOT / f"{name}.py").read_text()


# --- imports -------------------------------------------------------------------------------------


def foreign(text):
    """What a script may not do: import another script or package, or run text as code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
        found += [module for module in modules if module.split(".")[0] not in ALLOWED]
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in FORBIDDEN:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import unet",
        "from segnet import SegNet",
        "from . import unet",
        "import cv2",
        "import runpy",
        "exec(open('unet.py').read())",
        "__import__('unet')",
        "sys.path.append('.')",
    ],
)
def test_the_checker_sees(line):
    assert foreign(line)


@each_script
def test_imports(name):
    assert foreign(source(name)) == []


@each_script
def test_import_computes_nothing(name):
    """The top level has imports, constants, functions and classes, and starts main if it is run."""
    *body, last = ast.parse(source(name)).body
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef)
    assert [ast.unparse(node) for node in body[1:] if not isinstance(node, kinds)] == []
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"


def test_import_has_no_side_effect(tmp_path):
    """No line is printed, no file written, no random number drawn."""
    code = f"""
import importlib.util, torch
state = torch.get_rng_state()
for name in {NAMES}:
    spec = importlib.util.spec_from_file_location(name, f"{ROOT}/{{name}}.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
assert torch.equal(state, torch.get_rng_state())
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert list(tmp_path.iterdir()) == []


# --- text ----------------------------------------------------------------------------------------


@each_script
def test_banners(name):
    """Shared sections stand in one order. A training has all of them, but for other losses."""
    found = re.findall(r"^# --- (.+?) -+$", source(name), flags=re.M)
    shared = [title for title in found if title in BANNERS]
    assert shared == [title for title in BANNERS if title in shared] and found[-1] == "main"
    assert (SCORES in shared) == (name in SEGMENTERS)
    if name in TRAINING:
        assert set(BANNERS) - {SCORES} <= set(shared)


@each_script
def test_docstring(name):
    text = load(name).__doc__
    parts = ["WHAT IT DOES", "YOU WILL LEARN", "RUN IT", "WHAT TO EXPECT"]
    if name in TRAINING:
        parts.append("DIFFERS FROM THE PAPER")
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "TODO" not in text


@each_script
def test_the_docstring_names_what_is_there(name):
    """The functions, methods, classes and tables to read, after the arrows."""
    learn = load(name).__doc__.partition("YOU WILL LEARN")[2].partition("RUN IT")[0]
    found = re.findall(r"->\s+(\w[\w.]*(?:,\s+\w[\w.]*)*)", learn)
    names = re.split(r",\s+", ", ".join(found))
    assert len(names) >= 2
    for word in names:
        last = word.strip(".").split(".")[-1]
        assert re.search(rf"^ *(def |class |){last}\b", source(name), flags=re.M), word


@each_script
def test_classes_are_modules(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.ClassDef):
            assert issubclass(getattr(load(name), node.name), nn.Module)


@each_script
def test_public_functions_and_classes_say_what_they_do(name):
    for node in ast.parse(source(name)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in OWN:
            assert ast.get_docstring(node), node.name


# --- flags ---------------------------------------------------------------------------------------


@pytest.fixture
def flags(monkeypatch):
    """flags(name) -> {flag: argparse's action} of a script."""
    parsers = []
    monkeypatch.setattr(ArgumentParser, "print_help", lambda parser: parsers.append(parser))

    def call(name):
        with pytest.raises(SystemExit):
            load(name).parse_args(["--help"])
        actions = [action for action in parsers[-1]._actions if action.option_strings]
        return {action.option_strings[-1]: action for action in actions}

    return call


@each_script
def test_flags(name, flags):
    """At most 18, in kebab-case; each helps, except where its choices do."""
    found = flags(name)
    assert len(found) <= 18 + 1  # with --help
    assert [flag for flag in found if not re.fullmatch("--bf16|--[a-z]+(-[a-z]+)*", flag)] == []
    assert [flag for flag, action in found.items() if not (action.help or action.choices)] == []


def test_shared_flags_have_the_same_help(flags):
    of_photos, of_training = ["--size", "--frac"], ["--net", "--batch-size", "--lr"]
    for flag in of_photos + of_training + ["--device", "--bf16", "--resume"]:
        helps = {flags(name)[flag].help for name in TRAINING if flag in flags(name)}
        assert len(helps) == 1, (flag, helps)


@each_script
def test_help_is_the_docstring(name, capsys):
    with pytest.raises(SystemExit) as stop:
        load(name).main(["--help"])
    assert stop.value.code == 0
    assert load(name).__doc__.strip() in capsys.readouterr().out


def test_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    words = [re.split("[#<>=~ ]", line)[0].lower() for line in lines]
    assert {word for word in words if word} == {"torch", "torchvision", "numpy", "pillow"}
