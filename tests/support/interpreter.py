"""Run generated Triton code on CPU tensors, in Triton's interpreter.

Triton decides when it is imported whether kernels are interpreted, so they run in a worker process of their own, which
stays alive between calls: a call costs a few milliseconds besides the kernel itself.

    interpreter().kernel(code.kernel("moe_expert_up"), [hidden, w13, order, offsets, out])   # the tensors afterwards
    interpreter().graph(code, module_or_fn, args)                                            # a whole generated graph

The interpreter multiplies the bits of bfloat16 in `tl.dot`, so use float32 or float16. Triton 3.6 needs numpy < 2.4.
"""

import atexit
import functools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import torch

from tests.support.interpreter_worker import receive, send

_ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 300


class InterpreterError(AssertionError):
    """The worker's traceback, or that it died."""


@functools.cache
def interpreter():
    """The worker shared by all tests of this process."""
    worker = Interpreter()
    atexit.register(worker.close)
    return worker


class Interpreter:
    """A worker process; calls are answered one at a time."""

    def __init__(self):
        self._process = None
        self._lock = threading.Lock()

    def kernel(self, kernel, args, *, grid=None, name=None, constants=None):
        """Run one kernel over `args` (tensors and numbers, in the order of its parameters), return them afterwards.

        kernel: an `OfflineKernel`, whose grid and options are then Inductor's own, or the text of a module with a
        `@triton.jit` function; then `grid` is needed, `name` if there are several functions, and `constants` are its
        constexpr parameters.
        """
        generated = not isinstance(kernel, str)
        request = {
            "what": "kernel",
            "source": kernel.source if generated else kernel,
            "name": kernel.name if generated else name or _only_function(kernel),
            "args": list(args),
            "grid": grid,
            "constants": dict(constants or {}),
        }
        return self._ask(request)

    def graph(self, code, target, args=(), kwargs=None, *, in_order=False):
        """Run a generated wrapper as Inductor would, kernels interpreted and library calls on the CPU.

        code: what `offline_source(target, ...)` returned; target and args are the real ones, on the CPU, and may have
        other sizes where the code is dynamic. in_order: `tl.dot` adds up products one after the other, so that a row
        does not depend on its place in a tile, as on tensor cores; a library may do otherwise. Returns the flat list of
        the graph's outputs.
        """
        where = {"target": target, "args": args, "kwargs": kwargs or {}}
        inputs = [eval(expression, {}, where) for expression in code.inputs]
        inputs = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs]
        return self._ask({"what": "graph", "source": code.wrapper_source, "args": inputs, "in_order": in_order})

    def close(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self):
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": _python_path()}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.interpreter_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=_ROOT,
        )

    def _ask(self, request):
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            alarm = threading.Timer(_SECONDS, process.kill)
            alarm.start()
            try:
                send(process.stdin, request)
                answer = receive(process.stdout)
            except (OSError, EOFError) as error:
                raise InterpreterError(f"the interpreter died or took more than {_SECONDS} s ({error})") from error
            finally:
                alarm.cancel()
        if "error" in answer:
            raise InterpreterError(answer["error"])
        return answer["values"]


def _python_path():
    return os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))


def _only_function(source):
    names = re.findall(r"^@triton\.jit\s*\ndef (\w+)", source, re.MULTILINE)
    assert len(names) == 1, f"name= one of {names}"
    return names[0]
