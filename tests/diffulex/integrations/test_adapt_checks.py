"""What `diffulex.adapt` looks at before it swaps a module: blocks that differ in one thing from what forms compute."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

import diffulex
from diffulex.integrations.adapt import form as forms
from lowering.errors import ReasonCode
from tests.support.adaptable import (
    ListedExperts,
    LoopBlock,
    Mlp,
    PackedExperts,
    SharedLoopBlock,
    SigmoidGate,
    build_adaptable,
    run_loop,
)
from tests.support.oracle import CountOps, assert_oracle_ratio


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def hidden_states(*shape):
    return torch.randn(*(shape or (2, 9)), 32, generator=torch.Generator().manual_seed(3))


def choice():
    weights, ids = torch.rand(9, 6, generator=torch.Generator().manual_seed(4)).topk(2)
    return ids, weights


def only(module):
    (layer,) = diffulex.adapt(module).layers
    return layer


def first(out):
    return out[0] if isinstance(out, tuple) else out


def assert_refused(module, code, detail):
    """And left as it was: classes, tensors, hooks, attributes, the random state."""
    classes = {part: type(part) for part in module.modules()}
    held = {name: (value, value.data_ptr()) for name, value in module.state_dict(keep_vars=True).items()}
    names = {part: set(vars(part)) | set(part._buffers) for part in module.modules()}
    state = torch.get_rng_state()
    layer = only(module)
    assert layer.reason is not None and layer.reason.code is code, str(layer)
    assert detail in layer.reason.detail
    assert classes == {part: type(part) for part in module.modules()}
    assert held.keys() == module.state_dict().keys()
    assert all(held[name][0] is value for name, value in module.state_dict(keep_vars=True).items())
    assert names == {part: set(vars(part)) | set(part._buffers) for part in module.modules()}
    assert not module._load_state_dict_post_hooks
    assert torch.equal(state, torch.get_rng_state())


def assert_computes(module, stock, *args, ops=True, **kwargs):
    exact = copy.deepcopy(stock).double()
    twice = [value.double() if value.is_floating_point() else value for value in args]
    named = {name: value.double() if value.is_floating_point() else value for name, value in kwargs.items()}
    with torch.no_grad(), CountOps() as seen:
        ours = module(*args, **kwargs)
    assert bool(seen.calls) == ops
    with torch.no_grad():
        assert_oracle_ratio(first(ours), first(stock(*args, **kwargs)), first(exact(*twice, **named)))


# how modules are called


def called_with_keywords():
    ids, weights = choice()
    flat, split, packed = (
        build_adaptable("dbrx").transformer.blocks[0].ffn.experts,
        ListedExperts(),
        PackedExperts(),
    )
    hidden = hidden_states(9)
    yield flat, {"top_k_weights": weights, "hidden_states": hidden.view(1, 9, 32), "top_k_index": ids}
    yield split, {"top_k_weights": weights, "top_k_index": ids, "hidden_states": hidden}
    yield packed, {"selected": ids, "routing_weights": weights, "hidden_states": hidden}
    yield LoopBlock(), {"hidden_states": hidden_states()}


@pytest.mark.parametrize("number", range(4))
def test_arguments_are_told_by_their_names(number):
    module, inputs = list(called_with_keywords())[number]
    stock = copy.deepcopy(module)
    assert only(module).adapted
    assert_computes(module, stock, **inputs)
    name, value = next(iter(inputs.items()))
    for wrong in ({}, {**inputs, "unheard_of": value}):
        with pytest.raises(TypeError):
            module(**wrong)
    with pytest.raises(TypeError):
        module(*inputs.values(), **{name: value})


def test_arguments_that_the_form_does_not_know_go_to_the_modules_own_code():
    class Masked(LoopBlock):
        def forward(self, hidden_states, mask=None, **kwargs):
            out, logits = super().forward(hidden_states)
            out = out if mask is None else out * mask
            return out * kwargs.get("factor", 1.0), logits

    module, stock, hidden = Masked(), None, hidden_states()
    stock = copy.deepcopy(module)
    assert only(module).adapted
    for given in ({}, {"mask": None}):
        with torch.no_grad(), CountOps() as seen:
            module(hidden, **given)
        assert seen.calls
    for given in ({"mask": torch.zeros(32)}, {"factor": 0.5}):
        with torch.no_grad(), CountOps() as seen:
            assert torch.equal(module(hidden, **given)[0], stock(hidden, **given)[0])
        assert not seen.calls


# hooks


def bypassed():
    yield LoopBlock(), "experts.3.up_proj", (hidden_states(),)
    yield LoopBlock(), "experts.3", (hidden_states(),)
    yield LoopBlock(), "experts.3.act_fn", (hidden_states(),)
    for family, block, name in (
        ("dbrx", "transformer.blocks.0.ffn", "experts.mlp"),
        ("jetmoe", "model.layers.0.mlp", "input_linear"),
        ("llama4", "model.layers.0.feed_forward", "experts"),
    ):
        yield build_adaptable(family).get_submodule(block), name, (hidden_states(),)


@pytest.mark.parametrize("number", range(6))
def test_hooks_of_modules_that_are_not_called_any_more(number):
    module, name, inputs = list(bypassed())[number]
    calls = []
    watched = module.get_submodule(name)
    handle = watched.register_forward_hook(lambda *_: calls.append(1))
    (layer,) = diffulex.adapt(module).layers
    assert layer.reason.code is ReasonCode.STRUCTURE and "hooks wait" in layer.reason.detail, str(layer)
    assert not calls  # random inputs are nothing that they should see
    handle.remove()
    assert diffulex.adapt(module).layers[0].adapted
    for register in (watched.register_forward_pre_hook, watched.register_forward_hook):
        handle, before = register(lambda *_: calls.append(1)), len(calls)
        with torch.no_grad(), CountOps() as seen:
            module(*inputs)
        assert len(calls) > before and not seen.calls.keys() & {"moe_expert_up"}
        handle.remove()
    with torch.no_grad(), CountOps() as seen:
        module(*inputs)
    assert seen.calls["moe_expert_up"]


# training


class Jitter(LoopBlock):
    def forward(self, hidden_states):
        if self.training:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(0.9, 1.1)
        return super().forward(hidden_states)


class Auxiliary(LoopBlock):
    """Adds the gradient of a loss that nobody sees."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out, loss):
            return out.view_as(out)

        @staticmethod
        def backward(ctx, grad):
            return grad, torch.ones(())

    def forward(self, hidden_states):
        out, logits = super().forward(hidden_states)
        return self.Loss.apply(out, logits.softmax(-1).square().sum()) if self.training else out, logits


class Detached(LoopBlock):
    """No gradients from the router."""

    def forward(self, hidden_states):
        hidden_TH = hidden_states.view(-1, 32)
        with torch.no_grad():
            weights, ids = self.gate(hidden_TH).softmax(1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return run_loop(self.experts, hidden_TH, ids, weights).view(hidden_states.shape)


class Dropping(nn.Module):
    """An expert with dropout behind its activation, or `late`, behind its last product, or by a function."""

    def __init__(self, where="middle"):
        super().__init__()
        self.wi, self.wo, self.dropout = nn.Linear(32, 24), nn.Linear(24, 32), nn.Dropout(0.5)
        self.act, self.where = nn.ReLU(), where

    def forward(self, hidden):
        act = self.act(self.wi(hidden))
        if self.where == "function":
            return self.wo(functional.dropout(act, 0.5, self.training))
        return self.wo(self.dropout(act)) if self.where == "middle" else self.dropout(self.wo(act))


def with_experts(*experts, block=LoopBlock, **kwargs):
    module = block(**kwargs)
    module.experts = nn.ModuleList(experts)
    return module


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "kind", ["jitter", "loss", "detached", "late dropout", "dropout by a function", "router of its own"]
)
def test_training_that_differs_runs_the_modules_own_code(kind, train):
    module = {
        "jitter": Jitter,
        "loss": Auxiliary,
        "detached": lambda: Detached(renorm=False, pair=False),
        "late dropout": lambda: with_experts(*(Dropping("late") for _ in range(6))),
        "dropout by a function": lambda: with_experts(*(Dropping("function") for _ in range(6))),
        "router of its own": lambda: Jitter(renorm=False, pair=False),
    }[kind]()
    stock, layer = copy.deepcopy(module), only(module.train(train))
    assert all(part.training == train for part in module.modules())
    assert layer.adapted and layer.training is not None, str(layer)
    assert "runs its own code in training" in str(layer)
    assert diffulex.adapt(module).layers == (layer,)
    assert_computes(module.eval(), stock.eval(), hidden_states())
    for again in (module, copy.deepcopy(module)):
        again.train(), stock.train()
        with CountOps() as seen:
            torch.manual_seed(1)
            ours = first(again(hidden_states()))
        torch.manual_seed(1)
        assert torch.equal(ours, first(stock(hidden_states())))
        assert not seen.calls
    diffulex.adapt(module, undo=True)
    assert vars(module).keys() == vars(stock).keys()


def test_dropout_of_experts_stays_and_trains_by_the_ops():
    module = with_experts(*(Dropping() for _ in range(6))).train()
    layer = only(module)
    assert layer.adapted and layer.training is None, str(layer)
    with CountOps() as seen:
        one, two = first(module(hidden_states())), first(module(hidden_states()))
    assert seen.calls["moe_expert_up"] == 2 and not torch.equal(one, two)
    assert torch.equal(first(module.eval()(hidden_states())), first(module(hidden_states())))
    assert {type(part) for part in module.modules() if isinstance(part, nn.Dropout)} == {nn.Dropout}


# what a module holds, sets and does beside


class Offset(LoopBlock):
    """Holds a tensor that is zero, today."""

    def __init__(self, *, buffer):
        super().__init__(pair=False)
        offset = torch.zeros(32)
        self.register_buffer("offset", offset) if buffer else setattr(self, "offset", nn.Parameter(offset))

    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.offset


class Telling(LoopBlock):
    """Tells others of its logits: by an attribute, in a list, or in a buffer of its router."""

    def __init__(self, how):
        super().__init__()
        self.how, self.kept = how, []
        self.gate.register_buffer("seen", torch.zeros(6))

    def forward(self, hidden_states):
        out, logits = super().forward(hidden_states)
        if self.how == "attribute":
            self.last_logits = logits
        elif self.how == "list":
            self.kept.append(logits)
        else:
            self.gate.seen += logits.detach().sum(0)
        return out, logits


@pytest.mark.parametrize("buffer", [True, False])
def test_tensors_that_the_form_would_not_read(buffer):
    assert_refused(Offset(buffer=buffer), ReasonCode.STRUCTURE, "offset, which its form does not have")
    packed = PackedExperts()
    packed.router_bias = nn.Parameter(torch.zeros(6))
    assert_refused(packed, ReasonCode.STRUCTURE, "router_bias")


@pytest.mark.parametrize(("how", "what"), [("attribute", "last_logits"), ("list", "kept"), ("buffer", "gate.seen")])
def test_what_a_forward_sets_is_missed(how, what):
    module = Telling(how)
    assert_refused(module, ReasonCode.STRUCTURE, f"sets {what}")
    assert not module.kept and not module.gate.seen.any()


# capacities


def kept_by_capacity(ids_TK, *, capacity):
    """ids, but 6, which is no expert, where `capacity` earlier tokens have the same one."""
    chosen_TKE = functional.one_hot(ids_TK, 6)
    place_TK = (chosen_TKE.sum(1).cumsum(0).unsqueeze(1) * chosen_TKE).sum(-1)
    return ids_TK.masked_fill(place_TK > capacity, 6)


class CrowdedBlock(LoopBlock):
    """Each expert takes its first 64 tokens alone."""

    capacity, only_training = 64, False

    def forward(self, hidden_states):
        hidden_TH = hidden_states.view(-1, 32)
        weights, ids = self.gate(hidden_TH).softmax(1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.training or not self.only_training:
            ids = kept_by_capacity(ids, capacity=self.capacity)
        return run_loop(self.experts, hidden_TH, ids, weights).view(hidden_states.shape)


class CrowdedList(ListedExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, kept_by_capacity(top_k_index, capacity=64), top_k_weights)


class CrowdedPack(PackedExperts):
    def forward(self, hidden_states, routing_weights, selected):
        return super().forward(hidden_states, routing_weights, kept_by_capacity(selected, capacity=64))


class CrowdedMask(nn.ModuleDict):
    """Called with a mask, as Switch calls them."""

    def __init__(self):
        super().__init__({f"expert_{number}": Mlp() for number in range(6)})

    def forward(self, hidden_states, selected_experts, routing_weights):
        out_TH, mask_TE = torch.zeros_like(hidden_states), selected_experts.amax(1)
        mask_TE = mask_TE * (mask_TE.cumsum(0) <= 64)
        for number, expert in enumerate(self.values()):
            token = torch.where(mask_TE[:, number] > 0)[0]
            out_TH.index_add_(0, token, expert(hidden_states[token]) * routing_weights[token])
        return out_TH


@pytest.mark.parametrize("kind", [CrowdedBlock, CrowdedList, CrowdedPack, CrowdedMask])
def test_a_capacity_that_few_tokens_do_not_reach(kind):
    module = kind(renorm=False, pair=False) if kind is CrowdedBlock else kind()
    assert_refused(module, ReasonCode.UNLIKE, "with 272 equal tokens, some of which a fixed capacity drops: ")


def test_a_capacity_in_training_alone():
    module = CrowdedBlock(renorm=False, pair=False)
    module.only_training = True
    layer = only(module)
    assert layer.adapted and "some of which a fixed capacity drops" in layer.training.detail


def test_a_capacity_that_no_check_reaches_is_none_for_the_crowd():
    module = CrowdedBlock(renorm=False, pair=False)
    module.capacity = 1000
    layer = only(module)
    assert layer.adapted and layer.training is None, str(layer)


def test_a_forward_that_does_not_take_a_crowd():
    class Few(LoopBlock):
        def forward(self, hidden_states):
            if hidden_states.shape[:-1].numel() > 100:
                raise ValueError("too many tokens")
            return super().forward(hidden_states)

    assert_refused(
        Few(), ReasonCode.UNVERIFIED, "its own forward fails on 272 equal tokens: ValueError: too many tokens"
    )


class Capped(Mlp):
    """Caps what only large inputs reach."""

    def forward(self, hidden):
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        return self.down_proj(self.act_fn(gate) * up.clamp(-8.0, 8.0))


class Leaky(Mlp):
    def __init__(self, slope):
        super().__init__()
        self.act_fn = nn.LeakyReLU(slope)


class Extra(Mlp):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(24))


class Same(Mlp):
    """Another class of experts."""


def unlike():
    capped, leaky = [Capped() for _ in range(6)], [Leaky(0.1) for _ in range(5)]
    yield "capped", with_experts(*capped), ReasonCode.UNLIKE, "differ by"
    yield "one of another slope", with_experts(*leaky, Leaky(0.3)), ReasonCode.UNLIKE, "differ by"
    yield "more tensors", with_experts(*(Extra() for _ in range(6))), ReasonCode.STRUCTURE, "beside their Linears"
    yield "classes", with_experts(*(Mlp() for _ in range(5)), Same()), ReasonCode.STRUCTURE, "different classes"
    yield "sizes", with_experts(*(Mlp() for _ in range(5)), Mlp(width=16)), ReasonCode.STRUCTURE, "differ in size"
    one = Mlp()
    yield "one twice", with_experts(*(one for _ in range(6))), ReasonCode.STRUCTURE, "more than once"
    tied = with_experts(*(Mlp() for _ in range(6)))
    tied.experts[1].up_proj.weight = tied.experts[0].up_proj.weight
    yield "tied", tied, ReasonCode.STRUCTURE, "shares memory"
    views = with_experts(*(Mlp() for _ in range(6)))
    both = torch.randn(2, 24, 32)
    for expert, own in zip(views.experts, both, strict=False):
        expert.up_proj.weight.data = own
    yield "parts of one tensor", views, ReasonCode.STRUCTURE, "shares memory"
    with torch.inference_mode():
        inference = LoopBlock()
    yield "inference tensors", inference, ReasonCode.STRUCTURE, "inference mode"
    with torch.device("meta"):
        meta = LoopBlock()
    yield "meta", meta, ReasonCode.UNVERIFIED, "meta device"
    whole = LoopBlock()
    whole.gate = None
    yield "no router", whole, ReasonCode.STRUCTURE, "no `gate` or `router`"
    gaps = LoopBlock()
    gaps.experts = nn.ModuleList([Mlp(), None])
    yield "gaps", gaps, ReasonCode.STRUCTURE, "has gaps"
    integers = LoopBlock()
    integers.experts[2].up_proj.weight = nn.Parameter(torch.ones(24, 32, dtype=torch.int8), requires_grad=False)
    yield "integers", integers, ReasonCode.DTYPE, "int8"


UNLIKE = [name for name, *_ in unlike()]


@pytest.mark.parametrize("name", UNLIKE)
def test_refused(name):
    (case,) = [case for case in unlike() if case[0] == name]
    assert_refused(*case[1:])


def test_what_has_no_class_to_swap_is_passed_over():
    traced = torch.jit.trace(LoopBlock(), (hidden_states(),), check_trace=False)
    assert diffulex.adapt(nn.Sequential(traced)).adapted == ()


# how blocks route


class Variant(nn.Module):
    """A block of remote code, in the parts that differ between them."""

    def __init__(self, **how):
        super().__init__()
        self.how = {"score": "softmax", "renorm": True, "beside": "", **how}
        experts = [Mlp() for _ in range(6)]
        named = {f"expert_{number}": expert for number, expert in enumerate(experts)}
        self.experts = nn.ModuleDict(named) if how.get("dict") else nn.ModuleList(experts)
        self.router = nn.Linear(32, 6) if self.how["score"] != "own" else SigmoidGate()
        if how.get("config"):
            self.config = type("Config", (), {"num_experts_per_tok": 2})()
        else:
            self.num_experts_per_tok = 2
        if how.get("scale"):
            self.routed_scaling_factor = 2.5
        if how.get("shared"):
            self.shared_expert, self.shared_expert_gate = Mlp(width=40), nn.Linear(32, 1)

    def forward(self, hidden_states):
        hidden_TH = hidden_states.reshape(-1, 32)
        if self.how["score"] == "own":
            ids, weights, logits = self.router(hidden_states)
        else:
            logits = self.router(hidden_TH)
            scores = logits.softmax(-1, dtype=torch.float32) if self.how["score"] == "softmax" else logits.sigmoid()
            weights, ids = scores.topk(2, dim=-1)
            if self.how["renorm"]:
                weights = weights / weights.sum(-1, keepdim=True)
        experts = self.experts.values() if isinstance(self.experts, nn.ModuleDict) else self.experts
        out = run_loop(experts, hidden_TH, ids, weights.to(hidden_TH.dtype)).view(hidden_states.shape)
        out = out * getattr(self, "routed_scaling_factor", 1.0)
        if hasattr(self, "shared_expert"):
            out = out + self.shared_expert_gate(hidden_states).sigmoid() * self.shared_expert(hidden_states)
        by_token = (*hidden_states.shape[:2], -1)
        beside = {
            "logits": (logits,),
            "by token": (logits.view(by_token),),
            "choice": ((logits.view(by_token), ids.view(by_token)),),
        }
        return (out, *beside[self.how["beside"]]) if self.how["beside"] else out


@pytest.mark.parametrize(
    "how",
    [
        {"renorm": False, "beside": "logits"},
        {"score": "sigmoid", "dict": True},
        {"score": "sigmoid", "renorm": False, "beside": "by token", "config": True},
        {"scale": True, "shared": True, "beside": "by token"},
        {"score": "own", "beside": "choice"},
        {"score": "own", "scale": True, "beside": "logits", "shared": True},
    ],
    ids=lambda how: ", ".join(how),
)
def test_blocks_that_route_in_different_ways(how):
    module = Variant(**how)
    stock, layer = copy.deepcopy(module), only(module)
    assert layer.adapted and layer.training is None, str(layer)
    assert_computes(module, stock, hidden_states())
    with torch.no_grad():
        ours, theirs = module(hidden_states()), stock(hidden_states())
    torch.testing.assert_close(ours, theirs)  # everything that it returns


class Ungated(nn.Module):
    """An expert without a gate, its Linears in the wrong order and square: sizes do not say which comes first."""

    def __init__(self, width):
        super().__init__()
        self.w_out, self.w_in = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, hidden):
        return self.w_out(functional.gelu(self.w_in(hidden)))


class Fused(nn.Module):
    """Gate and up in one Linear, up first."""

    def __init__(self):
        super().__init__()
        self.up_gate, self.down = nn.Linear(32, 48, bias=False), nn.Linear(24, 32)

    def forward(self, hidden):
        up, gate = self.up_gate(hidden).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


@pytest.mark.parametrize("expert", [lambda: Ungated(24), lambda: Ungated(32), Fused], ids=["24", "32", "fused"])
def test_experts_of_two_linears(expert):
    module = with_experts(*(expert() for _ in range(6)))
    stock, layer = copy.deepcopy(module), only(module)
    assert layer.adapted, str(layer)
    assert_computes(module, stock, hidden_states())


# around it


def test_inside_other_modes_of_pytorch():
    """Adapted in train mode, without gradients, in autocast, in inference mode: nothing of it is in the answer."""
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        module = with_experts(*(Dropping() for _ in range(6))).train()
        with mode:
            layer = only(module)
        assert layer.adapted and layer.training is None, str(layer)
        assert module.training and all(parameter.grad is None for parameter in module.parameters())
        out = module(hidden_states())
        out[0].sum().backward()
        assert module.experts[0].wi.weight.grad is not None


def test_layers_are_told_one_by_one():
    """A good layer beside bad ones, one that is reached under two names, and one inside of what was refused."""
    shared = LoopBlock()
    outer = Offset(buffer=True)
    outer.shared_experts = SharedLoopBlock()
    model = nn.ModuleDict({"a": shared, "b": Offset(buffer=True), "c": shared, "d": outer})
    report = diffulex.adapt(model)
    assert [(layer.name, layer.adapted) for layer in report.layers] == [
        ("a", True),
        ("b", False),
        ("d", False),
        ("d.shared_experts", True),
    ]
    report.undo()
    assert type(model["a"]) is LoopBlock and type(model["d"].shared_experts) is SharedLoopBlock


def test_threads_get_one_class():
    made, wait = [], threading.Barrier(8)

    def make():
        wait.wait()
        made.append(forms.adapted_class(forms.Adapted, Same, options="threads"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and len(set(made)) == 1


def test_an_interrupted_check_leaves_the_module_as_it_was(monkeypatch):
    module = LoopBlock()
    before = {name: value.data_ptr() for name, value in module.state_dict().items()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffulex.integrations.adapt.swap._check_training", interrupt)
    with pytest.raises(KeyboardInterrupt):
        diffulex.adapt(module)
    assert type(module) is LoopBlock and module.state_dict().keys() == before.keys()
    assert not module._buffers and not module._load_state_dict_post_hooks and module.training
