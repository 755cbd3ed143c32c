"""Kernels that Inductor's C++ wrapper launches (`cpp_wrapper`, AOTInductor): memory for descriptors, early begin."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._subclasses.fake_tensor import FakeTensorMode

from lowering.errors import ReasonCode
from lowering.inductor import _compat
from lowering.inductor.fake_device import fake_gpu
from lowering.inductor.offline import _quiet_compiler, fake_cuda, offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from tests.support.blocks import Block
from tests.support.inputs import BlockForm

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

MANY = BlockForm(tokens=4096, top_k=4, experts=8, hidden=1024, width=512, dtype=torch.bfloat16)

AS_AOTINDUCTOR = {"cpp_wrapper": True, "triton.autotune_at_compile_time": True}


class Generated(BaseException):
    """Carries the kernels' text and the largest values of sizes out of the compiler, ahead of the run on the device."""

    def __init__(self, text, bounds):
        super().__init__(text)
        self.bounds = bounds


@pytest.fixture
def generated(monkeypatch):
    """The compiler raises `Generated` where it would run what it generated."""

    def stop(wrapper):
        ranges = _compat.V.graph.sizevars.shape_env.var_to_range.values()
        raise Generated(wrapper.kernel_autotune_defs.getvalue(), {int(found.upper) for found in ranges})

    monkeypatch.setattr(PythonWrapperCodegen, "generate_and_run_autotune_block", stop)


@pytest.fixture
def generate(generated):
    def run(form, **options):
        register_lowerings()
        torch._dynamo.reset()
        function = Block(form)
        with collect() as decisions, pytest.raises(Generated) as raised:
            offline_source(function, function.inputs(), options={**AS_AOTINDUCTOR, **options})
        return str(raised.value), {found.subject: found for found in decisions if found.stage == "lower"}

    return run


@pytest.mark.parametrize("counts", [True, False])
def test_descriptors_where_the_wrapper_lends_memory_to_every_program(generate, counts, monkeypatch):
    """And no specialised warps, which the plan wants here."""
    monkeypatch.setattr(_compat, "_cpp_wrapper_counts_programs", lambda: counts)
    text, lowered = generate(MANY)
    assert ("make_tensor_descriptor" in text) == counts
    for stage in ("moe_expert_up", "moe_expert_down"):
        assert lowered[stage].outcome.startswith("triton") and lowered[stage].kernel_refusal is None
        assert lowered[stage].reason.code is ReasonCode.WRAPPER
        assert ("Gluon" in lowered[stage].reason.detail) == counts


def test_slots_of_one_token_are_read_where_they_stand(generate):
    text, lowered = generate(BlockForm(tokens=1, top_k=2, experts=8, hidden=64, width=32, dtype=torch.bfloat16))
    assert lowered["moe_dispatch"].outcome.startswith("nowhere")
    assert "tl.load(IDS + slot)" in text and "_row_of_expert(w_row, IDS + 1" in text and "ORDER" not in text


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
    function = Block(MANY.replace(bias=True))  # which specialised warps do not know
    assert "make_tensor_descriptor" in offline_source(function, function.inputs()).kernel("expert_up").function


def test_cuda_graphs_that_the_wrapper_has_none_of_begin_nothing_early(generate):
    _, lowered = generate(MANY.replace(tokens=4), **{"triton.cudagraphs": True})
    assert not [found.outcome for found in lowered.values() if "begins early" in found.outcome]


class Positions(torch.nn.Module):
    """A block behind a sum along all tokens, which Inductor computes in one tile where it knows that they are few."""

    def forward(self, hidden_TH, ids_TK, *rest):
        positions_T = torch.cumsum(ids_TK[:, 0] > 0, dim=0)
        return Block(FEW)(hidden_TH + positions_T[:, None].to(hidden_TH.dtype), ids_TK, *rest)


FEW = MANY.replace(tokens=16, experts=32)
AT_MOST = 4096  # tokens of the exported program, beyond the first range of rows


def test_a_package_is_for_all_sizes_of_its_program(generated):
    """It checks no guards: a range of rows that it were made for would make kernels that are not ours wrong beyond."""
    register_lowerings()
    tokens = torch.export.Dim("tokens", min=2, max=AT_MOST)
    with fake_gpu(), _quiet_compiler(AS_AOTINDUCTOR), torch.no_grad():
        inputs = fake_cuda(tuple(Block(FEW).inputs()), mode=FakeTensorMode(allow_non_fake_inputs=True))
        hidden, ids, *rest = ({0: tokens} if tensor.shape[0] == FEW.tokens else None for tensor in inputs)
        shapes = {"hidden_TH": hidden, "ids_TK": ids, "rest": tuple(rest)}
        program = torch.export.export(Positions(), inputs, dynamic_shapes=shapes).module()
        with pytest.raises(Generated) as raised:
            torch._inductor.aot_compile(program, inputs)
    assert raised.value.bounds == {AT_MOST}
    scans = re.findall(r"def triton_(\w+?)_fused_\w*cumsum", str(raised.value))
    assert scans == ["red"], "one loop over all tokens"
    assert re.search(r"def triton_tem_\w*moe_expert_up", str(raised.value))
