"""The second host of the templates: hooks, launches, and kernels compiled for sm_90 without one."""

import ast
import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import threading
import types

import jinja2
import pytest
import torch

from lowering.ops.moe_dispatch import dispatch_schedule
from lowering.schedule.device import H100
from lowering.schedule.plan import plan
from lowering.schedule.schedule import GemmShape, Loop, Schedule
from lowering.templates import standalone
from lowering.templates.eager import gemm_constants, index_constants, specialized_arguments
from lowering.templates.render import ExpertGemmVariant, GradWeightVariant, template_text
from tests.support.launches import compile_for_h100, interpret, on_meta, sass_of

SCALED = """{{def_kernel("X")}}
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < {{size("X", 1)}}
    value = tl.load(X + row * {{stride("X", 0)}} + column * {{stride("X", 1)}}, mask=inside) * FACTOR
    {{store_output(("row", "column"), "value", "inside")}}
"""
CONSTANTS = {"BLOCK": 8, "FACTOR": 2.0}


def rendered(text=SCALED, constants=None, rank=2):
    return standalone.render(text, "moe_x", constants=tuple((constants or CONSTANTS).items()), output_rank=rank)


def launch(x, out, **changes):
    options = {"name": "moe_x", "constants": CONSTANTS, "grid": (len(x),), "num_warps": 1, "num_stages": 1} | changes
    standalone.launch(SCALED, {"X": x, "OUT": out}, **options)


def test_sizes_and_strides_are_arguments_in_the_order_they_are_named():
    kernel = rendered()
    (function,) = (n for n in ast.parse(kernel.source).body if isinstance(n, ast.FunctionDef))
    names = [argument.arg for argument in function.args.args]
    assert (kernel.name, function.name) == ("_moe_x_kernel", "_moe_x_kernel")
    assert names == ["X", "OUT", "size_X_1", "stride_X_0", "stride_X_1", "stride_OUT_0", "stride_OUT_1"]
    x, out = torch.zeros(3, 5), torch.zeros(5, 3).t()
    assert kernel.arguments({"X": x, "OUT": out})[2:] == [5, 5, 1, 1, 3]
    assert "BLOCK: tl.constexpr = 8" in kernel.source


def test_kernels_are_kept_by_text_and_constants():
    assert rendered() is rendered()
    assert rendered(constants={"BLOCK": 16, "FACTOR": 2.0}).source != rendered().source


@pytest.mark.parametrize("text", ["{{def_kernel('X')}}\n    {{other('X')}}", "{{def_kernel('X')}}\n    {{WIDTH}}"])
def test_a_hook_or_constant_that_is_not_there(text):
    with pytest.raises(jinja2.UndefinedError):
        rendered(text)


def test_a_tensor_that_is_not_there():
    with pytest.raises(KeyError, match="X"):
        rendered().arguments({"OUT": torch.zeros(1, 1)})


def test_a_launch_reads_strides_and_writes_the_output(monkeypatch):
    interpret(monkeypatch)
    x = torch.arange(30.0).reshape(6, 5)[::2].t()
    out = torch.full((3, 5), torch.nan).t()
    launch(x, out)
    assert torch.equal(out, 2 * x)


def test_the_output_has_its_own_dtype(monkeypatch):
    interpret(monkeypatch)
    out = torch.zeros(2, 3, dtype=torch.float16)
    launch(torch.full((2, 3), 1.25), out)
    assert torch.equal(out, torch.full((2, 3), 2.5, dtype=torch.float16))


def test_an_empty_grid_launches_nothing(monkeypatch):
    monkeypatch.setattr(standalone, "_jit_function", lambda kernel: pytest.fail("launched"))
    launch(torch.zeros(0, 3), torch.zeros(0, 3))
    launch(torch.zeros(2, 0), torch.zeros(2, 0), grid=(2, 0))


def test_the_source_of_a_kernel_lies_in_a_private_folder():
    function = standalone._jit_function(rendered())
    path = standalone._source_folder()
    assert path.stat().st_mode & 0o077 == 0
    assert rendered().source in [file.read_text() for file in path.glob("_moe_x_kernel_*.py")]
    assert function.__name__ == "_moe_x_kernel"


def test_threads_that_ask_at_once_get_one_function():
    """None reads a source that another one is writing, and none compiles a kernel a second time."""
    barrier, found = threading.Barrier(4), []

    def ask(kernel):
        barrier.wait()
        function = standalone._jit_function(kernel)
        found.append((function, "tl.store" in function.src))

    for block in range(30):
        kernel = rendered(constants={"BLOCK": 8, "FACTOR": block + 0.5})
        threads = [threading.Thread(target=ask, args=(kernel,)) for _ in range(4)]
        found.clear()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert all(whole for _, whole in found)
        assert len({id(function) for function, _ in found}) == 1


FORKED = """
import os, sys
from lowering.templates import standalone

def made(factor):
    text = '{{def_kernel("X")}}\\n    {{store_output(("0",), "FACTOR")}}'
    kernel = standalone.render(text, "moe_x", constants=(("FACTOR", factor),), output_rank=1)
    return standalone._jit_function(kernel)

made(1.0)
folder = standalone._source_folder()
child = os.fork()
if not child:
    made(2.0)
    assert standalone._source_folder() != folder
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
assert folder.is_dir() and standalone._source_folder() == folder
made(3.0)
print(folder)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_that_ends_leaves_the_sources_of_its_parent(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", FORKED],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path))
    assert not list(tmp_path.glob("diffulex-kernels-*")), "each process removes its own"


def test_a_folder_that_was_removed_is_made_again():
    folder = standalone._source_folder()
    shutil.rmtree(folder)
    function = standalone._jit_function(rendered(constants={"BLOCK": 32, "FACTOR": 3.0}))
    assert "tl.store" in function.src
    assert standalone._source_folder() != folder


# Compiled for sm_90


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device and would read the other one's memory."""
    entered = []
    output = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"), dim=lambda: 1)
    kernel = types.SimpleNamespace(arguments=lambda tensors: [])
    monkeypatch.setattr(standalone, "render", lambda *args, **options: kernel)
    monkeypatch.setattr(standalone, "_jit_function", lambda kernel: {(1,): lambda **options: entered.append("launch")})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(entered.append(device.index)))
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        standalone.launch("", {"OUT": output}, name="x", constants={}, grid=(1,), num_warps=1, num_stages=1)
    assert entered == [1, "launch", "launch"]


UP, DOWN = GemmShape(128, 2048, 768, True), GemmShape(128, 768, 2048, False)


def compiled_gemm(shape, schedule, *, dtype=torch.bfloat16, bias=False, rows=4096):
    gather = shape.gated
    variant = ExpertGemmVariant(gather, not gather, bias, act="silu(g) * u" if gather else "identity")
    variant = dataclasses.replace(variant, loop=schedule.loop)
    weight_rows = shape.width * (2 if gather else 1)
    tensors = {
        "A": on_meta(rows // 8 if gather else rows, shape.depth, dtype=dtype),
        "W": on_meta(shape.num_experts, weight_rows, shape.depth, dtype=dtype),
        "ORDER": on_meta(rows, dtype=torch.int32),
        "OFFSETS": on_meta(shape.num_experts + 1, dtype=torch.int32),
        "OUT": on_meta(rows, shape.width, dtype=dtype),
    }
    if bias:
        tensors["BIAS"] = on_meta(shape.num_experts, weight_rows, dtype=dtype)
    constants = gemm_constants(shape.num_experts, 8 if gather else 1, width=shape.width, schedule=schedule)
    constants |= index_constants(tensors, schedule)
    if schedule.loop.specialized:
        tensors |= specialized_arguments(tensors, schedule, gather=gather, programs=H100.num_sms)
    return compile_for_h100(
        variant.source(),
        tensors,
        constants=constants,
        num_warps=schedule.launched_warps,
        num_stages=schedule.num_stages,
    )


@pytest.mark.parametrize("shape", [UP, DOWN], ids=["up", "down"])
def test_planned_expert_gemms_compile_without_spills(shape):
    """Every schedule the plan has for this model on an H100; from 64 rows on the matrix units are fed by wgmma."""
    index = (UP, DOWN).index(shape)
    for schedule in {found.schedules[index] for found in plan((UP, DOWN), H100)}:
        kernel, facts = compiled_gemm(shape, schedule)
        assert 0 < facts["registers"] <= 255
        assert facts["spilled"] == 0, (schedule, facts)
        assert kernel.metadata.shared <= H100.shared_memory
        ptx = kernel.asm["ptx"]
        assert ("wgmma.mma_async" in ptx) == (schedule.block_m >= 64), schedule
        assert "mma" in ptx
        assert "cp.async" in ptx, "loads are not pipelined"


@pytest.mark.parametrize(
    "shape", [GemmShape(8, 4096, 14336, True), GemmShape(8, 14336, 4096, False)], ids=["up", "down"]
)
def test_few_experts_leave_the_main_loop_uniform(shape):
    """A search among fewer experts than a warp has lanes made addresses of the whole loop those of divergent code."""
    kernel, _ = compiled_gemm(shape, Schedule(128, 128, 64, 8, 4, Loop(tma=True, flatten=True), 16))
    sass = "\n".join(sass_of(kernel))
    assert "HGMMA" in sass
    assert "BRA.DIV" not in sass


def test_shared_memory_is_what_the_schedule_says():
    schedule = Schedule(64, 128, 64, 4, 3)
    kernel, _ = compiled_gemm(UP, schedule)
    assert kernel.metadata.shared == pytest.approx(schedule.shared_memory(gated=True, element_size=2), rel=0.02)


def test_fp32_and_biases_compile():
    kernel, facts = compiled_gemm(UP, Schedule(16, 32, 64, 4, 3), dtype=torch.float32, bias=True)
    assert facts["spilled"] == 0
    assert kernel.metadata.shared <= H100.shared_memory


def test_the_other_templates_compile():
    grad = GradWeightVariant(left_index=False, right_index=True)
    tensors = {
        "LEFT": on_meta(4096, 1536),
        "RIGHT": on_meta(512, 2048),
        "RIGHT_INDEX": on_meta(4096, dtype=torch.int32),
        "OFFSETS": on_meta(129, dtype=torch.int32),
        "OUT": on_meta(128, 1536, 2048),
    }
    constants = {"BLOCK_L": 128, "BLOCK_R": 128, "BLOCK_K": 32, "INDEX_DTYPE": "tl.int32"}
    kernel, facts = compile_for_h100(grad.source(), tensors, constants=constants, num_warps=8, num_stages=3)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert facts["spilled"] == 0


@pytest.mark.parametrize("num_experts", [128, 256, 1024])
def test_dispatch_compiles_without_spills_or_global_atomics(num_experts):
    ids, out = on_meta(16384, 8, dtype=torch.int32), on_meta(num_experts + 1, dtype=torch.int32)
    written = {name: on_meta(131072, dtype=torch.int32) for name in ("ORDER", "TOKEN")}
    many = dispatch_schedule(131072, num_experts, top_k=8)
    counts = on_meta(many.programs, many.constants["BINS"], dtype=torch.int32)
    for name, tensors, schedule in (
        ("moe_dispatch", {"IDS": ids, **written, "OUT": out}, dispatch_schedule(512, num_experts, top_k=8)),
        ("moe_dispatch", {"IDS": ids, **written, "OUT": out}, dispatch_schedule(8192, num_experts, top_k=8)),
        ("moe_dispatch_count", {"IDS": ids, "OUT": counts}, many),
        ("moe_dispatch_place", {"IDS": ids, "COUNTS": counts, **written, "OUT": out}, many),
    ):
        kernel, facts = compile_for_h100(
            template_text(name),
            tensors,
            constants=schedule.constants,
            num_warps=schedule.num_warps,
            num_stages=1,
        )
        assert facts["spilled"] == 0, name
        assert not re.search(r"\b(atom|red)\.global", kernel.asm["ptx"]), name
