"""On a real GPU: no wait for the device, no copy off it, CUDA graphs of every regime, memory as it is stated here.

What the compiled expert stage of N = T * K rows needs beside its inputs, in inference, in 16 bits: the rows between its
GEMMs, N * I, and those behind the second one, N * H, at once; then these and the sums, T * H. The order of slots and
their tokens, 2 * N numbers of 32 bits, and E + 1 offsets come on top.
"""

import pytest
import torch

import diffulex  # noqa: F401  the passes
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from tests.support.invariance import Layer
from tests.support.profile import gpu_kernels

pytestmark = pytest.mark.gpu

ops = torch.ops.diffulex
# one token, slots sorted by the first GEMM, plain schedules; the last one for descriptors, and two kernels that sort
REGIMES = (0, 1, 8, 64, 512, 4096)
NAMES = ("qwen3", "mixtral", "deepseek")
COMPILED = (("qwen3", "compiled"), ("deepseek", "compiled"))
E, K, H, WIDTH = 32, 4, 1024, 512


@pytest.fixture(autouse=True)
def _ready():
    register_lowerings()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def syncs_are_errors():
    """What follows `start()` may not wait for the device."""

    def start():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


def compiled(layer, **options):
    return torch.compile(layer, fullgraph=True, **options)


def trained(call, tensors):
    """The loss and all gradients, nothing of it read by the host."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out_TH, weights_TK = call(*leaves)
    loss = out_TH.float().square().mean() + weights_TK.square().mean()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss, *(grad for grad in grads if grad is not None)]


HOW = {"eager": lambda layer: layer, "compiled": lambda layer: compiled(layer, dynamic=True)}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", NAMES)
def test_nobody_waits_for_the_device(name, how, syncs_are_errors, record_property):
    """Forward, and forward with backward, for token counts that need no new code."""
    layer = Layer(name)
    call, batches = HOW[how](layer), [layer.inputs(tokens, device="cuda") for tokens in (64, 65, 500)]
    for tensors in batches:  # compiles, and loads what is loaded once
        trained(call, tensors)
        with torch.no_grad():
            call(*tensors)
    syncs_are_errors()
    for tensors in batches:
        trained(call, tensors)
        with torch.no_grad():
            call(*tensors)
    torch.cuda.set_sync_debug_mode("default")
    record_property("waits", 0)  # else the call would have raised


def test_a_wait_is_seen(syncs_are_errors):
    """The control."""
    tensor = torch.ones(1, device="cuda")
    syncs_are_errors()
    with pytest.raises(RuntimeError, match="synchroniz"):
        tensor.item()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_copied_to_the_host(name, how, record_property):
    layer = Layer(name)
    call, tensors = HOW[how](layer), layer.inputs(257, device="cuda")

    def both():
        with torch.no_grad():
            call(*tensors)
        trained(call, tensors)

    both()
    kernels = gpu_kernels(both)
    copies = sum(count for kernel, count in kernels.items() if "DtoH" in kernel)
    record_property("copies_to_the_host", copies)
    assert sum(kernels.values()) > 10 and copies == 0, kernels


def test_a_copy_is_seen():
    """The control."""
    tensor = torch.ones(3, device="cuda")
    assert any("DtoH" in kernel for kernel in gpu_kernels(lambda: tensor.cpu()))


@pytest.mark.parametrize("tokens", REGIMES)
@pytest.mark.parametrize(("name", "how"), [*((name, "eager") for name in NAMES), *COMPILED])
def test_cuda_graphs_take_every_regime(name, tokens, how, record_property):
    """Captured once; replayed with other tokens, it gives the bits of a call."""
    layer = Layer(name)
    call = compiled(layer, dynamic=False) if how == "compiled" else layer
    hidden_TH, *weights = layer.inputs(tokens, device="cuda")
    with torch.no_grad():
        for _ in range(2):
            call(hidden_TH, *weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(hidden_TH, *weights)
        hidden_TH.copy_(hidden_TH.flip(1) * 0.5)
        graph.replay()
        found = [tensor.clone() for tensor in captured]
        for mine, theirs in zip(found, call(hidden_TH, *weights), strict=True):
            assert torch.equal(mine, theirs)
    record_property("regimes_captured", 1)


def test_the_regimes_are_different_ones():
    """The control: not one text for all of them."""
    told = set()
    for tokens in REGIMES[1:]:
        torch._dynamo.reset()
        with collect() as decisions, torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            compiled(layer := Layer("qwen3"), dynamic=False)(*layer.inputs(tokens, device="cuda"))
        told.add(tuple(decision.outcome for decision in decisions if decision.stage == "lower"))
    assert len(told) >= 4


def experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, K, "silu(g) * u")
    return ops.moe_combine(ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1), weights_TK)


def stated(tokens):
    """Bytes that the module's text asks for, the output included; tensors begin at multiples of 512 bytes."""
    rows = tokens * K
    routing = 2 * 4 * rows + 4 * (E + 1)
    return routing + 2 * max(rows * (WIDTH + H), rows * H + tokens * H)


@pytest.mark.parametrize("tokens", [512, 4096, 16384])
def test_peak_memory_is_what_is_stated(tokens, record_property):
    generator = torch.Generator().manual_seed(0)
    sizes = [(tokens, H), (E, 2 * WIDTH, H), (E, H, WIDTH)]
    hidden_TH, w13_EJH, w2_EHI = (torch.randn(size, generator=generator).bfloat16().cuda() / 30 for size in sizes)
    ids_TK = torch.rand(tokens, E, generator=generator).argsort(1)[:, :K].int().cuda()
    weights_TK = torch.full((tokens, K), 1 / K, device="cuda")
    call = compiled(experts, dynamic=False)
    args = hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI
    with torch.no_grad():
        for _ in range(2):
            call(*args)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out_TH = call(*args)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    record_property("peak_over_stated", round(peak / stated(tokens), 4))
    assert out_TH.shape == (tokens, H)
    assert peak <= 1.05 * stated(tokens), f"{peak / 2**20:.1f} MiB, stated {stated(tokens) / 2**20:.1f}"
    assert peak >= 0.8 * stated(tokens), "what is stated is what is needed, and not more"
