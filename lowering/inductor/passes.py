"""The graph pass in Inductor's slot. Importing this imports Inductor; `install` does so when a graph is compiled."""

from __future__ import annotations

import importlib
from typing import Any

import torch._inductor.config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from ..report import take_decisions
from ..state import is_enabled
from .identity import identity


class MoEPasses(CustomGraphPass):
    """The pass in `joint_custom_pre_pass`: runs what was there before, then ours.

    Its `uuid` hashes every file of `lowering` and tells where the switches stand, so Inductor's caches never return
    code of another version, or of the other side of a switch.
    """

    def __init__(self, previous: Any = None) -> None:
        self.previous = previous

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        for other in self._others():
            other(graph)
        order = importlib.import_module("lowering.graph.order_pass")
        order.order_pass(graph)  # also where the switches are off: layers of several ranks run there, too
        if any(order.takes_part(node) for node in graph.nodes):
            importlib.import_module("lowering.inductor.exchange_lowerings").register_exchanges()
        take_decisions()  # of a graph whose compilation failed: the next graph's are kept with the graph
        if is_enabled():
            importlib.import_module("lowering.graph.pipeline").run_passes(graph)
            if any(getattr(node.target, "namespace", "") == "diffulex" for node in graph.nodes):
                register_lowerings()

    def _others(self) -> tuple[Any, ...]:
        if self.previous is None:
            return ()
        return tuple(self.previous) if isinstance(self.previous, list | tuple) else (self.previous,)

    def uuid(self) -> Any:
        """Cache key part; None, which bypasses the cache, where another pass has no identity of its own."""
        others = []
        for other in self._others():
            found = other.uuid() if isinstance(other, CustomGraphPass) else None
            if found is None:
                return None
            others.append(found)
        return (identity(), *others)


def register_lowerings() -> None:
    """Import the lowerings, which registers them; needed before a graph with our ops is lowered."""
    importlib.import_module("lowering.inductor.lowerings")
    importlib.import_module("lowering.inductor.route_lowerings")
    importlib.import_module("lowering.inductor.shared_lowerings")
    importlib.import_module("lowering.inductor.route_linear_lowerings")


def install_pass() -> None:
    """Put the pass into Inductor's configuration, around what stands there; a second call does nothing."""
    if not isinstance(inductor_config.joint_custom_pre_pass, MoEPasses):
        inductor_config.joint_custom_pre_pass = MoEPasses(inductor_config.joint_custom_pre_pass)
