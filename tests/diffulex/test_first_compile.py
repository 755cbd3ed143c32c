"""Eight threads, and eight processes with one empty cache, compile a block first at once: the same bits, and an end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.first_compile import COUNT

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_all_at_once(how, tmp_path, record_property):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.support.first_compile", how]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    record_property("at_once", len(told["found"]))
    record_property("digests", len({*told["found"], told["eager"]}))
    assert len(told["found"]) == COUNT and set(told["found"]) == {told["eager"]}, told
    assert list(tmp_path.glob("fxgraph/*")), "the cache was theirs"
