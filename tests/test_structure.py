"""The rules of layout and style that a parser can check."""
import argparse, ast, operator, re, subprocess, sys

import pytest
from torch import nn

from conftest import NAMES, ROOT, SCRIPTS, TRAINING, load

PACKAGES = {"torch", "torchvision", "numpy", "PIL"}
BANNERS = ["knobs", "model", "loss and scores", "training", "data", "checkpoints", "main"]
each_script = pytest.mark.parametrize("name", SCRIPTS)

def source(name):
    return (ROOT / f"{name}.py").read_text()

def sections(name):
    """[(title, number of lines)] by the banners."""
    found = re.split(r"^# --- (.+?) -+$", source(name), flags=re.M)
    return list(zip(found[1::2], (part.count("\n") for part in found[2::2])))

def foreign(tree):
    """What a script may not do: [(line, what)]: import another script or package, run text."""
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            ["." * node.level + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            if top in {*NAMES, "importlib", "runpy", "imp", ""} or \
                    top not in PACKAGES and top not in sys.stdlib_module_names:
                yield node.lineno, name
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            plain = isinstance(node.func, ast.Name)
            if plain and called in ("exec", "eval", "__import__", "compile") or called == "run_path":
                yield node.lineno, called
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            yield node.lineno, "sys.path"

@pytest.mark.parametrize("line", (
    "import unet", "from segnet import VQVAE", "from . import unet", "import cv2", "import importlib",
    "exec(open('unet.py').read())", "__import__('unet')", "runpy.run_path('unet.py')", "sys.path.append('.')"))
def test_the_checker_sees(line):
    assert list(foreign(ast.parse(line)))

@each_script
def test_imports(name):
    assert list(foreign(ast.parse(source(name)))) == []

@each_script
def test_sections(name):
    titles = [title for title, _ in sections(name)]
    if name in TRAINING:
        plain = ["data" if title in ("labelled data", "unlabelled data") else title for title in titles]
        assert plain == BANNERS
    assert titles[0] == "knobs" and titles[-1] == "main" and len(set(titles)) == len(titles)
    assert source(name).endswith('\nif __name__ == "__main__":\n    main()\n')

@each_script
def test_docstring(name):
    text = ast.get_docstring(ast.parse(source(name)))
    parts = ["WHAT IT DOES", "YOU WILL LEARN", "RUN IT", "WHAT TO EXPECT"]
    parts += ["DIFFERS FROM THE PAPER"] if name in TRAINING else []
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), dict(zip(parts, places))
    assert "@" not in text, "a place that is still to be filled in"
    names = re.findall(r"->\s+(\w[\w.]*(?:,\s+\w[\w.]*)*)", text[text.find("YOU WILL"):])   # what to read is there
    assert len(names) >= 2
    for word in ", ".join(names).split(", "):
        operator.attrgetter(word.strip(".\n"))(load(name))

@each_script
def test_flags(name, monkeypatch):
    """Every flag has a help; at most 24; kebab-case; no abbreviations; the docstring is the help."""
    seen = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: seen.append(self))
    load(name).parse_args([])
    actions = [a for a in seen[0]._actions if not isinstance(a, argparse._HelpAction)]
    flags = [a for a in actions if a.option_strings]
    assert [a.dest for a in actions if not a.help] == []
    assert len(flags) <= 24
    assert [o for a in flags for o in a.option_strings if not re.fullmatch(r"--[a-z]+(-[a-z]+)*", o)] == []
    assert seen[0].allow_abbrev is False and seen[0].description == load(name).__doc__
    assert all(len(a.help) > 8 and a.help != a.dest for a in actions)

@each_script
def test_help_shows(name, capsys):
    with pytest.raises(SystemExit) as stop:
        load(name).main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and load(name).__doc__.strip().splitlines()[0] in out and "default" in out

def test_shared_flags_have_the_same_line():
    """A flag that several scripts have reads the same in all of them, but for defaults and data."""
    lines = {}
    for name in SCRIPTS:
        tree = ast.parse(source(name))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add" \
                    and ast.unparse(node.args[0]).startswith("'--"):
                flag = node.args[0].value
                if flag in ("--seed", "--device", "--amp", "--compile", "--resume", "--frac", "--lr",
                            "--epochs", "--batch-size", "--weight-decay", "--root", "--size") \
                        and name in TRAINING:
                    lines.setdefault(flag, {}).setdefault(ast.unparse(node), []).append(name)
    assert {flag: held for flag, held in lines.items() if len(held) > 1} == {}

@each_script
def test_length(name):
    lines = source(name).splitlines()
    assert len(lines) <= 600
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100 or line != line.rstrip()] == []

@each_script
def test_import_has_no_side_effect(name, tmp_path):
    code = ("import importlib.util as u, sys, random, torch; s = u.spec_from_file_location('s', sys.argv[1]);"
            "m = u.module_from_spec(s); a = torch.get_rng_state(); s.loader.exec_module(m);"
            "assert (a == torch.get_rng_state()).all(), 'a random number was drawn'")
    done = subprocess.run([sys.executable, "-B", "-c", code, str(ROOT / f"{name}.py")], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []

@each_script
def test_only_modules_are_classes(name):
    classes = [node.name for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.ClassDef)]
    assert [c for c in classes if not issubclass(getattr(load(name), c), nn.Module)] == []

@each_script
def test_runs_without_its_lessons(name):
    """The ## lines teach; without them the code is the same."""
    bare = "".join(line for line in source(name).splitlines(True) if not line.lstrip().startswith("##"))
    assert ast.dump(ast.parse(bare)) == ast.dump(ast.parse(source(name)))

@pytest.mark.parametrize("name", TRAINING)
def test_most_of_it_is_the_lesson(name):
    """Model, loss and training are at least two fifths of a script."""
    size = dict(sections(name))
    share = (size["model"] + size["loss and scores"] + size["training"]) / len(source(name).splitlines())
    assert share >= 0.40, f"{share:.2f}"

@pytest.mark.parametrize("file, allowed", (("requirements.txt", {"torch", "torchvision", "numpy", "pillow"}),
                                           ("tests/requirements.txt", {"pytest", "pytest-xdist", "scikit-learn", "torchmetrics"})))
def test_requirements(file, allowed):
    words = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    assert {re.split(r"[<>=~ ]", word)[0].lower() for word in words if word} == allowed
