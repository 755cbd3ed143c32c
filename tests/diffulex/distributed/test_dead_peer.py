"""A rank that ends or stands still in the middle is an error on the others, in time, and no hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.dead_peer import DEAD, RANKS, TIMEOUT

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("how", "end"), [("naive", "killed"), ("tp", "killed"), ("static", "frozen")])
def test_the_others_get_an_error(how, end, record_property):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.support.dead_peer", how, end]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(each["rank"] for each in told) == [rank for rank in range(RANKS) if rank != DEAD], done.stderr[-3000:]
    record_property("seconds_over_the_limit", round(max(each["seconds"] for each in told) - TIMEOUT, 1))
    for each in told:
        assert each["error"], each
        assert each["seconds"] <= TIMEOUT + 5, each
