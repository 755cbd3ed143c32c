"""Kernels that Inductor's C++ wrapper launches (`cpp_wrapper`, AOTInductor): memory for descriptors, early begin."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from lowering.errors import ReasonCode
from lowering.inductor import _compat
from lowering.inductor.offline import offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from tests.support.blocks import Block
from tests.support.inputs import BlockForm

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

MANY = BlockForm(tokens=4096, top_k=4, experts=8, hidden=1024, width=512, dtype=torch.bfloat16)

AS_AOTINDUCTOR = {"cpp_wrapper": True, "triton.autotune_at_compile_time": True}


class Generated(BaseException):
    """Carries the kernels' text out of the compiler, ahead of the run that compiles them on the device."""


@pytest.fixture
def generate(monkeypatch):
    def stop(wrapper):
        raise Generated(wrapper.kernel_autotune_defs.getvalue())

    def run(form, **options):
        register_lowerings()
        torch._dynamo.reset()
        function = Block(form)
        with collect() as decisions, pytest.raises(Generated) as raised:
            offline_source(function, function.inputs(), options={**AS_AOTINDUCTOR, **options})
        return str(raised.value), {found.subject: found for found in decisions if found.stage == "lower"}

    monkeypatch.setattr(PythonWrapperCodegen, "generate_and_run_autotune_block", stop)
    return run


@pytest.mark.parametrize("counts", [True, False])
def test_descriptors_where_the_wrapper_lends_memory_to_every_program(generate, counts, monkeypatch):
    monkeypatch.setattr(_compat, "_cpp_wrapper_counts_programs", lambda: counts)
    text, lowered = generate(MANY)
    assert ("make_tensor_descriptor" in text) == counts
    for stage in ("moe_expert_up", "moe_expert_down"):
        assert lowered[stage].outcome.startswith("triton") and lowered[stage].kernel_refusal is None
        assert (lowered[stage].reason and lowered[stage].reason.code) == (None if counts else ReasonCode.WRAPPER)


def test_this_torch_is_known():
    """2.11 lends memory for one program, 2.13 for all of them."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version == (2, 12):
        pytest.skip("which of the two 2.12 does was not looked up; it is detected, and both ways are tested above")
    assert _compat._cpp_wrapper_counts_programs() == (version > (2, 12))


def test_a_python_wrapper_lends_memory_to_every_program(monkeypatch):
    monkeypatch.setattr(_compat, "_cpp_wrapper_counts_programs", lambda: False)
    register_lowerings()
    torch._dynamo.reset()
    function = Block(MANY)
    assert "make_tensor_descriptor" in offline_source(function, function.inputs()).kernel("expert_up").function


def test_cuda_graphs_that_the_wrapper_has_none_of_begin_nothing_early(generate):
    _, lowered = generate(MANY.replace(tokens=4), **{"triton.cudagraphs": True})
    assert not [found.outcome for found in lowered.values() if "begins early" in found.outcome]
