"""What Inductor would run on a GPU, found out without one: the generated source, and what ptxas makes of it.

    code = offline_source(model, {"input_ids": ids})         # wrapper and Triton kernels, nothing runs
    for facts in compile_kernels(code):
        print(facts)                                         # registers, spills, shared memory, wgmma

Weights cost no memory: modules on the CPU or the meta device are mirrored by fake CUDA tensors first. The private
names of torch that appear here are those of the compiler's seams, replaced for the time of one call; `fake_device` has
the rest.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import io
import itertools
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from ..errors import MoEOptionError, MoEUnsupportedError
from .fake_device import H100, GpuDescription, fake_gpu, swap
from .fresh import fresh_caller


@dataclasses.dataclass(frozen=True)
class OfflineKernel:
    """One generated Triton kernel: its name in the wrapper and the text of the module that defines it."""

    name: str
    source: str = dataclasses.field(repr=False)

    @property
    def function(self) -> str:
        """The `@triton.jit` function alone."""
        return self.source[self.source.index("@triton.jit") :].strip() + "\n"


@dataclasses.dataclass(frozen=True)
class OfflineCode:
    """The generated wrapper (a Python module, never executed here), its Triton kernels and the calls it makes.

    calls: names of generated kernels, one entry a launch, in order. extern_calls: calls that are not generated kernels
    (`extern_kernels.mm`, `torch.ops.aten.topk.default`, ...), one entry a call, in order. inputs: where each input of
    the wrapper's `call` comes from, as Python expressions over `target` (the module or function), `args` and `kwargs`.
    gpu: the device that the code is for.
    """

    wrapper_source: str = dataclasses.field(repr=False)
    kernels: tuple[OfflineKernel, ...]
    calls: tuple[str, ...]
    extern_calls: tuple[str, ...]
    inputs: tuple[str, ...]
    gpu: GpuDescription = H100

    def kernel(self, part: str) -> OfflineKernel:
        """The one kernel whose name contains `part`; `MoEOptionError` when there is none or more than one."""
        found = [kernel for kernel in self.kernels if part in kernel.name]
        if len(found) == 1:
            return found[0]
        raise MoEOptionError.of(
            "OfflineCode.kernel",
            expected=f"one kernel with {part!r} in its name",
            got=", ".join(kernel.name for kernel in self.kernels) or "no kernels",
            hint="Name one of these.",
        )


@dataclasses.dataclass(frozen=True)
class KernelFacts:
    """What ptxas made of one kernel with one configuration.

    registers: per thread. stack_bytes: local memory per thread, spills and arrays. spill_store_bytes, spill_load_bytes:
    what spilling moves per thread, each instruction counted once. static_shared_bytes, dynamic_shared_bytes: per block,
    without the 1024 bytes that every block has reserved. wgmma, cp_async, tma: instructions in the PTX text, not
    executions. warps: per block. stages: depth of the software pipeline asked for. compile_seconds: Triton and ptxas,
    caches empty. config: the constexpr options. configs: how many configurations Inductor would time on the device.
    """

    name: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    wgmma: int
    cp_async: int
    tma: int
    warps: int
    stages: int
    compile_seconds: float
    config: tuple[tuple[str, Any], ...]
    configs: int

    @property
    def spill_bytes(self) -> int:
        """Bytes per thread that spilling stores and loads: 0 for a kernel that fits its registers."""
        return self.spill_store_bytes + self.spill_load_bytes

    @property
    def shared_bytes(self) -> int:
        """Static and dynamic shared memory per block, in bytes."""
        return self.static_shared_bytes + self.dynamic_shared_bytes


def fake_cuda(tree: Any, *, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> Any:
    """Fake CUDA versions of all tensors in a tree of inputs; other leaves stay. To be called inside `fake_gpu()`.

    Shapes [...], strides and dtypes are kept, values are not; `dtype` replaces that of floating-point tensors. Marks of
    `torch._dynamo.mark_dynamic` are kept.
    """
    return pytree.tree_map_only(torch.Tensor, lambda tensor: _fake_tensor(tensor, mode, dtype), tree)


def fake_cuda_module(
    module: torch.nn.Module, *, mode: FakeTensorMode, dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """A copy of `module`, which may be on the CPU or the meta device, whose parameters and buffers are fake CUDA
    tensors.

    No weight is copied, and the copy takes part in no gradient. `dtype` replaces the dtype of floating-point
    parameters; buffers keep theirs, as with `from_pretrained`. To be called inside `fake_gpu()`.
    """
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        fake = _fake_tensor(tensor.detach(), mode, dtype if is_parameter else None)
        memo[id(tensor)] = torch.nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    return copy.deepcopy(module, memo)


def _fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode, dtype: torch.dtype | None) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, FakeTensor) or tensor.layout is not torch.strided:
        raise MoEUnsupportedError.of(
            "offline_source",
            expected="plain strided tensors",
            got=f"{type(tensor).__name__} of layout {tensor.layout}",
            hint="Materialise quantised, distributed and sparse tensors first.",
        )
    if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
        return tensor
    dtype = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cuda:0")
    for name, value in vars(tensor).items():
        if name.startswith("_dynamo_"):
            setattr(fake, name, copy.copy(value))
    return fake


class _Captured(BaseException):
    """Carries the generated wrapper out of the compiler; no Exception, so nothing on the way wraps or handles it."""

    def __init__(self, wrapper_source: str) -> None:
        super().__init__("captured")
        self.wrapper_source = wrapper_source


def offline_source(
    fn_or_module: Callable[..., Any],
    example_inputs: Sequence[Any] | Mapping[str, Any],
    *,
    dynamic: bool | None = None,
    dtype: torch.dtype | None = None,
    options: Mapping[str, Any] | None = None,
    gpu: GpuDescription = H100,
) -> OfflineCode:
    """The code `torch.compile` would generate for one call on a GPU, in inference, as one graph.

    example_inputs: positional inputs, or keyword inputs as a mapping. Tensors [...] of any dtype may be on the CPU, on
    the meta device or fake; only shapes, strides and dtypes count, and the weights of a module count the same way. A
    plain function must get all its tensors as inputs. dynamic: as for `torch.compile`; single symbolic dimensions are
    asked for by `torch._dynamo.mark_dynamic` on the examples. dtype: cast floating-point inputs and parameters.
    options: Inductor options on top of the current configuration, passes included.

    Where Inductor would time candidates on the device, the first is taken. Raises the compiler's own error when the
    call does not compile without a graph break, and what `fake_gpu` raises.
    """
    inputs: list[str] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        inputs.extend(_origin(node) for node in graph.graph.nodes if node.op == "placeholder")
        return compile_fx(graph, examples)

    with fake_gpu(gpu), _quiet_compiler(options):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        target = getattr(fn_or_module, "_orig_mod", fn_or_module)  # what torch.compile(module) wraps
        if isinstance(target, torch.nn.Module):
            target = fake_cuda_module(target, mode=mode, dtype=dtype)
        keywords = isinstance(example_inputs, Mapping)
        fakes = fake_cuda(
            dict(example_inputs) if keywords else tuple(example_inputs),
            mode=mode,
            dtype=dtype,
        )
        compiled = torch.compile(fresh_caller(target), backend=backend, fullgraph=True, dynamic=dynamic)
        try:
            with torch.no_grad():
                compiled(**fakes) if keywords else compiled(*fakes)
        except _Captured as captured:
            return dataclasses.replace(_split(captured.wrapper_source, tuple(inputs)), gpu=gpu)
    raise MoEUnsupportedError.of(
        "offline_source",
        expected="a call that computes something on the device",
        got="an empty graph",
        hint="Check that the function uses its tensor inputs and is not under torch.compiler.disable.",
    )


def _origin(placeholder: torch.fx.Node) -> str:
    """Where Dynamo found a graph input, as an expression over target, args and kwargs."""
    name = placeholder.meta["grapharg"].source.name
    return re.sub(r"\bL\['(target|args|kwargs)'\]", r"\1", name() if callable(name) else name)


@contextlib.contextmanager
def _quiet_compiler(options: Mapping[str, Any] | None) -> Iterator[None]:
    """Inductor with caches off, in one process, timing nothing, stopping as soon as the wrapper's text is there."""
    import torch._dynamo.config as dynamo_config
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    from torch._inductor.graph import GraphLowering
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    def stop(_graph: Any, wrapper_code: Any) -> NoReturn:
        raise _Captured(wrapper_code.value)

    def first_choice(selector: Any, name: str, choices: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        return select(selector, name, [choice for choice in choices if choice is not None][:1], *args, **kwargs)

    select = AlgorithmSelectorCache.__call__
    # shape_padding would time padded and unpadded matrix products.
    inductor = {"compile_threads": 1, "fx_graph_cache": False, "shape_padding": False, **(options or {})}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_scratch_caches())
        stack.enter_context(inductor_config.patch(inductor))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        stack.enter_context(dynamo_config.patch(automatic_dynamic_shapes=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
        swap(stack, GraphLowering, _compile_to_module_lines=stop)
        swap(stack, AlgorithmSelectorCache, __call__=first_choice)
        yield


@contextlib.contextmanager
def _scratch_caches() -> Iterator[None]:
    """Empty caches of Inductor and Triton, on disk too, gone afterwards."""
    from torch._inductor.utils import fresh_cache

    failure: Exception | None = None
    with tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder):
        try:
            yield
        except Exception as error:
            failure = error  # fresh_cache would keep its folder and log where
    if failure is not None:
        raise failure


def launches(wrapper_source: str) -> tuple[str, ...]:
    """Names of the generated kernels that a wrapper launches, one a launch, in order; none of one in C++."""
    try:
        return _split(wrapper_source, ()).calls
    except SyntaxError:
        return ()


def _split(wrapper_source: str, inputs: tuple[str, ...]) -> OfflineCode:
    """Find kernels, launches and library calls in a generated wrapper."""
    tree = ast.parse(wrapper_source)
    definitions = [
        (ast.unparse(node.targets[0]), node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    ]
    kernels = [
        OfflineKernel(name, ast.literal_eval(call.args[1]))
        for name, call in definitions
        if _called(call) == "async_compile.triton"
    ]
    names = {kernel.name for kernel in kernels}
    calls, extern = [], []
    for call in sorted((node for node in ast.walk(tree) if isinstance(node, ast.Call)), key=lambda node: node.lineno):
        called = _called(call)
        if called.endswith(".run") and called.removesuffix(".run") in names:
            calls.append(called.removesuffix(".run"))
        elif called.startswith(("extern_kernels.", "torch.ops.", "aten.")):
            extern.append(called)
    return OfflineCode(wrapper_source, tuple(kernels), tuple(calls), tuple(extern), inputs)


def _called(call: ast.Call) -> str:
    """The dotted name a call expression calls; empty when it is computed."""
    return ast.unparse(call.func) if isinstance(call.func, ast.Attribute | ast.Name) else ""


def compile_kernels(code: OfflineCode, *, all_configs: bool = False) -> tuple[KernelFacts, ...]:
    """Compile every kernel of `code` to machine code for its GPU and report what ptxas says about it.

    By default each kernel's first configuration; with `all_configs` every one that Inductor would time.
    """
    facts: list[KernelFacts] = []
    with fake_gpu(code.gpu), _scratch_caches():
        for kernel in code.kernels:
            facts.extend(_compile_kernel(kernel, code.gpu, all_configs=all_configs))
    return tuple(facts)


def _compile_kernel(kernel: OfflineKernel, gpu: GpuDescription, *, all_configs: bool) -> Iterator[KernelFacts]:
    from torch._inductor.codecache import PyCodeCache

    tuner = getattr(PyCodeCache.load(kernel.source), kernel.name)
    for config in tuner.configs if all_configs else tuner.configs[:1]:
        started = time.perf_counter()
        binary, log = _binary(tuner, config, gpu)
        seconds = time.perf_counter() - started
        ptx = binary.asm["ptx"]
        yield KernelFacts(
            name=kernel.name,
            registers=_total(r"Used (\d+) registers", log),
            stack_bytes=_total(r"(\d+) bytes stack frame", log),
            spill_store_bytes=_total(r"(\d+) bytes spill stores", log),
            spill_load_bytes=_total(r"(\d+) bytes spill loads", log),
            static_shared_bytes=sum(int(size) for size in re.findall(r"(\d+) bytes smem", log)),
            dynamic_shared_bytes=binary.metadata.shared,
            wgmma=len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
            cp_async=len(re.findall(r"\bcp\.async\.(?:ca|cg)\b", ptx)),
            tma=len(re.findall(r"\bcp\.async\.bulk\.tensor\b", ptx)),
            warps=binary.metadata.num_warps,
            stages=binary.metadata.num_stages,
            compile_seconds=seconds,
            config=tuple(sorted(config.kwargs.items())),
            configs=len(tuner.configs),
        )


def _binary(tuner: Any, config: Any, gpu: GpuDescription) -> tuple[Any, str]:
    """Triton's compiled kernel for one configuration, built with the options Inductor would use, and ptxas's log."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    meta = tuner._create_compile_meta(config)
    source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    target = GPUTarget(meta["device_type"], meta["cc"], gpu.warp_size)
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(source, target=target, options=tuner._create_compile_options(config, meta))
    return binary, log.getvalue()


def _total(pattern: str, ptxas_log: str) -> int:
    """The number `pattern` finds, added up over a kernel's functions (more than one where a call was not inlined)."""
    found = re.findall(pattern, ptxas_log)
    if not found:
        raise MoEUnsupportedError.of(
            "compile_kernels",
            expected=f"{pattern!r} in the log of ptxas",
            got=ptxas_log.strip() or "no log",
            hint="Check the installation of triton.",
        )
    return sum(map(int, found))
