"""What a rank of a layer with all tokens on all ranks leaves alone, slots of other ranks' experts: for a faked H100."""

from unittest import mock

import pytest
import torch

from diffulex.moe.layer import tp_impl
from diffulex.moe.layer.experts import slots_by_ops
from lowering import ops
from lowering.inductor.offline import offline_source
from lowering.inductor.passes import register_lowerings
from lowering.reference.moe_block import ExpertWeights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

T, K, H, WIDTH, EXPERTS, HELD = 4096, 4, 256, 128, 16, 8


class Layer(tp_impl.TPFusedMoE):
    """One of two ranks, without the other one, and with tables and weights that are given."""

    def __init__(self, *, on_input=False):
        torch.nn.Module.__init__(self)
        self.num_experts, self.owned_experts = EXPERTS, tuple(range(HELD))
        self._group, self._slots, self._weight_on_input = "", slots_by_ops, on_input

    @property
    def expert_weights(self):
        return ExpertWeights(self.w13, self.w2, None, None, "silu(g) * u", False)

    def call(self, hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, table=None):
        """This rank's sum; without a table, as of a rank that has slices of all experts."""
        self.w13, self.w2, self._row_of_expert = w13_EJH, w2_EHI, table
        return self.run_experts(hidden_TH, weights_TK, ids_TK)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("copy_to_ranks", "sum_of_ranks"):
        monkeypatch.setattr(tp_impl, name, lambda tensor, group: tensor)


def inputs_of(tokens, *, held, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    drawn = {"generator": generator, "dtype": dtype}
    ids_TK = torch.randint(-1, EXPERTS + 1, (tokens, K), generator=generator)
    weights = torch.randn(held, 2 * WIDTH, H, **drawn) / 16, torch.randn(held, H, WIDTH, **drawn) / 11
    return [torch.randn(tokens, H, **drawn), ids_TK, torch.rand(tokens, K, generator=generator), *weights]


def table_of():
    return torch.tensor([*range(HELD), *[-1] * (EXPERTS - HELD + 1)], dtype=torch.int32)


def zeroed(code):
    """Which kernels write zeros in the places of slots of no expert here, and whether all sums skip such slots."""
    gemms = {kernel.name: kernel.function for kernel in code.kernels if "moe_expert" in kernel.name}
    sums = [kernel.function for kernel in code.kernels if "moe_combine" in kernel.name]
    assert len(gemms) == 2 and sums
    writing = [name for name, text in gemms.items() if "no expert: zeros" in text or "if start >= end" in text]
    return writing, all("other=0.0" in text for text in sums)


@pytest.mark.parametrize("on_input", [False, True])
def test_slots_of_other_ranks_are_neither_written_nor_read(on_input):
    register_lowerings()
    layer = Layer(on_input=on_input)
    with torch.no_grad():
        assert zeroed(offline_source(layer.call, [*inputs_of(T, held=HELD), table_of()])) == ([], True)
        writing, skipping = zeroed(offline_source(layer.call, inputs_of(T, held=EXPERTS)))
    assert len(writing) == 1 and not skipping


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_those_over_all_slots(dtype):
    given = inputs_of(40, held=HELD, dtype=dtype)
    plain = lambda slots, weights, *_: ops.moe_combine(slots, weights)  # noqa: E731
    found = Layer().call(*given, table_of())
    with mock.patch.object(tp_impl, "ops", mock.Mock(moe_combine=plain)):
        assert torch.equal(found, Layer().call(*given, table_of())) and found.any()
