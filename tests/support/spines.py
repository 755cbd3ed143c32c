"""The grouped-GEMM spine of an experts block written step by step, and the ways in which it can be another one.

Each function of `MATCHED` and `REFUSED` changes some steps; the pass has to see through the former and to leave the
latter alone. T tokens, K experts per token, N = T*K slots, E experts, H hidden, I expert width, J = 2I.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowering.errors import ReasonCode

from .inputs import BlockForm, make_block

# N = T*K = H: a broadcast along the wrong dimension is possible then
FORM = BlockForm(tokens=12, top_k=2, experts=4, hidden=24, width=8, bias=True, dtype=torch.float32)
T, K, E, H, N = FORM.tokens, FORM.top_k, FORM.experts, FORM.hidden, FORM.tokens * FORM.top_k


@dataclasses.dataclass
class Inputs:
    """What a block reads; `other_TK` are the ids of another router."""

    hidden_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    w13_EJH: Tensor
    w2_EHI: Tensor
    b13_EJ: Tensor
    b2_EH: Tensor
    other_TK: Tensor


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The tensors of `Inputs` in their order; floating ones in `dtype`, weights in at least fp32, ids in int64."""
    block = make_block(FORM.replace(dtype=dtype))
    other = make_block(FORM.replace(seed=1)).ids_TK
    tensors = (block.hidden_TH, block.ids_TK.long(), block.weights_TK, block.w13_EJH, block.w2_EHI)
    return *tensors, block.b13_EJ, block.b2_EH, other.long()  # type: ignore[return-value]


def fallback_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """transformers' grouped GEMM for the dtypes that torch's own does not compile with."""
    import transformers.integrations.moe  # noqa: F401  registers the op

    return torch.ops.transformers.grouped_mm_fallback(rows, weight, offsets)


class Spine:
    """Every step of the block as one method; `__call__` runs them on tensors in the order of `Inputs`."""

    def __call__(self, *tensors: Tensor) -> Any:
        self.given = Inputs(*tensors)
        self.ids, self.perm = self.sort(self.flat_ids())
        self.offsets = self.count(self.ids)
        rows = self.mm(self.gather(self.given.hidden_TH), self.given.w13_EJH.transpose(1, 2), self.offsets)
        act = self.act(self.add_bias(rows, self.given.b13_EJ))
        rows = self.mm(act, self.given.w2_EHI.transpose(1, 2), self.offsets)
        self.rows = self.add_bias(rows, self.given.b2_EH)
        self.weighted = self.after_product(self.product(self.after_down(self.rows), self.scale()))
        self.slots = self.view(self.to_slots(self.weighted))
        return self.result(self.total(self.slots))

    def flat_ids(self) -> Tensor:
        return self.given.ids_TK.reshape(-1)

    def sort(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids)

    def count(self, ids: Tensor) -> Tensor:
        return torch.histc(ids.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)

    def gather(self, hidden: Tensor) -> Tensor:
        return hidden[self.perm // K]

    def mm(self, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return fallback_mm(rows, weight, offsets)

    def add_bias(self, rows: Tensor, bias: Tensor) -> Tensor:
        return rows + bias[self.ids]

    def act(self, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, -1)
        return functional.silu(gate) * up

    def after_down(self, rows: Tensor) -> Tensor:
        return rows

    def scale(self) -> Tensor:
        return self.given.weights_TK.reshape(-1)[self.perm].unsqueeze(-1)

    def product(self, rows: Tensor, scale: Tensor) -> Tensor:
        return rows * scale

    def after_product(self, rows: Tensor) -> Tensor:
        return rows

    def inverse_values(self) -> Tensor:
        return torch.arange(N)

    def to_slots(self, rows: Tensor) -> Tensor:
        inverse = torch.empty_like(self.perm)
        inverse[self.perm] = self.inverse_values()
        return rows[inverse]

    def view(self, rows: Tensor) -> Tensor:
        return rows.view(T, K, H)

    def total(self, slots: Tensor) -> Tensor:
        return slots.sum(1)

    def result(self, total: Tensor) -> Any:
        return total


def changed(spine: Spine | None = None, **steps: Callable[..., Any]) -> Spine:
    """The spine (the stock one by default) with some steps replaced."""
    return type("Changed", (type(spine or Spine()),), steps)()


def _clamped_bias(least: int | None, most: int | None) -> Callable[..., Tensor]:
    def add_bias(self: Spine, rows: Tensor, bias: Tensor) -> Tensor:
        return rows + bias[self.ids.clamp(min=least, max=most)]

    return add_bias


def _inverse_of(perm: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(perm).index_put((perm,), values)


def _inverse(values: Callable[[], Tensor]) -> Callable[..., Tensor]:
    return lambda self, rows: rows[_inverse_of(self.perm, values())]


def _accumulated(self: Spine, rows: Tensor) -> Tensor:
    base = torch.full_like(self.perm, -1)
    return rows[base.index_put((self.perm,), torch.arange(N), accumulate=True)]


def _drop_greater(rows: Tensor) -> Tensor:
    return rows.masked_fill(rows >= 0.5, 0.0)


def _masked_from(expert: int) -> Callable[..., Tensor]:
    return lambda self, rows: rows.masked_fill((self.ids >= expert).unsqueeze(-1), 0.0)


def _clamped_up_masked(self: Spine, rows: Tensor, bias: Tensor) -> Tensor:
    rows = _clamped_bias(0, E - 1)(self, rows, bias)
    return rows if rows.shape[1] == H else _masked_from(E)(self, rows)


def _second_as_bmm(self: Spine, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if weight.shape[1] == H:
        return fallback_mm(rows, weight, offsets)
    return torch.bmm(rows.unsqueeze(1), weight[self.ids]).squeeze(1)


def _separate_gate(self: Spine, rows: Tensor) -> Tensor:
    gate = self.mm(self.gather(self.given.hidden_TH), self.given.w13_EJH[:, : FORM.width].transpose(1, 2), self.offsets)
    return functional.silu(gate) * rows[:, : FORM.width]


def _through(*dtypes: torch.dtype) -> Callable[..., Tensor]:
    """A step that casts rows to one dtype after the other."""

    def cast(self: Spine, rows: Tensor) -> Tensor:
        for dtype in dtypes:
            rows = rows.to(dtype)
        return rows

    return cast


def _bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of a tensor in fp16, read as another dtype of their size; in fp32."""
    return tensor.half().view(dtype).float()


def _other_perm(self: Spine) -> Tensor:
    return torch.sort(self.given.other_TK.reshape(-1))[1]


# What the pass has to recognise.
MATCHED: dict[str, Spine] = {
    "stock": Spine(),
    "no_bias": changed(add_bias=lambda self, rows, bias: rows),
    "int32_ids": changed(flat_ids=lambda self: self.given.ids_TK.reshape(-1).int()),
    "stable_sort": changed(sort=lambda self, ids: torch.sort(ids, stable=True)),
    "floor_divide": changed(gather=lambda self, hidden: hidden[torch.floor_divide(self.perm, K)]),
    "repeated_rows": changed(
        gather=lambda self, hidden: hidden.repeat_interleave(K, 0)[self.perm],
        scale=lambda self: self.given.weights_TK.reshape(-1)[self.perm].unsqueeze(-1),
        view=lambda self, rows: rows.view(N, 1, H),
        result=lambda self, total: total.view(T, K, H).sum(1),
    ),
    "masked_rows": changed(gather=lambda self, hidden: _masked_from(E)(self, hidden[self.perm // K])),
    "masked_up": changed(
        add_bias=lambda self, rows, bias: _masked_from(E)(self, _clamped_bias(None, E - 1)(self, rows, bias))
    ),
    "masked_product": changed(after_product=_masked_from(E)),
    "clamped_bias": changed(
        add_bias=lambda self, rows, bias: _masked_from(E)(self, _clamped_bias(0, E - 1)(self, rows, bias))
    ),
    "clamped_bias_masked_later": changed(add_bias=_clamped_up_masked, after_product=_masked_from(E)),
    "weights_as_column": changed(scale=lambda self: self.given.weights_TK.reshape(-1, 1)[self.perm]),
    "scaled_weights": changed(scale=lambda self: (2.5 * self.given.weights_TK).reshape(-1)[self.perm].unsqueeze(-1)),
    "up_read_elsewhere": changed(
        act=lambda self, rows: Spine.act(self, rows) + 0.0 * rows.sum(),
    ),
    "sorted_ids_returned": changed(result=lambda self, total: (total, self.ids)),
    "offsets_returned": changed(result=lambda self, total: (total, self.offsets)),
    "sum_read_twice": changed(result=lambda self, total: total * torch.sigmoid(total)),
    "bits_of_weights": changed(
        scale=lambda self: _bits(self.given.weights_TK, torch.bfloat16).reshape(-1)[self.perm].unsqueeze(-1)
    ),
    "sum_over_list": changed(total=lambda self, slots: torch.sum(slots, (1,))),
}

_STRUCTURE, _SHAPE, _DTYPE = ReasonCode.STRUCTURE, ReasonCode.SHAPE, ReasonCode.DTYPE
_INVERSE = (_STRUCTURE, "not the inverse permutation")
_WEIGHTS = (_SHAPE, "not one number per slot")
_SUM = (_STRUCTURE, "not to a sum over K")
_SHARED = (ReasonCode.SHARED_USE, "2 users")
_AFTER_DOWN = (_STRUCTURE, "not to a product")
_TO_FLOAT8 = (_DTYPE, "rows are cast from torch.float32 to torch.float8_e4m3fn")
_TO_INT32 = (_DTYPE, "rows are cast from torch.float32 to torch.int32")

# What the pass must leave alone, the code of its reason and a part of the detail. Each but the last group would give
# other values if it were rewritten.
REFUSED: dict[str, tuple[Spine, ReasonCode, str]] = {
    # offsets
    "offsets_searched": (
        changed(count=lambda self, ids: torch.searchsorted(ids, torch.arange(1, E + 1)).int()),
        _STRUCTURE,
        "not from a cumsum",
    ),
    "offsets_sum_ids": (
        changed(count=lambda self, ids: (ids[:E].float() + 1).cumsum(0, dtype=torch.int32)),
        _STRUCTURE,
        "not a histogram",
    ),
    "histogram_of_unsorted": (
        changed(count=lambda self, ids: Spine.count(self, self.flat_ids())),
        _STRUCTURE,
        "not sorted ids",
    ),
    "offsets_of_other": (
        changed(count=lambda self, ids: Spine.count(self, torch.sort(self.given.other_TK.reshape(-1))[0])),
        _STRUCTURE,
        "not gathered by permutation // K",
    ),
    "histogram_from_one": (
        changed(count=lambda self, ids: torch.histc(ids.float(), E, 1, E).cumsum(0, dtype=torch.int32)),
        _STRUCTURE,
        "covers [1, 4] with 4 bins",
    ),
    "histogram_to_E": (
        changed(count=lambda self, ids: torch.histc(ids.float(), E, 0, E).cumsum(0, dtype=torch.int32)),
        _STRUCTURE,
        "covers [0, 4] with 4 bins",
    ),
    "descending": (changed(sort=lambda self, ids: torch.sort(ids, descending=True)), _STRUCTURE, "descending"),
    "narrow_ids": (
        changed(
            flat_ids=lambda self: self.given.ids_TK.reshape(-1).to(torch.int16),
            add_bias=lambda self, rows, bias: rows + bias[self.ids.long()],
        ),
        _DTYPE,
        "torch.int16",
    ),
    "sorted_per_token": (
        changed(
            sort=lambda self, ids: [out.reshape(-1) for out in torch.sort(self.given.ids_TK)],
            to_slots=lambda self, rows: rows[torch.zeros_like(self.perm).index_put((self.perm,), torch.arange(N))],
        ),
        _SHAPE,
        "one of 2 dimensions",
    ),
    # gather
    "rows_of_other": (
        changed(gather=lambda self, hidden: hidden[_other_perm(self) // K]),
        _STRUCTURE,
        "not gathered by permutation // K",
    ),
    "rows_by_remainder": (
        changed(gather=lambda self, hidden: hidden[self.perm % T]),
        _STRUCTURE,
        "rows are gathered by aten.remainder",
    ),
    "rows_by_truncation": (
        changed(gather=lambda self, hidden: hidden[torch.div(self.perm, K, rounding_mode="trunc")]),
        _STRUCTURE,
        "rows are gathered by aten.div.Tensor_mode of 2",
    ),
    "rows_by_tensor": (
        changed(gather=lambda self, hidden: hidden[self.perm // torch.full_like(self.perm, K)]),
        _STRUCTURE,
        "rows are gathered by",
    ),
    "rows_by_clamp": (
        changed(gather=lambda self, hidden: hidden[self.perm.clamp(max=T - 1)]),
        _STRUCTURE,
        "rows are gathered by aten.clamp",
    ),
    "rows_and_columns": (
        changed(gather=lambda self, hidden: hidden[(self.perm // K).unsqueeze(1), torch.arange(H)]),
        _STRUCTURE,
        "indexes more than rows",
    ),
    "columns": (
        changed(gather=lambda self, hidden: hidden.repeat_interleave(K, 0)[:, self.perm]),
        _STRUCTURE,
        "indexes more than rows",
    ),
    "rows_of_more_tokens": (
        changed(gather=lambda self, hidden: torch.cat((hidden, hidden))[self.perm // K]),
        _SHAPE,
        "not K ids a token",
    ),
    "rows_by_other_divisor": (
        changed(gather=lambda self, hidden: hidden[self.perm // (K + 1)]),
        _SHAPE,
        "not K ids a token",
    ),
    "rows_not_gathered": (
        changed(gather=lambda self, hidden: hidden.repeat_interleave(K, 0)),
        _STRUCTURE,
        "not gathered rows",
    ),
    "rows_masked_by_value": (
        changed(gather=lambda self, hidden: _drop_greater(Spine.gather(self, hidden))),
        _STRUCTURE,
        "not gathered rows",
    ),
    "rows_of_last_expert_masked": (
        changed(gather=lambda self, hidden: _masked_from(E - 1)(self, Spine.gather(self, hidden))),
        _STRUCTURE,
        "not gathered rows",
    ),
    # bias
    "bias_of_unsorted_ids": (
        changed(add_bias=lambda self, rows, bias: rows + bias[self.flat_ids()]),
        _STRUCTURE,
        "not indexed by the sorted ids",
    ),
    "bias_of_clamped_ids": (changed(add_bias=_clamped_bias(0, E - 2)), _STRUCTURE, "clamped to [None, 2]"),
    "bias_of_raised_ids": (changed(add_bias=_clamped_bias(1, E - 1)), _STRUCTURE, "clamped to [1, None]"),
    "clamped_bias_unmasked": (
        changed(add_bias=_clamped_bias(0, E - 1)),
        _STRUCTURE,
        "rows that nothing masks afterwards",
    ),
    "clamped_bias_masked_up": (changed(add_bias=_clamped_up_masked), _STRUCTURE, "rows that nothing masks afterwards"),
    "bias_with_factor": (
        changed(add_bias=lambda self, rows, bias: torch.add(rows, bias[self.ids], alpha=2)),
        _STRUCTURE,
        "a bias with a factor",
    ),
    "bias_of_more_experts": (
        changed(add_bias=lambda self, rows, bias: rows + torch.cat((bias, bias))[self.ids]),
        _SHAPE,
        "one row per expert",
    ),
    "bias_per_expert": (
        changed(add_bias=lambda self, rows, bias: rows + bias[:, :1][self.ids]),
        _SHAPE,
        "one row per expert",
    ),
    "bias_in_double": (
        changed(add_bias=lambda self, rows, bias: (rows + bias.double()[self.ids]).float()),
        _DTYPE,
        "a bias added over the dtypes",
    ),
    "rows_doubled": (changed(add_bias=lambda self, rows, bias: rows + rows), *_AFTER_DOWN),
    # grouped GEMMs
    "three_gemms": (changed(act=_separate_gate), _STRUCTURE, "2 further grouped GEMMs"),
    "one_gemm": (changed(mm=_second_as_bmm), _STRUCTURE, "0 further grouped GEMMs"),
    # weights
    "weights_in_slot_order": (
        changed(scale=lambda self: self.given.weights_TK.reshape(-1, 1)),
        _STRUCTURE,
        "rows are weighted by",
    ),
    "weights_of_other": (
        changed(scale=lambda self: self.given.weights_TK.reshape(-1)[_other_perm(self)].unsqueeze(-1)),
        _STRUCTURE,
        "not in expert order",
    ),
    "weights_along_columns": (
        changed(scale=lambda self: self.given.weights_TK.reshape(-1)[self.perm].unsqueeze(0)),
        _SHAPE,
        "not one per row",
    ),
    "weights_are_integers": (
        changed(scale=lambda self: self.given.other_TK.reshape(-1)[self.perm].unsqueeze(-1)),
        *_WEIGHTS,
    ),
    "weights_of_more_slots": (
        changed(scale=lambda self: self.given.hidden_TH.reshape(-1)[self.perm].unsqueeze(-1)),
        *_WEIGHTS,
    ),
    "weights_with_factor": (changed(scale=lambda self: 2.5 * Spine.scale(self)), _STRUCTURE, "weighted by aten.mul"),
    "weights_are_a_number": (changed(product=lambda self, rows, scale: rows * 0.5), _STRUCTURE, "weighted by a tensor"),
    "weights_of_last_expert_masked": (
        changed(scale=lambda self: _masked_from(E - 1)(self, Spine.scale(self))),
        _STRUCTURE,
        "rows are weighted by aten.where",
    ),
    "weights_divide": (changed(product=lambda self, rows, scale: rows / scale), *_AFTER_DOWN),
    "squared": (changed(product=lambda self, rows, scale: rows * rows), _STRUCTURE, "weighted by a tensor"),
    # after the second GEMM
    "down_masked_by_value": (changed(after_down=lambda self, rows: _drop_greater(rows)), *_SHARED),
    "down_of_last_expert_masked": (
        changed(after_down=lambda self, rows: _masked_from(E - 1)(self, rows)),
        *_AFTER_DOWN,
    ),
    "down_of_other_ids_masked": (
        changed(after_down=lambda self, rows: rows.masked_fill((self.flat_ids() >= E).unsqueeze(-1), 0.0)),
        *_AFTER_DOWN,
    ),
    "down_filled_with_ones": (
        changed(after_down=lambda self, rows: rows.masked_fill((self.ids >= E).unsqueeze(-1), 1.0)),
        *_AFTER_DOWN,
    ),
    "down_kept_where_masked": (
        changed(after_down=lambda self, rows: torch.where((self.ids >= E).unsqueeze(-1), rows, 0.0)),
        *_AFTER_DOWN,
    ),
    "down_normalised": (
        changed(after_down=lambda self, rows: rows * rows.square().mean(-1, keepdim=True).rsqrt()),
        *_SHARED,
    ),
    "product_masked_by_value": (
        changed(after_product=lambda self, rows: _drop_greater(rows)),
        *_SHARED,
    ),
    # casts that change values
    "down_to_float8": (changed(after_down=_through(torch.float8_e4m3fn, torch.float32)), *_TO_FLOAT8),
    "down_to_integers": (changed(after_down=_through(torch.int32)), *_TO_INT32),
    "down_to_integers_and_back": (changed(after_down=_through(torch.int32, torch.float32)), *_TO_INT32),
    "product_to_float8": (changed(after_product=_through(torch.float8_e5m2, torch.float32)), _DTYPE, "float8_e5m2"),
    "product_to_integers": (changed(after_product=_through(torch.int32, torch.float32)), *_TO_INT32),
    "slots_to_float8": (
        changed(view=lambda self, rows: _through(torch.float8_e4m3fn, torch.float32)(self, Spine.view(self, rows))),
        *_TO_FLOAT8,
    ),
    "slots_to_integers": (
        changed(view=lambda self, rows: _through(torch.int32)(self, Spine.view(self, rows))),
        *_TO_INT32,
    ),
    "slots_to_bool": (
        changed(view=lambda self, rows: _through(torch.bool)(self, Spine.view(self, rows))),
        _DTYPE,
        "torch.float32 to torch.bool",
    ),
    "bits_of_rows": (
        changed(gather=lambda self, hidden: _bits(hidden[self.perm // K], torch.bfloat16)),
        _STRUCTURE,
        "reads aten.view.dtype, not gathered rows",
    ),
    "bits_of_slots": (
        changed(view=lambda self, rows: _bits(Spine.view(self, rows), torch.bfloat16)),
        _STRUCTURE,
        "slots go to aten.view.dtype",
    ),
    # back to slot order
    "slots_in_expert_order": (changed(to_slots=lambda self, rows: rows), _STRUCTURE, "not back to slot order"),
    "slots_permuted_twice": (changed(to_slots=lambda self, rows: rows[self.perm]), _STRUCTURE, "slot order comes from"),
    "inverse_reversed": (changed(to_slots=_inverse(lambda: torch.arange(N - 1, -1, -1))), *_INVERSE),
    "inverse_shifted": (changed(to_slots=_inverse(lambda: torch.arange(-1, N - 1))), *_INVERSE),
    "inverse_backwards": (changed(to_slots=_inverse(lambda: torch.arange(0, -N, -1))), *_INVERSE),
    "inverse_of_ids": (changed(to_slots=lambda self, rows: rows[_inverse_of(self.perm, self.ids)]), *_INVERSE),
    "inverse_of_other": (
        changed(to_slots=lambda self, rows: rows[_inverse_of(_other_perm(self), torch.arange(N))]),
        *_INVERSE,
    ),
    "inverse_accumulated": (changed(to_slots=_accumulated), *_INVERSE),
    # sum
    "view_of_other_tokens": (
        changed(view=lambda self, rows: rows.view(T * 2, K, H // 2), total=lambda self, slots: slots.sum(1).view(T, H)),
        _STRUCTURE,
        "not viewed as [T, K, H]",
    ),
    "view_of_two_dims": (
        changed(view=lambda self, rows: rows.view(-1, K), total=lambda self, slots: slots.sum(1).view(T, H)),
        _STRUCTURE,
        "not viewed as [T, K, H]",
    ),
    "sum_over_hidden": (changed(total=lambda self, slots: slots.sum(2)), *_SUM),
    "sum_over_both": (changed(total=lambda self, slots: slots.sum((1, 2))), *_SUM),
    "sum_over_all": (changed(total=lambda self, slots: slots.sum()), *_SUM),
    "sum_keeps_dim": (changed(total=lambda self, slots: slots.sum(1, keepdim=True)), _STRUCTURE, "keeps the K dim"),
    "maximum": (changed(total=lambda self, slots: slots.amax(1)), *_SUM),
    # read elsewhere
    "down_read_elsewhere": (changed(result=lambda self, total: (total, self.rows)), *_SHARED),
    "product_read_elsewhere": (
        changed(result=lambda self, total: (total, self.weighted)),
        *_SHARED,
    ),
    "slots_read_elsewhere": (changed(result=lambda self, total: (total, self.slots)), *_SHARED),
}
