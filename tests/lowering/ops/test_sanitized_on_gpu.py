"""Every generated kernel at small and awkward sizes, on its own and under compute-sanitizer: no bad access, no race.

One child a tool runs all cases of a test, so that torch is imported once. References are computed on the CPU: what runs
on the device are the generated kernels and copies. Two planted errors show that both tools see errors in kernels that
are launched like these. racecheck follows what threads read and write in shared memory: whether it knows of copies by
tensor descriptors is not documented, so kernels with them have a test of their own.
"""

import functools
import re
from unittest import mock

import pytest
import torch
from torch.nn.functional import linear, silu

import diffulex  # noqa: F401  the passes that find a router's product and a shared expert
from lowering.inductor.passes import register_lowerings
from lowering.ops.moe_dispatch import _cuda as dispatch_on_gpu
from lowering.ops.moe_route import _cuda as route_on_gpu
from lowering.reference.moe_dispatch import moe_dispatch_reference
from lowering.reference.moe_route import moe_route_reference
from lowering.report import collect
from lowering.schedule.schedule import Loop, Schedule
from lowering.spec import RoutingSpec
from lowering.templates import eager, standalone
from tests.lowering.ops import test_moe_dispatch as of_dispatch
from tests.lowering.ops import test_moe_expert_down as of_down
from tests.lowering.ops import test_moe_expert_grad_weight as of_grad_weight
from tests.lowering.ops import test_moe_expert_up as of_up
from tests.lowering.ops import test_moe_route as of_route
from tests.support.inputs import BlockForm, cast, down_args, grad_weight_args, up_args
from tests.support.oracle import assert_oracle_ratio
from tests.support.sanitizer import under_sanitizer

pytestmark = pytest.mark.gpu

ops = torch.ops.diffulex
DOUBLE, HALF = torch.float64, torch.float16
# No size is a multiple of a block, a third of the ids are of no expert, rows past offsets[E] belong to none
ODD = BlockForm(tokens=45, top_k=3, experts=7, hidden=67, width=37, ids="sentinels", bias=True, dtype=HALF)
ALIGNED = ODD.replace(hidden=72, width=40)  # as descriptors ask for, and still no multiples
GPT_OSS = {"act": "swiglu_oai", "interleaved": True, "transposed": True}
T16, T32, T64 = Schedule(16, 32, 64, 4, 3), Schedule(32, 64, 64, 4, 3), Schedule(64, 64, 64, 4, 3)
T128 = Schedule(128, 128, 64, 8, 3)
GROUPED = Schedule(16, 32, 64, 4, 3, Loop(grouped=True), group_m=2)


def tma(block_n=64, **loop):
    return Schedule(64, block_n, 64, 4, 3, Loop(tma=True, **loop), group_m=2)


class ThreeSMs:
    """So that a program takes several tiles, one after the other."""

    num_sms = 3
    capability = (9, 0)


def launched(function, args, schedule, device, **options):
    """The kernel's output on the CPU for arguments on the CPU."""
    args = [arg.to(device) if torch.is_tensor(arg) else arg for arg in args]
    if schedule is None or not schedule.loop.tma:
        return function(*args, **options, schedule=schedule).cpu()
    with mock.patch.object(eager, "device_spec", return_value=ThreeSMs):
        return function(*args, **options, schedule=schedule).cpu()


def up(device, schedule=None, form=ODD, **changes):
    args = up_args(form.replace(**changes))
    options = {"act": args[6], "interleaved": args[7]}
    ours = launched(eager.moe_expert_up, args[:5], schedule, device, **options)
    assert_oracle_ratio(ours, of_up.eager(*args), of_up.reference(*cast(args, DOUBLE)))


def down(device, schedule=None, form=ODD, **changes):
    args = down_args(form.replace(**changes))
    ours = launched(eager.moe_expert_down, args, schedule, device)
    assert_oracle_ratio(ours, of_down.eager(*args), of_down.reference(*cast(args, DOUBLE)))


def grad_weight(device, sides, **changes):
    left, right = sides.split("_")
    args = grad_weight_args(ODD.replace(**changes), left=left, right=right)
    ours = eager.moe_expert_grad_weight(*[arg if arg is None else arg.to(device) for arg in args]).cpu()
    assert_oracle_ratio(ours, of_grad_weight.eager(*args), of_grad_weight.reference(*cast(args, DOUBLE)))


def dispatch(device, tokens, *, top_k=3, experts=7, kind="outside", dtype=torch.int32):
    ids_TK = of_dispatch.make_ids(kind, tokens, top_k, experts, dtype)
    of_dispatch.assert_same(dispatch_on_gpu(ids_TK.to(device), experts), moe_dispatch_reference(ids_TK, experts))


def route(device, spec, tokens=33, *, dtype=torch.float32, bias=False, given=False, experts=of_route.EXPERTS):
    logits_TE = of_route.with_ties(tokens, dtype)[:, :experts]
    bias_E = of_route.values("normal", (experts,), 1) / 8 if bias else None
    ids_TK = of_route.given_ids(tokens, spec.top_k, experts) if given else None
    tensors = [None if tensor is None else tensor.to(device) for tensor in (logits_TE, bias_E, ids_TK)]
    ours = route_on_gpu(*tensors, *spec.op_args())
    exact_TK, wanted_TK = moe_route_reference(logits_TE, spec, bias_E=bias_E, ids_TK=ids_TK, dtype=DOUBLE)
    of_route.assert_same(ours, (exact_TK.float(), wanted_TK), rtol=1e-5)  # as the op's own test on the device


# A compiled layer: the router's product, slots sorted by the first expert GEMM where they are few, a shared expert
# in both stages, the weighted sum.

EXPERTS, TOP_K, HIDDEN, WIDTH, SHARED = 12, 3, 72, 40, 56


def layer(hidden_TH, gate_EH, w13_EJH, w2_EHI, w1_SH, w3_SH, w2_HS):
    logits_TE = linear(hidden_TH, gate_EH)
    weights_TK, ids_TK = ops.moe_route(logits_TE, None, None, *RoutingSpec(TOP_K).op_args())
    out_TH = experts(hidden_TH, weights_TK, ids_TK, w13_EJH, w2_EHI, w1_SH, w3_SH, w2_HS)
    return out_TH, weights_TK, ids_TK, logits_TE


def experts(hidden_TH, weights_TK, ids_TK, w13_EJH, w2_EHI, w1_SH, w3_SH, w2_HS):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, EXPERTS)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, TOP_K, "silu(g) * u")
    slots_NH = ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)
    shared_TH = linear(silu(linear(hidden_TH, w1_SH)) * linear(hidden_TH, w3_SH), w2_HS)
    return ops.moe_combine(slots_NH, weights_TK) + shared_TH


def layer_inputs(tokens):
    generator = torch.Generator().manual_seed(tokens)
    sizes = [(tokens, HIDDEN), (EXPERTS, HIDDEN), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)]
    sizes += [(SHARED, HIDDEN), (SHARED, HIDDEN), (HIDDEN, SHARED)]
    hidden_TH, *weights = (torch.randn(size, generator=generator) / size[-1] ** 0.5 for size in sizes)
    return [tensor.to(HALF) for tensor in (6 * hidden_TH, *weights)]


def compiled_layer(inputs, device):
    register_lowerings()
    torch._dynamo.reset()
    # in this process, and without timing: both would take long under a tool
    options = {"compile_threads": 1, "triton.autotune_pointwise": False}
    with torch._inductor.config.patch(options), torch.no_grad():
        outs = torch.compile(layer, fullgraph=True, dynamic=False)(*[tensor.to(device) for tensor in inputs])
    return [out.cpu() for out in outs]


def compiled(device, tokens, told):
    """`told`: what the compiler says of each op, by what it begins with."""
    inputs = layer_inputs(tokens)
    with collect() as decisions:
        out_TH, weights_TK, ids_TK, logits_TE = compiled_layer(inputs, device)
    outcomes = {decision.subject: decision.outcome for decision in decisions if decision.stage == "lower"}
    assert all(outcomes[name].startswith(begin) for name, begin in told.items()), outcomes
    hidden_TH, gate_EH, *weights = inputs
    exact = cast(tuple(inputs), DOUBLE)
    assert_oracle_ratio(logits_TE, linear(hidden_TH, gate_EH), linear(*exact[:2]), what="logits")
    exact_TK, wanted_TK = moe_route_reference(logits_TE, RoutingSpec(TOP_K), dtype=DOUBLE)
    of_route.assert_same((weights_TK, ids_TK), (exact_TK.float(), wanted_TK), rtol=1e-5)
    wanted_TH = experts(exact[0], weights_TK.double(), ids_TK, *exact[2:])
    assert_oracle_ratio(out_TH, experts(hidden_TH, weights_TK, ids_TK, *weights), wanted_TH)


DSV3 = of_route.SPECS["deepseek_v3"]
TOLD = {
    "moe_route": "triton moe_route_linear",
    "moe_dispatch": "triton moe_dispatch",
    "moe_expert_up": "triton moe_expert_up_shared",
    "moe_expert_down": "triton moe_expert_down_shared",
    "moe_combine": "Inductor IR",
}
SORTED = TOLD | {"moe_dispatch": "in the kernel of moe_expert_up"}
VECTORS = {"moe_expert_up": "triton moe_expert_vector_up", "moe_expert_down": "triton moe_expert_vector_sum"}
IN_PLACE = TOLD | VECTORS | {"moe_dispatch": "nowhere"}
CASES = {
    "route": (route, RoutingSpec(3)),
    "route_groups_biased": (route, DSV3, {"bias": True}),
    "route_bfloat16": (route, of_route.SPECS["sqrtsoftplus"], {"dtype": torch.bfloat16}),
    "route_13_experts": (route, RoutingSpec(3, "sigmoid", renorm=False), {"experts": 13}),
    "route_given_ids": (route, RoutingSpec(3), {"given": True}),
    "route_one_token": (route, DSV3, {"tokens": 1}),
    "route_no_tokens": (route, RoutingSpec(3), {"tokens": 0}),
    "route_1100_tokens": (route, RoutingSpec(3), {"tokens": 1100}),
    "dispatch": (dispatch, 45),
    "dispatch_int64": (dispatch, 331, {"dtype": torch.int64}),
    "dispatch_no_valid_id": (dispatch, 9, {"kind": "none"}),
    "dispatch_one_token": (dispatch, 1),
    "dispatch_no_tokens": (dispatch, 0),
    "dispatch_two_kernels": (dispatch, 1101, {"top_k": 8, "experts": 60}),
    "dispatch_two_kernels_few_experts": (dispatch, 2777, {"kind": "few"}),
    "up_planned": (up,),
    "up_16": (up, T16),
    "up_32_interleaved": (up, T32, {"interleaved": True}),
    "up_64_transposed": (up, T64, {"transposed": True}),
    "up_64_gpt_oss": (up, T64, GPT_OSS),
    "up_128_ungated": (up, T128, {"act": "relu2"}),
    "up_128_one_expert_gets_all": (up, T128, {"ids": "one", "bias": False}),
    "up_grouped": (up, GROUPED),
    "up_grouped_experts_without_rows": (up, GROUPED, {"ids": "sparse"}),
    "up_no_valid_id": (up, T16, {"ids": "none"}),
    "up_one_token": (up, T16, {"tokens": 1}),
    "up_no_tokens": (up, T16, {"tokens": 0}),
    "up_even_depth": (up, T16, {"hidden": 128}),
    "up_bfloat16": (up, T16, {"dtype": torch.bfloat16}),
    "up_float32": (up, T16, {"dtype": torch.float32}),
    "up_width_one": (up, T16, {"width": 1, "hidden": 1}),
    "down_planned": (down,),
    "down_16": (down, T16),
    "down_32_transposed": (down, T32, {"transposed": True}),
    "down_64": (down, T64, {"bias": False}),
    "down_128_one_expert_gets_all": (down, T128, {"ids": "one"}),
    "down_grouped": (down, GROUPED, {"ids": "sparse"}),
    "down_no_valid_id": (down, T16, {"ids": "none"}),
    "down_one_token": (down, T16, {"tokens": 1}),
    "down_no_tokens": (down, T16, {"tokens": 0}),
    "down_bfloat16": (down, T16, {"dtype": torch.bfloat16}),
    "grad_weight_slot_row": (grad_weight, "slot_row"),
    "grad_weight_row_token_bfloat16": (grad_weight, "row_token", {"dtype": torch.bfloat16}),
    "grad_weight_float32": (grad_weight, "slot_token", {"dtype": torch.float32}),
    "grad_weight_experts_without_rows": (grad_weight, "row_row", {"ids": "sparse"}),
    "grad_weight_one_token": (grad_weight, "slot_row", {"tokens": 1}),
    "grad_weight_no_tokens": (grad_weight, "slot_row", {"tokens": 0}),
}
BY_DESCRIPTORS = {
    "up_tma": (up, tma()),
    "up_tma_subtiles": (up, tma(subtiles=2), {"bias": False}),
    "up_tma_flatten": (up, tma(flatten=True)),
    "up_tma_flatten_subtiles": (up, tma(128, flatten=True, subtiles=2), {"ids": "sparse"}),
    "up_tma_interleaved": (up, tma(flatten=True), {"interleaved": True}),
    "up_tma_transposed": (up, tma(), {"transposed": True}),
    "up_tma_gpt_oss": (up, tma(flatten=True, subtiles=2), GPT_OSS),
    "up_tma_ungated": (up, tma(), {"act": "relu2"}),
    "up_tma_no_valid_id": (up, tma(), {"ids": "none"}),
    "up_tma_one_token": (up, tma(flatten=True), {"tokens": 1}),
    "down_tma": (down, tma()),
    "down_tma_subtiles": (down, tma(128, subtiles=2), {"bias": False}),
    "down_tma_flatten": (down, tma(flatten=True), {"ids": "one"}),
    "down_tma_flatten_subtiles": (down, tma(flatten=True, subtiles=2), {"ids": "sparse"}),
    "down_tma_transposed": (down, tma(), {"transposed": True}),
    "down_tma_one_token": (down, tma(), {"tokens": 1}),
}
WHOLE = ODD.replace(hidden=256, width=256, bias=False, dtype=torch.bfloat16)  # as specialised warps ask for
BY_WARPS = {
    "up_specialized": (up, Schedule.specialized(gated=True)),
    "up_specialized_four_row_tiles": (up, Schedule.specialized(gated=True), {"tokens": 200, "ids": "one"}),
    "up_specialized_ungated": (up, Schedule.specialized(gated=False), {"act": "relu2"}),
    "up_specialized_no_valid_id": (up, Schedule.specialized(gated=True), {"ids": "none"}),
    "down_specialized": (down, Schedule.specialized(gated=False)),
    "down_specialized_two_row_tiles": (down, Schedule.specialized(gated=False), {"tokens": 150, "ids": "one"}),
    "down_specialized_one_token": (down, Schedule.specialized(gated=False), {"tokens": 1}),
    "up_specialized_in_pieces": (up, Schedule.specialized(gated=True, split_k=True), {"hidden": 8192, "width": 128}),
    "down_specialized_in_pieces": (down, Schedule.specialized(gated=False, split_k=True), {"width": 8192}),
}
COMPILED = {
    "compiled_one_token": (compiled, 1, IN_PLACE),
    "compiled_21_tokens": (compiled, 21, SORTED),
    "compiled_45_tokens": (compiled, 45, TOLD),
}


def as_call(kind, *args, form=None):
    """A function of the device; the last argument may be a dict of options."""
    options = args[-1] if args and isinstance(args[-1], dict) and kind is not compiled else {}
    args = args[:-1] if options else args
    options = options if form is None else {"form": form, **options}
    return functools.partial(lambda device: kind(device, *args, **options))


CALLS = {name: as_call(*case) for name, case in {**CASES, **COMPILED}.items()}
DESCRIBED = {name: as_call(*case, form=ALIGNED) for name, case in BY_DESCRIPTORS.items()}
WARPS = {name: as_call(*case, form=WHOLE) for name, case in BY_WARPS.items()}


@pytest.mark.parametrize("case", CALLS)
def test_launches(case):
    with mock.patch.object(standalone, "launch", wraps=standalone.launch) as launch:
        CALLS[case]("cuda")
    assert launch.called or case in COMPILED


@pytest.mark.parametrize("case", DESCRIBED)
def test_launches_by_descriptors(case):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor descriptors before sm_90")
    DESCRIBED[case]("cuda")


@pytest.mark.parametrize("case", WARPS)
def test_launches_by_warps(case):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("kernels of sm_90 alone")
    WARPS[case]("cuda")


@under_sanitizer("memcheck", "racecheck", runs="test_launches")
def test_no_bad_access_and_no_race(found):
    found.assert_clean()
    assert found.cases == {f"test_launches[{case}]": "passed" for case in CALLS}


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no tensor descriptors here"
)
@under_sanitizer("memcheck", "racecheck", runs="test_launches_by_descriptors")
def test_nor_by_descriptors(found):
    found.assert_clean()
    assert found.cases == {f"test_launches_by_descriptors[{case}]": "passed" for case in DESCRIBED}


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="kernels of sm_90 alone"
)
@under_sanitizer("memcheck", "racecheck", runs="test_launches_by_warps")
def test_nor_by_warps(found):
    """racecheck takes how Triton starts the groups of warps for races: the words that its first group leaves in shared
    memory for the others, and that they wait for at a barrier. What it says of the functions of the groups counts, but
    for a tile's number that one warp leaves to the others: all threads of a group read or write it before a barrier of
    theirs, behind which one of them arrives for all at what the other side waits for.
    """
    assert found.cases == {f"test_launches_by_warps[{case}]": "passed" for case in WARPS}
    if found.tool == "memcheck":
        found.assert_clean()
        return
    with mock.patch.object(standalone, "_jit_function", wraps=standalone._jit_function) as made:
        for case in WARPS.values():
            case("cuda")
    sources = {kernel.name: kernel.source.splitlines() for ((kernel,), _) in made.call_args_list}
    races = [
        [(name, int(line)) for name, line in re.findall(r"access at (\w+)\+0x[0-9a-f]+ in \w+\.py:(\d+)", race)]
        for race in found.report.split("Race reported between")[1:]
    ]
    assert (found.errors or 0) <= len(races) and all(len(places) >= 2 for places in races)
    for places in races:
        inside = {sources[name][line - 1].strip() for name, line in places if line < _first_line(sources[name])}
        handed = all(re.search(r"\bgiven\.(load|store)\(", line) for line in inside)
        assert not inside or (handed and len(inside) == 2), (inside, found.report)


def _first_line(source):
    """Where the kernel begins, behind the functions of its groups."""
    return next(at for at, line in enumerate(source, 1) if line.startswith("def _moe_"))


# Planted errors: what was found above was found by tools that see errors

PAST_THE_END = """{{def_kernel("IN")}}
    n = tl.arange(0, BLOCK)
    {{store_output(("n",), "n", "None")}}
"""
# Triton puts a barrier wherever its own shared memory needs one, so the race is in PTX: a thread reads what one of the
# next warp writes. `planted` are 128 words, one for each thread.
WITHOUT_A_BARRIER = '''{{def_kernel("IN")}}
    n = tl.arange(0, BLOCK)
    value = tl.inline_asm_elementwise(
        """
        {
        .shared .align 4 .b32 planted[128];
        .reg .b32 base, mine, theirs;
        mov.u32 base, planted;
        shl.b32 mine, $1, 2;
        xor.b32 theirs, mine, 128;
        add.u32 mine, base, mine;
        add.u32 theirs, base, theirs;
        st.volatile.shared.b32 [mine], $1;
        ld.volatile.shared.b32 $0, [theirs];
        }
        """,
        "=r,r",
        [n],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    {{store_output(("n",), "value", "None")}}
'''


def plant(text, name, size, block):
    """The output [size] int32 of a kernel of one program that takes `block` elements."""
    out = torch.zeros(size, dtype=torch.int32, device="cuda")
    tensors = {"IN": out, "OUT": out}
    standalone.launch(text, tensors, name=name, constants={"BLOCK": block}, grid=(1,), num_warps=4, num_stages=1)
    return out.cpu()


def test_planted_write(inside_sanitizer):
    plant(PAST_THE_END, "planted_write", 200, 256)


def test_planted_race(inside_sanitizer):
    assert plant(WITHOUT_A_BARRIER, "planted_race", 128, 128).shape == (128,)


@under_sanitizer("memcheck", runs="test_planted_write")
def test_memcheck_sees_a_write_past_the_end(found):
    found.assert_reported("Invalid __global__ write", "planted_write")


@under_sanitizer("racecheck", runs="test_planted_race")
def test_racecheck_sees_a_missing_barrier(found):
    found.assert_reported("Race reported", "planted_race")
