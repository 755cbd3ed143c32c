"""Kernels that begin early: they wait ahead of every access to memory, on sm_90 alone, where a graph asks for it."""

import re
from importlib import resources

import pytest
import torch

import diffulex  # noqa: F401  its passes take the router's product into two kernels
from lowering.inductor import early, lowerings
from lowering.inductor.fake_device import A100, H100, fake_gpu
from lowering.inductor.offline import _binary, _scratch_caches, offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.schedule.schedule import Loop, Schedule
from tests.lowering.inductor.test_generated_block import E, block, block_inputs

ops = torch.ops.diffulex
WAIT, LAUNCH = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"
TOUCHES = r"load|store|atomic|descriptor|\breturn\b|inline_asm|_dispatch_ids"
GRAPHS, ASKED = {"triton.cudagraphs": True}, {"triton.enable_pdl": True}
FEW, MANY = Schedule(16, 32, 32, 4, 2), Schedule(64, 32, 32, 4, 2, Loop(tma=True, flatten=True))
faked = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")


def generated(options, fn=block, tokens=16, schedule=FEW, gpu=H100):
    """The code of a bfloat16 block for a faked GPU, and what was said of its ops."""
    register_lowerings()
    torch._dynamo.reset()
    inputs = [tensor.bfloat16() for tensor in block_inputs(tokens, 0)]
    with pytest.MonkeyPatch.context() as patch, collect() as decisions:
        patch.setattr(lowerings, "schedule_of", lambda rows, shape, device: (schedule, None))
        code = offline_source(fn, inputs, options=options, gpu=gpu)
    return code, [d.outcome for d in decisions if d.stage == "lower"]


def is_early(kernel):
    """Whether a kernel has the launch attribute; it waits if and only if it has."""
    declared = "'launch_pdl': True" in kernel.source
    counts = [kernel.source.count(text) for text in (WAIT, LAUNCH)]
    assert counts == [int(declared)] * 2, kernel.name
    return declared


def assert_waits_first(kernel):
    """Ahead of what touches memory, returns or calls another function, outside of loops and branches."""
    body = kernel.source.partition(f"def {kernel.name}(")[2].partition("):\n")[2].partition("@triton.jit")[0]
    body = re.sub(r"#.*", "", body)
    before, after = f"\n{body}".split(f"\n    {WAIT}\n    {LAUNCH}\n")
    assert not re.search(TOUCHES, before), before
    assert re.search(TOUCHES, after)


def test_every_template_can():
    """But for one that a graph calls as an op, which begins when all before has ended, and one that reads weights ahead
    (`test_vectors.py`).
    """
    folder = resources.files("lowering.templates")
    apart = ("moe_rows_of_ranks.jinja", "moe_expert_vector_sum.jinja")
    texts = [path.read_text() for path in folder.iterdir() if path.name.endswith(".jinja") and path.name not in apart]
    texts = [
        text.partition("{{def_kernel(")[2] for text in texts if "{{def_kernel(" in text and "@gluon.jit" not in text
    ]
    assert len(texts) == 10
    for text in texts:
        before, _ = text.split(f"\n{{%- if EARLY is defined %}}\n    {WAIT}\n    {LAUNCH}\n{{%- endif %}}\n")
        assert not re.search(TOUCHES, re.sub(r"#.*", "", before))


CASES = {"few": (16, FEW), "many": (4096, MANY)}


@pytest.fixture(scope="module", params=CASES)
def early_code(request):
    tokens, schedule = CASES[request.param]
    return generated(GRAPHS, tokens=tokens, schedule=schedule)


@faked
def test_every_kernel_waits_first(early_code):
    code, told = early_code
    assert len(code.kernels) in (5, 6) and all(map(is_early, code.kernels))
    for kernel in code.kernels:
        assert_waits_first(kernel)
    assert len(told) == 5 and all(outcome.endswith(", begins early") for outcome in told)


@faked
def test_gemms_of_many_rows_do_not_begin_early():
    """Their programs stay for long; what is around them still waits for all that came before."""
    large = Schedule(128, 32, 32, 4, 2, Loop(tma=True, flatten=True))
    code, told = generated(GRAPHS, tokens=4096, schedule=large)
    gemms = [kernel for kernel in code.kernels if "moe_expert" in kernel.name]
    assert len(gemms) == 2 and [is_early(kernel) for kernel in code.kernels].count(False) == 2
    assert not any(map(is_early, gemms))
    for kernel in code.kernels:
        if kernel not in gemms:
            assert_waits_first(kernel)
    assert sum(outcome.endswith(", begins early") for outcome in told) == 3


@faked
@pytest.mark.slow
def test_the_machine_code_waits_first(early_code):
    from torch._inductor.codecache import PyCodeCache

    with fake_gpu(), _scratch_caches():
        for kernel in early_code[0].kernels:
            tuner = getattr(PyCodeCache.load(kernel.source), kernel.name)
            binary, _ = _binary(tuner, tuner.configs[0], H100)
            assert binary.metadata.launch_pdl
            before, launch, after = binary.asm["ptx"].partition("griddepcontrol.launch_dependents;")
            before, wait, between = before.partition("griddepcontrol.wait;")
            accesses = r"\b(ld|st|red|atom|tensormap)\.(\w+\.)*global|\bcp\.async|\bret;"
            assert wait and launch and not re.search(accesses, before + between)
            assert re.search(accesses, after)


@faked
def test_who_asks_gets_the_same_code_without_graphs():
    asked, graphs = (generated(options)[0].kernels for options in (ASKED, GRAPHS))
    assert all(map(is_early, asked)) and [k.function for k in asked] == [k.function for k in graphs]


@faked
def test_without_graphs_nothing_is_early():
    code, told = generated(None)
    assert not any(map(is_early, code.kernels)) and not any("early" in outcome for outcome in told)


@faked
@pytest.mark.parametrize("options", [GRAPHS, ASKED], ids=["graphs", "asked"])
def test_never_on_sm_80(options):
    code, told = generated(options, gpu=A100)
    assert "cc=80" in code.kernels[0].source
    assert not any(map(is_early, code.kernels)) and not any("early" in outcome for outcome in told)


def neighbours(hidden_TH, gate_EH, w13_EJH, w2_EHI):
    """Inductor's own kernels of all kinds: one that reads nothing, pointwise, loops, a scatter, a sort, a scan."""
    weights_TK, ids_TK = ops.moe_route(hidden_TH @ gate_EH.T, None, None, 3)
    counts_E = torch.zeros(E, device=hidden_TH.device).index_add(0, ids_TK[:, 0], weights_TK[:, 0])
    large_T = (hidden_TH.repeat(1, 512) * weights_TK[:, :1]).softmax(-1).amax(-1)
    filled_TT = torch.full((4096, 4096), 2.0, device=hidden_TH.device)
    return ids_TK.long() + 1, counts_E, large_T, filled_TT, ids_TK.sort(-1).values, weights_TK.cumsum(0)


@faked
@pytest.mark.parametrize("combined", [False, True])
def test_inductors_kernels_wait_first_too(combined):
    code, _ = generated({**GRAPHS, "combo_kernels": combined}, neighbours)
    assert len(code.kernels) > 3
    for kernel in code.kernels:
        assert "'launch_pdl': True" in kernel.source
        if "ComboKernel" not in kernel.source:
            assert is_early(kernel)
            assert_waits_first(kernel)
        else:  # each branch waits for itself
            assert kernel.source.count(WAIT) == kernel.source.count("pid_offset = pid") > 1
    assert combined == any("ComboKernel" in kernel.source for kernel in code.kernels)


@faked
def test_other_graphs_are_left_alone():
    """Without our ops a graph gets what its configuration says: nothing, or Inductor's own placement."""

    def other(hidden_TH, gate_EH, w13_EJH, w2_EHI):
        return (hidden_TH + 1).softmax(-1) * w2_EHI.sum()

    generated(GRAPHS)
    assert not any(map(is_early, generated(GRAPHS, other)[0].kernels))
    stock = [kernel.function for kernel in generated(ASKED, other)[0].kernels]
    assert stock and all(WAIT in text for text in stock)
    assert any(text.index(WAIT) > text.index("tl.load") for text in stock)


def test_a_cache_serves_each_configuration_its_own():
    """A graph of library calls, compiled for real on the CPU: what counts is the key."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    def product(x_TH):
        return torch.mm(x_TH, x_TH.T)

    def outcomes():
        found = []
        for options in ({}, GRAPHS, ASKED):
            torch._dynamo.reset()
            counters.clear()
            torch.compile(product, options={"fx_graph_cache": True, **options})(torch.ones(4, 4))
            found.append(tuple(counters["inductor"][f"fxgraph_cache_{name}"] for name in ("miss", "hit")))
        return found

    with torch.no_grad(), fresh_cache():
        assert outcomes() == [(1, 0)] * 3
        assert outcomes() == [(0, 1)] * 3


def test_an_inductor_that_is_not_known(monkeypatch):
    """Its own placement would read, ahead of the wait, what a kernel of ours that let it go still writes."""
    from lowering.inductor import _compat

    monkeypatch.setattr(_compat, "_LAUNCH_METHODS", (*_compat._LAUNCH_METHODS, "renamed"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    device = torch.device("cuda", 0)
    with _compat.config.patch(ASKED):
        assert not early.begins_early(device)
    with _compat.config.patch(GRAPHS):
        assert early.begins_early(device)


def test_when():
    from torch._inductor import config

    device = torch.device("cuda", 0)
    with pytest.MonkeyPatch.context() as patch:
        for capability, wanted in (((8, 9), False), ((9, 0), True), ((10, 0), True)):
            patch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
            for options in (GRAPHS, ASKED):
                with config.patch(options):
                    assert early.begins_early(device) == wanted
            assert not early.begins_early(device)
