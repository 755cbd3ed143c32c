"""Experts that are modules of Linears: parameters are views of one tensor, and whatever happens to them is seen."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import diffulex
from diffulex.families.build import output_of
from tests.support.adaptable import ListedExperts, LoopBlock, Mlp, build_adaptable, inputs_of
from tests.support.oracle import CountOps, assert_oracle_ratio


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs():
    weights, ids = torch.rand(9, 6).topk(2)
    return torch.randn(9, 32), ids, weights


def pair():
    """Adapted experts, and the same that are not."""
    experts = ListedExperts()
    stock = copy.deepcopy(experts)
    assert diffulex.adapt(experts).adapted[0].form == "Linears, called with ids"
    return experts, stock


def assert_equal(experts, stock, *, ops=True):
    args = inputs()
    exact = copy.deepcopy(stock).double()
    with torch.no_grad():
        wanted = stock(*args), exact(args[0].double(), args[1], args[2].double())
        for grad in (False, True):
            with torch.set_grad_enabled(grad), CountOps() as seen:
                ours = experts(*args)
            assert_oracle_ratio(ours.detach(), *wanted)
            assert bool(seen.calls) == ops


def state_of(module):
    return {name: torch.randn_like(value) / 5 for name, value in module.state_dict().items()}


def step(kind, **options):
    def run(module):
        optimizer = kind(module.parameters(), lr=0.1, **options)
        args = inputs()
        for _ in range(2):
            optimizer.zero_grad()
            module(*args).square().sum().backward()
            optimizer.step()

    return run


def load(**options):
    return lambda module: module.load_state_dict(state_of(module), **options)


def other_data(module):
    module[1].down_proj.weight.data = torch.randn(32, 24)


def other_parameter(module):
    module[1].down_proj.weight = nn.Parameter(torch.randn(32, 24))


def other_linear(module):
    module[1].down_proj = nn.Linear(24, 32)


def in_place(module):
    with torch.no_grad():
        module[1].up_proj.weight.mul_(2)
        module[2].up_proj.bias.zero_()


def other_expert(module):
    module[3] = Mlp(bias=True)


VIEWS = {
    "SGD": step(torch.optim.SGD, momentum=0.9),
    "AdamW": step(torch.optim.AdamW),
    "AdamW, foreach": step(torch.optim.AdamW, foreach=True),
    "load": load(),
    "load, assign": load(assign=True),
    "in place": in_place,
    "double and back": lambda module: module.double().float(),
    "double": lambda module: module.double(),
}
APART = {"data": other_data, "parameter": other_parameter, "Linear": other_linear, "expert": other_expert}


@pytest.mark.parametrize("kind", [*VIEWS, *APART])
def test_weights_follow_their_parameters(kind):
    experts, stock = pair()
    change = (VIEWS | APART)[kind]
    for module in (experts, stock):
        torch.manual_seed(2)
        change(module)
    if kind == "double":
        experts, stock = experts.float(), stock.float()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(experts.state_dict()[name], value)
    assert_equal(experts, stock)
    # nothing was copied for the call where views are what is left
    assert experts.state() == ("apart" if kind in APART else "whole")
    diffulex.adapt(experts)
    assert experts.state() == "whole"
    assert_equal(experts, stock)


def test_gradients_are_those_of_the_parameters():
    """Several times, into gradients that are there, and second ones."""
    experts, stock = pair()
    exact = copy.deepcopy(stock).double()
    hidden, _, weights = inputs()
    everywhere = torch.arange(18).view(9, 2) % 6  # experts without tokens have zeros here and None there
    for _ in range(2):
        for module, dtype in ((experts, torch.float32), (stock, torch.float32), (exact, torch.float64)):
            module(hidden.to(dtype), everywhere, weights.to(dtype)).square().sum().backward()
    kinds = (module.named_parameters() for module in (experts, stock, exact))
    for (name, mine), (_, own), (_, oracle) in zip(*kinds, strict=True):
        assert_oracle_ratio(mine.grad, own.grad, oracle.grad, what=name)
        assert mine.grad.is_contiguous()


class Doubled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


class Residual(Mlp):
    def forward(self, hidden):
        return hidden + super().forward(hidden)


WRAPPED = {
    "a Linear's class": lambda module: setattr(module[1].up_proj, "__class__", Doubled),
    "an expert's class": lambda module: setattr(module[1], "__class__", Residual),
    "another expert's class": lambda module: module.__setitem__(1, Residual(bias=True)),
    "without a bias": lambda module: setattr(module[1].down_proj, "bias", None),
    "a Linear": lambda module: setattr(module[0], "up_proj", nn.Sequential(module[0].up_proj, nn.ReLU())),
    "an expert": lambda module: module.__setitem__(0, nn.Sequential(module[0], nn.ReLU())),
    "half of a dtype": lambda module: (
        module[0].up_proj.double()
        and module[0].up_proj.register_forward_pre_hook(lambda _, args: (args[0].double(),))
        and module[0].up_proj.register_forward_hook(lambda *args: args[2].float())
    ),
    "a forward": lambda module: setattr(module[0], "forward", lambda hidden: hidden),
    "weight norm": lambda module: nn.utils.parametrizations.weight_norm(module[0].up_proj),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_experts_wrapped_afterwards_run_their_own_code(kind):
    """And conversions, states and the way back go on working."""
    experts, stock = pair()
    with torch.no_grad():
        for module in (experts, stock):
            torch.manual_seed(2)
            WRAPPED[kind](module)
    args = inputs()
    with torch.no_grad(), CountOps() as seen:
        assert torch.equal(experts(*args), stock(*args))
    assert not seen.calls
    for module in (experts, stock):
        torch.manual_seed(3)
        module.load_state_dict(state_of(module))
        module.to(torch.float64 if kind != "half of a dtype" else torch.float32)
    copied = copy.deepcopy(experts)
    for module in (experts, copied):
        diffulex.adapt(module, undo=True)
        for mine, own in zip(module.parameters(), stock.parameters(), strict=True):
            assert torch.equal(mine, own)
        assert type(module) is ListedExperts and not list(module.buffers())


def biased(linear):
    linear.bias = nn.Parameter(torch.randn(linear.out_features))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_biases_given_later_are_seen(name, grad):
    """One runs the module's own code; where every expert has one the ops take them."""
    block, hidden = LoopBlock(), torch.randn(2, 9, 32)
    stock = copy.deepcopy(block)
    diffulex.adapt(block)
    for number, state in ((2, "own"), (None, "apart")):
        for module in (block, stock):
            torch.manual_seed(2)
            for expert in module.experts if number is None else [module.experts[number]]:
                for linear in [expert.gate_proj, expert.up_proj] if name == "up_proj" else [expert.down_proj]:
                    biased(linear)
        assert block.state() == state
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(block(hidden), stock(hidden))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_by_torch_func(frozen):
    """Of what the block reads, and of all parameters."""
    block, hidden = LoopBlock().double(), torch.randn(2, 9, 32, dtype=torch.float64)
    stock = copy.deepcopy(block)
    diffulex.adapt(block)
    for module in (block, stock):
        module.requires_grad_(not frozen)
    parameters = dict(stock.named_parameters())

    def by(module):
        def loss(hidden, parameters=None):
            out = module(hidden) if parameters is None else torch.func.functional_call(module, parameters, (hidden,))
            return out[0].square().sum()

        both = torch.func.grad(loss, (0, 1))(hidden, parameters)
        return torch.func.grad(loss)(hidden), torch.func.jacrev(torch.func.grad(loss))(hidden), both

    for ours, wanted in zip(by(block), by(stock), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
    many = torch.func.vmap(torch.func.grad(lambda hidden: block(hidden)[0].square().sum()))
    both = torch.stack([hidden, 2 * hidden])
    wanted = torch.stack([torch.func.grad(lambda hidden: stock(hidden)[0].square().sum())(each) for each in both])
    torch.testing.assert_close(many(both), wanted, rtol=1e-10, atol=1e-10)


def test_copies_are_adapted_and_apart():
    experts, stock = pair()
    for again in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert again.state() == "whole"
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        assert not any(buffer.any() for buffer in again.buffers())
    assert_equal(experts, stock)


def test_states_hold_every_weight_once(tmp_path):
    experts, stock = pair()

    def size(thing):
        file = io.BytesIO()
        torch.save(thing, file)
        return file.tell()

    assert size(experts.state_dict()) <= 1.1 * size(stock.state_dict())
    assert size(experts) <= 1.1 * size(stock)
    model, again = build_adaptable("switch_transformers"), build_adaptable("switch_transformers")
    diffulex.adapt(model)
    model.save_pretrained(tmp_path)
    loaded = type(again).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(output_of(model(**inputs_of(model))), output_of(loaded(**inputs_of(model))))


def test_undo_gives_parameters_tensors_of_their_own():
    experts, stock = pair()
    diffulex.adapt(experts, undo=True)
    places = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    assert len(places) == len(list(experts.parameters()))
    assert vars(experts).keys() == vars(stock).keys()
    experts.load_state_dict(stock.state_dict())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_functional_call(compiled, grad):
    """Other tensors in the place of all parameters; of a few of them in eager mode, and compiled with gradients."""
    block = LoopBlock()
    stock = copy.deepcopy(block)
    diffulex.adapt(block)
    hidden, others = torch.randn(2, 9, 32), state_of(block)
    few = {name: others[name] for name in list(others)[4:6]}

    def call(state, hidden):
        return torch.func.functional_call(block, state, (hidden,))[0]

    run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    with torch.set_grad_enabled(grad):
        for state in (others, few) if grad or not compiled else (others,):
            wanted = torch.func.functional_call(stock, state, (hidden,))[0]
            torch.testing.assert_close(run(state, hidden), wanted)
        torch.testing.assert_close(block(hidden)[0], stock(hidden)[0])


@pytest.mark.parametrize("change", ["load", "load, assign", "AdamW", "double and back"])
def test_compiled_code_sees_new_weights(change):
    experts, stock = pair()
    args = inputs()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(*args)
    for module in (experts, stock):
        torch.manual_seed(2)
        (VIEWS | APART)[change](module)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), stock(*args))


def test_compiled_training():
    """By Inductor: gradients of the parameters, which the graph joins, and of what the router reads."""
    block = LoopBlock()
    stock = copy.deepcopy(block)
    exact, hidden = copy.deepcopy(block).double(), torch.randn(2, 9, 32)
    diffulex.adapt(block)
    for call, dtype in ((torch.compile(block, fullgraph=True), torch.float32), (stock, None), (exact, torch.float64)):
        call(hidden.to(dtype or torch.float32))[0].square().sum().backward()
    others, oracle = dict(stock.named_parameters()), dict(exact.named_parameters())
    for name, parameter in block.named_parameters():
        if others[name].grad is not None:
            assert_oracle_ratio(parameter.grad, others[name].grad, oracle[name].grad, what=name)


def test_traced_without_values():
    block = LoopBlock()
    diffulex.adapt(block)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert block(torch.randn(2, 9, 32))[0].shape == (2, 9, 32)
    hidden = torch.randn(2, 9, 32)
    exported = torch.export.export(block, (hidden,))
    assert [node for node in exported.graph.nodes if "moe_expert_up" in str(node.target)]
    torch.testing.assert_close(exported.module()(hidden), block(hidden))


def test_a_look_at_the_weights_does_not_read_them(monkeypatch):
    """An eager call looks at each parameter's address; the long look is for what changed."""
    experts, _ = pair()
    monkeypatch.setattr(type(experts), "banks", lambda self: pytest.fail("the long look"))
    assert experts.state() == "whole"
