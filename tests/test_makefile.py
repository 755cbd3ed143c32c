"""Which interpreter `make` takes, from what it would run; nothing is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def venv(tmp_path):
    """An environment that is up to date, made by another Python than this one."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\necho another\n")
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    return tmp_path


def would_run(venv, *arguments):
    command = ["make", "-n", "demo", f"VENV={venv}", *arguments]
    inherited = {"PYTHON", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"}  # where make runs this
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_interpreter_that_is_asked_for_makes_a_new_environment(venv):
    assert f"{sys.executable} -m venv --clear {venv}" in would_run(venv, f"PYTHON={sys.executable}")


def test_the_environment_is_kept(venv):
    assert "-m venv" not in would_run(venv)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    assert "-m venv" not in would_run(venv, f"PYTHON={sys.executable}")
