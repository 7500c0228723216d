"""The rules of layout and style that a parser can check. (Budgets: ../shared/check.py.)"""

import argparse
import ast
import re
import subprocess
import sys

import pytest
from conftest import NAMES, ROOT, TRAINING, load
from torch import nn

PACKAGES = {"torch", "torchvision", "numpy", "PIL"}
SCORES = "loss and scores (the same in every script that has them)"
DATA = "data (the same in every script that has it)"
CHECKPOINTS = "checkpoints (the same in every script that has it)"
BANNERS = ["model", SCORES, "training", DATA, CHECKPOINTS, "main"]
each_script = pytest.mark.parametrize("name", NAMES)
each_training = pytest.mark.parametrize("name", TRAINING)


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
        for module in modules:
            top = module.split(".")[0]
            known = top in PACKAGES or top in sys.stdlib_module_names
            if not known or top in ["importlib", "runpy"]:
                found.append(module)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ["exec", "eval", "compile", "__import__"]:
                found.append(called)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            found.append("sys.path")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import unet",
        "from segnet import SegNet",
        "from . import unet",
        "import cv2",
        "import importlib",
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
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout == ""
    assert list(tmp_path.iterdir()) == []


# --- text ----------------------------------------------------------------------------------------


def banners(name):
    return re.findall(r"^# --- (.+?) -+$", source(name), flags=re.M)


@each_training
def test_banners(name):
    """vqvae.py has no section of losses, pretrain.py one of its own."""
    losses = {"vqvae": [], "pretrain": ["loss"]}.get(name, [SCORES])
    assert banners(name) == ["model", *losses, "training", DATA, CHECKPOINTS, "main"]


@pytest.mark.parametrize("name", ["evaluate", "experiments"])
def test_banners_of_the_other_two(name):
    """They have sections of their own; those that they share stand in the same order."""
    shared = [title for title in banners(name) if title in BANNERS]
    assert shared == [title for title in BANNERS if title in shared]
    assert banners(name)[-1] == "main"


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
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            short = node.name in ["main", "parse_args"]
            assert short or ast.get_docstring(node), node.name


@each_script
def test_runs_without_its_lessons(name):
    """The ## lines teach; without them the code is the same."""
    lines = source(name).splitlines(keepends=True)
    bare = "".join(line for line in lines if not line.lstrip().startswith("##"))
    assert ast.dump(ast.parse(bare)) == ast.dump(ast.parse(source(name)))


# --- flags ---------------------------------------------------------------------------------------


class Parser(Exception):
    """Carries the parser out of parse_args."""


@pytest.fixture
def flags(monkeypatch):
    """flags(name) -> {flag: argparse's action} of a script."""

    def stop(self, *_):
        raise Parser(self)

    def call(name):
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(Parser) as caught:
                load(name).parse_args([])
        found = {}
        for action in caught.value.args[0]._actions:
            if action.option_strings and action.dest != "help":
                found[action.option_strings[0]] = action
        return found

    return call


@each_script
def test_flags(name, flags):
    """At most 18, in kebab-case; each helps, except where its choices do."""
    found = flags(name)
    assert len(found) <= 18
    assert [flag for flag in found if not re.fullmatch("--[a-z]+(-[a-z]+)*", flag)] == []
    assert [flag for flag, action in found.items() if not (action.help or action.choices)] == []


def test_shared_flags_have_the_same_help(flags):
    for flag in ["--size", "--frac", "--net", "--batch-size", "--lr", "--device", "--resume"]:
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
