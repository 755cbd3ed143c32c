"""Make torch, Inductor and Triton believe that an H100 is there, for as long as a `with` block lasts.

Nothing can run on the device; graphs can be traced, lowered and compiled for it. Everything the block changes is
listed in the tables below and undone when it ends: functions of `torch.cuda`, Dynamo's device interface, Triton's
active driver, what torch has cached about the device, and (on CPU builds of torch) one entry of the C++ device-guard
registry. All this is process wide, so a lock lets one thread at a time in; other threads must not compile meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import MoEDeviceError, MoEUnsupportedError, Reason, ReasonCode
from .fake_attention import GPU_DECOMPOSITIONS
from .fake_guard import device_guard


@dataclasses.dataclass(frozen=True)
class GpuDescription:
    """What a GPU reports about itself, with the attribute names of `torch.cuda.get_device_properties`.

    Memory sizes are bytes, clock rates kHz, the memory bus width bits.
    """

    name: str = "NVIDIA H100 80GB HBM3"
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 132
    warp_size: int = 32
    max_threads_per_block: int = 1024
    max_threads_per_multi_processor: int = 2048
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 48 * 1024
    shared_memory_per_block_optin: int = 227 * 1024
    shared_memory_per_multiprocessor: int = 228 * 1024
    total_memory: int = 80 * 1024**3
    L2_cache_size: int = 50 * 1024**2
    clock_rate: int = 1_980_000
    memory_clock_rate: int = 2_619_000
    memory_bus_width: int = 5120
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    gcnArchName: str = ""

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability as (major, minor)."""
        return self.major, self.minor

    @property
    def arch(self) -> int:
        """Compute capability as one number: 90 for sm_90."""
        return self.major * 10 + self.minor


H100 = GpuDescription()
A100 = GpuDescription(
    name="NVIDIA A100-SXM4-80GB",
    major=8,
    multi_processor_count=108,
    shared_memory_per_block_optin=163 * 1024,
    shared_memory_per_multiprocessor=164 * 1024,
    L2_cache_size=40 * 1024**2,
    clock_rate=1_410_000,
    memory_clock_rate=1_593_000,
)
B200 = GpuDescription(
    name="NVIDIA B200",
    major=10,
    multi_processor_count=148,
    total_memory=180 * 1024**3,
    L2_cache_size=126 * 1024**2,
    clock_rate=1_965_000,
    memory_clock_rate=3_996_000,
    memory_bus_width=8192,
)


def fake_refusal() -> Reason | None:
    """Why a GPU cannot be faked in this process; `None` when it can."""
    if _STATE.depth == 0 and torch.cuda.is_available():
        return Reason(ReasonCode.OPTION, f"a real CUDA device is present ({torch.cuda.get_device_name()})")
    if importlib.util.find_spec("triton") is None:
        return Reason(ReasonCode.NO_TRITON)
    return None


@contextlib.contextmanager
def fake_gpu(gpu: GpuDescription = H100) -> Iterator[GpuDescription]:
    """Fake one GPU as device `cuda:0` inside the block; yields its description. Blocks of one GPU may nest.

    Raises `MoEDeviceError` where a real CUDA device, or another fake one, is present, `MoEUnsupportedError` where
    triton is missing.
    """
    with _STATE.lock:
        if _STATE.depth == 0:
            _refuse(fake_refusal())
            _STATE.gpu = gpu
        elif gpu != _STATE.gpu:
            raise MoEDeviceError.of(
                "fake_gpu",
                expected=f"one GPU at a time, {_STATE.gpu.name}",
                got=gpu.name,
                hint="Leave its block first.",
            )
        _STATE.depth += 1
        try:
            with _patched(gpu) if _STATE.depth == 1 else contextlib.nullcontext():
                yield gpu
        finally:
            _STATE.depth -= 1


class _State:
    """The lock, the nesting depth and the device of `fake_gpu`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.gpu = H100


_STATE = _State()


def _refuse(reason: Reason | None) -> None:
    if reason is None:
        return
    if reason.code is ReasonCode.NO_TRITON:
        raise MoEUnsupportedError.of(
            "fake_gpu",
            expected="triton to be installed",
            got="no triton",
            hint="Run `pip install triton` (Linux only).",
        )
    hint = "Compile on that device instead: torch.compile, and TORCH_LOGS=output_code to see the source."
    raise MoEDeviceError.of("fake_gpu", expected="a machine without a CUDA device", got=reason.detail, hint=hint)


# What is answered while the device is faked


def _always(value: Any) -> Callable[..., Any]:
    """A function that returns `value` whatever it is asked."""

    def answer(*_args: Any, **_kwargs: Any) -> Any:
        return value

    return answer


def _no_device(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise MoEDeviceError.of(
        "fake_gpu",
        expected="work on fake tensors only",
        got="a request to run on the GPU",
        hint="Only tracing and compiling are possible here; create tensors under FakeTensorMode.",
    )


def _cuda_answers(gpu: GpuDescription) -> dict[str, Any]:
    """Attributes of `torch.cuda` while the fake device is there."""
    return {
        "is_available": _always(True),
        "device_count": _always(1),
        "current_device": _always(0),
        "set_device": _always(None),
        "synchronize": _always(None),
        "get_device_properties": _always(gpu),
        "get_device_capability": _always(gpu.capability),
        "get_device_name": _always(gpu.name),
        "is_bf16_supported": _always(True),
        "is_tf32_supported": _always(True),
        "is_current_stream_capturing": _always(False),
        "get_rng_state": lambda *_args, **_kwargs: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": _always(None),
        "_exchange_device": _always(0),
        "_maybe_exchange_device": _always(0),
        "_lazy_init": _no_device,
    }


def _triton_driver(gpu: GpuDescription) -> Any:
    """A Triton driver that knows the target and launches nothing."""
    from triton.backends.compiler import GPUTarget

    limits = {
        "max_shared_mem": gpu.shared_memory_per_block_optin,
        "multiprocessor_count": gpu.multi_processor_count,
        "max_num_regs": gpu.regs_per_multiprocessor,
        "warpSize": gpu.warp_size,
        "sm_clock_rate": gpu.clock_rate,
        "mem_clock_rate": gpu.memory_clock_rate,
        "mem_bus_width": gpu.memory_bus_width,
    }
    return SimpleNamespace(
        get_current_target=_always(GPUTarget("cuda", gpu.arch, gpu.warp_size)),
        get_current_device=_always(0),
        get_current_stream=_always(0),
        get_device_capability=_always(gpu.capability),
        get_active_torch_device=_always(torch.device("cuda", 0)),
        get_device_interface=_always(torch.cuda),
        map_python_to_cpp_type=str,
        get_benchmarker=_no_device,
        get_empty_cache_for_benchmark=_no_device,
        launcher_cls=_no_device,
        utils=SimpleNamespace(get_device_properties=_always(limits), load_binary=_no_device),
    )


@functools.cache
def _device_interface() -> type:
    """Dynamo's CUDA interface, asking the replaced functions of `torch.cuda` instead of those seen at import."""
    from torch._dynamo.device_interface import CudaInterface

    def late(name: str) -> staticmethod[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            return getattr(torch.cuda, name)(*args, **kwargs)

        return staticmethod(ask)

    class FakeCudaInterface(CudaInterface):
        class Worker:
            set_device = late("set_device")
            current_device = late("current_device")
            get_device_properties = late("get_device_properties")

        current_device = late("current_device")
        set_device = late("set_device")
        device_count = late("device_count")
        synchronize = late("synchronize")
        get_device_properties = late("get_device_properties")
        is_bf16_supported = late("is_bf16_supported")
        exchange_device = late("_exchange_device")
        maybe_exchange_device = late("_maybe_exchange_device")
        get_raw_stream = staticmethod(_always(0))

    return FakeCudaInterface


class _ConstantsOnCpu(TorchDispatchMode):
    """Small constants on the CPU: the compiler makes them as real tensors to look at their values."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(torch.device, _cpu_for_cuda, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _cpu_for_cuda(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "cuda" else device


@contextlib.contextmanager
def _real_constants() -> Iterator[None]:
    """What `unset_fake_temporarily` is to the tracer: real tensors for a moment, here on the CPU."""
    with unset_fake_temporarily(), _ConstantsOnCpu():
        yield


def _folding_on_cpu(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _ConstantsOnCpu():
            return run(*args, **kwargs)

    return wrapped


# Installing and undoing

# Cached functions whose answer depends on the device: module, and name in it; "*" is every cached function.
_DEVICE_CACHES = (
    ("torch.utils._triton", "*"),
    ("torch._inductor.utils", "*"),
    ("torch._inductor.codegen.cuda.cuda_env", "*"),
    ("torch._inductor.comm_analysis", "get_gpu_type"),
    ("torch._inductor.codecache", "CacheBase.get_system"),
    ("torch._inductor.runtime.hints", "DeviceProperties.create"),
    ("lowering.schedule.device", "device_spec"),
)


def _clear_device_caches() -> None:
    for module_name, path in _DEVICE_CACHES:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError:  # another torch keeps this elsewhere
            continue
        cached = _cached_functions(module) if path == "*" else [functools.reduce(getattr, path.split("."), module)]
        for function in cached:
            function.cache_clear()


def _cached_functions(module: ModuleType) -> list[Any]:
    found = [value for value in vars(module).values() if callable(getattr(value, "cache_clear", None))]
    return [function for function in found if function.__module__ == module.__name__]


def swap(stack: contextlib.ExitStack, owner: Any, **attributes: Any) -> None:
    """Set attributes of `owner` until `stack` closes; then the very entries of its dict come back."""
    for name, value in attributes.items():
        if name in vars(owner):
            stack.callback(setattr, owner, name, vars(owner)[name])
        elif hasattr(owner, name):
            stack.callback(delattr, owner, name)
        else:
            raise AttributeError(f"{owner!r} has no {name!r}; this torch is newer than fake_gpu knows")
        setattr(owner, name, value)


def _swap_item(stack: contextlib.ExitStack, mapping: dict[Any, Any], key: Any, value: Any) -> None:
    if key in mapping:
        stack.callback(mapping.__setitem__, key, mapping[key])
    else:
        stack.callback(mapping.pop, key)
    mapping[key] = value


def _swap_kernel(stack: contextlib.ExitStack, op: Any, kernel: Callable[..., Any]) -> None:
    """Let the Python dispatcher decompose a composite op by `kernel`."""
    stack.callback(op._dispatch_cache.clear)
    _swap_item(stack, op.py_kernels, torch._C.DispatchKey.CompositeImplicitAutograd, kernel)
    op._dispatch_cache.clear()


@contextlib.contextmanager
def _patched(gpu: GpuDescription) -> Iterator[None]:
    import triton
    from torch._dynamo import device_interface
    from torch._inductor import constant_folding
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from torch.fx.experimental import proxy_tensor

    # Inductor registers its own graph patterns once a process, traced on the device it finds: let it find the CPU.
    joint_graph.lazy_init(torch.device("cpu"))
    post_grad.lazy_init()
    device_interface.get_registered_device_interfaces()  # registers the real ones first

    with contextlib.ExitStack() as stack:
        stack.callback(_clear_device_caches)
        stack.enter_context(device_guard())
        swap(stack, torch.cuda, **_cuda_answers(gpu))
        # Dynamo opens streams on the generic accelerator when there is one; there is no stream to open.
        swap(stack, torch.accelerator, is_available=_always(False))
        for index in ("cuda", "cuda:0"):
            _swap_item(stack, device_interface.device_interfaces, index, _device_interface())
        swap(stack, triton.runtime.driver, _active=_triton_driver(gpu))
        swap(stack, triton_helpers, set_driver_to_gpu=_always(None))
        swap(stack, fake_tensor.FakeTensorMode, avoid_device_init=True)
        swap(stack, fake_tensor, init_gpu_context=_always(None))
        for op, decomposition in GPU_DECOMPOSITIONS.items():
            _swap_kernel(stack, op, decomposition)
        swap(stack, constant_folding.ConstantFolder, run=_folding_on_cpu(constant_folding.ConstantFolder.run))
        swap(stack, proxy_tensor, unset_fake_temporarily=_real_constants)
        for module in (joint_graph, post_grad):
            swap(stack, module, lazy_init=_always(None))
        _clear_device_caches()
        yield
