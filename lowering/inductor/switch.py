"""Dynamo guards on the switches in every graph, so that `disabled()` and `batch_invariant()` reach what was compiled
before, and back.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from .. import state

_MODULE = "lowering.state"
_ALIAS = f"__import_{_MODULE.replace('.', '_dot_')}"  # as Dynamo names a module it puts into the globals of a frame


def guard_on_switches(module: ModuleType) -> None:
    """Add the guards to those that every graph starts with; `module` is `torch._dynamo.output_graph`.

    A graph whose code never reads a switch gets the passes and kernels of one side all the same: without the guard it
    would be reused on the other.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import AttrSource, GlobalSource

    stock = module.OutputGraph.__init__

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self.import_sources[_ALIAS] = _MODULE
        package = getattr(self, "package", None)
        if package is not None:  # what is stored names the modules that its guards need when it is loaded
            package.add_import_source(_ALIAS, _MODULE)
        self.global_scope[_ALIAS] = state
        for name in state.GUARDED:
            self.guards.add(AttrSource(GlobalSource(_ALIAS), name).make_guard(GuardBuilder.CONSTANT_MATCH))

    module.OutputGraph.__init__ = init
