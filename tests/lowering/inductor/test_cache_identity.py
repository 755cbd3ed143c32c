"""Two processes, one cache: code of another version or mode is never served, code of the same one is.

Each process runs a copy of the packages in which one file may be edited. That the test can fail is shown by a copy
whose fingerprint is a constant: there the edited version gets the code of the first one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Every operation of this graph is a call of one of our ops or of an ATen kernel: no C++ has to be compiled.
SCRIPT = """
import json, os, torch, diffulex
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

class Other(CustomGraphPass):
    def __call__(self, graph):
        pass

    def uuid(self):
        return b"other"

ops = torch.ops.diffulex

def block(hidden, ids, weights, w13, w2):
    order, _, offsets = ops.moe_dispatch(ids, 4)
    gate, up = ops.moe_expert_up(hidden, w13, None, order, offsets, 2).chunk(2, -1)
    act = torch.nn.functional.silu(gate) * up
    return ops.moe_combine(ops.moe_expert_down(act, w2, None, order, offsets), weights)

generator = torch.Generator().manual_seed(0)
sizes = [(3, 8), (3, 2), (4, 12, 8), (4, 8, 6)]
hidden, weights, w13, w2 = (torch.randn(size, generator=generator) for size in sizes)
ids = torch.tensor([[0, 1], [1, 2], [3, 0]], dtype=torch.int32)
args = (hidden, ids, weights, w13, w2)
with torch.no_grad():
    options = {"joint_custom_pre_pass": Other()} if os.environ.get("OTHER_PASS") else None
    out = torch.compile(block, fullgraph=True, options=options)(*args)
    factor = (out.double().sum() / block(*args).double().sum()).item()
found = {name: counters["inductor"].get(f"fxgraph_cache_{name}", 0) for name in ("hit", "miss", "bypass")}
print(json.dumps({"factor": round(factor, 3), **found}))
"""

MISS, HIT = {"hit": 0, "miss": 1, "bypass": 0}, {"hit": 1, "miss": 0, "bypass": 0}

NEGATED = """    result = _compat.fallback(op, *args)
    negate = torch.ops.aten.neg.default
    return _compat.fallback(negate, result) if op is _OPS.moe_combine.default else result
"""
# file -> (text, what stands there instead, factor of the result)
EDITS = {
    "lowering": (
        "lowering/inductor/lowerings.py",
        "    return _compat.fallback(op, *args)\n",
        NEGATED,
        -1.0,
    ),
    "pass": (
        "lowering/graph/activation_pass.py",
        "        formula = simplified_formula(text)\n",
        "        formula = simplified_formula(f'3.0 * ({text})')\n",
        3.0,
    ),
    # not read on the CPU, so the result stays
    "template": (
        "lowering/templates/moe_expert_gemm.jinja",
        "acc = tl.dot(a, w, acc,",
        "acc = tl.dot(a, w, acc, ",
        1.0,
    ),
}


CONSTANT = ("lowering/inductor/identity.py", '    return hash_sources(_ROOT, "")\n', "    return 64 * '0'\n")


class Versions:
    """Copies of the packages, and a process for each that compiles the script's block with one common cache."""

    def __init__(self, folder):
        self.folder = folder
        self.script = folder / "script.py"
        self.script.write_text(SCRIPT)

    def copy(self, name, *edits):
        for package in ("lowering", "diffulex"):
            ignored = shutil.ignore_patterns("__pycache__", "*.txt")
            shutil.copytree(ROOT / package, self.folder / name / package, ignore=ignored)
        for file, before, after in edits:
            path = self.folder / name / file
            assert path.read_text().count(before) == 1, f"{before!r} is not in {file}"
            path.write_text(path.read_text().replace(before, after))

    def run(self, name, cache, **variables):
        environment = {
            **os.environ,
            **variables,
            "PYTHONPATH": str(self.folder / name),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / cache),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-W", "ignore", self.script],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    versions = Versions(tmp_path_factory.mktemp("versions"))
    versions.copy("first")
    assert versions.run("first", "cache") == {"factor": 1.0, **MISS}
    return versions


@pytest.mark.slow
@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_file_is_another_version(versions, kind):
    file, before, after, factor = EDITS[kind]
    versions.copy(kind, (file, before, after))
    assert versions.run(kind, "cache") == {"factor": factor, **MISS}


@pytest.mark.slow
def test_the_same_version_hits(versions):
    """From another folder, too: what counts is the content."""
    versions.copy("again")
    assert versions.run("again", "cache") == {"factor": 1.0, **HIT}


@pytest.mark.slow
def test_without_the_fingerprint_stale_code_is_served(versions):
    """The control: the edited lowering is not run, and nothing but the fingerprint prevents that."""
    versions.copy("constant", CONSTANT)
    versions.copy("constant_edited", CONSTANT, EDITS["lowering"][:3])
    assert versions.run("constant", "other_cache") == {"factor": 1.0, **MISS}
    assert versions.run("constant_edited", "other_cache") == {"factor": 1.0, **HIT}


@pytest.mark.slow
def test_tuned_times_have_code_of_their_own(versions):
    """Where nothing else differs, and behind a pass of someone else's in Inductor's slot: by the tag alone."""
    cache = "tuned_cache"
    versions.copy("untuned", CONSTANT)
    versions.copy("tuned", CONSTANT, ("lowering/schedule/tuned.py", '        return ""\n', '        return "1f"\n'))
    assert versions.run("untuned", cache, OTHER_PASS="1")["miss"] == 1
    assert versions.run("tuned", cache, OTHER_PASS="1")["miss"] == 1
    assert versions.run("tuned", cache, OTHER_PASS="1")["hit"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("other", ["", "1"])
def test_each_mode_has_code_of_its_own(versions, other):
    """Behind a pass of someone else's in Inductor's slot, too: there, the tag of the caches alone tells them apart."""
    cache, on = f"modes{other}", {"DIFFULEX_BATCH_INVARIANT": "1"}
    assert versions.run("first", cache, OTHER_PASS=other)["miss"] == 1
    assert versions.run("first", cache, OTHER_PASS=other, **on)["miss"] == 1
    assert versions.run("first", cache, OTHER_PASS=other)["hit"] == 1
    assert versions.run("first", cache, OTHER_PASS=other, **on)["hit"] == 1
