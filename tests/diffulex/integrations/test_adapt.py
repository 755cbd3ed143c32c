"""`diffulex.adapt`: every family outside transformers' interface, adapted or refused, and back."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import diffulex
from diffulex.families.build import build_model, output_of
from diffulex.families.catalogue import FAMILIES as CATALOGUE
from lowering.errors import ReasonCode
from tests.support.adaptable import (
    FAMILIES,
    ListedExperts,
    LoopBlock,
    PackedExperts,
    SharedLoopBlock,
    build_adaptable,
    exact_of,
    inputs_of,
)
from tests.support.graphs import stop_at_lowerings
from tests.support.oracle import CountOps, assert_oracle_ratio

REFUSED = {"doge": "product keys", "vitpose_backbone": "data set"}
ADAPTED = {
    "aria": ("layers.0.mlp.experts", "layers.1.mlp.experts"),
    "dbrx": ("blocks.0.ffn.experts", "blocks.1.ffn.experts"),
    "jetmoe": (
        "layers.0.mlp",
        "layers.0.self_attention.experts",
        "layers.1.mlp",
        "layers.1.self_attention.experts",
    ),
    "llama4": ("layers.0.feed_forward", "layers.1.feed_forward"),
    "longcat_flash": ("layers.0.mlp.experts", "layers.1.mlp.experts"),
    "step3p7": ("layers.0.mlp.experts", "layers.1.mlp.experts"),
    "ernie4_5_vl_moe": ("layers.0.mlp", "layers.1.mlp"),
    "nllb_moe": ("encoder.layers.1.ffn.experts", "decoder.layers.1.ffn.experts"),
    "openai_privacy_filter": ("layers.0.mlp.experts", "layers.1.mlp.experts"),
    "switch_transformers": ("encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts"),
}
assert ADAPTED.keys() | REFUSED.keys() == FAMILIES.keys()
STAGES = ("moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model, inputs):
    with torch.no_grad():
        return output_of(model(**inputs))


def adapted(family):
    """A model, adapted; Aria's experts go through the interface in newer releases, which reach the ops by its name."""
    model = build_adaptable(family)
    report = diffulex.adapt(model)
    if family == "aria" and not report.adapted:
        pytest.skip("this transformers has Aria in its experts interface")
    return model, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ADAPTED)
def test_the_adapted_model_computes_what_the_model_does(family, dtype):
    model, _ = adapted(family)
    model, stock = model.to(dtype), build_adaptable(family).to(dtype)
    exact = exact_of(stock)
    for length in (1, 9, 33):
        inputs = inputs_of(model, seed=length, length=length)
        with CountOps() as seen:
            ours = run(model, inputs)
        assert all(seen.calls[stage] >= len(ADAPTED[family]) for stage in STAGES[:3])
        if dtype == torch.float32:  # in 16 bits rounding chooses other experts: layers are compared below
            assert_oracle_ratio(ours, run(stock, inputs), run(exact, inputs), what=f"{length} tokens")
        else:
            assert ours.isfinite().all()


@pytest.mark.parametrize("family", ADAPTED)
def test_every_layer_is_named_and_captured(family, monkeypatch):
    stop_at_lowerings(monkeypatch)
    model, report = adapted(family)
    assert all(layer.name.endswith(name) for layer, name in zip(report.layers, ADAPTED[family], strict=True))
    assert not report.refused
    explained = diffulex.explain(model, **inputs_of(model))
    assert explained.all_captured, str(explained)
    assert len(explained.layers) == len(report.layers)
    assert (explained.graphs, explained.breaks) == (1, 0), str(explained)


@pytest.mark.parametrize("family", ADAPTED)
def test_compiled(family, monkeypatch):
    """One through all of Inductor, for the others their graph after the passes."""
    if family != "dbrx":
        stop_at_lowerings(monkeypatch)
    model, _ = adapted(family)
    stock = build_adaptable(family)
    exact = exact_of(stock)
    compiled = torch.compile(model, fullgraph=True)
    for length in (9, 17):
        inputs = inputs_of(model, seed=length, length=length)
        torch._dynamo.maybe_mark_dynamic(inputs["input_ids"], 1)  # other inputs may fix its length
        assert_oracle_ratio(run(compiled, inputs), run(stock, inputs), run(exact, inputs), what=f"{length} tokens")


@pytest.mark.parametrize("family", ADAPTED)
def test_undo(family):
    model = build_adaptable(family)
    inputs, classes = inputs_of(model), [type(module) for module in model.modules()]
    before, state = run(model, inputs), copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    report = diffulex.adapt(model)
    for step in ("adapted", "undone"):
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
        if step == "adapted":
            report.undo()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model, inputs), before)
    assert not [name for name, _ in model.named_buffers() if "adapted" in name]


@pytest.mark.parametrize("family", ADAPTED)
def test_gradients_reach_the_parameters(family):
    """In eager mode, against the model's own code."""
    model, _ = adapted(family)
    stock = build_adaptable(family)
    exact = exact_of(stock)
    inputs = inputs_of(model)
    for each in (model, stock, exact):
        out = output_of(each(**inputs))
        (out * torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)).sum().backward()
    others, oracle = dict(stock.named_parameters()), dict(exact.named_parameters())
    experts = 0
    for name, parameter in model.named_parameters():
        if others[name].grad is None:  # an expert that no token chose
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert_oracle_ratio(parameter.grad, others[name].grad, oracle[name].grad.double(), what=name)
            experts += "expert" in name or "linear" in name
    assert experts


def test_compiled_training(monkeypatch):
    stop_at_lowerings(monkeypatch)
    model, _ = adapted("step3p7")
    stock = build_adaptable("step3p7")
    exact, inputs = exact_of(stock), inputs_of(stock)
    for call in (torch.compile(model, fullgraph=True), stock, exact):
        output_of(call(**inputs)).square().sum().backward()
    for name, parameter in model.named_parameters():
        others = [dict(each.named_parameters())[name].grad for each in (stock, exact)]
        if parameter.grad is not None:
            assert_oracle_ratio(parameter.grad, *others, what=name)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family):
    model = build_adaptable(family)
    inputs = inputs_of(model)
    runs = family != "doge"  # some releases cannot run Doge's experts at all
    before, report = run(model, inputs) if runs else None, diffulex.adapt(model)
    assert report.layers and not report.adapted
    for layer in report.refused:
        assert layer.reason.code is ReasonCode.STRUCTURE
        assert REFUSED[family] in layer.reason.detail
        assert f"left as it is: {layer.reason}" in str(report)
    assert not runs or torch.equal(run(model, inputs), before)


def test_experts_of_the_interface_are_left_to_it():
    family = next(family for family in CATALOGUE if family.name == "qwen3_moe")
    report = diffulex.adapt(build_model(family))
    assert [layer.reason.code for layer in report.layers] == [ReasonCode.INTERFACE] * 2


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "mixtral"])
def test_experts_of_the_interface_that_run_their_own_loop(name):
    """Transposed with biases, without a gate, and the usual form; undone they go back to their loop."""
    family = next(family for family in CATALOGUE if family.name == name)
    model = build_model(family)
    model.set_experts_implementation("eager")
    inputs = inputs_of(model)
    before, report = run(model, inputs), diffulex.adapt(model)
    assert [layer.form for layer in report.layers] == ["transformers' interface"] * 2
    with CountOps() as seen:
        out = run(model, inputs)
    assert seen.calls["moe_expert_up"] == 2
    assert_oracle_ratio(out, before, run(exact_of(build_model(family)), inputs).double())
    report.undo()
    assert torch.equal(run(model, inputs), before)


def test_a_router_that_converts_itself():
    """Nothing is converted that has the dtype already; a second look finds the same modules of experts."""
    model = build_adaptable("switch_transformers")
    first = diffulex.adapt(model)
    assert [layer.name for layer in diffulex.adapt(model).layers] == [layer.name for layer in first.layers]
    classifier = model.encoder.block[1].layer[1].mlp.router.classifier
    assert type(classifier) is not nn.Linear and classifier.to(torch.float32) is classifier
    assert classifier.to(torch.float64).weight.dtype == torch.float64
    first.undo()
    assert type(classifier) is nn.Linear


@pytest.mark.parametrize("kinds", ["text", "both", None])
def test_experts_by_modality(kinds):
    """Which tokens are images, none, or nothing said about it: outputs and the routers' logits."""
    model = build_adaptable("ernie4_5_vl_moe")
    block = model.layers[0].mlp
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))
    given = {"text": torch.zeros(2, 6).int(), "both": torch.arange(12).view(2, 6) % 3, None: None}[kinds]
    with torch.no_grad():
        wanted = block(hidden, given)
        diffulex.adapt(model)
        got = block(hidden, moe_mm_token_type_ids=given)
        whole = torch.compile(block, fullgraph=True, backend="aot_eager")(hidden, given)
    for ours in (got, whole):
        torch.testing.assert_close(ours, wanted)


def test_a_model_without_experts():
    assert str(diffulex.adapt(nn.Linear(2, 2))) == "0 of 0 module(s) of experts adapted"


def test_the_report_says_what_was_changed():
    model, report = adapted("dbrx")
    assert str(report).splitlines() == [
        "2 of 2 module(s) of experts adapted",
        "transformer.blocks.0.ffn.experts (DbrxExperts): adapted, flat weights",
        "transformer.blocks.1.ffn.experts (DbrxExperts): adapted, flat weights",
    ]
    assert diffulex.adapt(model) == report  # once more changes nothing
    assert diffulex.adapt(model, undo=True).layers == ()
    assert type(model.transformer.blocks[0].ffn.experts).__mro__[1] is nn.Module


def test_compiled_before_it_is_adapted(monkeypatch):
    stop_at_lowerings(monkeypatch)
    model = build_adaptable("dbrx")
    compiled, inputs = torch.compile(model), inputs_of(model)
    before = run(compiled, inputs)
    report = diffulex.adapt(compiled)
    assert len(report.adapted) == 2
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, inputs), before)
    assert diffulex.explain(compiled, **inputs).all_captured


@pytest.mark.parametrize("family", ADAPTED)
def test_switched_off_the_modules_run_their_own_code(family):
    model, _ = adapted(family)
    stock, inputs = build_adaptable(family), inputs_of(model)
    with diffulex.disabled(), CountOps() as seen:
        assert torch.equal(run(model, inputs), run(stock, inputs))
    assert not seen.calls


def test_router_logits_are_still_recorded():
    model, _ = adapted("jetmoe")
    stock, inputs = build_adaptable("jetmoe"), {**inputs_of(build_adaptable("jetmoe")), "output_router_logits": True}
    with torch.no_grad():
        ours, theirs = model(**inputs).router_logits, stock(**inputs).router_logits
    assert len(ours) == len(theirs) > 0
    for mine, own in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, own)


@pytest.mark.parametrize(
    "block",
    [
        *(LoopBlock(renorm=renorm, pair=pair, bias=pair) for renorm in (True, False) for pair in (True, False)),
        SharedLoopBlock(),
    ],
    ids=lambda block: type(block).__name__,
)
def test_blocks_with_a_loop(block):
    torch.manual_seed(0)
    hidden, stock = torch.randn(2, 9, 32), copy.deepcopy(block)
    exact = copy.deepcopy(block).double()
    report = diffulex.adapt(block)
    assert [layer.form for layer in report.layers] == ["block with a loop over Linears"], str(report)
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    with torch.no_grad():
        wanted = [first(stock(hidden)), first(exact(hidden.double()))]
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert_oracle_ratio(first(compiled(hidden)), *wanted)
        for call in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            with CountOps() as seen:
                assert_oracle_ratio(first(call(hidden)), *wanted)
            assert seen.calls["moe_expert_up"] == 1
    report.undo()
    assert type(block) is type(stock) and torch.equal(first(block(hidden)), first(stock(hidden)))


@pytest.mark.parametrize("kind", [{}, {"swapped": True}, {"transposed": True}, {"swapped": True, "transposed": True}])
def test_packed_copies(kind):
    torch.manual_seed(0)
    module = PackedExperts(**kind)
    weights, ids = torch.rand(9, 6).topk(2)
    inputs = (torch.randn(9, 32), weights, ids)
    with torch.no_grad():
        before = module(*inputs)
        assert len(diffulex.adapt(module).adapted) == 1
        torch.testing.assert_close(module(*inputs), before)


@pytest.fixture
def listed():
    torch.manual_seed(0)
    weights, ids = torch.rand(9, 6).topk(2)
    return ListedExperts(), (torch.randn(9, 32), ids, weights)


def test_stacked_weights_follow_their_parameters(listed):
    """An optimizer's step, a conversion, a loaded state, a parameter with other data."""
    experts, inputs = listed
    hidden, ids, weights = inputs
    stock = copy.deepcopy(experts)
    assert diffulex.adapt(experts).adapted[0].form == "Linears, called with ids"
    state = {name: torch.randn_like(value) for name, value in stock.state_dict().items()}

    def step(module):
        torch.optim.SGD(module.parameters(), lr=0.1).step(module(*inputs).sum().backward())

    def replace(module):
        module[1].down_proj.weight.data = torch.ones(32, 24)

    for change in (
        step,
        lambda module: module.double().float(),
        lambda module: module.load_state_dict(state),
        lambda module: module.load_state_dict(state, assign=True),
        replace,
    ):
        for module in (experts, stock):
            change(module)
        with torch.no_grad(), CountOps() as seen:
            ours = experts(*inputs)
            exact = copy.deepcopy(stock).double()(hidden.double(), ids, weights.double())
            assert_oracle_ratio(ours, stock(*inputs), exact)
        assert seen.calls["moe_expert_up"]


def test_experts_wrapped_afterwards_run_their_own_code(listed):
    experts, inputs = listed
    diffulex.adapt(experts)
    with torch.no_grad():
        experts[0].up_proj = nn.Sequential(experts[0].up_proj, nn.ReLU())
        with CountOps() as seen:
            experts(*inputs)
    assert not seen.calls


def test_what_is_not_reproduced_is_refused():
    class Halved(PackedExperts):
        def forward(self, hidden_states, routing_weights, selected):
            return super().forward(hidden_states, routing_weights, selected) / 2

    module = Halved()
    (layer,) = diffulex.adapt(module).layers
    assert layer.reason.code is ReasonCode.UNLIKE and type(module) is Halved
    hooked = PackedExperts()
    hooked.forward = hooked.forward
    assert diffulex.adapt(hooked).layers[0].reason.code is ReasonCode.STRUCTURE
    assert diffulex.adapt(PackedExperts().to("meta")).layers[0].reason.code is ReasonCode.UNVERIFIED
    with torch.no_grad():
        zero = PackedExperts()
        zero.down_proj.zero_()
    assert diffulex.adapt(zero).layers[0].reason.code is ReasonCode.UNVERIFIED


def test_adapt_is_loaded_when_it_is_used():
    code = (
        "import sys, diffulex; assert 'diffulex.integrations.adapt' not in sys.modules; diffulex.adapt;"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        _ = diffulex.nothing
