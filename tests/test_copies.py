"""Shared blocks are copied into every script that needs them: same name, same text.

python tests/test_copies.py                        names the blocks that differ
python tests/test_copies.py --fix finetune.py      pushes finetune.py's text into the other scripts
"""
import argparse, ast, os, re, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = "vqvae linknet segnet unet pretrain finetune evaluate experiments".split()
OWN = {"main", "parse_args", "AUTO"}          # every script has its own

def blocks(source):
    """Functions, classes and UPPER_CASE constants at the top level -> {name: (first, last line)},
    with the decorators and the comments glued above, but no banner; to the last line of the body."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else \
            [t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper()]
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        while first > 1 and lines[first - 2].startswith("#") and not lines[first - 2].startswith("# ---"):
            first -= 1
        last = node.end_lineno
        while last < len(lines) and (not lines[last].strip() or lines[last][0].isspace()):
            last += 1                          # comments at the end of the body belong to it
        while not lines[last - 1].strip():
            last -= 1
        found |= {name: (first, last) for name in names if name not in OWN}
    return found

def text(source, span):
    return "\n".join(source.splitlines()[span[0] - 1:span[1]])

def differing(folder):
    """Names of the blocks that have more than one text -> the scripts that hold each."""
    texts = {}
    for path in (Path(folder, f"{name}.py") for name in NAMES):
        source = path.read_text() if path.exists() else ""
        for name, span in blocks(source).items():
            texts.setdefault(name, {}).setdefault(text(source, span), []).append(path.name)
    return {name: list(held.values()) for name, held in texts.items() if len(held) > 1}

def fix(folder, script):
    """Push script's text of every block into the other scripts that have it -> what was changed."""
    source, changed = Path(folder, script).read_text(), []
    right = {name: text(source, span) for name, span in blocks(source).items()}
    for path in (Path(folder, f"{name}.py") for name in NAMES):
        if not path.exists() or path.name == script:
            continue
        other = path.read_text()
        for name, span in sorted(blocks(other).items(), key=lambda item: -item[1][0]):   # from below
            if name in right and text(other, span) != right[name]:
                lines = other.splitlines()
                lines[span[0] - 1:span[1]] = right[name].splitlines()
                other = "\n".join(lines) + "\n"
                changed.append(f"{path.name}: {name}")
        if other != path.read_text():
            temporary = path.with_name(f".{path.name}.new")
            temporary.write_text(other)
            os.replace(temporary, path)
    return changed

def test_same_name_same_text():
    assert differing(ROOT) == {}

def test_same_main_in_all_that_train():
    """main, around the one function that each script has of its own, is a copy too."""
    mains = [(ROOT / f"{name}.py").read_text().partition("\ndef main(")[2] for name in NAMES[:6]]
    assert len({re.sub(r"\b(train|pretrain|finetune)_(vqvae|linknet|segnet|unet)\b", "it", text) for text in mains}) == 1

# --- the checker itself ---------------------------------------------------------------------------

ONE = '''"""One."""
SEED = 0      # of everything

# --- scores ---
# What it is for.
@decorated
def score(x):
    """Doc."""
    return x      # why

class Net(Base):
    size = 1

def main():
    pass
'''
DRIFTS = {"a comment": ("# why", "# because"), "the comment above": ("# What it", "# Whatever it"),
          "a decorator": ("@decorated\n", ""), "a trailing line": ("# why\n", "# why\n    # more\n"),
          "a constant": ("SEED = 0 ", "SEED = 1 "), "its comment": ("of everything", "of nothing"),
          "a class": ("size = 1", "size = 2"), "a type": ("def score(x)", "def score(x: int)")}

@pytest.fixture
def pair(tmp_path):
    def write(other):
        (tmp_path / "unet.py").write_text(ONE)
        (tmp_path / "segnet.py").write_text(other)
        return tmp_path
    return write

def test_equal_texts_pass(pair):
    own = ONE.replace("One.", "Two.").replace("    pass", "    return 1").replace("# --- scores", "# --- s")
    assert differing(pair(own)) == {}          # docstring, main and banners are each script's own

@pytest.mark.parametrize("drift", DRIFTS)
def test_drift_is_seen_and_repaired(pair, drift):
    folder = pair(ONE.replace(*DRIFTS[drift]))
    assert len(differing(folder)) == 1
    assert len(fix(folder, "unet.py")) == 1
    assert (folder / "segnet.py").read_text() == ONE
    assert fix(folder, "unet.py") == [] and sorted(p.name for p in folder.iterdir()) == ["segnet.py",
                                                                                         "unet.py"]

def test_fix_keeps_what_only_the_other_has(pair):
    folder = pair("import os\n\nOTHER = 2\n\n" + ONE.replace("size = 1", "size = 2\n    more = 3"))
    fix(folder, "unet.py")
    assert (folder / "segnet.py").read_text() == "import os\n\nOTHER = 2\n\n" + ONE

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fix", metavar="SCRIPT.py", help="the script whose texts are right")
    script = parser.parse_args().fix
    if script and not (ROOT / script).exists():
        parser.error(f"{script} is not there")
    for line in fix(ROOT, script) if script else []:
        print("changed", line)
    off = differing(ROOT)
    for name, held in sorted(off.items()):
        print(f"{name}: differs between " + " | ".join(", ".join(group) for group in held))
    sys.exit(bool(off))
