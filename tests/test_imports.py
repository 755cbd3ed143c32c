"""What `import diffulex` and `import lowering` may load, seen from fresh processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = ("triton", "transformers.modeling_utils", "diffulex.benching")
MAX_SECONDS = 2.0

PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import {package}
seconds = time.perf_counter() - start
loaded = [name for name in {forbidden!r} if name in sys.modules and name not in before]
print(json.dumps(dict(seconds=seconds, loaded=loaded, cuda=torch.cuda.is_initialized())))
"""


def probe(package):
    """Import `package` in a fresh process: seconds beyond torch's import, forbidden modules loaded, CUDA started."""
    code = PROBE.format(package=package, forbidden=FORBIDDEN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("package", ["diffulex", "lowering", "lowering.ops"])
def test_import_loads_no_triton_no_models_and_starts_no_cuda(package):
    seen = probe(package)
    assert seen["loaded"] == []
    assert not seen["cuda"]


@pytest.mark.parametrize("module", FORBIDDEN)
def test_the_probe_sees_a_forbidden_module(module):
    assert module in probe(module)["loaded"]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["diffulex", "lowering"])
def test_import_takes_less_than_two_seconds_beyond_torch(package):
    seconds = []
    for _ in range(3):
        seconds.append(probe(package)["seconds"])
        if seconds[-1] < MAX_SECONDS:
            return
    pytest.fail(f"import {package} took {seconds} s beyond torch")
