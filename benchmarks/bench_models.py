"""Time the forward pass of stock transformers models at real shapes, few layers: with diffulex and stock torch.compile.

    python -m benchmarks.bench_models --models qwen3-30b-a3b --tokens 1 64 --out models.csv

One sequence without a cache, logits of its last token, bf16, seeded weights; a static graph for each token count.
CUDA-graph replays, round-robin, medians. The two outputs are compared, which says that both ran, not that they are
right: tests do. Kernels are those of one MoE block, from the router's product to the combined output and with a shared
expert where there is one, as the profiler counts them.
"""

from __future__ import annotations

import argparse
import csv
import time
from typing import Any

import torch
from torch import Tensor, nn

import diffulex
from diffulex.benching.timing import capture, round_robin
from diffulex.explanation import find_experts
from tests.support.profile import gpu_kernels

TOKENS = (1, 64, 1024, 8192)
_QWEN3 = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "norm_topk_prob": True,
}
_MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_GPT_OSS = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
}
# 64 of the 256 routed experts, what one of four ranks holds
_DEEPSEEK_V3 = {"n_routed_experts": 64, "first_k_dense_replace": 0}
# transformers has no class for it; GLM-4-MoE's layers compute the same
_LLADA2_MINI = {
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "use_qk_norm": True,
}
# model -> (transformers' model type, fields of its configuration that are not its defaults)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": ("qwen3_moe", _QWEN3),
    "mixtral-8x7b": ("mixtral", _MIXTRAL),
    "gpt-oss-20b": ("gpt_oss", _GPT_OSS),
    "deepseek-v3": ("deepseek_v3", _DEEPSEEK_V3),
    "llada2-mini": ("glm4_moe", _LLADA2_MINI),
}


def build(name: str, layers: int) -> nn.Module:
    """The model with `layers` layers and a vocabulary of 32,768, bf16 on CUDA, matrices N(0, 0.02)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    model_type, fields = MODELS[name]
    common = {"num_hidden_layers": layers, "vocab_size": 32768, "max_position_embeddings": 16384, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **common, **fields)
    with torch.device("cuda"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
    return model.eval()


def kernels(model: nn.Module, tokens: int) -> int:
    """How many kernels the last MoE block of a compiled model runs for hidden [1, T, H]."""
    experts = list(find_experts(model))[-1]
    block = torch.compile(model.get_submodule(experts.rpartition(".")[0]), dynamic=False)
    hidden = torch.randn(1, tokens, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    return sum(gpu_kernels(lambda: block(hidden)).values())


def measure(model: Any, tokens: int) -> tuple[dict[str, float], dict[str, int], float]:
    """(microseconds of each variant, kernels of its MoE block, relative difference of the logits)."""
    sets = [torch.randint(1, model.config.vocab_size, (1, tokens), device="cuda") for _ in range(2)]

    def forward(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False, logits_to_keep=1).logits

    graphs, logits, counts = {}, {}, {}
    for variant in ("diffulex", "stock"):
        torch._dynamo.reset()
        with torch.no_grad(), diffulex.disabled() if variant == "stock" else torch.no_grad():
            compiled = torch.compile(forward, dynamic=False)
            logits[variant] = compiled(sets[0]).float()
            graphs[variant] = capture(compiled, [(ids,) for ids in sets])
            counts[variant] = kernels(model, tokens)
    off = (logits["diffulex"] - logits["stock"]).norm() / logits["stock"].norm()
    return round_robin(graphs, len(sets)), counts, float(off)


def main() -> None:
    """Parse arguments, measure each cell, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", default="models.csv")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, {arguments.layers} layers; microseconds")
    print(f"{'model':14} tokens  diffulex     stock stock/diffulex  kernels difference")
    with open(arguments.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["device", "model", "layers", "tokens", "diffulex_us", "stock_us", "kernels", "stock_kernels", "difference"]
        )
        for name in arguments.models:
            model = build(name, arguments.layers)
            for tokens in arguments.tokens:
                start = time.perf_counter()
                times, counts, off = measure(model, tokens)
                row = [*(f"{us:.1f}" for us in times.values()), *counts.values(), f"{off:.2e}"]
                writer.writerow([torch.cuda.get_device_name(), name, arguments.layers, tokens, *row])
                file.flush()
                ratio = f"{times['stock'] / times['diffulex']:.2f}"
                cells = f"{row[0]:>9} {row[1]:>9} {ratio:>14} {row[2]:>3} / {row[3]:2} {row[4]:>10}"
                print(f"{name:14} {tokens:6} {cells}  [{time.perf_counter() - start:.0f} s]", flush=True)
            del model
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
