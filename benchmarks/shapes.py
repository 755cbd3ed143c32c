"""The model shapes all benchmarks use: E experts, K per token, H hidden, I expert width."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int


SHAPES = {
    "qwen3": Shape(128, 8, 2048, 768),  # Qwen3-30B-A3B, SDAR-30B-A3B
    "mixtral": Shape(8, 2, 4096, 14336),  # Mixtral-8x7B
    "dsv3": Shape(64, 8, 7168, 2048),  # 64 local experts of DeepSeek-V3
    "llada2": Shape(256, 8, 2048, 512),  # LLaDA2-mini
}
TOKENS = (1, 8, 64, 512, 4096, 16384)
