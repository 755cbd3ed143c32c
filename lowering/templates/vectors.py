"""The experts of one token as products with vectors, on CUDA: bytes of weights are all that counts there.

Two kernels, `moe_expert_vector_up` and `moe_expert_vector_sum`; the second one adds up the slots as well. Tiles do not
come from the cost model: in both, a warp has a column of the result, its lanes 16 bytes of a weight row each, and as
many of them under way as registers allow (`benchmarks/NOTES.md`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math

from ..activation import IDENTITY, canonical, is_gated, to_triton
from . import render
from .eager import power_of_two

Constants = dict[str, int]
STEP = 8
# that an SM's registers, 64 Ki, have room for, by the pieces of weights that each of them holds
PROGRAMS = {STEP: 28, 2 * STEP: 18}


@dataclasses.dataclass(frozen=True)
class VectorUp:
    """The up stage of one token: act [K, I] of hidden [1, H], weights [E, J, H] whose rows are consecutive.

    top_k, width, depth, num_experts   K, I, H and E
    shared_width                       S of a shared expert beside them, or 0; then rows do not alternate
    """

    top_k: int
    width: int
    depth: int
    num_experts: int
    element_size: int
    act: str = IDENTITY
    interleaved: bool = False
    shared_width: int = 0

    num_warps = 1

    @property
    def block_k(self) -> int:
        """Elements of a row at once, 64 bytes for each lane, or fewer."""
        return min(power_of_two(self.depth), 2048 // self.element_size)

    @property
    def constants(self) -> Constants:
        """The constexprs of the kernel."""
        return {
            "NUM_EXPERTS": self.num_experts,
            "WIDTH_N": self.width,
            "WIDTH_K": self.depth,
            "BLOCK_K": self.block_k,
            **({"SHARED_N": self.shared_width} if self.shared_width else {}),
        }

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        return self.top_k * self.width + self.shared_width

    @functools.cache  # noqa: B019  a few a model
    def source(self) -> str:
        """The kernel text with the host's hooks in it."""
        gated, shared = is_gated(self.act), self.shared_width > 0
        assert not (shared and self.interleaved), "the shared expert's rows do not alternate"
        ups = ["SHARED_UP"] if gated else []
        act = None if self.act == IDENTITY else to_triton(self.act, gate="acc", up="acc_up")
        return render.fill(
            "moe_expert_vector_up",
            arguments=_names(["A", "W", "IDS"], ["SHARED_A", "SHARED_W", *ups, "SHARED_OUT"] if shared else []),
            shared=shared,
            act=act,
            gated=gated,
            mask="" if self.depth % self.block_k == 0 else ", mask=k0 + k < WIDTH_K, other=0.0",
            column_step=2 if gated and self.interleaved else 1,
            up_shift="1" if self.interleaved else "WIDTH_N",
            functions=render.fill("moe_activation_functions", act=act),
        )

    @property
    def name(self) -> str:
        """A kernel name that is the same for the same text and constants."""
        return _name("moe_expert_vector_up", dataclasses.replace(self, act=canonical(self.act)))


@dataclasses.dataclass(frozen=True)
class VectorSum:
    """The down stage of one token and the sum over its slots: [1, H] fp32 of act [K, I], weights [E, H, I] whose rows
    are consecutive, and weights [1, K].

    top_k, width, depth, num_experts   K, H, I and E
    ahead                              weights are read while the kernel before still runs
    num_sms                            of the device
    shared_depth                       S of a shared expert beside them, whose result is as wide, or 0
    """

    top_k: int
    width: int
    depth: int
    num_experts: int
    element_size: int
    ahead: bool
    num_sms: int
    shared_depth: int = 0

    num_warps = 1

    @property
    def block_k(self) -> int:
        """Elements of a piece, 16 bytes for each lane, or fewer."""
        return min(power_of_two(self.depth), 512 // self.element_size)

    @property
    def shared_block(self) -> int:
        """Elements of a row of the shared expert's weights at once."""
        return min(power_of_two(self.shared_depth), 1024 // self.element_size)

    @property
    def pieces(self) -> int:
        """Pieces of a slot."""
        return -(-self.depth // self.block_k)

    @property
    def held(self) -> int:
        """Pieces of weights that are read at first, so that the others come out even in steps of `STEP`."""
        total = self.pieces * self.top_k
        many = self._is_even and self._idle(PROGRAMS[STEP]) > self._idle(PROGRAMS[2 * STEP]) + 0.05
        most = 2 * STEP if many else STEP  # with masks, many would spill
        return total if total <= most else most - STEP + (total % STEP or STEP)

    @property
    def _is_even(self) -> bool:
        return self.depth % self.block_k == 0

    def _idle(self, programs_at_once: int) -> float:
        """The share of an SM's room for programs that nothing uses, over all waves of them."""
        waves = self.width / (self.num_sms * programs_at_once)
        return 1 - waves / math.ceil(waves)

    @property
    def constants(self) -> Constants:
        """The constexprs of the kernel."""
        return {
            "NUM_EXPERTS": self.num_experts,
            "WIDTH_N": self.width,
            "WIDTH_K": self.depth,
            "BLOCK_K": self.block_k,
            **({"SHARED_K": self.shared_depth, "SHARED_BLOCK": self.shared_block} if self.shared_depth else {}),
        }

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        return self.width

    @functools.cache  # noqa: B019  a few a model
    def source(self) -> str:
        """The kernel text with the host's hooks in it."""
        shared = self.shared_depth > 0
        return render.fill(
            "moe_expert_vector_sum",
            arguments=_names(["A", "W", "IDS", "WEIGHTS"], ["SHARED_A", "SHARED_W", "SHARED_OUT"] if shared else []),
            shared=shared,
            shared_ahead=self.ahead and self.shared_depth <= self.shared_block,
            even_k=self._is_even,
            ahead=self.ahead,
            pieces=self.pieces,
            top_k=self.top_k,
            held=self.held,
            held_slots=-(-self.held // self.pieces),
            step=STEP,
        )

    @property
    def name(self) -> str:
        """A kernel name that is the same for the same text and constants."""
        return _name("moe_expert_vector_sum", self)


def _names(*names: list[str]) -> str:
    return ", ".join(f'"{name}"' for some in names for name in some)


def _name(stage: str, variant: VectorUp | VectorSum) -> str:
    return f"{stage}_{hashlib.sha256(repr(variant).encode()).hexdigest()[:8]}"
