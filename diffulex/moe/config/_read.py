"""Reading facts from transformers configs, plain objects and dicts alike: wrappers, aliases, per-layer values.

Nothing of transformers is imported; its configs are recognised by what they have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from lowering.errors import MoEConfigError, MoEOptionError

from ._families import COUNT, FAMILIES, GENERIC, Family

SIDES = ("encoder", "decoder")
# Where a wrapper keeps the config of its language model. `get_text_config` is not used: it returns a rewritten copy
# for encoder-decoder configs, and plain objects have none.
_SUB_CONFIGS = (
    "text_config",
    "thinker_config",
    "language_config",
    "llm_config",
    "vlm_config",
    "decoder_config",
    "decoder",
    "generator",
    "text_encoder",
    "backbone_config",
)
_MAX_DEPTH = 4

Value = TypeVar("Value", bound=Hashable)


class Missing:
    """The config does not have the attribute; `None` is a value of its own."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = Missing()


def peek(config: Any, name: str) -> Any:
    """Value of a dotted attribute of an object, a dict or a list (by position); `MISSING` where there is none."""
    for part in name.split("."):
        if isinstance(config, Mapping):
            config = config.get(part, MISSING)
        elif isinstance(config, list | tuple) and part.isdigit():
            config = config[int(part)] if int(part) < len(config) else MISSING
        elif part.isdigit():
            continue  # one number instead of a list
        else:
            config = getattr(config, part, MISSING)
        if config is MISSING:
            break
    return config


@dataclasses.dataclass(frozen=True)
class Facts:
    """The config of one layer (None: of any layer) and one side, with the row of its family.

    sources   configs asked in order: overrides of the layer first
    """

    sources: tuple[Any, ...]
    family: Family
    model_type: str
    layer_idx: int | None
    side: str

    def get(self, names: Sequence[str]) -> Any:
        """First value that is not None among the names, None if some have it but say None, else `MISSING`."""
        found: Any = MISSING
        for source in self.sources:
            for name in names:
                value = peek(source, name.format(side=self.side))
                if value is not MISSING and value is not None:
                    return value
                found = value if found is MISSING else found
        return found

    def need(self, names: Sequence[str], *, what: str) -> Any:
        """As `get`, but an error naming all of `names` where the config does not say."""
        value = self.get(names)
        if value is MISSING or value is None:
            raise self.error(
                f"one of the attributes {', '.join(name.format(side=self.side) for name in names)} to say {what}",
                got="none of them" if value is MISSING else "None",
                hint="Set one of them on the config.",
            )
        return value

    def number(self, names: Sequence[str], *, what: str) -> int:
        """A whole number; of a list, the entry of the layer. Names that disagree are no answer, but rows rank names."""
        stated = {name: peek(self.sources[-1], name) for name in names if self.family is GENERIC}
        stated = {name: value for name, value in stated.items() if value is not MISSING and value is not None}
        if any(value != next(iter(stated.values())) for value in stated.values()):
            raise self.error(f"one value for {what}", got=str(stated), hint="Remove all but one of them.")
        value = self.of_layer(self.need(names, what=what), what=what)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(f"a whole number of {what} in {', '.join(names)}", got=repr(value), hint="Correct it.")
        return value

    def of_layer(self, value: Any, *, what: str) -> Any:
        """The entry of this layer where `value` is a list with one per layer."""
        if not isinstance(value, list | tuple):
            return value
        if self.layer_idx is None:
            if value and all(entry == value[0] for entry in value):
                return value[0]
            raise self.error(f"a layer_idx, as {what} differs from layer to layer", got=repr(value), hint="Pass it.")
        return self.entry(value, what=what)

    def entry(self, values: Sequence[Any], *, what: str) -> Any:
        """`values[layer_idx]`, or an error where the list is too short."""
        if self.layer_idx is None or not self.layer_idx < len(values):
            raise self.error(
                f"a layer_idx below {len(values)}, the layers that {what} names",
                got=repr(self.layer_idx),
                hint="Count layers from 0.",
            )
        return values[self.layer_idx]

    def error(self, expected: str, *, got: str, hint: str) -> MoEConfigError:
        """`MoEConfigError` that says which config, layer and side it is about."""
        where = f"config of {self.model_type or 'unnamed model type'}"
        where += "" if self.layer_idx is None else f", layer {self.layer_idx}"
        return MoEConfigError.of(where, expected=expected, got=got, hint=hint)  # type: ignore[return-value]


def _global(config: Any) -> Any:
    """A config whose attributes can be read: the first layer's where reading the global one is an error."""
    return config.per_layer_config[0] if getattr(config, "is_heterogeneous", False) else config


def text_config(config: Any, side: str | None = None) -> Any:
    """The config that describes the MoE layers: itself, or the language model's where `config` wraps several."""
    names = (side, f"{side}_config", *_SUB_CONFIGS) if side else _SUB_CONFIGS
    for _ in range(_MAX_DEPTH):
        readable = _global(config)
        says = any(peek(readable, name) is not MISSING for name in COUNT)
        if says or peek(readable, "model_type") in FAMILIES:
            break
        inner = [sub for name in names if (sub := peek(readable, name)) is not MISSING and _is_config(sub)]
        if not inner:
            break
        config = inner[0]
    return config


def _is_config(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "__dict__")


def layer_sources(config: Any, layer_idx: int | None) -> tuple[Any, ...]:
    """What to ask about a layer: its own config, or its overrides and then the global config."""
    if getattr(config, "is_heterogeneous", False):
        layers = config.per_layer_config
        return (layers[layer_idx if layer_idx is not None and layer_idx < len(layers) else 0],)
    overrides = peek(config, "per_layer_config")
    if layer_idx is not None and isinstance(overrides, Mapping):
        return (overrides.get(layer_idx, overrides.get(str(layer_idx), {})), config)
    return (config,)


def _differs(config: Any) -> bool:
    overrides = peek(config, "per_layer_config")
    return bool(getattr(config, "is_heterogeneous", False) or (isinstance(overrides, Mapping) and overrides))


def _facts(config: Any, layer_idx: int | None, *, side: str) -> Facts:
    sources = layer_sources(config, layer_idx)
    model_type = peek(sources[-1], "model_type")
    model_type = model_type if isinstance(model_type, str) else ""
    return Facts(sources, FAMILIES.get(model_type, GENERIC), model_type, layer_idx, side)


def _sides(config: Any, side: str | None) -> tuple[str, ...]:
    if side is not None:
        if side not in SIDES:
            raise MoEOptionError.of(
                "side of a config", expected=f"one of {SIDES} or None", got=repr(side), hint="Choose one."
            )
        return (side,)
    config = _global(config)
    two = peek(config, "is_encoder_decoder") is True or all(_is_config(peek(config, name)) for name in SIDES)
    return SIDES if two else ("decoder",)


def num_layers(facts: Facts) -> int:
    """Layers of this side of the model."""
    return facts.number(facts.family.layers, what="layers")


def facts_of(config: Any, layer_idx: int | None, *, side: str | None, every_layer: bool = False) -> list[Facts]:
    """The facts a question is about: one per side that is meant and, without `layer_idx`, per layer that differs.

    `every_layer` lists each layer even where all share one config.
    """
    found = []
    for one in _sides(config, side):
        inner = text_config(config, one)
        facts = _facts(inner, layer_idx, side=one)
        if layer_idx is not None and (isinstance(layer_idx, bool) or not isinstance(layer_idx, int) or layer_idx < 0):
            raise facts.error("a layer_idx of 0 or more", got=repr(layer_idx), hint="Count layers from 0.")
        if layer_idx is None and (every_layer or _differs(inner)):
            found += [_facts(inner, layer, side=one) for layer in range(num_layers(facts))]
        else:
            found.append(facts)
    return found


def agreed(question: Callable[[Facts], Value], config: Any, layer_idx: int | None, *, side: str | None) -> Value:
    """The one answer of all layers and sides that are meant; an error listing the answers where they differ."""
    facts = facts_of(config, layer_idx, side=side)
    answers = list(dict.fromkeys(question(one) for one in facts))
    if len(answers) == 1:
        return answers[0]
    raise dataclasses.replace(facts[0], layer_idx=layer_idx).error(
        "a layer_idx or a side, as the answers differ",
        got=", ".join(map(str, answers)) or "no layers",
        hint="Ask for one layer, and for side='encoder' or 'decoder' of an encoder-decoder config.",
    )
