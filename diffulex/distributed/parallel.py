"""`ParallelConfig`: how the experts of a layer are spread over the ranks of a device mesh."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lowering.errors import MoEOptionError, MoEParallelError

from .placement import ExpertPlacement, even_shares

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

MODES = ("ep", "tp")
SHARDS = ("experts", "width")
DISPATCHERS = ("naive", "static", "deepep")
MOST_CHUNKS = 16


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the experts of a layer are spread over one dimension of a device mesh.

    mesh                 `DeviceMesh`; its other dimensions hold replicas (EP x DP), each with an exchange of its own
    mode                 "ep": each rank owns experts and has tokens of its own, which travel; "tp": all ranks have the
                         same tokens, and their partial results are added up
    dim                  name of the mesh dimension; None: the only one
    shard                for "tp", what a rank owns: whole "experts", or a slice of every expert's "width"
    placement            experts of each rank, as `plan_placement` makes them from counts; None: `ExpertPlacement.even`.
                         With replicas, for "ep" and inference, each slot goes to one copy
    dispatcher           for "ep", the backend of `build_token_dispatcher`
    max_tokens_per_rank  for "static", the most tokens a rank may bring to one call
    exact                for "static": the result of each slot travels back, so that the layer equals the one on a
                         single rank bitwise (see `EPFusedMoE`); else one sum per token and rank, a K-th of the rows,
                         made in fp32 and rounded once to the dtype of the hidden states
    chunks               for "static" with exact=False: parts of a call, this rank's own tokens and n - 1 parts of those
                         of its peers, so that exchanges overlap GEMMs where ranks share memory; each reads the weights
                         again; under `torch.no_grad()` alone
    """

    mesh: DeviceMesh
    mode: str = "ep"
    dim: str | None = None
    shard: str = "experts"
    placement: ExpertPlacement | None = None
    dispatcher: str = "naive"
    max_tokens_per_rank: int | None = None
    exact: bool = True
    chunks: int = 1

    @property
    def group(self) -> ProcessGroup:
        """The ranks this one shares the experts with."""
        return self.mesh.get_group(self.dim)

    @property
    def size(self) -> int:
        """How many ranks share the experts."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """The number of this rank among them."""
        return self.group.rank()

    def experts_of(self, num_experts: int) -> ExpertPlacement:
        """The placement of `num_experts` experts."""
        return ExpertPlacement.even(num_experts, self.size) if self.placement is None else self.placement

    def width_of(self, width: int) -> tuple[int, int]:
        """This rank's slice (start, stop) of an expert's width."""
        return even_shares(width, self.size)[self.rank]

    def check_mesh(self) -> None:
        """Raise `MoEParallelError` unless `dim` names one dimension of the mesh."""
        names = self.mesh.mesh_dim_names or ()
        if self.dim not in names and (self.dim is not None or self.mesh.ndim != 1):
            raise MoEParallelError.of(
                "ParallelConfig",
                expected=f"dim in {names}, the dimensions of the mesh",
                got=repr(self.dim),
                hint="The experts are spread over one dimension; make the mesh with mesh_dim_names.",
            )

    def _check_used(self) -> None:
        """Raise `MoEOptionError` for an option that would not be looked at beside the others."""
        exchange, by_width = self.mode == "ep", self.mode == "tp" and self.shard == "width"
        unused = {
            "shard": exchange,
            "placement": by_width,
            "dispatcher": not exchange,
            "max_tokens_per_rank": not exchange,
            "exact": not exchange or self.dispatcher != "static",
            "chunks": not exchange or self.dispatcher != "static" or self.exact,
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if unused.get(field.name) and value != field.default:
                shown = value.owned if isinstance(value, ExpertPlacement) else value
                others = f"mode={self.mode!r}, shard={self.shard!r}, dispatcher={self.dispatcher!r}"
                raise MoEOptionError.of(
                    "ParallelConfig",
                    expected=f"no {field.name} beside {others}",
                    got=f"{field.name}={shown!r}"[:120],
                    hint="It would not be looked at: leave it out, or choose what it is for.",
                )

    def check(self, num_experts: int, width: int) -> None:
        """Raise `MoEOptionError` or `MoEParallelError` for options that are unknown or do not fit the experts."""
        for name, known in (("mode", MODES), ("shard", SHARDS), ("dispatcher", DISPATCHERS)):
            value = getattr(self, name)
            if value not in known:
                raise MoEOptionError.of(
                    "ParallelConfig", expected=f"{name} in {known}", got=repr(value), hint=f"Choose one of {known}."
                )
        self._check_used()
        if self.mode == "tp" and self.shard == "width":
            if width < self.size:
                raise MoEParallelError.of(
                    "ParallelConfig",
                    expected=f"experts at least as wide as there are ranks, {self.size}",
                    got=f"width {width}",
                    hint="Use a smaller group, or shard='experts'.",
                )
            return
        placement = self.experts_of(num_experts)
        placement.check(num_experts, self.size)
        if self.mode == "tp" and placement.replicas:
            raise MoEParallelError.of(
                "ParallelConfig",
                expected="each expert on one rank for the mode 'tp'",
                got=f"copies of the experts {list(placement.replicas)[:8]}",
                hint="All ranks add up what their experts give: a copy would count twice. Use the mode 'ep'.",
            )
        most = self.max_tokens_per_rank
        if self.mode == "ep" and self.dispatcher == "static" and (most is None or most < 1):
            raise MoEParallelError.of(
                "ParallelConfig",
                expected="max_tokens_per_rank >= 1 for the dispatcher 'static'",
                got=str(most),
                hint="Its buffers are made for that many tokens of each rank; a call with more is refused.",
            )
        if not 1 <= self.chunks <= MOST_CHUNKS:
            raise MoEParallelError.of(
                "ParallelConfig",
                expected=f"1 to {MOST_CHUNKS} chunks",
                got=str(self.chunks),
                hint="Two hide most of what can be hidden where GEMMs take longer than exchanges.",
            )
