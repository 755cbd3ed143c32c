"""Inputs of a MoE block and of each op: one list per op, shared by opcheck, hypothesis and benchmarks.

T tokens, K experts per token, N = T*K slots, E experts, H hidden, I expert width, J = 2I gated, I otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lowering.ops  # noqa: F401  registers torch.ops.diffulex
from lowering.activation import evaluate, is_gated, split_gate
from lowering.reference.moe_block import ExpertWeights, moe_block_reference

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
LOW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Args = tuple[Any, ...]
SENTINELS = (-1, 2**31 - 1, -(2**31))  # and E itself, the sentinel of transformers' expert parallelism


@dataclasses.dataclass(frozen=True)
class BlockForm:
    """What a block looks like. `ids` names how tokens choose experts, see `make_ids`; sizes T, K, E, H, I."""

    tokens: int = 7
    top_k: int = 2
    experts: int = 5
    hidden: int = 8
    width: int = 6
    act: str = "swiglu"
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    ids: str = "distinct"
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def replace(self, **changes: Any) -> BlockForm:
        """The form with some fields changed."""
        return dataclasses.replace(self, **changes)


FORMS = {
    "plain": BlockForm(),
    "ungated": BlockForm(act="relu2"),
    "ungated_biased": BlockForm(act="gelu", bias=True),
    "biased": BlockForm(act="geglu", bias=True),
    "transposed": BlockForm(transposed=True),
    "interleaved": BlockForm(interleaved=True),
    "gpt_oss": BlockForm(act="swiglu_oai", bias=True, interleaved=True, transposed=True),
    "sentinels": BlockForm(ids="sentinels", bias=True),
    "all_sentinels": BlockForm(ids="none", bias=True),
    "no_tokens": BlockForm(tokens=0, bias=True),
    "one_token": BlockForm(tokens=1),
    "one_expert_gets_all": BlockForm(ids="one", bias=True),
    "empty_experts": BlockForm(ids="sparse", experts=9, bias=True),
    "every_expert": BlockForm(top_k=5),
    "one_expert": BlockForm(top_k=1, experts=1),
    "duplicates": BlockForm(ids="duplicates", top_k=3, experts=2),
    "top1": BlockForm(top_k=1, act="geglu_tanh"),
    "primes": BlockForm(tokens=13, top_k=3, experts=7, hidden=11, width=5, bias=True),
    "width_one": BlockForm(hidden=1, width=1, bias=True, interleaved=True),
}
# Wide enough for the two norms to mean something.
WIDE = BlockForm(tokens=33, top_k=3, experts=6, hidden=48, width=40)
WIDE_FORMS = {
    "plain": WIDE,
    "ungated": WIDE.replace(act="relu2"),
    "gpt_oss": WIDE.replace(act="swiglu_oai", bias=True, interleaved=True, transposed=True),
    "sentinels": WIDE.replace(ids="sentinels", act="geglu"),
}


@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """Tensors of one block: hidden [T, H], weights [T, K], ids [T, K] int32, w13 [E, J, H], w2 [E, H, I], biases."""

    hidden_TH: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    w13_EJH: Tensor
    w2_EHI: Tensor
    b13_EJ: Tensor | None = None
    b2_EH: Tensor | None = None
    act: str = "swiglu"
    interleaved: bool = False

    def replace(self, **changes: Any) -> BlockInputs:
        """The inputs with some tensors or options changed."""
        return dataclasses.replace(self, **changes)

    def floats(self) -> dict[str, Tensor]:
        """The floating tensors by name, absent biases left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: v for name, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}

    def leaves(self) -> BlockInputs:
        """The same values as leaves that ask for a gradient; strides are kept."""
        return self.replace(**{name: t.detach().requires_grad_() for name, t in self.floats().items()})

    def double(self) -> BlockInputs:
        """The same values in fp64."""
        return self.replace(**{name: t.detach().double() for name, t in self.floats().items()})

    def eager(self) -> Tensor:
        """The block [T, H] as stock models write it, in the inputs' own dtype: one `linear` per expert, `index_add`."""
        out_TH = torch.zeros_like(self.hidden_TH)
        for expert in range(self.w13_EJH.shape[0]):
            token, k = torch.where(self.ids_TK == expert)
            bias, bias_2 = (None if b is None else b[expert] for b in (self.b13_EJ, self.b2_EH))
            pre = torch.nn.functional.linear(self.hidden_TH[token], self.w13_EJH[expert], bias)
            act = evaluate(self.act, *split_gate(pre, self.act, interleaved=self.interleaved))
            rows = torch.nn.functional.linear(act, self.w2_EHI[expert], bias_2)
            weighted = rows * self.weights_TK[token, k, None].to(rows.dtype)
            out_TH = out_TH.index_add(0, token, weighted)
        return out_TH

    def chain(self) -> Tensor:
        """The block [T, H] through the ops."""
        ops = torch.ops.diffulex
        num_experts, top_k = self.w13_EJH.shape[0], self.ids_TK.shape[1]
        order_N, _, offsets_E1 = ops.moe_dispatch(self.ids_TK, num_experts)
        act_NI = ops.moe_expert_up(
            self.hidden_TH, self.w13_EJH, self.b13_EJ, order_N, offsets_E1, top_k, self.act, self.interleaved
        )
        slots_NH = ops.moe_expert_down(act_NI, self.w2_EHI, self.b2_EH, order_N, offsets_E1)
        return ops.moe_combine(slots_NH, self.weights_TK)

    def reference(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The block [T, H] through the per-token loop, computed in `dtype`."""
        experts = ExpertWeights(self.w13_EJH, self.w2_EHI, self.b13_EJ, self.b2_EH, self.act, self.interleaved)
        return moe_block_reference(self.hidden_TH, self.weights_TK, self.ids_TK, experts=experts, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Slots:
    """Slots sorted by expert, made without the dispatch op: order [N], token [N], offsets [E+1], all int32."""

    order_N: Tensor
    token_N: Tensor
    offsets_E1: Tensor

    @property
    def valid(self) -> int:
        """The number of slots whose id is an expert."""
        return int(self.offsets_E1[-1])


def sort_slots(ids_TK: Tensor, num_experts: int) -> Slots:
    """Slots of ids [T, K] int in expert order, stable; ids outside [0, E) last."""
    top_k, ids = ids_TK.shape[1], ids_TK.reshape(-1).tolist()
    experts = [i if 0 <= i < num_experts else num_experts for i in ids]
    order = sorted(range(len(experts)), key=experts.__getitem__)
    offsets = [sum(e < bound for e in experts) for bound in range(num_experts + 1)]
    lists = (order, [slot // top_k for slot in order], offsets)
    return Slots(*(torch.tensor(values, dtype=torch.int32, device=ids_TK.device) for values in lists))


def make_ids(form: BlockForm, generator: torch.Generator) -> Tensor:
    """Expert ids [T, K] int32.

    distinct    K different experts a token          sentinels  the same, a third of them outside [0, E)
    duplicates  a token may choose an expert twice   sparse     every second expert gets nothing
    one         one expert gets all slots            none       no id is an expert
    """
    shape = (form.tokens, form.top_k)
    if form.ids == "one":
        return torch.full(shape, form.experts // 2, dtype=torch.int32)
    if form.ids == "none":
        return torch.full(shape, form.experts, dtype=torch.int32)
    if form.ids == "duplicates":
        return torch.randint(form.experts, shape, generator=generator, dtype=torch.int32)
    pool = (form.experts + 1) // 2 if form.ids == "sparse" else form.experts
    assert pool >= form.top_k, f"{form} has too few experts for distinct ids"
    ids_TK = torch.rand(form.tokens, pool, generator=generator).argsort(1)[:, : form.top_k].int()
    if form.ids == "sparse":
        return ids_TK * 2
    if form.ids == "sentinels":
        outside = torch.tensor([*SENTINELS, form.experts], dtype=torch.int32)
        drawn = outside[torch.randint(len(outside), shape, generator=generator)]
        return torch.where(torch.rand(shape, generator=generator) < 1 / 3, drawn, ids_TK)
    assert form.ids == "distinct", form.ids
    return ids_TK


def make_block(form: BlockForm, device: str | torch.device = "cpu") -> BlockInputs:
    """Random inputs of a block; the same form gives the same values on every device, rounded to its dtype.

    Weights [T, K] sum to about one; they are fp32 (fp64 for fp64) and hold values of the form's dtype, so that a
    reference in that dtype is not charged for rounding them.
    """
    generator = torch.Generator().manual_seed(form.seed)
    rows = form.width * (2 if is_gated(form.act) else 1)
    routing = torch.promote_types(form.dtype, torch.float32)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * fan_in**-0.5
        return values.to(form.dtype).to(device)

    def weight(*shape: int) -> Tensor:
        values = normal(*shape, fan_in=shape[2])
        return values.transpose(1, 2).contiguous().transpose(1, 2) if form.transposed else values

    ids_TK = make_ids(form, generator).to(device)
    scores_TK = torch.rand(form.tokens, form.top_k, generator=generator, dtype=torch.float64) + 0.1
    weights_TK = scores_TK / scores_TK.sum(1, keepdim=True)
    return BlockInputs(
        hidden_TH=normal(form.tokens, form.hidden),
        weights_TK=weights_TK.to(form.dtype).to(routing).to(device),
        ids_TK=ids_TK,
        w13_EJH=weight(form.experts, rows, form.hidden),
        w2_EHI=weight(form.experts, form.hidden, form.width),
        b13_EJ=normal(form.experts, rows) if form.bias else None,
        b2_EH=normal(form.experts, form.hidden) if form.bias else None,
        act=form.act,
        interleaved=form.interleaved,
    )


def make_act(form: BlockForm, device: str | torch.device = "cpu") -> Tensor:
    """An input [N, I] of the down stage; rows past offsets[E] hold values too, which nothing may read."""
    generator = torch.Generator().manual_seed(form.seed + 1)
    shape = (form.tokens * form.top_k, form.width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(form.dtype).to(device)


def is_float(value: Any) -> bool:
    """Whether it is a floating tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def in_strides(tensor: Tensor | None) -> Tensor | None:
    """The same values in other strides: every second element of a vector, a transposed matrix. Any shape, any dtype."""
    if tensor is None or tensor.dim() == 0:
        return tensor
    return torch.stack((tensor, tensor), 1)[:, 0] if tensor.dim() == 1 else tensor.mT.contiguous().mT


def cast(args: Args, dtype: torch.dtype) -> Args:
    """The arguments with floating tensors in `dtype`; strides are kept."""
    return tuple(a.to(dtype) if is_float(a) else a for a in args)


def with_grad(args: Args) -> Args:
    """The same values as leaves, floating tensors asking for a gradient; strides are kept."""
    return tuple(a.detach().requires_grad_() if is_float(a) else a for a in args)


# --- samples: positional arguments of each op, by name -----------------------------------------------------------

Sample = Callable[[torch.device], Args]


def up_args(form: BlockForm, device: str | torch.device = "cpu") -> Args:
    """Arguments of `moe_expert_up`, in schema order."""
    block = make_block(form, device)
    slots = sort_slots(block.ids_TK, form.experts)
    tensors = (block.hidden_TH, block.w13_EJH, block.b13_EJ, slots.order_N, slots.offsets_E1)
    return *tensors, form.top_k, form.act, form.interleaved


def down_args(form: BlockForm, device: str | torch.device = "cpu") -> Args:
    """Arguments of `moe_expert_down`, in schema order."""
    block = make_block(form, device)
    slots = sort_slots(block.ids_TK, form.experts)
    return make_act(form, device), block.w2_EHI, block.b2_EH, slots.order_N, slots.offsets_E1


def _normal(form: BlockForm, device: str | torch.device, *sizes: tuple[int, int], seed: int) -> list[Tensor]:
    """Matrices of these sizes in the form's dtype, rows of about length one."""
    generator = torch.Generator().manual_seed(form.seed + seed)
    values = [torch.randn(size, generator=generator, dtype=torch.float64) * max(1, size[1]) ** -0.5 for size in sizes]
    return [value.to(form.dtype).to(device) for value in values]


def up_shared_args(form: BlockForm, device: str | torch.device = "cpu") -> Args:
    """Arguments of `moe_expert_up_shared`: those of the up stage, and a shared expert from H + 1 to S = I + 3."""
    *tensors, top_k, act, interleaved = up_args(form, device)
    depth, width = form.hidden + 1, form.width + 3
    rows, w1, w3 = _normal(form, device, (form.tokens, depth), (width, depth), (width, depth), seed=6)
    return *tensors, rows, w1, w3 if is_gated(act) else None, top_k, act, interleaved


def down_shared_args(form: BlockForm, device: str | torch.device = "cpu") -> Args:
    """Arguments of `moe_expert_down_shared`: those of the down stage, and a shared expert from S = I + 3 to H + 1."""
    width = form.width + 3
    shared, w2 = _normal(form, device, (form.tokens, width), (form.hidden + 1, width), seed=7)
    return *down_args(form, device), shared, w2, form.top_k


def grad_weight_args(form: BlockForm, device: str | torch.device = "cpu", *, left: str, right: str) -> Args:
    """Arguments of `moe_expert_grad_weight`; left [*, I] and right [*, H] hold rows by "row", "slot" or "token"."""
    block = make_block(form, device)
    slots = sort_slots(block.ids_TK, form.experts)
    index = {"row": None, "slot": slots.order_N, "token": slots.token_N}

    def rows(kind: str, width: int, seed: int) -> Tensor:
        count = form.tokens if kind == "token" else form.tokens * form.top_k
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, width, generator=generator, dtype=torch.float64).to(form.dtype).to(device)

    tensors = rows(left, form.width, form.seed + 2), rows(right, form.hidden, form.seed + 3)
    return *tensors, index[left], index[right], slots.offsets_E1


def combine_args(form: BlockForm, device: str | torch.device = "cpu") -> Args:
    """Arguments of `moe_combine`: slots [T*K, H] and weights [T, K]."""
    block = make_block(form, device)
    generator = torch.Generator().manual_seed(form.seed + 4)
    slots_NH = torch.randn(form.tokens * form.top_k, form.hidden, generator=generator, dtype=torch.float64)
    return slots_NH.to(form.dtype).to(device), block.weights_TK


def combine_args_with_ids(form: BlockForm, device: str | torch.device = "cpu") -> Args:
    """Arguments of `moe_combine` with ids [T, K] int64, of which some are outside [0, E), and E."""
    ids_TK = torch.randint(-2, form.experts + 2, (form.tokens, form.top_k), generator=torch.Generator().manual_seed(7))
    return *combine_args(form, device), ids_TK.to(device), form.experts


def dispatch_args(form: BlockForm, device: str | torch.device = "cpu") -> Args:
    """Arguments of `moe_dispatch`: ids [T, K] int32 and E."""
    return make_block(form, device).ids_TK, form.experts


def route_args(
    device: str | torch.device = "cpu", *, tokens: int = 5, bias: bool = False, ids: bool = False, **options: Any
) -> Args:
    """Arguments of `moe_route` for E = 8, K = 2: logits [T, E] fp32, bias [E], given ids [T, K], the options."""
    generator = torch.Generator().manual_seed(5)
    logits_TE = torch.randn(tokens, 8, generator=generator)
    bias_E = torch.randn(8, generator=generator).to(device) if bias else None
    ids_TK = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :2].int().to(device) if ids else None
    defaults = {
        "score": "softmax",
        "n_group": 1,
        "topk_group": 1,
        "group_score": "top2_sum",
        "group_fill": "-inf",
        "renorm": True,
        "eps": 0.0,
        "scale": 1.0,
    }
    assert options.keys() <= defaults.keys()
    return logits_TE.to(device), bias_E, ids_TK, 2, *(defaults | options).values()


def route_linear_args(
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    product: torch.dtype | None = None,
    linear_bias: bool = False,
    **options: Any,
) -> Args:
    """Arguments of `moe_route_linear` for E = 8, K = 2, H = 12: hidden [T, H], weight [E, H], linear_bias [E], then
    bias [E], the product's dtype (by default that of hidden), that of the logits, the options; of `route_args`.
    """
    logits_TE, bias_E, _, *rest = route_args(device, **options)
    form = BlockForm(dtype=dtype)
    hidden_TH, weight_EH, linear_bias_1E = _normal(form, device, (len(logits_TE), 12), (8, 12), (1, 8), seed=8)
    product = product or dtype
    logits = torch.promote_types(product, torch.float32)
    return hidden_TH, weight_EH, linear_bias_1E[0] if linear_bias else None, bias_E, product, logits, *rest


def _single(form: BlockForm) -> BlockForm:
    return form.replace(dtype=torch.float32)


def _strided(args: Args) -> Args:
    """The arguments with the first one stored column by column."""
    return args[0].t().contiguous().t(), *args[1:]


def _of_forms(make: Callable[..., Args], *names: str) -> dict[str, Sample]:
    return {name: lambda device, name=name: make(_single(FORMS[name]), device) for name in names}


def _grad_weight_samples() -> dict[str, Sample]:
    kinds = {"slot_row": "plain", "row_token": "sentinels", "row_row": "empty_experts", "slot_slot": "no_tokens"}
    samples: dict[str, Sample] = {}
    for kind, form_name in kinds.items():
        left, right = kind.split("_")
        form = _single(FORMS[form_name])
        samples[f"{kind}_{form_name}"] = lambda device, form=form, left=left, right=right: grad_weight_args(
            form, device, left=left, right=right
        )
    return samples


SAMPLES: dict[str, dict[str, Sample]] = {
    "moe_route": {
        "softmax": lambda device: route_args(device),
        "not_renormalised": lambda device: route_args(device, renorm=False, scale=2.5),
        "sigmoid_biased_groups": lambda device: route_args(
            device, bias=True, score="sigmoid", n_group=4, topk_group=2, eps=1e-20
        ),
        "max_groups": lambda device: route_args(device, n_group=2, group_score="max", group_fill="0"),
        "sqrtsoftplus": lambda device: route_args(device, score="sqrtsoftplus", scale=1.5),
        "given_ids": lambda device: route_args(device, ids=True),
        "no_tokens": lambda device: route_args(device, tokens=0),
    },
    "moe_route_linear": {
        "softmax": lambda device: route_linear_args(device),
        "biased": lambda device: route_linear_args(device, linear_bias=True, renorm=False),
        "sigmoid_biased_groups": lambda device: route_linear_args(
            device, bias=True, score="sigmoid", n_group=4, topk_group=2, eps=1e-20
        ),
        "wide_product": lambda device: route_linear_args(device, dtype=torch.bfloat16, product=torch.float32),
        "no_tokens": lambda device: route_linear_args(device, tokens=0),
    },
    "moe_dispatch": {
        **_of_forms(dispatch_args, "plain", "sentinels", "empty_experts", "no_tokens", "one_expert", "duplicates"),
        "int64": lambda device: (dispatch_args(FORMS["plain"], device)[0].long(), 5),
    },
    "moe_expert_up": {
        **_of_forms(up_args, "plain", "ungated_biased", "gpt_oss", "sentinels", "no_tokens", "one_token", "width_one"),
        "identity": lambda device: up_args(_single(FORMS["biased"]), device)[:6],
        "up_half_only": lambda device: up_args(_single(FORMS["plain"].replace(act="u")), device),
        "strided_hidden": lambda device: _strided(up_args(_single(FORMS["plain"]), device)),
        "half": lambda device: up_args(FORMS["plain"].replace(dtype=torch.float16), device),
    },
    "moe_expert_down": {
        **_of_forms(down_args, "plain", "biased", "transposed", "sentinels", "no_tokens", "one_token", "width_one"),
        "strided_act": lambda device: _strided(down_args(_single(FORMS["plain"]), device)),
        "bfloat16": lambda device: down_args(FORMS["biased"].replace(dtype=torch.bfloat16), device),
    },
    "moe_expert_up_shared": {
        **_of_forms(up_shared_args, "plain", "ungated_biased", "sentinels", "no_tokens", "one_token"),
        "bfloat16": lambda device: up_shared_args(FORMS["plain"].replace(dtype=torch.bfloat16), device),
    },
    "moe_expert_down_shared": {
        **_of_forms(down_shared_args, "plain", "biased", "sentinels", "no_tokens", "one_token"),
        "bfloat16": lambda device: down_shared_args(FORMS["plain"].replace(dtype=torch.bfloat16), device),
    },
    "moe_expert_grad_weight": {
        **_grad_weight_samples(),
        "strided_left": lambda device: _strided(
            grad_weight_args(_single(FORMS["plain"]), device, left="row", right="slot")
        ),
    },
    "moe_combine": {
        **_of_forms(combine_args, "plain", "no_tokens", "one_token", "every_expert", "top1"),
        "bfloat16": lambda device: combine_args(FORMS["plain"].replace(dtype=torch.bfloat16), device),
        "strided_slots": lambda device: _strided(combine_args(_single(FORMS["plain"]), device)),
        "ids": lambda device: combine_args_with_ids(FORMS["plain"], device),
    },
}
