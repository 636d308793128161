"""What the README says can be typed and clicked."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import fid
import generate
import train_balanced
import train_dcgan
import train_fcgan

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^ *(?:\.venv/bin/)?(?:python|torchrun .*?) (\w+\.py.*)$", README, re.MULTILINE
)
SCRIPTS = (train_dcgan, train_fcgan, train_balanced, generate, fid)
PARSERS = {f"{script.__name__}.py": script.get_args for script in SCRIPTS}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, monkeypatch):
    script, *argv = shlex.split(command, comments=True)
    if "--help" in argv:
        with pytest.raises(SystemExit) as exit:
            PARSERS[script](argv)
        assert exit.value.code == 0
    elif "--resume" in argv or any(flag.startswith("--config") for flag in argv):
        pytest.skip("needs a run: tests/test_run.py resumes and repeats some")
    else:
        PARSERS[script](argv)


def test_files_and_pictures_exist():
    named = re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"^\| `([\w./]+)`", README, re.M)
    files = [name for name in named if "/" in name or name.endswith((".py", ".md"))]
    inside_a_run = ("samples/",)
    missing = [f for f in files if not f.startswith(inside_a_run) and not Path(ROOT, f).exists()]
    assert len(files) > 4 and not missing


def test_both_setup_lines_are_there():
    setup = "python3 -m venv .venv && .venv/bin/pip install -r"
    assert f"{setup} requirements.txt && .venv/bin/python train_dcgan.py\n" in README
    assert f"{setup} tests/requirements.txt && .venv/bin/python -m pytest\n" in README
