"""Time the first call of a compiled stock model in fresh processes, cold and warm: with diffulex, and stock.

    python -m benchmarks.bench_compile --layers 4 48 --out compile.csv

A small Qwen3-MoE, one sequence. Each process builds the model, then the clock runs: `import diffulex` (or not),
`torch.compile`, the first call. "cold" starts with empty caches, "warm" with those that the cold process left. Variants
take turns; medians. Kernels are those that Inductor's code defines: how many are compiled, not how often they run.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

VARIANTS = ("diffulex", "stock")
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# wide enough for generated kernels of the GEMMs
_WIDE = {
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "head_dim": 256,
}


def build(layers: int, device: str) -> nn.Module:
    """The model in eval mode with seeded weights: float32 on the CPU, bf16 and wider on CUDA."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = _SIZES | (_WIDE if device == "cuda" else {})
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**sizes, num_hidden_layers=layers)
    return Qwen3MoeForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()


def first_call(variant: str, layers: int, *, tokens: int, device: str) -> dict[str, float]:
    """Seconds of the first call, and how many graphs and kernels it made; for a process of its own."""
    model = build(layers, device)
    ids = torch.randint(1, 128, (1, tokens), device=device)
    start = time.perf_counter()
    if variant == "diffulex":
        importlib.import_module("diffulex")
    compiled = torch.compile(model)
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    counters: Any = importlib.import_module("torch._dynamo.utils").counters
    modules: Any = importlib.import_module("torch._inductor.codecache").PyCodeCache.modules
    wrappers = [Path(module.__file__).read_text() for module in modules]
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return {
        "seconds": seconds,
        "graphs": counters["stats"]["unique_graphs"],
        "kernels": sum(len(re.findall(r"= async_compile\.\w+\(", text)) for text in wrappers),
        "hits": hits,
    }


def in_process(variant: str, layers: int, *, arguments: argparse.Namespace, cache: str) -> dict[str, float]:
    """`first_call` in a new process whose caches stand in this folder."""
    command = [sys.executable, "-m", "benchmarks.bench_compile", "--layers", str(layers), "--child", variant]
    command += ["--tokens", str(arguments.tokens), "--device", arguments.device]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Parse arguments, measure, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 48])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="compile.csv")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        told = first_call(arguments.child, arguments.layers[0], tokens=arguments.tokens, device=arguments.device)
        print(json.dumps(told))
        return
    print(f"{'layers':>6} {'variant':8} {'cold s':>7} {'warm s':>7} {'graphs':>6} {'kernels':>7} {'cache hits':>10}")
    with Path(arguments.out).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["device", "layers", "variant", "cold_s", "warm_s", "graphs", "kernels", "hits"])
        for layers in arguments.layers:
            runs: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {variant: [] for variant in VARIANTS}
            for _ in range(arguments.rounds):
                for variant in VARIANTS:
                    with tempfile.TemporaryDirectory() as cache:
                        cold = in_process(variant, layers, arguments=arguments, cache=cache)
                        runs[variant].append((cold, in_process(variant, layers, arguments=arguments, cache=cache)))
            for variant, pairs in runs.items():
                cold_s, warm_s = (statistics.median(pair[at]["seconds"] for pair in pairs) for at in (0, 1))
                cold, warm = pairs[0]
                row = [f"{cold_s:.2f}", f"{warm_s:.2f}", *(int(cold[name]) for name in ("graphs", "kernels"))]
                writer.writerow([arguments.device, layers, variant, *row, int(warm["hits"])])
                print(f"{layers:6} {variant:8} {row[0]:>7} {row[1]:>7} {row[2]:6} {row[3]:7} {int(warm['hits']):10}")


if __name__ == "__main__":
    main()
