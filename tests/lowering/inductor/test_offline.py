"""Code generated for a faked H100: what is in it, what ptxas says, that it computes the right thing, what is left."""

import dataclasses

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lowering.errors import MoEOptionError, MoEUnsupportedError
from lowering.inductor.fresh import fresh_caller
from lowering.inductor.offline import OfflineCode, OfflineKernel, compile_kernels, offline_source
from lowering.state import disabled
from tests.lowering.inductor.test_fake_device import changed, snapshot
from tests.support.interpreter import InterpreterError, interpreter
from tests.support.offline_matmul import matmul

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")


def softmax_of_rows(x_TH, index_N):
    return torch.softmax(x_TH[index_N] * 2, -1)


def rows(tokens=8, hidden=16, dtype=torch.float32):
    return [torch.randn(tokens, hidden, dtype=dtype), torch.arange(5) % tokens]


def scaled(x_TK, w_KN, scale_N):
    return torch.relu(matmul(x_TK, w_KN)) * scale_N + 1


def factors(tokens=96, depth=64, width=128, dtype=torch.bfloat16):
    torch.manual_seed(tokens)
    return [torch.randn(size, dtype=dtype) for size in ((tokens, depth), (depth, width), (width,))]


@pytest.fixture(scope="module")
def template_code():
    return offline_source(scaled, factors(depth=256))


# What is in the code


def test_neighbours_are_one_kernel():
    code = offline_source(softmax_of_rows, rows())
    assert len(code.kernels) == len(code.calls) == 1 and code.extern_calls == ()
    assert code.calls == (code.kernels[0].name,) and code.inputs == ("args[0]", "args[1]")
    assert code.kernels[0].function.startswith("@triton.jit\ndef triton_")
    assert "arch" not in code.kernels[0].function and "cc=90" in code.kernels[0].source


def test_library_calls_are_listed():
    code = offline_source(lambda x_TH: torch.topk(x_TH @ x_TH.T + 1, 2).values, rows()[:1])
    assert code.extern_calls == ("extern_kernels.mm", "torch.ops.aten.topk.default")
    assert len(code.calls) == 1


def test_a_template_takes_its_neighbours(template_code):
    assert template_code.extern_calls == ()
    assert "tl.dot" in template_code.kernel("matmul").function
    assert len(template_code.kernels) == 1 and "tmp" in template_code.kernels[0].function


def test_of_several_candidates_the_first_is_shown(template_code):
    assert "BLOCK : tl.constexpr = 64" in template_code.kernel("matmul").function


def test_marked_dimensions_stay_symbolic():
    x_TK, *others = factors()
    torch._dynamo.mark_dynamic(x_TK, 0)
    code = offline_source(scaled, [x_TK, *others])
    assert code.inputs == ("args[0].size()[0]", "args[0]", "args[1]", "args[2]")
    assert "ks0" in code.kernel("matmul").function
    static = offline_source(scaled, factors(tokens=32))  # what another call marked is forgotten
    assert "ks0" not in static.kernel("matmul").function


def test_keyword_inputs_and_constants():
    code = offline_source(lambda *, x_TH, k: x_TH.sin() * k, {"x_TH": torch.randn(4, 8), "k": 3})
    assert code.inputs == ("kwargs['x_TH']",) and "3.0" in code.kernels[0].function


class Layer(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)
        self.tied = self.linear
        self.register_buffer("shift", torch.ones(hidden))

    def forward(self, x_TH):
        return self.tied(self.linear(x_TH)) + self.shift


def test_a_module_is_mirrored_without_its_weights():
    layer = Layer()
    before = {name: (id(value), value.device) for name, value in layer.state_dict(keep_vars=True).items()}
    code = offline_source(layer, rows()[:1])
    assert before == {name: (id(value), value.device) for name, value in layer.state_dict(keep_vars=True).items()}
    assert sum("weight" in name for name in code.inputs) == 1  # tied weights are one input
    assert "target._buffers['shift']" in code.inputs
    with torch.device("meta"):
        huge = Layer(hidden=2**20)  # 4 TiB, were it real
    assert offline_source(huge, [torch.empty(4, 2**20, device="meta")]).extern_calls == code.extern_calls
    assert offline_source(torch.compile(layer), rows()[:1]).inputs == code.inputs


def test_a_dtype_can_be_asked_for():
    code = offline_source(Layer(), rows()[:1], dtype=torch.bfloat16)
    assert "torch.bfloat16" in code.wrapper_source and "fp32" in code.kernels[-1].source  # the buffer keeps float32


# What ptxas says


def test_facts_of_a_tensor_core_kernel(template_code):
    (facts,) = compile_kernels(template_code)
    assert facts.name == template_code.kernels[0].name
    assert 0 < facts.registers <= 255 and facts.warps == 4 and facts.stages == 3
    assert facts.wgmma > 0 and facts.cp_async > 0 and facts.tma == 0
    assert facts.spill_bytes == 0
    assert 2 * 64 * 64 * 2 <= facts.shared_bytes <= 227 * 1024  # at least one stage of both operands
    assert facts.compile_seconds > 0 and facts.configs == 1


def test_spills_are_seen():
    """An accumulator of 128 x 128 float32 in two warps needs 256 registers a thread."""
    code = offline_source(scaled, factors())
    kernel = code.kernel("matmul")
    source = kernel.source.replace("BLOCK : tl.constexpr = 64", "BLOCK : tl.constexpr = 128")
    source = source.replace("num_warps=4", "num_warps=2")
    assert source != kernel.source
    (facts,) = compile_kernels(dataclasses.replace(code, kernels=(OfflineKernel(kernel.name, source),)))
    assert facts.warps == 2 and facts.spill_bytes > 0 and facts.stack_bytes > 0


def test_every_configuration_can_be_compiled():
    code = offline_source(lambda x_TH: x_TH.sum(-1), [torch.randn(64, 96)])
    (first,), every = compile_kernels(code), compile_kernels(code, all_configs=True)
    assert len(every) == first.configs > 1 and every[0].config == first.config
    assert len({facts.config for facts in every} | {facts.warps for facts in every}) > 1


# What it computes


@settings(max_examples=5, phases=(Phase.explicit, Phase.generate))
@given(tokens=st.integers(2, 70), seed=st.integers(0, 99))
def test_a_generated_graph_computes_what_eager_does(symbolic_code, tokens, seed):
    torch.manual_seed(seed)
    args = factors(tokens, 16, 32, torch.float32)
    (out,) = interpreter().graph(symbolic_code, scaled, args)
    torch.testing.assert_close(out, scaled(*args), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def symbolic_code():
    x_TK, *others = factors(20, 16, 32, torch.float32)
    torch._dynamo.mark_dynamic(x_TK, 0)
    return offline_source(scaled, [x_TK, *others])


def test_a_generated_kernel_runs_alone(symbolic_code):
    x_TK, w_KN, scale_N = factors(40, 16, 32, torch.float32)
    out = torch.full((40, 32), torch.nan)
    grid = (1, 1, 1)
    arguments = [x_TK, w_KN, scale_N, out, 40, *grid]
    assert symbolic_code.kernel("matmul").function.count("ks0") > 1
    *_, after, _, _, _, _ = interpreter().kernel(symbolic_code.kernel("matmul"), arguments)
    torch.testing.assert_close(after, scaled(x_TK, w_KN, scale_N), rtol=1e-5, atol=1e-5)


PLAIN_KERNEL = """
import triton
import triton.language as tl

@triton.jit
def _double(x_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, at < size) * 2, at < size)
"""


def test_plain_kernels_run_too_and_their_errors_are_told():
    x_N = torch.arange(5.0)
    after, size = interpreter().kernel(PLAIN_KERNEL, [x_N, 5], grid=(3,), constants={"BLOCK": 2})
    assert after.tolist() == [0, 2, 4, 6, 8] and size == 5 and x_N[1] == 1
    with pytest.raises(InterpreterError, match="no_such_name"):
        interpreter().kernel(
            PLAIN_KERNEL.replace("* 2,", "* no_such_name,"), [x_N, 5], grid=(3,), constants={"BLOCK": 2}
        )
    assert interpreter().kernel(PLAIN_KERNEL, [x_N, 5], grid=(3,), constants={"BLOCK": 2})[0][4] == 8


# What is refused, and what is left


def test_what_cannot_be_compiled_raises_the_compilers_error():
    def breaks(x_TH):
        torch._dynamo.graph_break()
        return x_TH + 1

    before = snapshot()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        offline_source(breaks, rows()[:1])
    with pytest.raises(MoEUnsupportedError, match="empty graph"):
        offline_source(lambda x_TH: 1, rows()[:1])
    with pytest.raises(MoEUnsupportedError, match="sparse"):
        offline_source(torch.sin, [torch.eye(3).to_sparse()])
    assert not changed(before, snapshot())


def test_names_that_do_not_exist(template_code):
    with pytest.raises(MoEOptionError, match="got triton_tem_fused_add_matmul_mul_relu_0"):
        template_code.kernel("no such kernel")
    with pytest.raises(MoEUnsupportedError, match="Used"):
        compile_kernels_log("ptxas said nothing")


def compile_kernels_log(log):
    from lowering.inductor.offline import _total

    return _total(r"Used (\d+) registers", log)


def test_real_compiles_in_the_same_process_are_undisturbed():
    args = factors(12, 16, 32, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fresh_caller(scaled), backend=counter)
    compiled(*args)
    before, configuration = snapshot(), torch._inductor.config.save_config_portable()
    offline_source(scaled, args)
    assert not changed(before, snapshot())
    assert torch._inductor.config.save_config_portable() == configuration
    torch.testing.assert_close(compiled(*args), scaled(*args))
    assert counter.frame_count == 1
    fresh = torch.compile(fresh_caller(scaled))
    torch.testing.assert_close(fresh(*args), scaled(*args))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_stock_transformers_model(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        attn_implementation=attention,
        experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config).eval()
    ids_BT = torch.zeros(2, 17, dtype=torch.int64)
    torch._dynamo.mark_dynamic(ids_BT, 1)
    with disabled():
        code = offline_source(model, {"input_ids": ids_BT, "use_cache": False}, dtype=torch.bfloat16)
    assert isinstance(code, OfflineCode)
    assert code.extern_calls.count("extern_kernels._grouped_mm") == 2 * config.num_hidden_layers
    attended = sum("_attention" in call for call in code.extern_calls)
    assert attended == (config.num_hidden_layers if attention == "sdpa" else 0)
    assert "kwargs['input_ids'].size()[1]" in code.inputs
