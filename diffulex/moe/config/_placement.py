"""Which layers are MoE: one small rule per attribute that configs use, tried in order."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ._read import MISSING, Facts, num_layers

_SPARSE = ("sparse", "moe", "hash_moe")
_TELLTALE = re.compile(r"(^|_)(expert|experts|moe)(_|$)")
_HARMLESS = ("_experts_implementation", "experts_implementation")


def is_moe(facts: Facts) -> bool:
    """Whether the layer of `facts` holds a MoE block."""
    family = facts.family
    if family.enabled and not facts.get((family.enabled,)):
        return False
    count = facts.get(family.count)
    if count is MISSING:
        _refuse_unknown_names(facts)
        return False
    count = 0 if count is None else facts.of_layer(count, what="the number of experts")
    if not isinstance(count, int) or count < family.min_experts:
        return False
    return not _skipped(facts) and _placed(facts)


def _skipped(facts: Facts) -> bool:
    """Heterogeneous configs can leave the MLP out of a layer."""
    skip = facts.get(("skip",))
    return isinstance(skip, list | tuple) and "mlp" in skip


def _refuse_unknown_names(facts: Facts) -> None:
    """A config without a number of experts is dense, unless its names speak of experts in words not known here."""
    source = facts.sources[-1]
    names = source if isinstance(source, dict) else vars(source) if hasattr(source, "__dict__") else {}
    strange = [
        name
        for name, value in names.items()
        if isinstance(name, str) and _TELLTALE.search(name) and not name.startswith(_HARMLESS) and value
    ]
    if strange:
        raise facts.error(
            f"one of the attributes {', '.join(facts.family.count)} to say the number of experts",
            got=f"only {', '.join(sorted(strange))}",
            hint="Set one of them; 0 means a dense model.",
        )


def _placed(facts: Facts) -> bool:
    rule = facts.family.placement
    if rule == "all":
        return True
    if rule:
        facts.need(_ATTRIBUTES.get(rule, (rule.partition(",")[0],)), what="which layers are MoE")
        return _RULES[rule](facts)
    for name in _GENERIC:
        if _present(facts, name):
            return _RULES[name](facts)
    return True


def _present(facts: Facts, rule: str) -> bool:
    value = facts.get(_ATTRIBUTES.get(rule, (rule,)))
    return value is not MISSING and value is not None and (rule != "moe_layer_freq" or isinstance(value, list | tuple))


def _index(facts: Facts) -> int:
    if facts.layer_idx is None:
        raise facts.error("a layer_idx", got="None", hint="Ask for one layer.")
    return facts.layer_idx


def _types(facts: Facts) -> bool:
    kind = facts.entry(facts.get(("mlp_layer_types",)), what="mlp_layer_types")
    if kind not in (*_SPARSE, "dense"):
        raise facts.error(f"mlp_layer_types of {(*_SPARSE, 'dense')}", got=repr(kind), hint="Correct the list.")
    return kind in _SPARSE


def _block_types(facts: Facts) -> bool:
    blocks = facts.get(("layers_block_type", "hybrid_override_pattern"))
    return facts.entry(blocks, what="layers_block_type") in ("moe", "E")


def _enumerated(facts: Facts) -> bool:
    named = facts.get(("moe_layers", "moe_layers_enum"))
    if isinstance(named, str):
        named = [int(item) for item in named.split(",") if item.strip()]
    return _index(facts) in named


def _interleaved(facts: Facts) -> bool:
    """Llama 4: the listed layers, or every `interleave_moe_layer_step`-th."""
    if facts.get(("moe_layers",)) not in (MISSING, None):
        return _enumerated(facts)
    return (_index(facts) + 1) % _step(facts, "interleave_moe_layer_step") == 0


def _frequencies(facts: Facts) -> bool:
    return bool(facts.entry(facts.get(("moe_layer_freq",)), what="moe_layer_freq"))


def _after_dense(facts: Facts) -> bool:
    first = facts.number(("first_k_dense_replace",), what="dense layers at the start")
    step = 1
    if not facts.family.placement:  # the families with a row of this name read no step
        step = facts.get(("moe_layer_freq",))
        step = step if isinstance(step, int) and step > 0 else 1
    return _index(facts) >= first and _index(facts) % step == 0


def _after_num_dense(facts: Facts) -> bool:
    return _index(facts) >= facts.number(("num_dense_layers",), what="dense layers at the start")


def _interval(facts: Facts) -> bool:
    last = facts.get(("moe_layer_end_index",))
    last = num_layers(facts) - 1 if last in (MISSING, None, -1) else last
    first = facts.get(("moe_layer_start_index",))
    first = 0 if first in (MISSING, None) else first
    return (_index(facts) + 1) % _step(facts, "moe_layer_interval") == 0 and first <= _index(facts) <= last


def _every_step(facts: Facts) -> bool:
    dense: Any = facts.get(("mlp_only_layers",))
    if _index(facts) in (() if dense in (MISSING, None) else dense):
        return False
    return (_index(facts) + 1) % _step(facts, "decoder_sparse_step") == 0


def _period(facts: Facts) -> bool:
    offset = facts.number(("expert_layer_offset",), what="the first MoE layer")
    return _index(facts) % _step(facts, "expert_layer_period") == offset


def _last_of_each(facts: Facts) -> bool:
    step = facts.number(("{side}_sparse_step",), what="the distance of MoE layers")
    return step > 0 and (_index(facts) + 1) % step == 0


def _second_of_each(facts: Facts) -> bool:
    step = facts.number(("{side}_sparse_step",), what="the distance of MoE layers")
    return step > 0 and (step == 1 or _index(facts) % step == 1)


def _step(facts: Facts, name: str) -> int:
    step = facts.number((name,), what="the distance of MoE layers")
    if step < 1:
        raise facts.error(f"{name} of 1 or more", got=str(step), hint="Use 1 where every layer is MoE.")
    return step


_RULES: dict[str, Callable[[Facts], bool]] = {
    "mlp_layer_types": _types,
    "layers_block_type": _block_types,
    "moe_layers": _interleaved,
    "moe_layers_enum": _enumerated,
    "moe_layer_freq": _frequencies,
    "first_k_dense_replace": _after_dense,
    "num_dense_layers": _after_num_dense,
    "moe_layer_interval": _interval,
    "expert_layer_period": _period,
    "decoder_sparse_step": _every_step,
    "{side}_sparse_step, last of each": _last_of_each,
    "{side}_sparse_step, second of each": _second_of_each,
}
# Attributes that make a rule applicable, where they are not its name.
_ATTRIBUTES = {
    "layers_block_type": ("layers_block_type", "hybrid_override_pattern"),
    "moe_layers": ("moe_layers", "interleave_moe_layer_step"),
}
_GENERIC = (
    "mlp_layer_types",
    "moe_layers_enum",
    "moe_layer_freq",
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_interval",
    "expert_layer_period",
    "decoder_sparse_step",
)
