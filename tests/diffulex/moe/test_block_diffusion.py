"""Block-diffusion decoders on `build_mlp_or_moe`: what a token sees, and that every MoE layer is captured."""

import pytest
import torch
from torch._dynamo.utils import counters

import diffulex
from diffulex.moe import FusedMoE, NaiveFusedMoE
from diffulex.moe.topk import GroupLimitedTopKRouter, NaiveTopKRouter
from tests.support.block_diffusion import KINDS, DenseMLP, block_diffusion_mask, build_decoder
from tests.support.oracle import assert_near_exact, assert_oracle_ratio

LENGTH, BLOCK = 16, 4
LENGTHS = (1, 4, 12, 64, 100)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids(length, *, batch=1, seed=0):
    return torch.randint(60, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model, inputs):
    with torch.no_grad():
        return model(inputs)


def test_the_mask():
    mask = block_diffusion_mask(6, 2)
    assert mask.int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    assert block_diffusion_mask(5, 8).all() and block_diffusion_mask(0, 4).shape == (0, 0)
    assert torch.equal(block_diffusion_mask(5, 1), torch.ones(5, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize("position", range(LENGTH))
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_seen_by_its_own_block_and_all_later_ones(kind, position):
    """Bidirectional within a block, causal across blocks: changing a token shows who sees it."""
    model, inputs = build_decoder(kind).double(), ids(LENGTH)
    changed = inputs.clone()
    changed[0, position] = (inputs[0, position] + 1) % 60
    before, after = run(model, inputs)[0], run(model, changed)[0]
    first = position // BLOCK * BLOCK
    assert_near_exact(after[:first], before[:first])  # experts got other numbers of rows, so not bitwise
    assert ((after[first:] - before[first:]).abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_which_layers_are_dense(kind):
    model = build_decoder(kind)
    kinds = [type(layer.mlp) for layer in model.layers]
    dense = {"llada2": 0, "sdar_moe": 1}[kind]
    assert kinds == [DenseMLP if i == dense else NaiveFusedMoE for i in range(3)]
    moe = model.layers[2].mlp
    assert isinstance(moe, FusedMoE)
    if kind == "llada2":
        assert isinstance(moe.router, GroupLimitedTopKRouter)
        assert str(moe.router.spec).startswith("top 2 of sigmoid, 2 of 4 groups by top2_sum")
        assert moe.router.spec.scale == 2.5 and moe.shared_experts is not None
    else:
        assert isinstance(moe.router, NaiveTopKRouter) and moe.shared_experts is None
        assert moe.router.spec.score == "softmax" and moe.router.spec.renorm == 1


@pytest.mark.parametrize("kind", KINDS)
def test_compile_captures_every_moe_layer(kind):
    model = build_decoder(kind)
    report = diffulex.explain(model, ids(9))
    assert report.all_captured, str(report)
    moe = [f"layers.{i}.mlp" for i, layer in enumerate(model.layers) if isinstance(layer.mlp, FusedMoE)]
    assert [layer.name for layer in report.layers] == moe and len(moe) == 2
    assert (report.graphs, report.breaks) == (1, 0)


@pytest.mark.parametrize(
    ("kind", "backend"), [("llada2", "aot_eager"), pytest.param("sdar_moe", "inductor", marks=pytest.mark.slow)]
)
def test_compiled_over_lengths(kind, backend):
    """The oracle is the same model in fp64 with the naive loop."""
    model = build_decoder(kind)
    oracle = build_decoder(kind, moe_gemm_impl="naive").double()
    assert {layer.mlp.moe_gemm_impl for layer in oracle.layers if isinstance(layer.mlp, FusedMoE)} == {"naive"}
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    counters.clear()
    for length in LENGTHS:
        inputs = ids(length, seed=length)
        assert_oracle_ratio(run(compiled, inputs), run(model, inputs), run(oracle, inputs), what=f"{length} tokens")
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_trains_compiled(kind):
    model = build_decoder(kind).train()
    inputs = ids(8, batch=2)
    losses = []
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(function(inputs).flatten(0, 1), inputs.flatten())
        loss.backward()
        losses.append(
            {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    eager, compiled = losses
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_generates_block_by_block(kind):
    model = build_decoder(kind).double()
    prompt = ids(BLOCK, batch=2)
    once, twice = model.generate(prompt, 1), model.generate(prompt, 2)
    assert torch.equal(once[:, :BLOCK], prompt) and torch.equal(twice[:, : 2 * BLOCK], once)
    assert (twice != model.config.mask_token_id).all()
