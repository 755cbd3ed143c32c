"""What `import diffulex` does to the compiler: hooks that wait for Inductor, so neither it nor triton is loaded."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from ..after_import import after_import
from ..ops import _library
from ..state import WATCHERS
from ..templates.scratch import lend_memory
from .identity import tag_caches
from .kept import keep_decisions
from .switch import guard_on_switches

# The first so that a `config.patch` around the first compilation restores our pass and not its absence; the second,
# loaded before Inductor looks at any graph, for who set the slot between the two.
_SLOT_MODULES = ("torch._inductor.config", "torch._inductor.compile_fx")


def _on_slot(module: ModuleType) -> None:
    passes = importlib.import_module("lowering.inductor.passes")
    if hasattr(passes, "install_pass"):  # else `passes` itself is loading Inductor: the other module is still to come
        passes.install_pass()


def _on_trace() -> None:
    tag_caches()  # CUDA may have started since, and with it there may be tuned times
    # who set the slot after Inductor was loaded, or sets it for one compilation (options=), has our pass behind theirs
    if "torch._inductor.graph" in sys.modules:
        passes = importlib.import_module("lowering.inductor.passes")
        passes.install_pass()
        passes.register_lowerings()


def install() -> None:
    """Install once; later calls do nothing."""
    if _on_trace in _library.TRACE_HOOKS:
        return
    _library.TRACE_HOOKS.append(_on_trace)
    tag_caches()
    WATCHERS.append(tag_caches)
    for name in _SLOT_MODULES:
        after_import(name, _on_slot)
    after_import("torch._dynamo.output_graph", guard_on_switches)
    after_import("torch._inductor.output_code", keep_decisions)
    after_import("triton.runtime._allocation", lend_memory)
