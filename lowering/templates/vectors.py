"""The experts of one token as products with vectors, on CUDA: bytes of weights are all that counts there.

Two kernels, `moe_expert_vector_up` and `moe_expert_vector_sum`; the second one adds up the slots as well. Tiles do not
come from the cost model: in both, each lane of a warp has 16 bytes of a weight row at a time, and about as many of
them under way as registers allow (`benchmarks/NOTES.md`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

from ..activation import IDENTITY, canonical, is_gated, to_triton
from . import render

Constants = dict[str, int]


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class VectorUp:
    """The up stage of one token: act [K, I] of hidden [1, H], weights [E, J, H] whose rows are consecutive.

    top_k, width, depth, num_experts   K, I, H and E
    """

    top_k: int
    width: int
    depth: int
    num_experts: int
    element_size: int
    act: str = IDENTITY
    interleaved: bool = False

    num_warps = 2

    @property
    def block_k(self) -> int:
        """Elements of a row at once: all of a short one, whose gate and up rows a warp then has in its registers."""
        most = 4096 // self.element_size
        return _power_of_two(self.depth) if self.depth <= most else most // 2

    @property
    def constants(self) -> Constants:
        """The constexprs of the kernel."""
        return {
            "NUM_EXPERTS": self.num_experts,
            "WIDTH_N": self.width,
            "WIDTH_K": self.depth,
            "BLOCK_N": self.num_warps,
            "BLOCK_K": self.block_k,
        }

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        return self.top_k * -(-self.width // self.num_warps)

    @functools.cache  # noqa: B019  a few a model
    def source(self) -> str:
        """The kernel text with the host's hooks in it."""
        even_k, gated = self.depth % self.block_k == 0, is_gated(self.act)
        act = None if self.act == IDENTITY else to_triton(self.act, gate="acc", up="acc_up")
        return render.fill(
            "moe_expert_vector_up",
            act=act,
            gated=gated,
            even_k=even_k,
            w_mask="" if even_k else ", mask=(k0 + k < WIDTH_K)[None, :], other=0.0",
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
    """

    top_k: int
    width: int
    depth: int
    num_experts: int
    element_size: int
    ahead: bool

    num_warps = 1

    @property
    def block_k(self) -> int:
        """Elements of a piece, 16 bytes for each lane, or fewer."""
        return min(_power_of_two(self.depth), 512 // self.element_size)

    @property
    def constants(self) -> Constants:
        """The constexprs of the kernel."""
        pieces = -(-self.depth // self.block_k)
        return {
            "NUM_EXPERTS": self.num_experts,
            "TOP_K": self.top_k,
            "WIDTH_N": self.width,
            "WIDTH_K": self.depth,
            "BLOCK_K": self.block_k,
            "PIECES": pieces,
            "HELD": min(16, _power_of_two(pieces * self.top_k)),
            "STEP": 4,
        }

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        return self.width

    @functools.cache  # noqa: B019  a few a model
    def source(self) -> str:
        """The kernel text with the host's hooks in it."""
        return render.fill("moe_expert_vector_sum", even_k=self.depth % self.block_k == 0, ahead=self.ahead)

    @property
    def name(self) -> str:
        """A kernel name that is the same for the same text and constants."""
        return _name("moe_expert_vector_sum", self)


def _name(stage: str, variant: VectorUp | VectorSum) -> str:
    return f"{stage}_{hashlib.sha256(repr(variant).encode()).hexdigest()[:8]}"
