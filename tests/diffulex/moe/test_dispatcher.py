"""The contract of token dispatchers, on a group of one rank in this process: order of calls, capacity, DeepEP."""

import copy
import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from diffulex.checkpoint import load_checkpoint, save_checkpoint
from diffulex.distributed import ExpertPlacement, ParallelConfig
from diffulex.distributed.parts import PartsOfCollectives
from diffulex.moe import (
    EPFusedMoE,
    ExchangePlan,
    TPFusedMoE,
    build_mlp_or_moe,
    build_moe_block,
    build_token_dispatcher,
)
from diffulex.moe.dispatcher import static_dispatcher
from diffulex.moe.layer.experts import WholeSlots
from diffulex.moe.metadata import DispatcherStage
from lowering.errors import (
    MoECheckpointError,
    MoEDeviceError,
    MoEDtypeError,
    MoEOptionError,
    MoEParallelError,
    MoERangeError,
    MoEShapeError,
    MoEStageError,
    MoEUnsupportedError,
    Reason,
    ReasonCode,
)
from lowering.settings import Settings
from tests.support.catalogue import raises_catalogue
from tests.support.moe_layers import SPECS, make_inputs, make_layer
from tests.support.oracle import assert_near_exact, assert_oracle_ratio
from tests.support.rank_cases import layer_results
from tests.support.shared_memory import workspace_of_processes

EXPERTS, TOP_K, CAPACITY, HIDDEN = 4, 2, 5, 8


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    distributed.destroy_process_group()


def plan_of(mesh, **options):
    return ExchangePlan(ParallelConfig(mesh, dim="ep", **options), EXPERTS, TOP_K, CAPACITY)


def tokens(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, EXPERTS + 1, (count, TOP_K), generator=generator)
    return torch.randn(count, HIDDEN, generator=generator), ids, torch.rand(count, TOP_K, generator=generator)


def identity(out):
    """Experts that return what they get: the slots of the rows that have one."""
    rows, slots = out.recv_hidden_states, out.recv_local_expert_ids.shape[1]
    return rows.repeat_interleave(slots, dim=0) * (out.recv_local_expert_ids.reshape(-1, 1) >= 0)


@pytest.fixture(params=["naive", "static"])
def dispatcher(request, mesh):
    return build_token_dispatcher(request.param, plan_of(mesh))


def test_stages(dispatcher):
    assert dispatcher.stage is DispatcherStage.INITIAL
    for seed in range(2):
        hidden, ids, weights = tokens(seed=seed)
        out = dispatcher.dispatch(hidden, ids, weights)
        assert dispatcher.stage is DispatcherStage.DISPATCHED
        assert out.recv_weights.shape == out.recv_local_expert_ids.shape
        back = dispatcher.combine(identity(out), out.metadata)
        assert dispatcher.stage is DispatcherStage.COMBINED
        wanted = hidden * (weights * ((ids >= 0) & (ids < EXPERTS))).sum(1, keepdim=True)
        torch.testing.assert_close(back, wanted)


def test_calls_out_of_order_are_refused(dispatcher):
    with raises_catalogue(MoEStageError, expected="`dispatch` first", got="stage INITIAL"):
        dispatcher.combine(torch.zeros(0, HIDDEN), None)
    first = dispatcher.dispatch(*tokens())
    with raises_catalogue(MoEStageError, where="dispatch", expected="`combine` of the tokens", got="stage DISPATCHED"):
        dispatcher.dispatch(*tokens())
    slots = identity(first)
    dispatcher.combine(slots, first.metadata)
    with raises_catalogue(MoEStageError, expected="`dispatch` first", got="stage COMBINED"):
        dispatcher.combine(slots, first.metadata)
    dispatcher.dispatch(*tokens())
    with raises_catalogue(MoEStageError, expected="metadata of the last `dispatch`", got="stage DISPATCHED"):
        dispatcher.combine(slots, first.metadata)
    dispatcher.reset()
    assert dispatcher.stage is DispatcherStage.COMBINED
    dispatcher.dispatch(*tokens())


def test_a_refused_call_leaves_the_stage(dispatcher):
    hidden, ids, weights = tokens()
    with raises_catalogue(MoEShapeError, expected="ids of shape [3, 2]", got="shape (3, 1)"):
        dispatcher.dispatch(hidden, ids[:, :1], weights)
    with raises_catalogue(MoEShapeError, expected="weights of shape [3, 2]", got="shape (2, 2)"):
        dispatcher.dispatch(hidden, ids, weights[:2])
    with raises_catalogue(MoEShapeError, expected="hidden of shape [any, any]", got="shape (1, 3, 8)"):
        dispatcher.dispatch(hidden[None], ids, weights)
    with raises_catalogue(MoERangeError, expected=f"at most {CAPACITY} tokens", got="6"):
        dispatcher.dispatch(*tokens(6))
    assert dispatcher.stage is DispatcherStage.INITIAL


@pytest.mark.parametrize(
    ("error", "expected", "change"),
    [
        (MoEDtypeError, "hidden in fp32", lambda h, i, w: (h.long(), i, w)),
        (MoEDtypeError, "ids in int32", lambda h, i, w: (h, i.float(), w)),
        (MoEDtypeError, "ids in int32", lambda h, i, w: (h, i > 0, w)),
        (MoEDtypeError, "weights in fp32", lambda h, i, w: (h, i, w.long())),
        (MoEDeviceError, "hidden on cpu like the mesh", lambda h, i, w: (h.to("meta"), i, w)),
        (MoEDeviceError, "ids on cpu like the mesh", lambda h, i, w: (h, i.to("meta"), w)),
        (MoEDeviceError, "weights on cpu like the mesh", lambda h, i, w: (h, i, w.to("meta"))),
    ],
)
def test_only_tensors_that_fit_are_sent(dispatcher, error, expected, change):
    with raises_catalogue(error, expected=expected):
        dispatcher.dispatch(*change(*tokens()))
    assert dispatcher.stage is DispatcherStage.INITIAL


@pytest.mark.parametrize(
    ("error", "expected", "change"),
    [
        (MoEShapeError, "slots of shape", lambda slots: slots[:-1]),
        (MoEShapeError, "slots of shape", lambda slots: torch.cat((slots, slots))),
        (MoEShapeError, "slots of shape", lambda slots: slots[None]),
        (MoEDtypeError, "slots in fp32", lambda slots: slots.long()),
        (MoEDeviceError, "slots on cpu like the mesh", lambda slots: slots.to("meta")),
    ],
)
def test_other_results_than_those_owed_are_refused(dispatcher, error, expected, change):
    out = dispatcher.dispatch(*tokens())
    with raises_catalogue(error, expected=expected):
        dispatcher.combine(change(identity(out)), out.metadata)
    dispatcher.combine(identity(out), out.metadata)


def test_parts_are_refused_like_a_dispatch(mesh):
    options = {"dispatcher": "static", "max_tokens_per_rank": CAPACITY, "exact": False, "chunks": 2}
    dispatcher = build_token_dispatcher("static", plan_of(mesh, **options))
    hidden, ids, weights = tokens()

    def first(rows, ids):
        return WholeSlots(rows.repeat_interleave(ids.shape[1], dim=0) * (ids.reshape(-1, 1) >= 0))

    wanted = hidden * (weights * ((ids >= 0) & (ids < EXPERTS))).sum(1, keepdim=True)
    torch.testing.assert_close(dispatcher.run_in_parts(hidden, ids, weights, first=first), wanted)
    with raises_catalogue(MoEShapeError, expected="ids of shape [3, 2]"):
        dispatcher.run_in_parts(hidden, ids[:, :1], weights, first=first)
    with raises_catalogue(MoERangeError, expected=f"at most {CAPACITY} tokens", got="6"):
        dispatcher.run_in_parts(*tokens(6), first=first)
    dispatcher.dispatch(hidden, ids, weights)
    with raises_catalogue(MoEStageError, where="run_in_parts", expected="`combine` of the tokens"):
        dispatcher.run_in_parts(hidden, ids, weights, first=first)


def test_the_own_sum_is_not_rounded(mesh, monkeypatch):
    """Only what travels is; the own one is added as it is."""
    options = {"dispatcher": "static", "max_tokens_per_rank": CAPACITY, "exact": False, "chunks": 2}
    dispatcher, found = build_token_dispatcher("static", plan_of(mesh, **options)), []
    collect = PartsOfCollectives.collect
    watched = lambda self, own_TH, *, after: found.append(own_TH) or collect(self, own_TH, after=after)  # noqa: E731
    monkeypatch.setattr(PartsOfCollectives, "collect", watched)
    hidden, ids, weights = tokens()
    first = lambda rows, ids: WholeSlots(rows.repeat_interleave(ids.shape[1], dim=0))  # noqa: E731
    out = dispatcher.run_in_parts(hidden.bfloat16(), ids.clamp(0, 3), weights, first=first)
    assert out.dtype == torch.bfloat16 and found[0].dtype == torch.float32
    assert not torch.equal(found[0], out.float()) and torch.equal(found[0].bfloat16(), out)


def test_records_describe_the_exchange(mesh, monkeypatch):
    from diffulex.moe import metadata

    monkeypatch.setattr(metadata, "SETTINGS", Settings(debug=True))
    hidden, ids, weights = tokens()
    out = build_token_dispatcher("naive", plan_of(mesh)).dispatch(hidden, ids, weights)
    record, valid = out.metadata, (ids >= 0) & (ids < EXPERTS)
    assert record.num_tokens == 3 and record.send_splits == record.recv_splits == (int(valid.sum()),)
    assert torch.equal(out.recv_local_expert_ids.squeeze(1), ids[valid].int())
    assert torch.equal(record.recv_weights, weights[valid])
    assert torch.equal(record.recv_token_indices, valid.nonzero()[:, 0].int())
    assert torch.equal(record.recv_hidden_states, hidden[valid.nonzero()[:, 0]])


def test_static_rows_have_fixed_places(mesh):
    hidden, ids, weights = tokens()
    out = build_token_dispatcher("static", plan_of(mesh)).dispatch(hidden, ids, weights)
    assert out.recv_hidden_states.shape == (CAPACITY, HIDDEN) and out.recv_local_expert_ids.shape == (CAPACITY, TOP_K)
    assert torch.equal(out.recv_hidden_states[:3], hidden) and not out.recv_hidden_states[3:].any()
    assert torch.equal(out.recv_local_expert_ids[:3], torch.where((ids >= 0) & (ids < EXPERTS), ids, -1).int())
    assert (out.recv_local_expert_ids[3:] == -1).all()
    assert torch.equal(out.recv_weights[:3], weights)


def test_unknown_backends_are_refused(mesh):
    with raises_catalogue(MoEOptionError, expected="backend in ('naive', 'static', 'deepep')", got="'ring'"):
        build_token_dispatcher("ring", plan_of(mesh))


def test_deepep_has_to_be_installed(mesh, monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with raises_catalogue(MoEUnsupportedError, expected="the package deep_ep", got="deep_ep"):
        build_token_dispatcher("deepep", plan_of(mesh))
    with pytest.raises(MoEParallelError, match=r"on rank 0: \[MOE006\]"):
        EPFusedMoE(SPECS["qwen3"], parallel=ParallelConfig(mesh, dim="ep", dispatcher="deepep"))


class StubBuffer:
    """What `DeepEPDispatcher` calls of `deep_ep.Buffer`, for one rank."""

    made = 0
    hints = SimpleNamespace(
        get_nvl_buffer_size_hint=lambda row_bytes, size: row_bytes * size,
        get_rdma_buffer_size_hint=lambda row_bytes, size: 0,
    )

    def __init__(self, group, num_nvl_bytes, num_rdma_bytes):
        assert (group.size(), num_nvl_bytes, num_rdma_bytes) == (1, 2 * HIDDEN, 0)
        type(self).made += 1

    @classmethod
    def get_dispatch_config(cls, size):
        return cls.hints

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts):
        assert topk_idx.dtype == torch.int64 and num_experts == EXPERTS
        assert ((topk_idx >= -1) & (topk_idx < EXPERTS)).all()
        return "per rank", None, "per expert", (topk_idx >= 0).any(1, keepdim=True), None

    def dispatch(self, x, **given):
        assert x.dtype == torch.bfloat16 and given["topk_weights"].dtype == torch.float32
        assert (given["num_tokens_per_rank"], given["num_tokens_per_expert"]) == ("per rank", "per expert")
        here = given["is_token_in_rank"][:, 0]
        return x[here], given["topk_idx"][here], given["topk_weights"][here], [], here, None

    def combine(self, x, handle):
        out = x.new_zeros(handle.shape[0], x.shape[1])
        out[handle] = x
        return out, None, None


def test_deepep_is_called_as_it_asks(mesh, monkeypatch):
    module = ModuleType("deep_ep")
    module.Buffer = StubBuffer
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    dispatcher = build_token_dispatcher("deepep", plan_of(mesh))
    for seed in range(2):
        hidden, ids, weights = tokens(seed=seed)
        out = dispatcher.dispatch(hidden, ids, weights)
        back = dispatcher.combine(identity(out), out.metadata)
        assert back.dtype == hidden.dtype and StubBuffer.made == 1
        sent, valid = hidden.bfloat16(), (ids >= 0) & (ids < EXPERTS)  # what travels
        eager, oracle = (
            sent.to(dtype) * (weights.to(dtype) * valid).sum(1, keepdim=True)
            for dtype in (torch.float32, torch.float64)
        )
        assert_oracle_ratio(back.bfloat16(), eager.bfloat16(), oracle)
    out = dispatcher.dispatch(hidden, ids, weights)  # frozen hidden states, experts that are trained
    with raises_catalogue(MoEUnsupportedError, expected="a call without gradients", got="results of experts that"):
        dispatcher.combine(identity(out).requires_grad_(), out.metadata)
    with raises_catalogue(MoEUnsupportedError, expected="a call without gradients", got="hidden states or weights"):
        dispatcher.dispatch(hidden.requires_grad_(), ids, weights)
    with raises_catalogue(MoEUnsupportedError, expected="equally many consecutive experts"):
        build_token_dispatcher("deepep", plan_of(mesh, placement=ExpertPlacement(((1, 0, 2, 3),))))


CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "hidden_act": "silu",
}


def test_layers_are_built_from_a_parallel_config(mesh):
    ep, tp = (ParallelConfig(mesh, mode, dim="ep") for mode in ("ep", "tp"))
    assert isinstance(build_mlp_or_moe(CONFIG, 0, torch.nn.Identity, parallel=ep), EPFusedMoE)
    assert isinstance(build_mlp_or_moe(CONFIG, 0, torch.nn.Identity, parallel=tp), TPFusedMoE)
    assert isinstance(build_mlp_or_moe(CONFIG, 1, torch.nn.Identity, parallel=ep), torch.nn.Identity)
    layer = build_moe_block("ep", CONFIG, 0, parallel=ep, device="meta", dtype=torch.bfloat16)
    assert layer.w13.is_meta and layer.w13.dtype == torch.bfloat16 and layer.owned_experts == (0, 1, 2, 3)
    assert not layer.dispatcher.ranks_of_expert.is_meta
    with pytest.raises(MoEOptionError, match="a ParallelConfig for 'tp' and 'ep'"):
        build_moe_block("ep", CONFIG, 0)
    with pytest.raises(MoEOptionError, match="none for 'naive'"):
        build_moe_block("naive", CONFIG, 0, parallel=ep)
    with pytest.raises(MoEParallelError, match="a ParallelConfig of mode 'tp', got 'ep'"):
        build_moe_block("tp", CONFIG, 0, parallel=ep)
    with pytest.raises(MoEParallelError, match=r"dim in \('dp', 'ep'\)"):
        build_moe_block("ep", CONFIG, 0, parallel=ParallelConfig(mesh))
    with pytest.raises(MoEParallelError, match="'triton' or 'naive', got 'vllm'"):
        build_moe_block("ep", CONFIG, 0, parallel=ep, moe_gemm_impl="vllm")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("placement", {"mode": "tp", "shard": "width", "placement": ExpertPlacement(((0, 1, 2, 3),))}),
        ("shard", {"shard": "width"}),
        ("dispatcher", {"mode": "tp", "dispatcher": "static"}),
        ("max_tokens_per_rank", {"mode": "tp", "max_tokens_per_rank": 3}),
        ("exact", {"exact": False}),
        ("exact", {"mode": "tp", "exact": False}),
        ("chunks", {"chunks": 2}),
        ("chunks", {"chunks": 2, "dispatcher": "static", "max_tokens_per_rank": 3}),
    ],
)
def test_options_that_would_not_be_looked_at_are_refused(mesh, name, options):
    parallel = ParallelConfig(mesh, dim="ep", **options)
    with raises_catalogue(MoEOptionError, expected=f"no {name} beside mode=", got=f"{name}="):
        parallel.check(4, 8)
    with pytest.raises(MoEParallelError, match=f"no {name} beside"):
        build_moe_block(parallel.mode, CONFIG, 0, parallel=parallel)
    dataclasses.replace(parallel, **{name: getattr(ParallelConfig(mesh), name)}).check(4, 8)


def layer_of(mesh, spec, **options):
    """A layer over the group, in fp64, with the weights of `make_layer`."""
    kind = TPFusedMoE if options.get("mode") == "tp" else EPFusedMoE
    layer = kind(spec, parallel=ParallelConfig(mesh, dim="ep", **options), dtype=torch.float64).eval()
    layer.load_full(make_layer(spec).state_dict())
    return layer


STATIC = {"dispatcher": "static", "max_tokens_per_rank": 9}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("options", [{}, STATIC, {"mode": "tp"}], ids=str)
def test_every_form_of_layer_on_one_rank(mesh, name, options):
    spec, whole, layer = SPECS[name], make_layer(SPECS[name]), layer_of(mesh, SPECS[name], **options)
    for count in (0, 1, 9):
        inputs = make_inputs(spec, count)
        with torch.no_grad():
            found, wanted = (which(inputs.hidden_TH, **inputs.given)[0] for which in (layer, whole))
        assert_near_exact(found, wanted)


@pytest.mark.parametrize("options", [{}, {"mode": "tp"}, {"mode": "tp", "shard": "width"}], ids=str)
def test_compiled_layers_have_the_gradients_of_one_rank(mesh, options):
    """Casts to a wider dtype do nothing in fp64: torch 2.11 lost the gradient of a Function that ended in one."""
    layer, whole = layer_of(mesh, SPECS["qwen3"], **options), make_layer(SPECS["qwen3"])
    hidden_TH = make_inputs(SPECS["qwen3"], 5).hidden_TH
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, wanted = layer_results(compiled, hidden_TH), layer_results(whole, hidden_TH)
    for name, value in wanted.items():
        assert_near_exact(found[name], value, what=name)


class FailingSlots:
    """Experts that run out of memory, in compiled code too."""

    @torch.compiler.disable
    def __call__(self, hidden_TH, ids_TK, *, experts):
        raise torch.OutOfMemoryError("no memory")

    first = __call__


PARTS = {**STATIC, "exact": False, "chunks": 2}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("options", [{}, STATIC, PARTS], ids=["naive", "static", "parts"])
def test_an_error_of_the_experts_ends_with_the_call(mesh, monkeypatch, options, compiled):
    """The next one finds the layer as it was, and what was received is not kept."""
    layer, hidden_TH = layer_of(mesh, SPECS["qwen3"], **options), make_inputs(SPECS["qwen3"], 5).hidden_TH
    torch._dynamo.reset()
    call = torch.compile(layer, backend="aot_eager") if compiled else layer
    with torch.no_grad():
        wanted = layer(hidden_TH)[0]
        stage = layer.dispatcher.stage
        with monkeypatch.context() as patch:
            patch.setattr(layer, "_slots", FailingSlots())
            with pytest.raises(torch.OutOfMemoryError, match="no memory"):
                call(hidden_TH)
        assert layer.dispatcher.stage is stage is not DispatcherStage.DISPATCHED
        assert_near_exact(call(hidden_TH)[0], wanted)


def test_a_layer_takes_no_turn_that_another_began(mesh):
    layer, hidden_TH = layer_of(mesh, SPECS["qwen3"]), make_inputs(SPECS["qwen3"], 5).hidden_TH
    sent = layer.dispatcher.dispatch(hidden_TH, torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2))
    with raises_catalogue(MoEStageError, where="dispatch", expected="`combine` of the tokens"):
        layer(hidden_TH)
    layer.dispatcher.combine(identity(sent), sent.metadata)


def test_load_full_names_what_does_not_fit(mesh):
    spec = SPECS["deepseek_v3"]
    layer, state = EPFusedMoE(spec, parallel=ParallelConfig(mesh, dim="ep")), make_layer(spec).state_dict()
    with pytest.raises(MoECheckpointError, match="w2 missing, none more"):
        layer.load_full({name: tensor for name, tensor in state.items() if name != "w2"})
    with pytest.raises(MoECheckpointError, match="none missing, b2, more more"):
        layer.load_full(state | {"more": state["w2"], "b2": state["w2"]})


def without_extra(state):
    return {name: tensor for name, tensor in state.items() if "_extra_state" not in name}


def stored(state):
    return safetensors.torch.load(safetensors.torch.save({name: t.contiguous() for name, t in state.items()}))


STATES = {"own": dict, "older": without_extra, "stored": stored, "copied": copy.deepcopy}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
@pytest.mark.parametrize("options", [{}, {"mode": "tp", "shard": "width"}], ids=str)
def test_a_state_says_which_experts_it_holds(mesh, options, change):
    """Also in a larger module, and where all of it was cast; one that does not say it is taken as it is."""
    spec = SPECS["deepseek_v3"]
    one, other = (torch.nn.Sequential(layer_of(mesh, spec, **options)) for _ in range(2))
    torch.nn.init.zeros_(other[0].w2)
    state = one.state_dict()
    told = state["0._extra_state"]
    assert told.dtype == torch.int64 and told.tolist() == [0, spec.experts.intermediate_size, *range(8)]
    assert not any(other.load_state_dict(change(state)))
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    other.load_state_dict({name: tensor.bfloat16() for name, tensor in state.items()})
    other.to("meta").load_state_dict(change(state), assign=True)
    assert torch.equal(other[0].w2, one[0].w2)
    other.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, assign=True)
    assert other.state_dict()["0._extra_state"].tolist() == told.tolist()


def test_other_experts_are_refused_before_anything_is_taken(mesh):
    placement = ExpertPlacement((tuple(reversed(range(8))),))
    one, other = layer_of(mesh, SPECS["qwen3"]), layer_of(mesh, SPECS["qwen3"], placement=placement)
    torch.nn.init.zeros_(other.gate.weight)
    for strict in (True, False):
        with raises_catalogue(MoECheckpointError, expected="experts [7, 6, 5,", got="experts [0, 1, 2,"):
            other.load_state_dict(one.state_dict(), strict=strict)
    assert not other.gate.weight.any()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "w2"\.'):
        one.load_state_dict({name: t for name, t in without_extra(one.state_dict()).items() if name != "w2"})
    with raises_catalogue(MoECheckpointError, where="load_full", got="none missing, _extra_state more"):
        other.load_full(one.state_dict())


def test_checkpoints_hold_nothing_but_weights(mesh, tmp_path):
    layer = layer_of(mesh, SPECS["qwen3"])
    save_checkpoint({0: layer}, tmp_path, model_type="qwen3_moe")
    other = layer_of(mesh, SPECS["qwen3"])
    torch.nn.init.zeros_(other.w13)
    assert load_checkpoint({0: other}, tmp_path, model_type="qwen3_moe") == []
    assert torch.equal(other.w13, layer.w13)


@pytest.mark.parametrize(
    ("name", "change", "expected", "got"),
    [
        ("gate.weight", lambda t: t[:1], "gate.weight (8, 8)", "gate.weight (1, 8)"),
        ("w13", lambda t: torch.cat((t, t)), "w13 (8, 12, 8)", "w13 (16, 12, 8)"),
        ("w2", lambda t: torch.cat((t, t), dim=2), "w2 (8, 8, 6)", "w2 (8, 8, 12)"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"mode": "tp", "shard": "width"}], ids=str)
def test_load_full_takes_no_other_shape(mesh, options, name, change, expected, got):
    """What a slice or a broadcast would make fit."""
    layer, state = layer_of(mesh, SPECS["qwen3"], **options), make_layer(SPECS["qwen3"], seed=1).state_dict()
    before = copy.deepcopy(layer.state_dict())
    with raises_catalogue(MoECheckpointError, expected=expected, got=got):
        layer.load_full(state | {name: change(state[name])})
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def test_a_dispatcher_is_made_for_one_plan(mesh):
    plan = plan_of(mesh)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.top_k = 3
    assert plan.placement == ExpertPlacement(((0, 1, 2, 3),))
    assert ExpertPlacement.even(7, 3).owned == ((0, 1, 2), (3, 4), (5, 6))


def test_how_static_exchanges_travel_is_said(mesh, monkeypatch):
    """Each for itself, by what the plan says it will move; a call of another width than planned takes a collective."""
    plan = dataclasses.replace(plan_of(mesh), row_bytes=4 * HIDDEN)
    on_cpu = "collectives (NOT_CUDA: symmetric memory is for CUDA devices, the mesh is on cpu)"
    found = build_token_dispatcher("static", plan)
    assert found.workspace is None and found.transport == f"dispatch by {on_cpu}; combine by {on_cpu}"
    assert "the plan does not say how large" in build_token_dispatcher("static", plan_of(mesh)).transport
    layer = EPFusedMoE(SPECS["qwen3"], parallel=ParallelConfig(mesh, dim="ep", **STATIC))
    assert f"dispatcher='static': dispatch by {on_cpu}" in repr(layer)
    naive = EPFusedMoE(SPECS["qwen3"], parallel=ParallelConfig(mesh, dim="ep"))
    assert "dispatcher='naive': collectives" in repr(naive)

    monkeypatch.setattr(static_dispatcher, "workspace_for", workspace_of_processes)
    monkeypatch.setattr(static_dispatcher, "MOST_BYTES", 2048)
    monkeypatch.setattr(static_dispatcher, "MOST_SLOT_BYTES", 2304)
    both, first, neither = (
        build_token_dispatcher("static", dataclasses.replace(plan, row_bytes=size)) for size in (32, 256, 999)
    )
    assert both.transport == "dispatch by symmetric memory; combine by symmetric memory"
    assert both.workspace.num_bytes == 256 + 256
    slower = "collectives (SCHEDULE: a collective is for 2560 bytes)"
    assert first.transport == f"dispatch by symmetric memory; combine by {slower}"
    assert first._route("dispatch", 8).workspace is not None and first._route("combine", 8).workspace is None
    assert neither.workspace is None and "is for 10240 bytes" in neither.transport
    slots = build_token_dispatcher("static", dataclasses.replace(plan, row_bytes=220))
    summed = dataclasses.replace(plan.parallel, exact=False, dispatcher="static", max_tokens_per_rank=5)
    sums = build_token_dispatcher("static", dataclasses.replace(plan, parallel=summed, row_bytes=440))
    assert slots.refusals["combine"] is None and "is for 2304 bytes" in str(sums.refusals["combine"])
    parts = ParallelConfig(mesh, dim="ep", dispatcher="static", max_tokens_per_rank=5, exact=False, chunks=3)
    apart = build_token_dispatcher("static", dataclasses.replace(plan, parallel=parts, row_bytes=999))
    assert apart.transport.endswith("; parts by symmetric memory") and apart.capacity == 6
    assert apart._route("parts", 8).workspace is not None and apart._route("dispatch", 8).workspace is None
    for width, key in ((HIDDEN, both.workspace.key), (8 * HIDDEN, None)):
        hidden, ids, weights = tokens(5)
        out = both.dispatch(hidden.repeat(1, width // HIDDEN), ids, weights)
        assert torch.equal(out.recv_hidden_states, hidden.repeat(1, width // HIDDEN))
        assert both._route("dispatch", 5 * width * 4 + 256).workspace == key
        both.combine(identity(out), out.metadata)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("width", [9, 36, 65])
def test_rows_of_any_width_fit_the_memory(mesh, monkeypatch, exact, width):
    """Parts begin at multiples of 256 bytes, and what comes back may be the largest and no such multiple."""
    monkeypatch.setattr(static_dispatcher, "workspace_for", workspace_of_processes)
    parallel = ParallelConfig(mesh, dim="ep", dispatcher="static", max_tokens_per_rank=CAPACITY, exact=exact)
    plan = dataclasses.replace(plan_of(mesh), parallel=parallel, row_bytes=4 * width)
    found = build_token_dispatcher("static", plan)
    _, ids, weights = tokens(CAPACITY)
    hidden = torch.randn(CAPACITY, width, generator=torch.Generator().manual_seed(0))
    out = found.dispatch(hidden, ids, weights)
    wanted = ((ids >= 0) & (ids < EXPERTS)).mul(weights).sum(1, keepdim=True) * hidden
    torch.testing.assert_close(found.combine(identity(out), out.metadata), wanted)
    assert found.transport == "dispatch by symmetric memory; combine by symmetric memory"
    assert found.workspace.handle.barriers == 4


def test_an_exchange_without_memory_leaves_the_others_theirs(mesh, monkeypatch):
    asked = []

    def scarce(group, device_type, *, num_bytes):
        asked.append(num_bytes)
        if num_bytes > 1024:
            return Reason(ReasonCode.PEERS, "on rank 1: OutOfMemoryError")
        return workspace_of_processes(group, device_type, num_bytes=num_bytes)

    monkeypatch.setattr(static_dispatcher, "workspace_for", scarce)
    found = build_token_dispatcher("static", dataclasses.replace(plan_of(mesh), row_bytes=144))
    assert found.transport == (
        "dispatch by symmetric memory; combine by collectives (PEERS: on rank 1: OutOfMemoryError)"
    )
    assert asked == [1536, 1024] and found.workspace.num_bytes == 1024
