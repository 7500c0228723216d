"""Shared blocks are copied into every script that needs them: same name, same text.

python tests/test_copies.py                        names the blocks that differ
python tests/test_copies.py --fix finetune.py      pushes finetune.py's text into the other scripts
"""

import argparse
import ast
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["vqvae", "linknet", "segnet", "unet", "pretrain", "finetune", "evaluate", "experiments"]
OWN = ["main", "parse_args", "SCRIPT"]  # every script has its own


def name_of(node):
    """The name of a function, a class or an UPPER_CASE constant, else None."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id.isupper():
            return target.id
    return None


def blocks(source):
    """What stands at the top level -> {name: (first, last line)}, with the decorators and comments
    glued above it, but no banner, to the last comment of its body."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        name = name_of(node)
        if name is None or name in OWN:
            continue
        first, last = node.lineno, node.end_lineno
        for decorator in getattr(node, "decorator_list", []):
            first = min(first, decorator.lineno)
        while lines[first - 2].startswith("#") and "# ---" not in lines[first - 2]:
            first -= 1
        while last < len(lines) and lines[last].startswith(" "):
            last += 1
        found[name] = (first, last)
    return found


def texts(path):
    """{name: text} of the blocks of a script."""
    source = path.read_text()
    lines = source.splitlines()
    return {name: lines[first - 1 : last] for name, (first, last) in blocks(source).items()}


def scripts(folder):
    paths = [Path(folder, f"{name}.py") for name in NAMES]
    return [path for path in paths if path.exists()]


def differing(folder):
    """{name: [scripts that hold one text, scripts that hold another, ...]} where there are two."""
    held = {}
    for path in scripts(folder):
        for name, lines in texts(path).items():
            held.setdefault(name, {}).setdefault("\n".join(lines), []).append(path.name)
    return {name: list(groups.values()) for name, groups in held.items() if len(groups) > 1}


def fix(folder, script):
    """Push script's text of every block into the other scripts that have it -> what was changed."""
    right, changed = texts(Path(folder, script)), []
    for path in scripts(folder):
        source = path.read_text()
        lines = source.splitlines()
        for name, (first, last) in reversed(blocks(source).items()):  # from below: numbers stay
            if name in right and lines[first - 1 : last] != right[name]:
                lines[first - 1 : last] = right[name]
                changed.append(f"{path.name}: {name}")
        if lines != source.splitlines():
            temporary = path.with_name(f".{path.name}.new")
            temporary.write_text("\n".join(lines) + "\n")
            os.replace(temporary, path)
    return changed


def test_same_name_same_text():
    assert differing(ROOT) == {}


# --- the checker itself --------------------------------------------------------------------------

ONE = '''"""One."""

SEED = 0  # of everything

# --- scores ---
# What it is for.
@decorated
def score(x):
    """Doc."""
    return x  # why


class Net(Base):
    size = 1


def main():
    pass
'''
DRIFTS = {
    "a comment": ("# why", "# because"),
    "the comment above": ("# What it", "# Whatever it"),
    "a decorator": ("@decorated\n", ""),
    "a trailing line": ("# why\n", "# why\n    # more\n"),
    "a constant": ("SEED = 0", "SEED = 1"),
    "its comment": ("of everything", "of nothing"),
    "a class": ("size = 1", "size = 2"),
    "a type": ("def score(x)", "def score(x: int)"),
}


def write_two(folder, other):
    (folder / "unet.py").write_text(ONE)
    (folder / "segnet.py").write_text(other)


def test_equal_texts_pass(tmp_path):
    """The docstring, main and the banners are each script's own."""
    own = ONE.replace("One.", "Two.").replace("    pass", "    return 1")
    write_two(tmp_path, own.replace("# --- scores", "# --- loss"))
    assert differing(tmp_path) == {}


@pytest.mark.parametrize("drift", DRIFTS)
def test_drift_is_seen_and_repaired(tmp_path, drift):
    write_two(tmp_path, ONE.replace(*DRIFTS[drift]))
    assert len(differing(tmp_path)) == 1
    assert len(fix(tmp_path, "unet.py")) == 1
    assert (tmp_path / "segnet.py").read_text() == ONE
    assert fix(tmp_path, "unet.py") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["segnet.py", "unet.py"]


def test_fix_keeps_what_only_the_other_has(tmp_path):
    write_two(
        tmp_path, "import os\n\nOTHER = 2\n" + ONE.replace("size = 1", "size = 2\n    more = 3")
    )
    fix(tmp_path, "unet.py")
    assert (tmp_path / "segnet.py").read_text() == "import os\n\nOTHER = 2\n" + ONE


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fix", metavar="SCRIPT.py", help="the script whose texts are right")
    args = parser.parse_args()
    if args.fix:
        for line in fix(ROOT, args.fix):
            print("changed", line)
    off = differing(ROOT)
    for name, groups in sorted(off.items()):
        print(f"{name}: differs between " + " | ".join(", ".join(group) for group in groups))
    sys.exit(len(off) > 0)
