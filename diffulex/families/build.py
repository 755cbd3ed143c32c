"""Builds the tiny model of a family from transformers' own classes, with seeded weights, and its inputs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .catalogue import FAMILIES, SIZES, VOCABULARY, Family

_PATCH = 16  # of the images, in pixels
_PARTS = ("text_config", "vision_config")  # configurations inside others


def is_installed(family: Family) -> bool:
    """Whether the installed transformers has the family."""
    return importlib.util.find_spec(f"transformers.models.{family.name}") is not None


def model_class(family: Family) -> Any:
    """The class that holds the MoE layers."""
    return getattr(importlib.import_module(f"transformers.models.{family.name}.modeling_{family.name}"), family.model)


def small_options(defaults: Any) -> dict[str, Any]:
    """The common sizes that a configuration has fields for; `defaults` is one of its class."""
    names = {*vars(defaults), *getattr(type(defaults), "attribute_map", {})}
    sizes = {name: value for name, value in SIZES.items() if name in names}
    if "qk_rope_head_dim" in sizes:  # latent attention: positions rotate a part of each head, all heads have keys
        sizes |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
    return sizes


def options_of(name: str, defaults: Any, *, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """The fields of a small configuration of the family `name` (or model type of its text model), or of any other.

    defaults: a configuration of its class; options: those of one of the family's models, by default of the first.
    """
    if options is None:
        known = {family.name: family.options for family in reversed(FAMILIES)}
        options = known.get(name.removesuffix("_text").replace("-", "_"), {})
    options = {key: value for key, value in options.items() if key not in _PARTS or hasattr(defaults, key)}
    parts = {
        part: {**small_options(_part(defaults, part, options)), **options[part]} for part in _PARTS if part in options
    }
    return {**small_options(defaults), **options, **parts}


def _part(defaults: Any, name: str, options: dict[str, Any]) -> Any:
    """The configuration that stands in another one under this name; some releases have none there by default."""
    from transformers import AutoConfig

    own = getattr(defaults, name)
    return AutoConfig.for_model(options[name]["model_type"]) if own is None else own


def build_model(family: Family, *, dtype: torch.dtype = torch.float32) -> Any:
    """The model in eval mode with seeded weights."""
    kind = model_class(family)
    config = kind.config_class(**options_of(family.name, kind.config_class(), options=family.options))
    model = kind._from_config(config, dtype=dtype)
    fill_weights(model)
    return model.eval()


def fill_weights(model: nn.Module, *, seed: int = 0) -> None:
    """Give every parameter a value that matters: matrices keep the size of their inputs, norms stand around 1, biases,
    the selection bias of routers among them, around 0. Same values for every dtype, up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    selection = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *selection]:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(_scaled(name, noise))


def _scaled(name: str, noise: Tensor) -> Tensor:
    if noise.dim() < 2:
        return 1 + 0.1 * noise if "norm" in name else 0.1 * noise
    return noise if "embed" in name else noise * noise.shape[-1] ** -0.5


def _ids(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(1, VOCABULARY, (1, count), generator=generator)


def _tokens(model: Any, count: int) -> dict[str, Any]:
    return {"input_ids": _ids(count), "use_cache": False}


def _encoder(model: Any, count: int) -> dict[str, Any]:
    return {"input_ids": _ids(count)}


def _encoder_decoder(model: Any, count: int) -> dict[str, Any]:
    ids = _ids(count)
    mask = torch.ones_like(ids)  # which tokenizers return; Switch Transformers cannot be compiled without
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1), "use_cache": False}


def _prompt_and_canvas(model: Any, count: int) -> dict[str, Any]:
    return {"input_ids": _ids(count), "decoder_input_ids": _ids(count).flip(1)}


def _embeddings(model: Any, count: int) -> dict[str, Any]:
    size = (1, count, model.config.get_text_config().hidden_size)
    hidden = torch.randn(size, generator=torch.Generator().manual_seed(count))
    return {"inputs_embeds": hidden, "use_cache": False}


def _text_and_images(model: Any, count: int) -> dict[str, Any]:
    kinds = (torch.arange(count) % 3 == 1).int()[None]
    return {"input_ids": _ids(count), "moe_mm_token_type_ids": kinds, "use_cache": False}


def _images(model: Any, count: int) -> dict[str, Any]:
    size = (count, 3, 2 * _PATCH, 2 * _PATCH)
    pixels = torch.randn(size, generator=torch.Generator().manual_seed(count))
    return {"pixel_values": pixels, "dataset_index": torch.arange(count) % 3}


INPUTS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "tokens": _tokens,
    "encoder": _encoder,
    "encoder_decoder": _encoder_decoder,
    "prompt_and_canvas": _prompt_and_canvas,
    "embeddings": _embeddings,
    "text_and_images": _text_and_images,
    "images": _images,
}


def inputs_of(family: Family, model: Any, *, count: int) -> dict[str, Any]:
    """Seeded arguments of the model: ids [1, count] int64, embeddings [1, count, H] float32, or `count` images."""
    return INPUTS[family.inputs](model, count)


def output_of(out: Any) -> Tensor:
    """Logits [1, T, V], last hidden states [1, T, H] or feature maps [B, H, Y, X] out of what a model returned, in the
    model's dtype.
    """
    if hasattr(out, "feature_maps"):
        return out.feature_maps[-1]
    result: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return result
