"""Every command in the README and in the docstrings is accepted by the script's own parser."""
import re, shlex

import pytest

from conftest import NAMES, ROOT, SCRIPTS, load

COMMAND = re.compile(r"(?:^|&& |[$;] )python3? ((?:" + "|".join(NAMES) + r")\.py[^#\n;&|]*)", re.M)

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
