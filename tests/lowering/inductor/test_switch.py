"""The switches and code that never reads them: a grouped-GEMM spine in a model's own code."""

import os
import subprocess
import sys

import pytest
import torch

import diffulex
from lowering.report import collect
from lowering.state import switches
from tests.support.experts import make_case, stock_function
from tests.support.inputs import WIDE


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("inside_first", [False, True])
@pytest.mark.parametrize("switch", [diffulex.disabled, diffulex.batch_invariant])
def test_every_graph_is_guarded(switch, inside_first):
    """Both sides are compiled once, whichever comes first, and kept."""
    seen = []

    def backend(graph, _inputs):
        seen.append(switches())
        return graph.forward

    compiled, x = torch.compile(lambda x: x.sin(), backend=backend), torch.ones(3)
    for turn in range(4):
        if (turn % 2 == 0) == inside_first:
            with switch():
                compiled(x)
        else:
            compiled(x)
    outside = switches()
    with switch():
        inside = switches()
    assert inside != outside
    assert seen == ([inside, outside] if inside_first else [outside, inside])


@pytest.mark.slow
def test_through_inductor():
    """The chain is rewritten outside the block and stock inside, although one object was compiled."""
    case = make_case(WIDE.replace(dtype=torch.float32), stock_function("grouped_mm"))
    case.module.eval().requires_grad_(False)
    compiled = torch.compile(case.module)

    def rewritten():
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True), collect() as decisions:
            out = compiled(*case.inputs)
        return out, [d.outcome for d in decisions if d.subject == "spine_pass"], decisions

    ours, outcomes, _ = rewritten()
    assert outcomes == ["stage ops"]
    with diffulex.disabled():
        stock, outcomes, decisions = rewritten()
        assert (outcomes, decisions) == ([], [])
        assert torch.equal(rewritten()[0], stock)
    again, _, decisions = rewritten()
    assert decisions == []
    assert torch.equal(again, ours)


STORED = """
import torch, diffulex
import torch._dynamo.config
from torch._dynamo.precompile_context import PrecompileContext
from torch._dynamo.utils import counters

def double(x):
    return x * 2 + 1

x = torch.arange(4.0)
with torch._dynamo.config.patch(caching_precompile=True):
    assert torch.equal(torch.compile(double)(x), double(x))
    PrecompileContext.save_to_dynamo_cache()
print(dict(counters["dynamo_cache"]))
"""


@pytest.mark.slow
def test_a_graph_that_was_stored_is_found_by_the_next_process(tmp_path):
    """Its guards read the switches, whose module the stored entry has to name."""
    found = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", STORED],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        found.append(run.stdout.strip())
    assert found == ["{'dynamo_cache_miss': 1}", "{'dynamo_cache_hit': 1}"]
