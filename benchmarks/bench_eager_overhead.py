"""Host time of the ops in eager mode against a plain aten chain that computes the same block.

    python -m benchmarks.bench_eager_overhead [--device cuda] [--tokens 1 64]

Small sizes, so that what is timed is overhead: dispatcher, checks, allocation, launches. On CUDA the clock is the
host's and stops before the device has finished.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from lowering import ops

EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 2, 64, 32


def ours(hidden_TH: Tensor, logits_TE: Tensor, w13_EJH: Tensor, w2_EHI: Tensor) -> Tensor:
    """The five ops, [T, H] in the dtype of hidden."""
    weights_TK, ids_TK = ops.moe_route(logits_TE, None, None, TOP_K)
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, EXPERTS)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, TOP_K, "silu(g) * u")
    return ops.moe_combine(ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1), weights_TK)


def plain(hidden_TH: Tensor, logits_TE: Tensor, w13_EJH: Tensor, w2_EHI: Tensor) -> Tensor:
    """The same in aten calls over grouped_mm, as transformers writes it, [T, H] in the dtype of hidden."""
    weights_TK, ids_TK = logits_TE.softmax(-1, dtype=torch.float32).topk(TOP_K)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    sorted_N, order_N = torch.sort(ids_TK.reshape(-1))
    counts_E = torch.histc(
        sorted_N.float() if hidden_TH.device.type == "cpu" else sorted_N.int(), EXPERTS, 0, EXPERTS - 1
    )
    offsets_E = torch.cumsum(counts_E, 0, dtype=torch.int32)
    pre_NJ = torch._grouped_mm(hidden_TH[order_N // TOP_K], w13_EJH.transpose(1, 2), offs=offsets_E)
    gate_NI, up_NI = pre_NJ.chunk(2, -1)
    rows_NH = torch._grouped_mm(silu(gate_NI) * up_NI, w2_EHI.transpose(1, 2), offs=offsets_E)
    rows_NH = rows_NH * weights_TK.reshape(-1)[order_N].unsqueeze(-1)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return rows_NH[inverse_N].view(-1, TOP_K, HIDDEN).sum(1).to(hidden_TH.dtype)


def host_micros(function: Callable[[], object], repeats: int = 200) -> float:
    """Median host microseconds of one call."""
    for _ in range(20):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    """Print a row for each token count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64])
    arguments = parser.parse_args()
    options = {"device": arguments.device, "dtype": torch.bfloat16}
    weights = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, **options), torch.randn(EXPERTS, HIDDEN, WIDTH, **options)
    print("tokens   ours us   aten us   ratio")
    with torch.inference_mode():
        for tokens in arguments.tokens:
            inputs = torch.randn(tokens, HIDDEN, **options), torch.randn(tokens, EXPERTS, **options), *weights
            first, second = (host_micros(functools.partial(f, *inputs)) for f in (ours, plain))
            print(f"{tokens:6} {first:9.0f} {second:9.0f} {first / second:7.2f}")


if __name__ == "__main__":
    main()
