"""A small op with a Triton template, as a user of Inductor would register one: what the offline tests compile.

`matmul(x_TK, w_KN)`: two candidates, BLOCK 64 and 32; the loop reads K in steps of 16.
"""

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm, realize_inputs

_SOURCE = r"""
{{def_kernel("X", "W")}}
    T = {{size("X", 0)}}
    K = {{size("X", 1)}}
    N = {{size("W", 1)}}
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, K, STEP):
        k = start + tl.arange(0, STEP)
        x = tl.load(X + row[:, None] * {{stride("X", 0)}} + k[None, :] * {{stride("X", 1)}},
                    mask=(row[:, None] < T) & (k[None, :] < K), other=0.0)
        w = tl.load(W + k[:, None] * {{stride("W", 0)}} + col[None, :] * {{stride("W", 1)}},
                    mask=(k[:, None] < K) & (col[None, :] < N), other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    idx_m = row[:, None]
    idx_n = col[None, :]
    mask = (idx_m < T) & (idx_n < N)
    {{store_output(("idx_m", "idx_n"), "total", "mask", val_shape=("BLOCK", "BLOCK"))}}
"""


@torch.library.custom_op("offline_tests::matmul", mutates_args=())
def matmul(x_TK: torch.Tensor, w_KN: torch.Tensor) -> torch.Tensor:
    return x_TK @ w_KN


@matmul.register_fake
def _matmul_fake(x_TK, w_KN):
    return x_TK.new_empty(x_TK.shape[0], w_KN.shape[1])


@SymbolicGridFn
def _grid(rows, columns, meta, *, cdiv):
    return cdiv(rows, meta["BLOCK"]), cdiv(columns, meta["BLOCK"]), 1


_TEMPLATE = TritonTemplate(name="offline_matmul", grid=_grid, source=_SOURCE)


@register_lowering(torch.ops.offline_tests.matmul.default, type_promotion_kind=None)
def _matmul_lowering(x, w):
    x, w = realize_inputs(x, w)
    if x.get_device().type == "cpu":
        return torch._inductor.lowering.fallback_handler(torch.ops.offline_tests.matmul.default, False)(x, w)
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [x.get_size()[0], w.get_size()[1]])
    choices = []
    for block in (64, 32):
        options = {"BLOCK": block, "STEP": 64 if x.get_dtype().itemsize == 2 else 16, "num_warps": 4, "num_stages": 3}
        _TEMPLATE.maybe_append_choice(choices, input_nodes=[x, w], layout=layout, **options)
    result = autotune_select_algorithm("offline_matmul", choices, [x, w], layout)
    return result[0] if isinstance(result, tuple) else result
