"""What `import diffulex` does to the compiler, in fresh processes: nothing is imported early, nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

from lowering.inductor.identity import identity

ROOT = Path(__file__).resolve().parents[3]

PROBE = """
import contextlib, json, sys, torch
{before}
import diffulex
from lowering.inductor.install import install
from lowering.ops import _library
install()
names = ("lowering.inductor.lowerings", "torch._inductor.config", "torch._inductor.lowering", "triton")
state = dict(
    hooks=len(_library.TRACE_HOOKS),
    early=[name for name in names if name in sys.modules],
    tag=torch.compiler.config.cache_key_tag,
)
{after}
seen = globals().get("seen", [])

def function(slots, weights):
    return torch.ops.diffulex.moe_combine(slots, weights)

with torch.no_grad():
    args = (torch.randn(6, 4), torch.rand(3, 2))
    with {around}:
        out = torch.compile(function, options={options})(*args)
state.update(
    equal=torch.equal(out, function(*args)),
    lowered="lowering.inductor.lowerings" in sys.modules and "lowering.inductor.route_lowerings" in sys.modules,
    seen=seen,
    inside=type(torch._inductor.config.joint_custom_pre_pass).__name__,
)
print(json.dumps(state))
"""


def probe(before="", after="", options="{}", around="contextlib.nullcontext()"):
    """What a fresh process says after the import and one compilation.

    `before`, `after`: lines around the import; `around`: the context of the compilation.
    """
    code = PROBE.format(before=before, after=after, options=options, around=around)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


SET_PASS = """
import torch._inductor.config
seen = []
torch._inductor.config.joint_custom_pre_pass = lambda graph: seen.append(len(list(graph.nodes)))
"""


def test_a_fresh_process():
    state = probe()
    assert state["hooks"] == 1
    assert state["early"] == []
    assert state["tag"] == f"diffulex-{identity()}"
    assert (state["equal"], state["lowered"], state["inside"]) == (True, True, "MoEPasses")


def test_what_was_set_before_the_import_is_kept():
    state = probe("torch.compiler.config.cache_key_tag = 'mine'\n" + SET_PASS)
    assert state["tag"] == f"mine+diffulex-{identity()}"
    assert len(state["seen"]) == 1
    assert (state["equal"], state["inside"]) == (True, "MoEPasses")


def test_what_is_set_after_the_import_is_kept():
    state = probe(after=SET_PASS)
    assert len(state["seen"]) == 1
    assert (state["equal"], state["inside"]) == (True, "MoEPasses")


def test_inductor_may_be_loaded_before_the_import():
    state = probe("import torch._inductor.compile_fx")
    assert (state["equal"], state["lowered"], state["inside"]) == (True, True, "MoEPasses")


def test_the_pass_may_be_imported_before_inductor():
    state = probe(after="import lowering.inductor.passes")
    assert (state["equal"], state["lowered"], state["inside"]) == (True, True, "MoEPasses")


def test_lowerings_are_there_when_options_replace_the_pass():
    """The cache key keeps the tag then, which holds the fingerprint as well."""
    state = probe(options="{'joint_custom_pre_pass': lambda graph: seen.append(1)}")
    assert state["seen"] == [1]
    assert (state["equal"], state["lowered"]) == (True, True)


def test_a_patch_around_the_first_compilation_leaves_the_pass():
    """What `config.patch` saves and restores has to be our pass, before anything was compiled too."""
    state = probe(
        after="import torch._inductor.config as config",
        around="config.patch(joint_custom_pre_pass=lambda graph: seen.append(1))",
    )
    assert state["seen"] == [1]
    assert (state["equal"], state["lowered"], state["inside"]) == (True, True, "MoEPasses")
