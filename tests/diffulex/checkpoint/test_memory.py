"""Beside the model, memory holds one tensor of one expert: the kernel's own figures, and proof that they would tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import peak_memory
from tests.support.peak_memory import EXPERT_BYTES, SHARD_BYTES

# Python objects, pages that the loader touches, the allocator's own; less than a second tensor of an expert would be.
SLACK = 3 << 19
# glibc raises, as it goes, the size from which memory is mapped and given back when freed; tensors then come from a
# heap whose freed parts stay resident, as chance has it up to 6 MiB. Named, the size stays.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}

pytestmark = pytest.mark.skipif(not peak_memory.is_supported(), reason="the kernel keeps no peak that can be reset")


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "tests.support.peak_memory", str(tmp_path_factory.mktemp("peaks"))]
    env = {**os.environ, **ALLOCATOR}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "scenario",
    ["load v5", "load v4", "load transposed", "load converted", "save v5", "save v4", "save transposed"],
)
def test_one_tensor_of_one_expert(scenario, peaks):
    assert peaks[scenario] <= EXPERT_BYTES + SLACK, f"{peaks[scenario] / 2**20:.1f} MiB"


def test_a_window_bounds_what_stays_mapped(peaks):
    assert peaks["load a window"] <= 5 * EXPERT_BYTES + SLACK


@pytest.mark.parametrize("scenario", ["whole shard", "load unbounded"])
def test_reading_a_whole_shard_would_be_seen(scenario, peaks):
    assert peaks[scenario] >= 0.9 * SHARD_BYTES
