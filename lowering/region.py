"""The intermediate form of one MoE block: what was recognised in a graph, and what planning and reporting work from."""

from __future__ import annotations

import dataclasses

import sympy

from .spec import ExpertSpec, RoutingSpec


@dataclasses.dataclass(frozen=True)
class MoERegion:
    """One routing and the experts behind it.

    layer       dotted name of the module, empty where the graph does not say
    experts     sizes, activation and layout of the expert MLPs
    routing     how the router chooses, None where it stayed ordinary aten
    tokens      T as an expression of the graph's symbols
    top_k       K
    neighbours  what consumes the block's output behind casts and views ("add", "index", ...), for fusion
    """

    layer: str
    experts: ExpertSpec
    routing: RoutingSpec | None
    tokens: sympy.Expr
    top_k: int
    neighbours: tuple[str, ...] = ()

    @property
    def rows(self) -> sympy.Expr:
        """N = T*K, the rows of the expert GEMMs."""
        return self.tokens * self.top_k

    def __str__(self) -> str:
        e = self.experts
        form = ["gated" if e.gated else "ungated"]
        form += [name for name in ("bias", "interleaved", "transposed") if getattr(e, name)]
        sizes = f"E={e.num_experts} K={self.top_k} H={e.hidden_size} I={e.intermediate_size}"
        return (
            f"{sizes} {e.dtype} {e.act} ({', '.join(form)}), T={self.tokens}, then {', '.join(self.neighbours) or '-'}"
        )
