"""Layers over four gloo processes, or two pairs of them, against the layer on one rank that has all tokens."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from diffulex.distributed import ExpertPlacement, plan_placement
from diffulex.moe import MoESpec
from lowering.spec import RoutingSpec
from lowering.state import batch_invariant
from tests.support import rank_cases
from tests.support.moe_layers import SPECS, swiglu_experts, widened
from tests.support.oracle import assert_near_exact, assert_oracle_ratio
from tests.support.rank_cases import Case, expert_results
from tests.support.ranks import RankError, running

RANKS = 4
STATIC = (("dispatcher", "static"), ("max_tokens_per_rank", 9))
EXCHANGES = {"naive": (), "static": STATIC, "sums": (*STATIC, ("exact", False))}
SPLITS = {"experts": (("mode", "tp"),), "width": (("mode", "tp"), ("shard", "width"))}
OF_EXPERTS = ("w13", "w2", "b13", "b2")


@pytest.fixture(scope="module")
def ranks():
    with running(RANKS) as group:
        yield group


@pytest.fixture(scope="module")
def pair():
    """Enough for what is compiled, which takes each rank seconds."""
    with running(2) as group:
        yield group


def changed(case, **routing):
    """The case with other options of its router."""
    spec = dataclasses.replace(case.spec, routing=dataclasses.replace(case.spec.routing, **routing))
    return dataclasses.replace(case, spec=spec)


def single_rank(case, dtype=None):
    """The layer on one rank, with the same rounded numbers in a wider dtype where asked."""
    layer, inputs = case.whole_layer(), case.all_inputs()
    if dtype is not None:
        layer, inputs = layer.to(dtype), [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    torch.set_num_threads(1)
    return expert_results(layer, *inputs)


def owned_by(case, size):
    placement = dict(case.options).get("placement")
    return placement or ExpertPlacement.even(case.spec.experts.num_experts, size)


def joined(parts, case, of_tokens=("out", "hidden", "weights")):
    """The results of the ranks as those of one: tokens one rank's after the other's, experts in their order."""
    if case.mode == "tp":
        whole = {name: parts[0][name] for name in of_tokens}
        if dict(case.options).get("shard") == "width":
            return whole
    else:
        whole = {name: torch.cat([part[name] for part in parts]) for name in of_tokens}
    experts = [e for owned in owned_by(case, len(parts)).owned for e in owned]
    for name in OF_EXPERTS:
        if name in parts[0]:
            rows = torch.cat([part[name] for part in parts])
            whole[name] = torch.empty_like(rows)
            whole[name][experts] = rows
    return whole


def assert_bitwise(found, wanted, names):
    for name in names:
        assert torch.equal(found[name], wanted[name]), f"{name}: {(found[name] - wanted[name]).abs().max()}"


@st.composite
def placements(draw, num_experts, size):
    """Any experts on any rank, in any order, at least one on each."""
    order = draw(st.permutations(range(num_experts)))
    cuts = sorted(draw(st.sets(st.integers(1, num_experts - 1), min_size=size - 1, max_size=size - 1)))
    bounds = [0, *cuts, num_experts]
    return ExpertPlacement(tuple(tuple(order[a:b]) for a, b in itertools.pairwise(bounds)))


@st.composite
def cases(draw, options, *, aligned=True):
    """Layers of any kind. aligned: rows of 64 bytes or a multiple, as CPU GEMMs round by the alignment of what they
    read, also on one rank."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64) if aligned else (torch.float64,)
    sizes = st.sampled_from([32, 64]) if aligned else st.integers(RANKS, 19)
    num_experts = draw(st.integers(RANKS, 9))
    top_k = draw(st.integers(1, min(4, num_experts)))
    place = draw(st.sampled_from(["output", "output", "input"]))
    experts = swiglu_experts(num_experts, draw(sizes), draw(sizes))
    experts = dataclasses.replace(experts, bias=draw(st.booleans()), interleaved=draw(st.booleans()))
    spec = MoESpec(experts.hidden_size, RoutingSpec(top_k, apply_weight_on=place), experts)
    if draw(st.booleans()) and not dict(options).get("shard"):
        options = (*options, ("placement", draw(placements(num_experts, RANKS))))
    tokens = tuple(draw(st.lists(st.sampled_from([0, 0, 1, 2, 9]), min_size=RANKS, max_size=RANKS)))
    return Case(spec, tokens, draw(st.sampled_from(dtypes)), options, seed=draw(st.integers(0, 99)))


@given(cases(EXCHANGES["naive"]))
def test_naive_exchange_equals_one_rank_bitwise(ranks, case):
    found, wanted = joined(ranks.run(rank_cases.run_experts, case, RANKS), case), single_rank(case)
    assert found.keys() == wanted.keys()
    assert_bitwise(found, wanted, wanted)


@given(cases(EXCHANGES["static"]))
def test_static_exchange_equals_one_rank_bitwise(ranks, case):
    """Hidden states apart, whose gradient is added up per rank first."""
    found, wanted = joined(ranks.run(rank_cases.run_experts, case, RANKS), case), single_rank(case)
    assert found.keys() == wanted.keys()
    assert_bitwise(found, wanted, wanted.keys() - {"hidden"})
    if case.dtype == torch.float64:
        assert_near_exact(found["hidden"], wanted["hidden"], what="hidden")


@given(st.sampled_from(["static", "sums"]).flatmap(lambda how: cases(EXCHANGES[how])))
def test_shared_memory_equals_collectives_bitwise(ranks, case):
    """Output and all gradients, the workspace used by one call after another."""
    wanted = ranks.run(rank_cases.run_experts, case, RANKS)
    found = ranks.run(rank_cases.run_experts, dataclasses.replace(case, memory=True), RANKS)
    for mine, theirs in zip(found, wanted, strict=True):
        assert_bitwise(mine, theirs, theirs)


@given(cases(EXCHANGES["sums"], aligned=False), st.sampled_from([2, 3, 4, 16]))
def test_parts_equal_one_rank(ranks, case, chunks):
    """Through shared memory and collectives the same bits; twice, as the second call finds the memory used."""
    case = dataclasses.replace(case, options=(*case.options, ("chunks", chunks)))
    apart = ranks.run(rank_cases.run_twice, case, RANKS)
    found = ranks.run(rank_cases.run_twice, dataclasses.replace(case, memory=True), RANKS)
    for mine, theirs in zip(found, apart, strict=True):
        assert all(torch.equal(one, theirs[0]) for one in (*mine, theirs[1]))
    assert_near_exact(torch.cat([part[0] for part in found]), single_rank(case)["out"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_of_parts_is_that_of_one_rank(ranks, dtype):
    case = Case(
        widened(SPECS["gpt_oss"], hidden=64, width=48), (9, 5, 0, 9), dtype, (*EXCHANGES["sums"], ("chunks", 2))
    )
    apart = ranks.run(rank_cases.run_twice, case, RANKS)
    found = ranks.run(rank_cases.run_twice, dataclasses.replace(case, memory=True), RANKS)
    assert all(torch.equal(mine[1], theirs[0]) for mine, theirs in zip(found, apart, strict=True))
    # One rank, too, errs more in bf16 where its GEMMs have fewer rows, on some CPUs; so it gets the parts as well.
    layer, inputs, eager = case.whole_layer(), case.all_inputs(), torch.zeros(sum(case.tokens), 64, dtype=dtype)
    for first in (0, 5):
        starts = [sum(case.tokens[:rank]) for rank in range(RANKS)]
        spans = [range(start + first, start + min(first + 5, n)) for start, n in zip(starts, case.tokens, strict=True)]
        rows = [row for span in spans for row in span]
        with torch.no_grad():
            eager[rows] = layer.run_experts(*(tensor[rows] for tensor in inputs))
    oracle = single_rank(case, torch.float64)["out"]
    assert_oracle_ratio(torch.cat([part[0] for part in found]), eager, oracle)


@pytest.mark.parametrize("memory", [False, True])
def test_parts_compile_into_one_graph(pair, memory):
    case = Case(SPECS["qwen3"], (9, 4), torch.float64, (*EXCHANGES["sums"], ("chunks", 3)), memory=memory)
    parts, wanted = pair.run(rank_cases.run_twice, case, 2, True), single_rank(case)
    for number in range(2):
        assert_near_exact(torch.cat([part[number] for part in parts]), wanted["out"])


def test_parts_have_gradients_as_a_whole(pair):
    case = Case(SPECS["qwen3"], (9, 4), torch.float64, (*EXCHANGES["sums"], ("chunks", 3)))
    found, wanted = joined(pair.run(rank_cases.run_experts, case, 2), case), single_rank(case)
    for name, value in found.items():
        assert_near_exact(value, wanted[name], what=name)


@given(
    st.sampled_from(["sums", "experts", "width"]).flatmap(lambda n: cases({**EXCHANGES, **SPLITS}[n], aligned=False))
)
def test_sums_over_ranks_equal_one_rank(ranks, case):
    parts, wanted = ranks.run(rank_cases.run_experts, case, RANKS), single_rank(case)
    found = joined(parts, case)
    for name, value in found.items():
        assert_near_exact(value, wanted[name], what=name)
    if case.mode == "tp":
        for name in ("out", "hidden", "weights"):
            assert all(torch.equal(part[name], parts[0][name]) for part in parts), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [*EXCHANGES, *SPLITS])
def test_rounding_is_that_of_one_rank(ranks, how, dtype):
    spec = widened(SPECS["gpt_oss"], hidden=64, width=48)
    case = Case(spec, (9, 5, 0, 9), dtype, {**EXCHANGES, **SPLITS}[how])
    found = joined(ranks.run(rank_cases.run_experts, case, RANKS), case)
    eager, oracle = single_rank(case), single_rank(case, torch.float64)
    for name, value in found.items():
        assert_oracle_ratio(value, eager[name], oracle[name], what=name)


@pytest.mark.parametrize("how", [*EXCHANGES, *SPLITS])
@pytest.mark.parametrize(
    "name", ["qwen2_moe", "inkling", "longcat", "nemotron_h", "gpt_oss", "weight_on_input", "jetmoe"]
)
def test_whole_layers(ranks, name, how):
    case = Case(SPECS[name], (5, 0, 9, 2), torch.float64, {**EXCHANGES, **SPLITS}[how])
    parts = ranks.run(rank_cases.run_layer, case, RANKS)
    hidden_TH = torch.randn(16, 8, generator=torch.Generator().manual_seed(3)).double()
    wanted = rank_cases.layer_results(case.whole_layer(), hidden_TH)
    for key in ("out", "logits", "hidden"):
        found = parts[0][key] if case.mode == "tp" else torch.cat([part[key] for part in parts])
        assert_near_exact(found, wanted[key], what=key)
    for key in wanted.keys() - {"out", "logits", "hidden", *OF_EXPERTS}:
        if case.mode == "tp":
            assert_near_exact(parts[0][key], wanted[key], what=key)
        else:
            assert_near_exact(sum(part[key] for part in parts), wanted[key], what=key)


@pytest.mark.parametrize("impl", ["triton", "naive"])
@pytest.mark.parametrize("how", [*EXCHANGES, *SPLITS])
def test_two_replicas_of_two_ranks(ranks, how, impl):
    """A mesh of data-parallel replicas: each pair exchanges its tokens, also when another implementation runs them."""
    case = Case(SPECS["qwen3"], (3, 8), torch.float64, {**EXCHANGES, **SPLITS}[how], impl=impl)
    parts, wanted = ranks.run(rank_cases.run_experts, case, 2, 2), single_rank(case)
    for pair in (parts[:2], parts[2:]):
        for name, value in joined(pair, case).items():
            assert_near_exact(value, wanted[name], what=name)


@pytest.mark.parametrize("how", SPLITS)
def test_noise_is_the_same_where_tokens_are(ranks, how):
    """Each rank has its own seed; those that share tokens have to choose the same experts for them."""
    case = changed(Case(SPECS["mixtral"], (8,), torch.float64, SPLITS[how]), jitter=0.3)
    parts, layer = ranks.run(rank_cases.run_training, case, 2, 2), case.whole_layer().train()
    for first in (0, 2):
        torch.manual_seed(first)
        wanted = rank_cases.layer_results(layer, case.all_inputs()[0])
        for part in parts[first : first + 2]:
            for name in wanted.keys() - {"w13", "w2"}:
                assert_near_exact(part[name], wanted[name], what=name)


@pytest.mark.parametrize("tokens", [(0, 0, 0, 0), (0, 0, 7, 0)], ids=str)
@pytest.mark.parametrize("how", [*EXCHANGES, "experts"])
def test_ranks_without_tokens(ranks, how, tokens):
    case = Case(SPECS["mixtral"], tokens, torch.float64, {**EXCHANGES, **SPLITS}[how])
    found, wanted = joined(ranks.run(rank_cases.run_experts, case, RANKS), case), single_rank(case)
    for name, value in found.items():
        assert_near_exact(value, wanted[name], what=name)


@pytest.mark.parametrize("impl", ["triton", "naive"])
@pytest.mark.parametrize("how", [*EXCHANGES, "experts"])
def test_a_rank_whose_experts_nobody_chose_takes_part_in_backward(pair, how, impl):
    """Its gradients are zeros and not None, and the other rank does not wait for it."""
    case = Case(SPECS["gpt_oss"], (5, 3), torch.float64, {**EXCHANGES, **SPLITS}[how], impl=impl)
    found = joined(pair.run(rank_cases.run_on_first_expert, case, 2), case)
    wanted = rank_cases.first_expert_results(case.whole_layer(), *case.all_inputs()[:2])
    for name, value in wanted.items():
        assert_near_exact(found[name], value, what=name)


@pytest.mark.parametrize("how", [*EXCHANGES, *SPLITS])
def test_gradients_of_gradients(pair, how):
    case = Case(SPECS["qwen3"], (5, 3), torch.float64, {**EXCHANGES, **SPLITS}[how])
    found = joined(pair.run(rank_cases.run_second, case, 2), case, ("hidden", "weights"))
    wanted = rank_cases.second_gradients(case.whole_layer(), *case.all_inputs())
    for name, value in found.items():
        assert_near_exact(value, wanted[name], what=name)


PLANNED = Case(MoESpec(32, RoutingSpec(2), swiglu_experts(7, 32, 32)), (9, 6), seed=3)


@pytest.mark.parametrize("how", ["naive", "static"])
def test_a_planned_placement_equals_one_rank_bitwise(pair, how):
    """Counted, planned, and run: more experts on one rank than on the other, and none where they were."""
    options = {"naive": (), "static": STATIC}[how]
    counted = pair.run(rank_cases.run_counted, dataclasses.replace(PLANNED, options=options), 2)
    for told in counted:
        assert told["total"] == told["again"] == [sum(both) for both in zip(*(t["own"] for t in counted), strict=True)]
        assert told["own"] == told["unwatched"] == [2 * count for count in told["once"]]
    assert [sum(told["once"]) for told in counted] == [2 * tokens for tokens in PLANNED.tokens]
    plan = plan_placement(counted[0]["total"], 2)
    assert max(plan.after) < max(plan.before) and [len(owned) for owned in plan.placement.owned] == [3, 4]
    case = dataclasses.replace(PLANNED, options=(*options, ("placement", plan.placement)))
    found, wanted = joined(pair.run(rank_cases.run_experts, case, 2), case), single_rank(case)
    assert_bitwise(found, wanted, wanted.keys() - ({"hidden"} if how == "static" else set()))


@st.composite
def replicated(draw, options):
    """Layers whose experts have copies here and there, in any order."""
    case = draw(cases(options))
    num_experts = case.spec.experts.num_experts
    owned = []
    for experts in draw(placements(num_experts, RANKS)).owned:
        more = draw(st.sets(st.sampled_from(range(num_experts)), max_size=3)) - {*experts}
        owned.append(tuple(draw(st.permutations([*experts, *more]))))
    kept = tuple((name, value) for name, value in case.options if name != "placement")
    return dataclasses.replace(case, options=(*kept, ("placement", ExpertPlacement(tuple(owned)))))


PARTS = (*EXCHANGES["sums"], ("chunks", 2))


@given(st.sampled_from([EXCHANGES["naive"], EXCHANGES["static"]]).flatmap(replicated), st.booleans())
def test_copies_of_experts_equal_one_rank_bitwise(ranks, case, memory):
    """Where a row's result does not depend on the other rows: those of an expert are on several ranks now."""
    case = dataclasses.replace(case, memory=memory and ("dispatcher", "static") in case.options)
    parts = ranks.run(rank_cases.run_twice, case, RANKS, False, True)
    torch.set_num_threads(1)
    with torch.no_grad(), batch_invariant():
        wanted = case.whole_layer().run_experts(*case.all_inputs())
    for number in range(2):
        assert torch.equal(torch.cat([part[number] for part in parts]), wanted)


@given(st.sampled_from([EXCHANGES["sums"], PARTS]).flatmap(replicated))
def test_sums_of_copies_equal_one_rank(ranks, case):
    case = dataclasses.replace(case, dtype=torch.float64, memory=True)
    parts, wanted = ranks.run(rank_cases.run_twice, case, RANKS), single_rank(case)["out"]
    assert_near_exact(torch.cat([part[0] for part in parts]), wanted)


def test_a_plan_with_replicas_is_run(pair):
    """Half of what the first rank would have to do goes to the copy of its busiest expert."""
    plan = plan_placement([9, 1, 1, 1, 1, 1, 1], 2, replicas=1)
    assert plan.placement.replicas == {0: (0, 1)}
    case = dataclasses.replace(PLANNED, dtype=torch.float64, options=(("placement", plan.placement),))
    parts, wanted = pair.run(rank_cases.run_twice, case, 2), single_rank(case)["out"]
    assert_near_exact(torch.cat([part[0] for part in parts]), wanted)
    with pytest.raises(RankError, match=r"MoEUnsupportedError: .*no gradients of experts that are on several ranks"):
        pair.run(rank_cases.run_experts, case, 2)
    for message in pair.run(
        rank_cases.make_mismatched, (dataclasses.replace(case, options=(("mode", "tp"), *case.options)),) * 2
    ):
        assert message.startswith("MoEParallelError") and "each expert on one rank for the mode 'tp'" in message


@pytest.mark.parametrize("trained", OF_EXPERTS)
def test_no_tensor_of_copied_experts_is_trained(pair, trained):
    """A single one would make the copies differ."""
    owned = ExpertPlacement(((0, 1, 2, 3, 4), (4, 5, 6, 7, 0)))
    case = Case(SPECS["gpt_oss"], (3, 2), torch.float64, (("placement", owned),))
    for message, _ in pair.run(rank_cases.run_trained, case, 2, (trained,)):
        assert "no gradients of experts that are on several ranks" in message


def test_what_is_before_copied_experts_is_trained(pair):
    owned = ExpertPlacement(((0, 1, 2, 3, 4), (4, 5, 6, 7, 0)))
    case = Case(SPECS["gpt_oss"], (3, 2), torch.float64, (("placement", owned),))
    told = pair.run(rank_cases.run_trained, case, 2, ())
    assert [message for message, _ in told] == ["", ""]
    assert_near_exact(torch.cat([grad for _, grad in told]), single_rank(case)["hidden"])


def test_copies_of_new_experts_are_alike(ranks):
    """Each rank draws its own, and the first copy's are taken, on whichever rank that is."""
    placement = ExpertPlacement(((0, 1), (2, 3, 4), (5, 6), (3, 0)))
    case = dataclasses.replace(PLANNED, options=(("placement", placement),))
    made = ranks.run(rank_cases.make_fresh, case, RANKS)
    for name in ("w13", "w2"):
        first, second, _, last = (state[name] for state in made)
        assert torch.equal(last[0], second[1]) and torch.equal(last[1], first[0])
        for row in (*first, *second, *last):  # drawn, all of it, and not what memory held
            assert 0.9 * 32**-0.5 < row.abs().max() <= 32**-0.5 and row.unique().numel() > 0.9 * row.numel()


@pytest.mark.parametrize("how", ["naive", "static", "sums"])
def test_a_rank_without_tokens_needs_no_history(pair, how):
    """Nobody gives it hidden states that ask for gradients, and the others' take the way back through it."""
    with_tokens, without = pair.run(
        rank_cases.run_without_history, Case(SPECS["qwen3"], (5, 0), torch.float64, EXCHANGES[how]), 2
    )
    assert all(torch.equal(found, wanted) for wanted, found in zip(*with_tokens, strict=True))
    assert without[1][0] is None and all(
        torch.equal(a, b) for a, b in zip(*(part[1:] for part in without), strict=True)
    )


def test_data_parallel_training_leaves_experts_to_their_ranks(pair):
    """Gradients of what all ranks have are means over the ranks, those of experts sums over all tokens."""
    case = Case(SPECS["qwen3"], (5, 3), torch.float64, EXCHANGES["naive"])
    whole = case.whole_layer()
    whole(case.all_inputs()[0])[0].square().sum().backward()
    wanted = {name: tensor.grad for name, tensor in whole.named_parameters()}
    for rank, found in enumerate(pair.run(rank_cases.run_data_parallel, case, 2)):
        owned = list(owned_by(case, 2).owned[rank])
        assert found.keys() == wanted.keys()
        for name, grad in found.items():
            assert_near_exact(grad, wanted[name][owned] if name in OF_EXPERTS else wanted[name] / 2, what=name)


STEPS = ((0, 1), (1, 0), (5, 9), (9, 2), (3, 0))


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("name", "how", "memory"),
    [
        ("qwen3", "naive", False),
        ("weight_on_input", "naive", False),
        ("qwen2_moe", "static", False),
        ("weight_on_input", "static", False),
        ("qwen3", "sums", False),
        ("qwen3", "static", True),
        ("qwen3", "sums", True),
    ],
)
def test_exchanges_compile_into_one_graph(pair, name, how, memory, train):
    case = Case(SPECS[name], (), torch.float64, EXCHANGES[how], memory=memory)
    for told in pair.run(rank_cases.run_compiled, case, 2, "aot_eager", STEPS, train):
        assert told["graphs"] <= 3 and told["stage"] == "COMBINED"
        for found, wanted in told["results"]:
            for key, value in wanted.items():
                assert_near_exact(found[key], value, what=key)


@pytest.mark.parametrize("how", ["naive", "static", "sums"])
@pytest.mark.parametrize(("single", "most"), [((), 3), (((1, 1),), 4)])
def test_graphs_for_the_first_number_all_others_none_and_one(pair, how, single, most):
    """In this order; with `STEPS`, where the first numbers are none and one, these count as the first."""
    case = Case(SPECS["qwen3"], (), torch.float64, EXCHANGES[how])
    steps = ((5, 9), (0, 5), (9, 0), *single, (3, 7), (0, 0), (4, 8), (7, 3))
    for told in pair.run(rank_cases.run_compiled, case, 2, "aot_eager", steps, False):
        assert told["graphs"] <= most
        for found, wanted in told["results"]:
            assert_near_exact(found["out"], wanted["out"])


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("how", "first"),
    [
        *((how, first) for how in ("naive", "static", "sums") for first in ((5, 9), (0, 1), (4, 6))),
        *((how, (9, 9)) for how in SPLITS),
    ],
)
def test_dynamic_graphs_for_none_one_and_all_others(pair, how, first, train):
    """In any order, also where a table of the layer has as many rows as there are tokens."""
    case = Case(SPECS["qwen3"], (), torch.float64, {**EXCHANGES, **SPLITS}[how])
    if case.mode == "tp":  # all ranks have the same tokens
        steps = (first, (0, 0), (5, 5), (1, 1), (3, 3))
    else:
        steps = (first, (0, 5), (9, 0), (1, 1), (3, 7), (0, 0), (4, 8), (7, 3))
    for told in pair.run(rank_cases.run_compiled, case, 2, "aot_eager", steps, train, True):
        assert told["graphs"] <= 3
        for found, wanted in told["results"]:
            for key, value in wanted.items():
                assert_near_exact(found[key], value, what=key)


def test_compiled_code_holds_what_of_the_naive_exchange_has_a_shape(pair):
    """Without `fullgraph`, where the graph breaks; the graphs around serve every routing soon."""
    case = Case(SPECS["qwen3"], (9, 4), torch.bfloat16, EXCHANGES["naive"])
    for found in pair.run(rank_cases.run_broken, case, 2, 6):
        assert all(torch.equal(one, other) for one, other in found["results"])
        for op in ("diffulex.moe_combine", "diffulex.moe_dispatch", "diffulex_exchange.exchange"):
            assert any(op in name for graph in found["graphs"] for name in graph), op
        assert found["counts"][2] == found["counts"][-1], found["counts"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "memory"),
    [((), False), (STATIC, False), (STATIC, True), ((*EXCHANGES["sums"], ("chunks", 2)), True)],
    ids=["naive", "collectives", "memory", "parts"],
)
def test_inductor_compiles_exchanges(pair, options, memory):
    """Where a rank has no tokens nothing reads what comes back to it, and the others wait for it nevertheless."""
    case = Case(SPECS["qwen3"], (), torch.float64, options, memory=memory)
    for told in pair.run(rank_cases.run_compiled, case, 2, "inductor", STEPS[2:5], False):
        for found, wanted in told["results"]:
            assert_near_exact(found["out"], wanted["out"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), STATIC], ids=["naive", "static"])
def test_inductor_compiles_training(pair, options):
    case = Case(SPECS["qwen3"], (), torch.float64, options)
    for told in pair.run(rank_cases.run_compiled, case, 2, "inductor", ((5, 9), (0, 5), (9, 0)), True):
        for found, wanted in told["results"]:
            for key, value in wanted.items():
                assert_near_exact(found[key], value, what=key)


@pytest.mark.slow
def test_what_orders_exchanges_keeps_no_rows_alive(pair):
    """As many of a deep model's layers as of a shallow one's."""
    for counts in pair.run(rank_cases.run_deep, 5):
        assert len(counts) == 15 and max(counts) <= 4, counts


@pytest.mark.slow
@pytest.mark.parametrize(("options", "memory"), [((), False), (STATIC, True)], ids=["naive", "memory"])
def test_compiled_layers_exchange_in_one_order(pair, options, memory):
    """One depends on the other, and a third call on none of them; nothing of a rank without tokens tells."""
    case = Case(SPECS["qwen3"], (), torch.float64, options, memory=memory)
    told = pair.run(rank_cases.run_stack, case, 2, (0, 4))
    assert told[0]["orders"] == told[1]["orders"] and min(map(len, told[0]["orders"])) >= 6
    for found, wanted in (ranked["results"] for ranked in told):
        for key, value in wanted.items():
            assert_near_exact(found[key], value, what=key)


@pytest.mark.parametrize(
    "options",
    [
        (),
        (("placement", ExpertPlacement(((5,), (7, 0), (1, 2, 6), (4, 3)))),),
        (("placement", ExpertPlacement(((5, 1), (7, 0), (1, 2, 6), (4, 3, 1)))),),
        SPLITS["experts"],
    ],
)
def test_each_rank_loads_its_experts_from_a_checkpoint(ranks, options, tmp_path):
    case = Case(SPECS["qwen3"], (), torch.float32, options)
    names = {"gate.weight": "gate.weight", "w13": "experts.gate_up_proj", "w2": "experts.down_proj"}
    state = case.whole_layer().state_dict()
    stored = {f"model.layers.0.mlp.{names[name]}": tensor.contiguous() for name, tensor in state.items()}
    save_file(stored | {"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for rank, told in enumerate(ranks.run(rank_cases.run_checkpoint, case, RANKS, str(tmp_path))):
        assert told["owned"] == owned_by(case, RANKS).owned[rank] and told["rest"] == ["model.norm.weight"]
        assert_bitwise(told["loaded"], told["wanted"], told["wanted"])


@pytest.mark.parametrize("how", ["naive", *SPLITS])
def test_the_state_of_one_rank_is_not_for_another(pair, how):
    case = Case(SPECS["qwen3"], (), options={**EXCHANGES, **SPLITS}[how])
    own, other = pair.run(rank_cases.load_state, case, 2, 0, case)
    assert own == ("", True) and not other[1]
    experts = [[0, 1, 2, 3], [4, 5, 6, 7]] if how != "width" else [[*range(8)], [*range(8)]]
    units = [[0, 3], [3, 6]] if how == "width" else [[0, 6], [0, 6]]
    told = [f"experts {experts[rank]}, units {units[rank]} of their width" for rank in range(2)]
    assert f"on rank 1: expected the state of {told[1]}, got {told[0]}. " in other[0] and "load_full" in other[0]


def test_the_state_of_one_placement_is_not_for_another(pair):
    case = Case(SPECS["qwen3"], ())
    for owned in (((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1, 3, 2), (5, 4, 6, 7)), ((0, 1, 2), (3, 4, 5, 6, 7))):
        other = dataclasses.replace(case, options=(("placement", ExpertPlacement(owned)),))
        for source in range(2):
            message, changed = pair.run(rank_cases.load_state, case, 2, source, other)[source]
            assert f"expected the state of experts {[*owned[source]]}" in message and not changed


def test_states_go_through_fsdp_and_distributed_checkpoints(pair, tmp_path):
    case = Case(SPECS["qwen3"], ())
    for told in pair.run(rank_cases.store_sharded, case, 2, str(tmp_path)):
        assert told.pop("_extra_state").tolist() == [0, 6, *range(8)]
        wanted = case.whole_layer().state_dict()
        assert told.keys() == wanted.keys()
        assert_bitwise(told, wanted, wanted)


def test_new_layers_agree_on_what_is_replicated(ranks):
    spec = SPECS["deepseek_v3"]
    for options in ((), SPLITS["width"]):
        made = ranks.run(rank_cases.make_fresh, Case(spec, (), options=options), RANKS)
        for name in made[0].keys() - {"text", "_extra_state", *OF_EXPERTS}:
            assert all(torch.equal(state[name], made[0][name]) for state in made), name
        assert not torch.equal(made[0]["w2"], made[1]["w2"])
    assert (
        "8 of E=8, 2 of I=6" in made[0]["text"] and "1 of I=6" in made[3]["text"] and "rank 3 of 4" in made[3]["text"]
    )


BASE = Case(SPECS["qwen3"], (), options=(("dispatcher", "naive"),))


@pytest.mark.parametrize(
    ("others", "text"),
    [
        ({2: changed(BASE, top_k=3)}, "routing.top_k 2 on ranks 0, 1, 3, 3 on rank 2"),
        (
            {1: changed(BASE, scale=2.0), 3: changed(BASE, scale=2.0)},
            "routing.scale 1.0 on ranks 0, 2, 2.0 on ranks 1, 3",
        ),
        (
            {3: dataclasses.replace(BASE, options=STATIC)},
            "dispatcher 'naive' on ranks 0, 1, 2, 'static' on rank 3; max_",
        ),
        (
            {0: dataclasses.replace(BASE, dtype=torch.bfloat16)},
            "dtype torch.bfloat16 on rank 0, torch.float32 on ranks",
        ),
        (
            {0: dataclasses.replace(BASE, options=SPLITS["experts"])},
            "layer TPFusedMoE on rank 0, EPFusedMoE on ranks 1",
        ),
        (
            {1: dataclasses.replace(BASE, options=(("placement", ExpertPlacement(((7, 6), (5, 4), (3, 2), (1, 0)))),))},
            "placement None on ranks 0, 2, 3, ((7, 6), (5, 4), (3, 2), (1, 0)) on rank 1",
        ),
        ({2: dataclasses.replace(BASE, options=(("dispatcher", "ring"),))}, "on rank 2: [MOE005] ParallelConfig"),
        ({2: dataclasses.replace(BASE, options=STATIC[:1])}, "max_tokens_per_rank >= 1"),
    ],
)
def test_what_differs_is_named_on_every_rank(ranks, others, text):
    told = ranks.run(rank_cases.make_mismatched, tuple(others.get(rank, BASE) for rank in range(RANKS)))
    assert all(message.startswith("MoEParallelError [MOE009]") and text in message for message in told), told
    assert ranks.run(rank_cases.make_mismatched, (BASE,) * RANKS) == ["no error"] * RANKS


@pytest.mark.parametrize("how", ["naive", *SPLITS])
def test_ranks_without_values_are_named(pair, how):
    """A rank on the meta device has nothing to give out, and the others would wait for it."""
    case = Case(SPECS["qwen3"], (), options={**EXCHANGES, **SPLITS}[how])
    for devices in (("cpu", "meta"), ("meta", "cpu")):
        for message in pair.run(rank_cases.make_on_devices, case, devices):
            assert f"device {devices[0]} on rank 0, {devices[1]} on rank 1" in message
    for device in ("meta", "cpu"):
        assert pair.run(rank_cases.make_on_devices, case, (device, device)) == [device, device]


def test_tokens_of_weighted_inputs_are_counted_as_tokens(pair):
    """They travel slot by slot."""
    case = Case(SPECS["weight_on_input"], (9, 4), options=STATIC)
    pair.run(rank_cases.run_experts, case, 2)
    case = dataclasses.replace(case, tokens=(10, 10))
    with pytest.raises(RankError, match=r"at most 9 tokens, got 10\."):
        pair.run(rank_cases.run_experts, case, 2)


@pytest.mark.parametrize(
    ("spec", "options", "text"),
    [
        (
            dataclasses.replace(BASE.spec, experts=swiglu_experts(3)),
            (),
            r"one expert for each of 4 ranks, got \[1, 1, 1, 0\]",
        ),
        (dataclasses.replace(BASE.spec, experts=swiglu_experts(8, width=3)), SPLITS["width"], "as wide as there are"),
        (BASE.spec, (("placement", ExpertPlacement(((0,), (1,), (2,), (3,)))),), "each expert of 8 on a rank"),
        (BASE.spec, (*EXCHANGES["sums"], ("chunks", 17)), "1 to 16 chunks, got 17"),
    ],
)
def test_what_cannot_be_spread_is_refused_everywhere(ranks, spec, options, text):
    case = Case(spec, (), options=options)
    told = ranks.run(rank_cases.make_mismatched, (case,) * RANKS)
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(told[0])
    assert all(message.startswith("MoEParallelError") for message in told)


def test_an_error_on_a_rank_reaches_the_test(ranks):
    with pytest.raises(RankError, match=r"rank 0:[\s\S]*at most 9 tokens, got 10"):
        ranks.run(rank_cases.run_experts, Case(SPECS["qwen3"], (10,) * RANKS, options=STATIC), RANKS)
