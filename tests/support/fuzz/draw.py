"""What a random model is made of: a seed gives a `Form`, `source.write` the program."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

GATED = {
    "silu": "F.silu(g) * u",
    "gelu": "F.gelu(g) * u",
    "gelu_tanh": 'F.gelu(g, approximate="tanh") * u',
    "relu": "F.relu(g) * u",
    "written_out": "u * (g * torch.sigmoid(g))",
    "capped": "F.silu(g.clamp(max=1.5)) * u.clamp(-1.5, 1.5)",
    "oai": "(u.clamp(-2.0, 2.0) + 1.0) * (g.clamp(max=2.0) * torch.sigmoid(1.702 * g.clamp(max=2.0)))",
    "scaled": "1.5 * F.silu(g) * u",
    "widened": "F.silu(g.float()).to(g.dtype) * u",
    "tanh": "torch.tanh(g) * u - 0.25 * u",
    "of_rows": "F.silu(g) * u / (1.0 + u.abs().mean(-1, keepdim=True))",
}
PLAIN = {
    "silu": "F.silu(p)",
    "gelu": "F.gelu(p)",
    "relu2": "F.relu(p).square()",
    "tanh": "torch.tanh(p) + 0.5 * p",
    "sigmoid": "torch.sigmoid(p)",
    "of_rows": "p / (1.0 + p.abs().amax(-1, keepdim=True))",
}
ROUTERS = (
    "softmax",
    "softmax",
    "softmax_written_out",
    "topk_softmax",
    "sigmoid",
    "sigmoid",
    "sqrtsoftplus",
    "sigmoid_after",
    "squared",  # the passes know no such score
)
# other spellings of single steps of the grouped-GEMM spine, which the passes see through or have to leave alone
STEPS = (
    "int32_ids",
    "stable_sort",
    "floor_divide",
    "repeated_rows",
    "masked_rows",
    "masked_product",
    "clamped_bias",
    "weights_as_column",
    "scaled_rows",
    "index_add",
    "sum_in_fp32",
    "relu_of_rows",
    "dropped",  # ids of one expert become E, which is none
    "torch_mm",  # torch's own grouped GEMM in bfloat16
)
# further outputs: values of a block that are read twice then, in the dtype they have
EXTRAS = ("ids", "w", "logits", "probs", "mixed", "routed", "pre", "act", "offsets")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Block:
    """One MoE block; the names of its fields stand in the program `source.write` makes."""

    experts: int = 4
    top_k: int = 2
    width: int = 16
    style: str = "spine"
    gated: bool = True
    act: str = "silu"
    interleaved: bool = False
    bias: bool = False
    layouts: tuple[str, str] = ("plain", "plain")
    router: str = "softmax"
    gate_in: str = "model"
    router_bias: bool = False
    groups: int = 1
    group_score: str = "top2"
    fill: str = "-inf"
    renorm: str = ""
    scale: float = 1.0
    per_expert: bool = False
    narrow_weights: bool = False
    unsorted: bool = False
    shares_router: bool = False
    pre_norm: str = ""
    post_norm: str = ""
    residual: bool = False
    shared: str = ""
    shared_first: bool = False
    out_scale: float = 1.0
    steps: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()

    def is_sound(self) -> bool:
        """Whether there is such a program."""
        grouped = self.groups > 1 and (self.experts % self.groups > 0 or self.top_k > self.experts // self.groups)
        return self.act in (GATED if self.gated else PLAIN) and self.top_k <= self.experts and not grouped


@dataclasses.dataclass(frozen=True)
class Form:
    """A model of one or two blocks, and the token counts of its calls."""

    seed: int
    blocks: tuple[Block, ...]
    dtype: str = "float32"
    hidden: int = 16
    tokens: tuple[int, ...] = (5,)
    dynamic: bool = False

    def replace(self, **fields: Any) -> Form:
        """The form with other fields."""
        return dataclasses.replace(self, **fields)


def draw(seed: int) -> Form:
    """The form of a seed."""
    rng = random.Random(seed)
    dynamic = rng.random() < 0.35
    blocks = [_block(rng, index) for index in range(rng.choice((1, 1, 2)))]
    if blocks[-1].shares_router:  # and so what it chose from
        blocks[-1] = dataclasses.replace(blocks[-1], experts=blocks[0].experts, top_k=blocks[0].top_k)
    if any("mixed" in block.extras for block in blocks):  # slots, in whatever order the choice has
        blocks = [dataclasses.replace(block, unsorted=False) for block in blocks]
    return Form(
        seed,
        blocks=tuple(blocks),
        dtype=rng.choice(DTYPES),
        hidden=rng.choice((16, 24, 32)),
        tokens=tuple(rng.sample(range(18), 5)) if dynamic else (rng.randrange(18),),
        dynamic=dynamic,
    )


def _some(rng: random.Random, names: tuple[str, ...], chance: float) -> tuple[str, ...]:
    return tuple(name for name in names if rng.random() < chance)


def _block(rng: random.Random, index: int) -> Block:
    experts = rng.choice((3, 4, 6, 8, 12))
    gated = rng.random() < 0.8
    style = rng.choice(("spine", "spine", "interface", "ops"))
    router = rng.choice(ROUTERS)
    grouped = router in ("softmax", "sigmoid", "sqrtsoftplus") and experts % 2 == 0 and rng.random() < 0.35
    layouts = ("plain", "plain", "transposed") if style == "interface" else ("plain", "transposed", "padded", "strided")
    layout = rng.choice(layouts)
    return Block(
        experts=experts,
        top_k=rng.randint(1, min(4, experts // 2 if grouped else experts)),
        width=rng.choice((8, 16, 24)),
        style=style,
        gated=gated,
        act=rng.choice(tuple(GATED if gated else PLAIN)),
        interleaved=gated and rng.random() < 0.3,
        bias=rng.random() < 0.35,
        layouts=(layout, layout if style == "interface" else rng.choice(layouts)),
        router=router,
        gate_in=rng.choice(("model", "model", "float", "float_weight")),
        router_bias=router not in ("softmax_written_out", "squared") and rng.random() < 0.35,
        groups=2 if grouped else 1,
        group_score=rng.choice(("top2", "max")) if experts >= 4 else "max",
        fill=rng.choice(("-inf", "-inf", "0.0")),
        renorm=rng.choice(("", "sum", "sum", "eps", "clamp")),
        scale=rng.choice((1.0, 1.0, 2.5)),
        per_expert=rng.random() < 0.1,
        narrow_weights=rng.random() < 0.5,
        unsorted=rng.random() < 0.2,
        shares_router=index > 0 and rng.random() < 0.4,
        pre_norm=rng.choice(("", "rms", "rms", "layer")),
        post_norm=rng.choice(("", "", "rms", "layer")),
        residual=rng.random() < 0.6,
        shared=rng.choice(("", "", "plain", "gated")),
        shared_first=rng.random() < 0.5,
        out_scale=rng.choice((1.0, 1.0, 0.5)),
        steps=_some(rng, STEPS, 0.07),
        extras=_some(rng, EXTRAS, 0.08),
        dead=_some(rng, EXTRAS, 0.05),
    )
