"""The process in which `interpreter` runs kernels: TRITON_INTERPRET=1 is set, CUDA is taken for the CPU.

Requests come on stdin and answers go to stdout, each a length and what `torch.save` makes of a dict.
"""

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import re
import struct
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch


def send(stream, message):
    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(struct.pack("<Q", buffer.getbuffer().nbytes))
    stream.write(buffer.getbuffer())
    stream.flush()


def receive(stream):
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError("no answer")
    return torch.load(io.BytesIO(stream.read(struct.unpack("<Q", size)[0])))


def serve():
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what kernels print must not look like an answer
    pretend_cuda_is_cpu()
    complete_interpreter()
    while True:
        try:
            request = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = {"values": KINDS[request.pop("what")](**request)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        send(answers, answer)


def run_graph(source, args, in_order=False):
    """The outputs of a generated wrapper."""
    DOT["in_order"] = in_order
    for pattern, replacement in FOR_CPU:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
    return list(load(source).call(list(args)))


def run_kernel(source, name, args, grid, constants):
    """The arguments of a kernel after it ran."""
    found = getattr(load(source), name)
    if hasattr(found, "inductor_meta"):
        Launcher(found).run(*args)
    else:
        found[tuple(grid)](*args, **constants)
    return args


KINDS = {"graph": run_graph, "kernel": run_kernel}

# Lines of a generated wrapper, and what stands there for the CPU.
FOR_CPU = (
    (r"^from torch\._C import _cuda_getCurrentRawStream as get_raw_stream$", "get_raw_stream = lambda index: 0"),
    (r"_empty_strided_(?:cuda|xpu|mtia)\b", "_empty_strided_cpu"),
    (r"device\(type='cuda', index=\d+\)", "device(type='cpu')"),
    (r"device='cuda(?::\d+)?'", "device='cpu'"),
)


class Launcher:
    """A kernel with Inductor's metadata; `run` works out the grid as Inductor's own launcher does."""

    def __init__(self, tuner):
        self.function, self.config, self.meta = tuner.fn, tuner.configs[0], tuner.inductor_meta

    def run(self, *args, stream=None):
        from torch._inductor.runtime.triton_heuristics import GridExpr

        options = self.config.kwargs
        names = [name for name in self.function.arg_names if name not in options]
        extra = self.meta.get("extra_launcher_args", ())
        scope = {**options, **dict(zip([*names, *extra], args, strict=False))}
        grid = GridExpr.from_meta(self.meta, self.config)
        exec("\n".join([*grid.prefix, f"grid = ({grid.x_grid}, {grid.y_grid}, {grid.z_grid})"]), {}, scope)
        if all(scope["grid"]):
            self.function[scope["grid"]](*args[: len(args) - len(extra)], **options)


def pretend_cuda_is_cpu():
    """What a generated wrapper does with the device becomes nothing; the ops it calls are those of the CPU."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers

    import lowering.ops  # noqa: F401  registers them

    torch.cuda._DeviceGuard = lambda index: contextlib.nullcontext()
    torch.cuda.set_device = lambda index: None
    triton_helpers.set_driver_to_gpu = lambda: None
    AsyncCompile.triton = lambda self, name, source, device_str="cuda": Launcher(getattr(load(source), name))
    AsyncCompile.wait = lambda self, scope: None
    AsyncCompile.warm_pool = classmethod(lambda cls: None)


def complete_interpreter():
    """What the interpreter lacks: libdevice, whose functions are empty there, and reductions faster than by element."""
    import triton.language as tl
    from torch._inductor.runtime.triton_compat import libdevice
    from triton.runtime import interpreter

    for name in [name for name in vars(libdevice) if not name.startswith("_")]:
        setattr(libdevice, name, _from_torch(_TORCH_NAMES.get(name, name)))
    # Triton patches its language anew for every call of a function; nothing else happens in this process.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    interpreter.InterpreterBuilder.create_dot = _dot(interpreter.InterpreterBuilder.create_dot)
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.ScanOps.generic_scan = _scan


DOT = {"in_order": False}


def _dot(stock):
    def dot(self, a, b, d, *options):
        from triton.runtime.interpreter import TensorHandle

        if not DOT["in_order"]:
            return stock(self, a, b, d, *options)
        left, right = (part.data.astype(d.data.dtype) for part in (a, b))
        total = 0
        for depth in range(left.shape[1]):
            total += left[:, depth, None] * right[None, depth, :]
        return TensorHandle(total + d.data, d.dtype.scalar)

    return dot


_TORCH_NAMES = {"rint": "round", "nearbyint": "round", "llrint": "round", "fabs": "abs", "rcp": "reciprocal"}


def _from_torch(name):
    def function(*args):
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        like = next(arg for arg in args if isinstance(arg, tl.tensor))
        tensors = [
            torch.from_numpy(arg.handle.data) if isinstance(arg, tl.tensor) else torch.tensor(arg) for arg in args
        ]
        result = getattr(torch, name)(*tensors)
        scalar = tl.int32 if result.dtype is torch.bool else like.dtype.scalar
        result = result.to(torch.int32) if result.dtype is torch.bool else result.to(tensors[0].dtype)
        block = tl.block_type(scalar, list(result.shape)) if like.type.is_block() else scalar
        return tl.tensor(TensorHandle(result.numpy(), scalar), block)

    return function


def _slices(reduction, blocks):
    """Along the axis of a reduction: the list of what stands at each place, as tuples of blocks."""
    import numpy as np

    data = [arg.handle.data for arg in blocks]
    if reduction.axis is None:
        data = [array.reshape(-1) for array in data]
    axis = reduction.axis or 0
    places = range(data[0].shape[axis])
    arrays = [[np.take(array, place, axis=axis) for array in data] for place in places]
    return [
        tuple(reduction.to_tensor(a, arg.dtype) for a, arg in zip(row, blocks, strict=True)) for row in arrays
    ], axis


def _accumulate(reduction, rows):
    total = rows[0]
    yield total
    for row in rows[1:]:
        total = reduction.combine_fn.fn(*total, *row)
        total = total if isinstance(total, tuple) else (total,)
        yield total


def _reduce(reduction, blocks):
    import numpy as np

    rows, axis = _slices(reduction, blocks)
    *_, total = _accumulate(reduction, rows)
    result = []
    for value, arg in zip(total, blocks, strict=True):
        array = value.handle.data if value.type.is_block() else value.handle.data.reshape(())
        if reduction.keep_dims:
            array = array.reshape([1] * arg.handle.data.ndim) if reduction.axis is None else np.expand_dims(array, axis)
        result.append(reduction.to_tensor(array if array.shape else array.item(), arg.dtype))
    return result


def _scan(reduction, blocks):
    import numpy as np

    rows, axis = _slices(reduction, blocks)
    steps = list(_accumulate(reduction, rows))
    result = []
    for position, arg in enumerate(blocks):
        arrays = [step[position].handle.data for step in steps]
        arrays = arrays if steps[0][position].type.is_block() else [array.reshape(()) for array in arrays]
        result.append(reduction.to_tensor(np.stack(arrays, axis=axis), arg.dtype))
    return result


@functools.cache
def load(source):
    """Import a text as a module; it needs a file, because Triton reads the source of functions."""
    name = "generated_" + hashlib.sha256(source.encode()).hexdigest()[:16]
    path = Path(_folder()) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _folder():
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return folder.name


if __name__ == "__main__":
    serve()
