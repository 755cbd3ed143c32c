"""Whichever is imported or called first, in fresh processes: diffulex, transformers, torch.compile, Inductor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What the lines of a case may use. `module` calls its experts function as transformers' models do; `ops()` are the
# calls of ours in the graph Dynamo hands to a backend, so that nothing has to be generated.
HELPERS = """
import json, sys, torch

def make():
    from tests.support.experts import make_case
    from tests.support.inputs import FORMS

    def run(self, *inputs):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, *inputs)

    case = make_case(FORMS["plain"].replace(dtype=torch.float32), run)
    return case.module.requires_grad_(False), case.inputs

graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

def ops():
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    return sorted({name.split(".")[1] for name in names if name.startswith("diffulex.")})
"""
REPORT = """
print(json.dumps(result))
"""
OPS = ["moe_combine", "moe_dispatch", "moe_expert_down", "moe_expert_up"]


def outcome(*lines):
    """`result` after the lines, which run in a fresh process."""
    code = "\n".join([HELPERS, *lines, REPORT])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


COMPILE = "module, inputs = make()\ncompiled = torch.compile(module, backend=backend, fullgraph=True)"
RUN = "compiled(*inputs)\nresult = ops()"
EITHER_ORDER = {
    "diffulex_first": ["import diffulex", "import transformers.integrations.moe", COMPILE, RUN],
    "transformers_first": ["import transformers.integrations.moe", "import diffulex", COMPILE, RUN],
    "transformers_itself_first": ["import transformers", "import diffulex", COMPILE, RUN],
    "transformers_when_it_is_needed": ["import diffulex", COMPILE, RUN],
    "compile_before": ["import transformers.integrations.moe", COMPILE, "import diffulex", RUN],
    "inductor_before": ["import torch._inductor.compile_fx", "import diffulex", COMPILE, RUN],
    "twice": ["import diffulex, sys", "del sys.modules['diffulex']", "import diffulex", COMPILE, RUN],
}


@pytest.mark.parametrize("order", EITHER_ORDER)
def test_the_ops_are_captured(order):
    assert outcome(*EITHER_ORDER[order]) == OPS


def test_code_that_was_compiled_before_the_import_is_compiled_again():
    """Dynamo guards on the function it found in the registry."""
    before = ["import transformers.integrations.moe", COMPILE, "compiled(*inputs)", "first = ops()"]
    assert outcome(*before, "import diffulex", RUN, "result = [first, result]") == [[], OPS]


def test_without_diffulex_nothing_is_ours():
    """The control: the lines above see a difference."""
    assert outcome(COMPILE, RUN) == []


def test_switched_off_by_the_environment():
    assert outcome("import os", "os.environ['DIFFULEX_DISABLE'] = '1'", "import diffulex", COMPILE, RUN) == []


@pytest.mark.parametrize("order", ["import diffulex, transformers", "import transformers, diffulex"])
def test_a_configuration_takes_the_name(order):
    """transformers checks names of implementations when a model is made."""
    lines = [
        order,
        "from tests.support.models import ModelSizes, build_model",
        "model = build_model('qwen3_moe', ModelSizes(layers=1), experts='diffulex')",
        "result = model.config._experts_implementation",
    ]
    assert outcome(*lines) == "diffulex"


def test_the_hook_leaves_when_its_work_is_done():
    """No finder of ours stays in the way of other imports."""
    lines = [
        "import diffulex",
        "waiting = [getattr(finder, 'name', None) for finder in sys.meta_path]",
        "import transformers.integrations.moe, torch._inductor.compile_fx",
        "left = [getattr(finder, 'name', None) for finder in sys.meta_path]",
        "names = ('transformers.integrations.moe', 'torch._inductor.compile_fx')",
        "result = [[name in waiting for name in names], [name in left for name in names]]",
    ]
    assert outcome(*lines) == [[True, True], [False, False]]
