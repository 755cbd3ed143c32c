"""Arguments: what is refused, with which message and exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffulex.cli.main import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--preset", "huge"], "invalid choice: 'huge' (choose from"),
        (["demo", "--tokens"], "expected at least one argument"),
        (["demo", "--tokens", "many"], "invalid int value: 'many'"),
        (["explain"], "MODEL"),
    ],
)
def test_unknown_words_are_refused_by_the_parser(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--tokens", "1", "-3"], "--tokens: expected counts from 0 to 4096, got -3"),
        (["demo", "--tokens", "5000"], "--tokens: expected counts from 0 to 4096, got 5000"),
        (["demo", "--layers", "0"], "--layers: expected at least 1, got 0"),
        (["demo", "--train-seconds", "-1"], "--train-seconds: expected a number of seconds, got -1"),
        (["demo", "--train-seconds", "nan"], "--train-seconds: expected a number of seconds, got nan"),
        (["explain", "no_such_model"], "a model type of transformers, got 'no_such_model'"),
        (["explain", "qwen3_moe", "--layers", "0"], "--layers: expected at least 1, got 0"),
    ],
)
def test_values_without_a_meaning_get_the_catalogues_error(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_a_device_that_is_not_there(capsys):
    assert main(["demo", "--device", "cuda"]) == 2
    assert "--device: expected a CUDA device" in capsys.readouterr().err


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "diffulex", "demo", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--train-seconds" in done.stdout and "Exit code 1" in done.stdout


def test_a_wrong_environment_variable_is_no_traceback():
    command = [sys.executable, "-m", "diffulex", "env"]
    environment = {**os.environ, "DIFFULEX_DISABLE": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: [MOE005] environment variable DIFFULEX_DISABLE: expected 0, 1 or nothing")
    assert "Traceback" not in done.stderr


def test_an_output_that_is_a_file(tmp_path, capsys):
    file = tmp_path / "taken"
    file.write_text("")
    for output in (file, file / "below"):
        assert main(["demo", "--output", str(output)]) == 2
        assert "error: [MOE005] --output: expected a directory" in capsys.readouterr().err
