"""Random command lines: whatever is typed, a script ends well or refuses in one line."""
import argparse, inspect, math, random
from pathlib import Path

import pytest
import torch

from conftest import NAMES, SMALL, load, write_folder

LINES = 12                       # a script; many more with --slow

class Parsed(Exception):
    """Carries a script's parser out of its parse_args."""

def parser_of(name, monkeypatch):
    def stop(self, argv=None, namespace=None):
        raise Parsed(self)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as caught:
            load(name).parse_args([])
    return caught.value.args[0]

WORDS = ["", "auto", "none", "nan", "inf", "-inf", "1e999", "0x10", "½", "١", "a b", "-1", "0", "--", "../..",
         "\n", "9" * 5000, "1_0"]
PATHS = ["", ".", "/", "/dev/null", "/proc/self/mem", "missing", "flat", "parted", "words.txt", "empty", "broken.pt",
         "a" * 300, "ünï/ço dé", "out", "flat/images", "-"]
# In range, but so large that a run would take hours: drawn no larger than this.
LARGEST = {"--epochs": 2, "--size": 64, "--width": 32, "--residual-width": 16, "--residual-blocks": 2,
           "--downs": 4, "--stages": 5, "--seeds": 3, "--pretrain-epochs": 2, "--jobs": 3, "--codes": 64}

def draw(action, flag, r):
    """One value for an option, mostly one that it takes."""
    if r.random() < 0.12:
        return r.choice(WORDS)
    if action.choices:
        return r.choice(list(action.choices))
    bounds = inspect.getclosurevars(action.type).nonlocals if action.type else {}
    if "low" in bounds:
        low, high, kind = bounds["low"], min(bounds["high"], LARGEST.get(flag, math.inf)), bounds["kind"]
        if r.random() < 0.1 and bounds["words"]:
            return r.choice(bounds["words"])
        if r.random() < 0.15:                      # the ends of the range, and just outside
            return str(r.choice([low, kind(low - 1), bounds["high"] + 1, high]))
        if kind is int:
            return str(r.choice([r.randint(low, min(high, low + 4)), 2 ** r.randint(0, 6)]))
        return f"{10 ** r.uniform(math.log10(max(low, 1e-6)), math.log10(high)):.3g}"
    if action.type:
        return r.choice(["0.05-0.25", "0-0", "0-0.01", "0.95-0.95", "0.9-0.1", "0.5", "-0.1-0.2", "a-b", "0.1-nan"])
    return r.choice(PATHS)

def line(name, parser, r):
    """A random command line, small enough to end soon if it is accepted."""
    words = [*SMALL.get(name, ()), *(["--epochs", "1"] if name in SMALL else [])]
    if r.random() < 0.7 and name != "experiments":
        words += ["--data", r.choice(["flat", "flat", "flat", "parted", "flat/images"])]
    options = [action for action in parser._actions if action.option_strings]
    for action in r.sample(options, r.choice([0, 0, 1, 1, 2, 3, 5])):
        flag = r.choice(action.option_strings)
        if flag in ("-h", "--download", "--compile"):
            continue
        words.append(flag)
        if action.nargs != 0:
            words += [draw(action, flag, r) for _ in range(r.choice([1, 1, 2, 3]) if action.nargs else 1)]
    for action in parser._actions:
        if not action.option_strings and r.random() < 0.7:
            names = ["run"] * 8 if name == "evaluate" else ["all", "labels", "quick", "masks"] * 3
            words += [r.choice(list(action.choices or [*names, *PATHS]))]
    return words + ["--dry-run"] * (name == "experiments")

@pytest.fixture
def place(here, monkeypatch):
    """A folder with a little of everything, and few drawn pets."""
    write_folder("flat", 12, (20, 20))
    for part in ("train", "test"):
        write_folder(Path("parted", part), 4, (24, 20), lambda labels: labels, 3)
    Path("words.txt").write_text("words")
    Path("empty").mkdir()
    torch.save({"script": "pretrain.py"}, "broken.pt")
    return here

@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "linknet" else [])
                                  for name in NAMES])
def test_random_lines(name, place, monkeypatch, capsys, pytestconfig):
    module, parser = load(name), parser_of(name, monkeypatch)
    if hasattr(module, "draw_toy"):
        monkeypatch.setattr(module, "draw_toy", few(module.draw_toy))
    if name == "evaluate":
        load("unet").main([*SMALL["unet"], "--data", "flat", "--epochs", "1", "--out", "run"])
    count = LINES if not pytestconfig.getoption("--slow") else 60 * LINES
    ended = {0: 0, 2: 0}
    for seed in range(count):
        words = line(name, parser, random.Random(f"{name} {seed}"))
        capsys.readouterr()
        try:
            module.main(words)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as error:
            raise AssertionError(f"{name} {seed}: {words}") from error
        error = capsys.readouterr().err
        assert code in ended, (words, code, error)
        assert code == 0 or error.startswith(f"{name}.py: error: ") and error.count("\n") == 1, (words, error)
        ended[code] += 1
    assert min(ended.values()) > count // 20, ended          # both kinds were tried

def few(draw_toy):
    """Sixteen pictures, again and again: it saves most of the drawing."""
    def drawn(n, size, seed):
        images, masks, breeds = draw_toy(16, size, seed)
        many = [i % 16 for i in range(n)]
        return images[many], masks[many], [breeds[i] for i in many]
    return drawn
