"""What a block computes for a token, whatever the batch: one text of its kernels, one graph, the same bits."""

import contextlib
import dataclasses
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import diffulex  # noqa: F401  the passes, and the guards on the switch
from lowering.errors import ReasonCode
from lowering.inductor import offline
from lowering.inductor.fake_device import fake_gpu
from lowering.inductor.offline import compile_kernels, offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.state import batch_invariant
from tests.support.interpreter import interpreter
from tests.support.invariance import SHAPES, Layer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

ops = torch.ops.diffulex
TOKENS = (1, 4, 16, 64, 257, 1024)
STAGES = ("moe_route", "moe_expert")  # sorting has integers alone


def generated(layer, tensors, *, on=True, dynamic=False):
    """The code for a faked H100, and the decisions."""
    register_lowerings()
    torch._dynamo.reset()
    if dynamic:
        torch._dynamo.mark_dynamic(tensors[0], 0)
    with batch_invariant() if on else contextlib.nullcontext(), collect() as decisions:
        code = offline_source(layer, tensors)
    return code, decisions


def texts(code):
    """The kernels of router and experts, without their names, the number of rows, and where the next rows begin."""
    found = []
    for kernel in code.kernels:
        if any(stage in kernel.name for stage in STAGES) and "moe_combine" not in kernel.name:
            text = re.sub(r"triton_tem_\w+|, ks0(?=\):)", "", kernel.function)
            text = re.sub(r"(NUM_(TOKENS|ROWS)|SHARED_T) = .*", r"\1", text)
            text = re.sub(r"xindex = .*|(?<=out_ptr0 \+ \(tl.broadcast_to\()[^,]*", "", text)
            found += [text, re.search(r"num_warps=\d+|'num_warps': \d+", kernel.source)[0]]
    calls = re.findall(r"_expert_gemm_specialized\.default\([^']*('.*\])\)", code.wrapper_source)
    return found + calls  # by its activation, its stage and its schedule


def layer_texts(name, tokens, *, small=False, **how):
    layer = Layer(name)
    sizes = layer.small if small else None
    return texts(generated(layer, layer.inputs(tokens, sizes=sizes, device="meta"), **how)[0])


@pytest.mark.parametrize("name", SHAPES)
def test_one_text_for_every_number_of_tokens(name):
    wanted = layer_texts(name, 9, dynamic=True)
    assert len(wanted) == (2 * 4 if name == "deepseek" else 2 * 2 + 2), (
        "part and sum of the router, up, down, with warps"
    )
    for tokens in TOKENS:
        assert layer_texts(name, tokens) == wanted, f"{tokens} tokens"


@pytest.mark.parametrize("dynamic", [False, True])
def test_sums_of_wide_experts_are_not_cut(dynamic):
    """As they are elsewhere, by the rows of all experts."""
    layer = Layer("wide")

    def cut(on):
        code, _ = generated(layer, layer.inputs(16384, device="meta"), on=on, dynamic=dynamic)
        return re.findall(r"_expert_gemm_specialized\.default\(.*([01])\]\)", code.wrapper_source)

    assert (cut(on=True), cut(on=False)) == (["0", "0"], ["0", "1"])


def test_few_slots_are_not_sorted_by_the_first_gemm():
    """With a schedule that could: its text would be another one."""
    wanted = layer_texts("qwen3", 9, small=True, dynamic=True)
    assert not any("w_desc" in text for text in wanted)
    assert layer_texts("qwen3", 1, small=True) == layer_texts("qwen3", 8, small=True) == wanted


@pytest.mark.parametrize("name", SHAPES)
def test_in_the_default_mode_texts_follow_from_the_number(name):
    """The control."""
    found = {tokens: layer_texts(name, tokens, on=False) for tokens in (1, 64, 1024)}
    assert found[1] != found[64] != found[1024]


class Graphs:
    """Compiles for a faked H100 and counts; nothing runs: the result is an empty tensor."""

    def __init__(self, name):
        self.layer, self.codes = Layer(name), []
        self.compiled = torch.compile(self.layer, backend=self.backend, fullgraph=True)

    def backend(self, graph, examples):
        from torch._inductor.compile_fx import compile_fx

        try:
            compile_fx(graph, examples)
        except offline._Captured as captured:
            self.codes.append(captured.wrapper_source)
        return lambda *args: (torch.empty(1, device="meta"),) * 2

    def __call__(self, *counts):
        with fake_gpu(), offline._quiet_compiler(None), torch.no_grad():
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            for tokens in counts:
                fakes = offline.fake_cuda(self.layer.inputs(tokens, device="meta"), mode=mode)
                torch._dynamo.mark_dynamic(fakes[0], 0)
                self.compiled(*fakes)
        return len(self.codes)


def test_one_graph_for_every_number_of_tokens():
    """And, the control, more without: no guard on the number of tokens is needed."""
    register_lowerings()
    torch._dynamo.reset()
    counts = (9, 2, 64, 513, 20_000)
    graphs = Graphs("qwen3")
    with batch_invariant():
        assert graphs(*counts) == 1
    assert graphs(*counts) > 2
    with batch_invariant():
        again = len(graphs.codes)
        assert graphs(*counts) == again
    torch._dynamo.reset()


def test_any_number_of_tokens_beyond_the_default_bound():
    """The router's product keeps kernels of its own, and a shared expert stays in the experts'."""
    layer = Layer("deepseek")
    code, decisions = generated(layer, layer.inputs(4096, device="meta"))
    assert code.extern_calls == ()
    assert not [d for d in decisions if d.subject == "batch_invariance"]


def test_no_expert_kernel_spills():
    """A shared expert among the tiles costs registers, and these are more than it has where tokens are few."""
    layer = Layer("deepseek")
    code, _ = generated(layer, layer.inputs(9, device="meta"), dynamic=True)
    ours = tuple(kernel for kernel in code.kernels if "moe_expert" in kernel.name)
    facts = compile_kernels(dataclasses.replace(code, kernels=ours))
    assert len(facts) == 2 and all(kernel.spill_bytes == 0 for kernel in facts), facts


def test_what_kernels_of_its_own_cannot_do_is_told():
    layer = Layer("deepseek")
    tensors = layer.inputs(4, device="meta")
    tensors = [tensor.to(torch.float32) for tensor in tensors]
    tensors[5] = tensors[5].t().contiguous().t()
    _, decisions = generated(layer, tensors)
    told = {d.outcome: d.reason.code for d in decisions if d.subject == "batch_invariance"}
    assert told == {"the router's product": ReasonCode.DTYPE, "the shared expert's up products": ReasonCode.LAYOUT}
    _, decisions = generated(layer, tensors, on=False)
    assert not [d for d in decisions if d.subject == "batch_invariance"]


def test_what_it_costs():
    layer = Layer("qwen3")
    for on in (True, False):
        _, decisions = generated(layer, layer.inputs(4, device="meta"), on=on)
        costs = [d.cost for d in decisions if d.cost is not None]
        assert len(costs) == 2
        assert all((cost.usual_us is not None) == on for cost in costs)
    _, decisions = generated(layer, layer.inputs(4, device="meta"))
    assert all(d.cost.usual_us < d.cost.predicted_us for d in decisions if d.cost is not None)


# Bits


@pytest.fixture(scope="module", params=["qwen3", "deepseek"])
def batches(request):
    """A layer in fp16, a batch of 64, and a function that computes rows of it in the interpreter."""
    layer = Layer(request.param)
    tensors = [tensor.half() for tensor in layer.inputs(64, sizes=layer.small)]
    many, _ = generated(layer, tensors, dynamic=True)
    one, _ = generated(layer, [tensors[0][:1], *tensors[1:]])

    def run(rows_TH, code=None):
        """[T, H + K]: the outputs side by side."""
        code = code or (one if len(rows_TH) == 1 else many)
        out_TH, weights_TK = interpreter().graph(code, layer, [rows_TH, *tensors[1:]], in_order=True)
        return torch.cat((out_TH.float(), weights_TK), 1)

    return layer, tensors, run


def test_rows_alone_in_pairs_and_permuted(batches):
    _, (hidden_TH, *_), run = batches
    whole = run(hidden_TH)
    for row in (0, 17, 63):
        assert torch.equal(run(hidden_TH[row : row + 1])[0], whole[row])
    for pair in ([0, 1], [62, 5]):
        assert torch.equal(run(hidden_TH[pair]), whole[pair])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(hidden_TH[order]), whole[order])


def test_the_same_rows_among_others(batches):
    _, (hidden_TH, *_), run = batches
    others_TH = torch.cat((hidden_TH[:20], 3 * torch.flip(hidden_TH[20:], (1,))))
    assert torch.equal(run(others_TH)[:20], run(hidden_TH)[:20])


def test_static_numbers_of_tokens(batches):
    layer, (hidden_TH, *weights), run = batches
    code, _ = generated(layer, [hidden_TH[:16], *weights])
    assert torch.equal(run(hidden_TH[:16], code), run(hidden_TH)[:16])


def experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, w13_EJH.shape[0])
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, ids_TK.shape[1], "swiglu")
    return ops.moe_combine(ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1), weights_TK)


@pytest.mark.parametrize("on", [True, False])
def test_what_is_fused_behind_the_sum_reads_it_rounded(on):
    """Else a residual behind it would read other bits where it is fused, and fusion may depend on sizes."""

    def residual(*tensors):
        return tensors[0] + experts(*tensors)

    sizes = [(8, 64), (8, 2), (8, 2), (4, 64, 64), (4, 64, 32)]
    hidden_TH, ids_TK, weights_TK, *weights = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    code, _ = generated(residual, [hidden_TH, ids_TK.int(), weights_TK.float(), *weights], on=on)
    assert (".to(tl.bfloat16)" in code.kernel("moe_combine").function) == on


@pytest.mark.parametrize("on", [True, False])
def test_one_token_and_many_in_code_for_each(on):
    """In fp32, where no rounding hides a difference; off, the control, they differ."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(256, 320), (256, 2), (6, 320, 320), (6, 320, 160)]
    hidden_TH, weights_TK, w13_EJH, w2_EHI = (torch.randn(size, generator=generator) for size in sizes)
    ids_TK = torch.randint(0, 6, (256, 2), generator=generator, dtype=torch.int32)
    found = []
    for count in (1, 256):
        tensors = [hidden_TH[:count], ids_TK[:count], weights_TK[:count], w13_EJH / 18, w2_EHI / 13]
        code, _ = generated(experts, tensors, on=on)
        found.append(interpreter().graph(code, experts, tensors, in_order=True)[0][0])
    assert torch.equal(*found) == on
