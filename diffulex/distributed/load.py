"""`ExpertLoad`: how many slots each expert got, counted where the ids are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowering._checks import check_device, check_int
from lowering.errors import MoEOptionError, MoERangeError

from .collectives import total_of_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..moe.topk import TopKRouter


@dataclasses.dataclass(eq=False)
class Watching:
    """What `ExpertLoad.watch` returns: ends it by `remove()`, or behind a `with` block."""

    load: ExpertLoad
    router: TopKRouter
    removed: bool = False

    def remove(self) -> None:
        """Count no more, also in code that was compiled meanwhile; once is enough."""
        if self.removed:
            return
        self.removed = True
        watchers = list(self.router.watchers)
        del watchers[[watcher is self.load for watcher in watchers].index(True)]
        self.router.watchers = tuple(watchers)

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()


class ExpertLoad(nn.Module):
    """Counts the slots of each expert on the device, without the host: in eager code, compiled code and CUDA graphs.

    counts_E  [E] int64, a buffer that stays where it is and is not saved

    A module, so that compiled code takes the buffer's address as fixed. Keep it beside the model, not in it: replicas
    that share a model's buffers would share the counts. What is computed again for a gradient is counted again.
    """

    counts_E: Tensor

    def __init__(self, num_experts: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        if num_experts < 1:
            raise MoERangeError.of(
                "ExpertLoad", expected="at least one expert", got=str(num_experts), hint="Pass the E of the layer."
            )
        self.register_buffer("counts_E", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)

    def forward(self, ids_TK: Tensor) -> None:
        """Count ids [T, K] int32 or int64, any number of them; those outside [0, E) are no expert's."""
        check_int("ExpertLoad", "ids", ids_TK)
        check_device("ExpertLoad", ("the counts", self.counts_E), ("ids", ids_TK))
        ids_N = ids_TK.reshape(-1)
        num_experts = self.counts_E.shape[0]
        known_N = (ids_N >= 0) & (ids_N < num_experts)
        # One for each known id and nothing for the others, so shapes do not depend on the ids; integers add up to the
        # same in any order.
        self.counts_E.scatter_add_(0, ids_N.clamp(0, num_experts - 1).long(), known_N.long())

    def watch(self, router: TopKRouter) -> Watching:
        """Count what `layer.router` chooses from now on, until `remove()` of what this returns; ids [T, K] int32.

        Code that was compiled before counts as well: it is compiled once more at its next call, and after `remove()`
        what was compiled before runs again. Raises `MoEOptionError` for another module than such a router.
        """
        watchers = getattr(router, "watchers", None)
        if not isinstance(watchers, tuple):
            raise MoEOptionError.of(
                "ExpertLoad",
                expected="the router of a layer of diffulex.moe",
                got=type(router).__name__,
                hint="Count other routers' ids by calling this module with them, e.g. in a forward hook.",
            )
        router.watchers = (*watchers, self)
        return Watching(self, router)

    def reset(self) -> None:
        """Count from zero again."""
        self.counts_E.zero_()

    def total(self, group: ProcessGroup | None = None) -> Tensor:
        """The counts of all ranks of `group` together (None: of this one), a new tensor [E] int64; no host sync.

        Every rank of the group must call it. The counts of the rank itself stay as they are.
        """
        return self.counts_E.clone() if group is None else total_of_ranks(self.counts_E, group.group_name)

    def snapshot(self, group: ProcessGroup | None = None) -> list[int]:
        """`total` as a list on the host, for `plan_placement`: the one place that waits for the device."""
        return self.total(group).tolist()
