"""The sizes of MoE layers that all benchmarks use: E experts, K per token, H hidden, I expert width."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lowering.errors import MoEConfigError, MoEOptionError
from lowering.spec import ExpertSpec


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer to be timed: its name, sizes, and the form of its experts."""

    name: str
    shape: Shape
    spec: ExpertSpec


SHAPES = {
    "qwen3": Shape(128, 8, 2048, 768),  # Qwen3-30B-A3B, SDAR-30B-A3B
    "mixtral": Shape(8, 2, 4096, 14336),  # Mixtral-8x7B
    "dsv3": Shape(64, 8, 7168, 2048),  # 64 local experts of DeepSeek-V3
    "llada2": Shape(256, 8, 2048, 512),  # LLaDA2-mini
}
# sizes that the cost model was never fitted to
MORE_SHAPES = {
    "qwen3-235b": Shape(128, 8, 4096, 1536),
    "olmoe": Shape(64, 8, 2048, 1024),
    "gpt-oss": Shape(32, 4, 2880, 2880),  # the sizes of GPT-OSS-20B alone, not its activation, biases and layout
}
TOKENS = (1, 8, 64, 512, 4096, 16384)
# many narrow experts and a few wide ones, of a size that a CPU gets through
CPU_SHAPES = {"cpu-small": Shape(128, 8, 1024, 384), "cpu-wide": Shape(8, 2, 1024, 3584)}
CPU_TOKENS = (1, 8, 64, 512, 2048)


def case_of_shape(name: str) -> Case:
    """The case of a shape known by name: gated experts with SiLU and without biases."""
    shape = {**SHAPES, **MORE_SHAPES, **CPU_SHAPES}[name]
    return Case(name, shape, ExpertSpec(shape.num_experts, shape.hidden, shape.intermediate, "silu(g) * u"))


def case_of_config(path: Path) -> Case:
    """The case of a model's config.json, given as the file or as its folder; named after the folder or the file.

    Needs no model class: what the config says is read by `diffulex.moe.config`.
    """
    file = path / "config.json" if path.is_dir() else path
    return case_of(_read(file), name=file.resolve().parent.name if file.name == "config.json" else file.stem)


def case_of(config: Any, *, name: str) -> Case:
    """The case of a transformers config, or of one as a dict."""
    from ..moe.config import get_expert_spec, get_num_experts_per_tok

    spec, top_k = get_expert_spec(config), get_num_experts_per_tok(config)
    return Case(name, Shape(spec.num_experts, top_k, spec.hidden_size, spec.intermediate_size), spec)


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoEOptionError.of(
            "--config",
            expected="a config.json or the folder that holds one",
            got=f"{file} ({error.strerror})",
            hint="Name another one.",
        ) from error
    except ValueError as error:
        raise MoEConfigError.of(
            "--config", expected="JSON", got=f"{file}: {error}", hint="Give the config.json of a model."
        ) from error
    if not isinstance(config, dict):
        raise MoEConfigError.of(
            "--config",
            expected="a JSON object",
            got=f"{type(config).__name__} in {file}",
            hint="Give the config.json of a model.",
        )
    return config
