"""From a variant to kernel text: our own template pass, which leaves the host's hooks (`{{...}}`) untouched.

The same text is rendered by Inductor (compiled models) and by `standalone` (eager CUDA, interpreter, offline
checks), so a kernel exists once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from importlib import resources

import jinja2

from ..activation import IDENTITY, canonical, is_gated, to_triton
from ..schedule.schedule import MOST_PIECES, PLAIN, SPECIALIZED_ROWS, Loop, Schedule, is_transposed

# angle brackets: the host's hooks keep jinja's braces
_ENVIRONMENT = jinja2.Environment(
    block_start_string="<%",
    block_end_string="%>",
    variable_start_string="<<",
    variable_end_string=">>",
    comment_start_string="{#",
    comment_end_string="#}",
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)


@functools.cache
def template_text(name: str) -> str:
    """The file `name`.jinja of this package."""
    return resources.files(__package__).joinpath(f"{name}.jinja").read_text()


@functools.cache
def route_text(name: str = "moe_route") -> str:
    """The text of `moe_route` or `moe_route_linear_sum`, with the host's hooks in it.

    Both select and weigh by the same text; the first reads the chosen logits again, the second has them in a tile.
    """
    select = fill("moe_route_select", in_tile=name != "moe_route").rstrip("\n")
    return fill(name, select=select, functions=template_text("moe_route_functions"))


@dataclasses.dataclass(frozen=True)
class ExpertGemmVariant:
    """What distinguishes the texts of the expert GEMMs; sizes and tiles are constants of the host.

    gather     rows of A come through ORDER // TOP_K (up stage)
    scatter    rows of the output go to ORDER (down stage)
    act        formula, or identity
    even_k     the reduction width is a multiple of BLOCK_K: no masks in the loop
    precision  "ieee" or "tf32" for fp32 operands, no effect on 16-bit ones
    transposed columns of W are consecutive in memory, not rows
    shared     programs of a shared expert, with the same activation, come first (pointers, no bias)
    sorts      the slots are sorted by the programs themselves, out of IDS (up stage, pointers)
    by_slot    nobody sorts the slots, each is a row tile (one token, pointers)
    unread     rows of no expert are left as they are, instead of zeros (slots that were sorted, no shared expert)
    loop       the fields of the schedule that change the text, see `Schedule`
    """

    gather: bool
    scatter: bool
    bias: bool
    act: str = IDENTITY
    interleaved: bool = False
    even_k: bool = True
    precision: str = "ieee"
    transposed: bool = False
    shared: bool = False
    sorts: bool = False
    by_slot: bool = False
    unread: bool = dataclasses.field(default=False, repr=False)
    loop: Loop = PLAIN

    @property
    def stage(self) -> str:
        """The op that the kernel is of."""
        return ("moe_expert_up" if self.gather else "moe_expert_down") + ("_shared" if self.shared else "")

    @property
    def described(self) -> tuple[str, ...]:
        """The operands laid out for tensor descriptors where the loop takes them: gathered rows cannot come by one, but
        specialised warps copy as much at once.
        """
        return ("W",) if self.gather and not self.loop.specialized else ("W", "A")

    @functools.cache  # noqa: B019  a few schedules a model, and eager mode asks with every call
    def scheduled(self, schedule: Schedule, *, depth: int, strides: tuple[int, ...]) -> ExpertGemmVariant:
        """The variant for a schedule, a reduction width and the strides of the weights [E, J, H]."""
        even_k, transposed = depth % schedule.block_k == 0, is_transposed(strides)
        return dataclasses.replace(self, transposed=transposed, even_k=even_k, loop=schedule.loop)

    @functools.cache  # noqa: B019  a few variants a model, rendered once
    def source(self) -> str:
        """The kernel text with the host's hooks in it."""
        gated = is_gated(self.act)
        arguments = ["A", "W", *(["BIAS"] if self.bias else []), *([] if self.by_slot else ["ORDER", "OFFSETS"])]
        if self.sorts or self.by_slot:
            assert not self.loop.tma and (self.gather or not self.sorts), "the first stage sorts, and not for many rows"
            assert not self.by_slot or (self.loop == PLAIN and not self.sorts), "slots have no order to be grouped in"
            assert not self.unread, "who sorts writes the order of all slots"
            arguments += ["IDS"]
        if self.shared:
            apart = self.bias or self.interleaved or self.transposed or self.loop.tma or self.unread
            assert not apart, "a shared expert has none of these"
            arguments += ["SHARED_A", "SHARED_W", *(["SHARED_UP"] if gated else []), "SHARED_OUT"]
        if self.loop.specialized:
            return self._specialized(arguments)
        masks = ["w_inside"] if self.transposed else []
        masks += [] if self.even_k else ["(k0 + k < WIDTH_K)[:, None]"]
        act = self.act_text(gate="acc", up="acc_up")
        return fill(
            "moe_expert_gemm_tma" if self.loop.tma else "moe_expert_gemm",
            arguments=", ".join(f'"{name}"' for name in arguments),
            gather=self.gather,
            scatter=self.scatter,
            bias=self.bias,
            gated=gated,
            act=act,
            interleaved=self.interleaved,
            transposed=self.transposed,
            paired=self.transposed and gated and self.interleaved,
            halved=self.transposed and gated and not self.interleaved,
            w_mask=f", mask={' & '.join(masks)}, other=0.0" if masks else "",
            column_step=2 if gated and self.interleaved else 1,
            up_shift="1" if self.interleaved else "WIDTH_N",
            even_k=self.even_k,
            precision=self.precision,
            shared=self.shared,
            sorts=self.sorts,
            by_slot=self.by_slot,
            unread=self.unread,
            width="width" if self.shared else "WIDTH_N",
            up_ptr="w_up_ptr" if self.shared else "w_ptr + up_shift",
            grouped=self.loop.grouped,
            subtiles=self.loop.subtiles,
            flatten=self.loop.flatten,
            functions=fill("moe_activation_functions", act=act),
        )

    def unlike_specialized(self) -> tuple[str, ...]:
        """What of this variant no kernel with specialised warps knows."""
        kinds = {"with bias": self.bias, "of alternating halves": self.interleaved, "transposed": self.transposed}
        return tuple(words for words, holds in kinds.items() if holds)

    def _specialized(self, arguments: list[str]) -> str:
        assert not self.unlike_specialized(), "what plans a schedule asks for this before"
        assert not (self.shared or self.sorts or self.by_slot), "these are for few rows"
        described = ["W_DESC"] if self.gather else ["W_DESC", "A_DESC"]
        arguments = ["A", *described, *(name for name in arguments if name not in ("A", "W")), "TAKEN"]
        split_k = self.loop.split_k
        arguments += ["PARTIALS"] if split_k else []
        gated, parts = is_gated(self.act), SPECIALIZED_ROWS // 64
        sums = ("acc",) if gated else ("acc", "acc_up")
        results = [self.act_text(gate=name, up="acc_up") or name for name in sums]
        functions = fill("moe_activation_functions", act=results[0])
        return fill(
            "moe_expert_gemm_specialized",
            arguments=", ".join(f'"{name}"' for name in arguments),
            gather=self.gather,
            scatter=self.scatter,
            gated=gated,
            results=[_in_gluon(text) for text in results],
            unread=self.unread,
            parts=parts,
            split_k=split_k,
            most_pieces=MOST_PIECES,
            functions=_in_gluon(functions) + (_SIGMOID if "sigmoid(" in results[0] else ""),
        )

    def act_text(self, *, gate: str, up: str) -> str | None:
        """The activation as an expression of Triton, None for the identity."""
        return None if self.act == IDENTITY else to_triton(self.act, gate=gate, up=up)

    @property
    def name(self) -> str:
        """A kernel name that is the same for the same text."""
        return self._name()

    @functools.cache  # noqa: B019  a few variants a model
    def _name(self) -> str:
        fields = dataclasses.replace(self, act=canonical(self.act))
        name = f"{self.stage}_{hashlib.sha256(repr(fields).encode()).hexdigest()[:8]}"
        return f"{name}_unread" if self.unread else name


@dataclasses.dataclass(frozen=True)
class GradWeightVariant:
    """What distinguishes the texts of `moe_expert_grad_weight.jinja`: which side is read through an index."""

    left_index: bool
    right_index: bool
    precision: str = "ieee"

    @functools.cache  # noqa: B019  four variants
    def source(self) -> str:
        """The kernel text with the host's hooks in it."""
        indices = [name for name, used in (("LEFT_INDEX", self.left_index), ("RIGHT_INDEX", self.right_index)) if used]
        return fill(
            "moe_expert_grad_weight",
            arguments=", ".join(f'"{name}"' for name in ("LEFT", "RIGHT", *indices, "OFFSETS")),
            left_index=self.left_index,
            right_index=self.right_index,
            precision=self.precision,
        )

    @property
    def name(self) -> str:
        """A kernel name that is the same for the same text."""
        return f"moe_expert_grad_weight_{int(self.left_index)}{int(self.right_index)}_{self.precision}"


_SIGMOID = """

@gluon.jit
def _sigmoid(x):
    return 1 / (1 + gl.exp(-x))
"""


def _in_gluon(text: str) -> str:
    """An expression or functions of Triton in Gluon, which has no sigmoid."""
    text = text.replace("@triton.jit", "@gluon.jit").replace("tl.sigmoid(", "_sigmoid(")
    return re.sub(r"\btl\.(?!PropagateNan)", "gl.", text)


def fill(template: str, **values: object) -> str:
    """The file `template`.jinja of this package, our own pass filled in."""
    return _ENVIRONMENT.from_string(template_text(template)).render(**values)
