"""On an sm_90 device: the code that a process without the device shows is the code that the device gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lowering.inductor.offline import _split, offline_source
from tests.support.expected import normalise

pytestmark = pytest.mark.gpu

_HERE = Path(__file__)


def attention(query_BNTD, key_BNTD, value_BNTD, scale_D):
    out_BNTD = nn.functional.scaled_dot_product_attention(query_BNTD, key_BNTD, value_BNTD, is_causal=True)
    return torch.softmax(out_BNTD.transpose(1, 2) * scale_D, -1)


def masked(query_BNTD, key_BNTD, value_BNTD, mask_TT):
    return nn.functional.scaled_dot_product_attention(query_BNTD, key_BNTD, value_BNTD, attn_mask=mask_TT).relu()


def norm_and_router(x_TH, w_EH):
    normed_TH = x_TH * torch.rsqrt(x_TH.float().square().mean(-1, keepdim=True) + 1e-6).to(x_TH.dtype)
    return torch.softmax((normed_TH @ w_EH.T).float(), -1).topk(4)


def cases():
    """name -> function and inputs on the CPU."""
    bf16 = {"dtype": torch.bfloat16}
    heads = [torch.zeros(2, 4, 64, 32, **bf16) for _ in range(3)]
    return {
        "attention": (attention, [*heads, torch.zeros(32, **bf16)]),
        "masked": (masked, [*heads, torch.ones(64, 64, dtype=torch.bool)]),
        "norm_and_router": (norm_and_router, [torch.zeros(64, 256, **bf16), torch.zeros(16, 256, **bf16)]),
    }


def described(code):
    """What must agree: launches, library calls, and the text of the kernels.

    A kernel's name lists the ATen ops it came from, which depend on how a call was taken apart; kernels are numbered.
    """
    numbers = {kernel.name: f"kernel_{number}" for number, kernel in enumerate(code.kernels)}
    kernels = {
        numbers[kernel.name]: normalise(kernel.function.replace(kernel.name, "kernel")) for kernel in code.kernels
    }
    return {"calls": [numbers[call] for call in code.calls], "extern": list(code.extern_calls), "kernels": kernels}


@pytest.fixture(scope="module")
def without_the_device():
    program = f"import runpy; runpy.run_path({str(_HERE)!r}, run_name='offline')"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(_HERE.parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Seen on an H200 with torch 2.11: as many kernels and the same library calls, another text of the one that makes the
# additive mask for the memory-efficient attention. Strict, so that mending it is noticed.
OTHER_MASK = pytest.mark.xfail(strict=True, reason="the mask of efficient attention is prepared in other words offline")
NAMES = [pytest.param(name, marks=OTHER_MASK) if name == "masked" else name for name in cases()]


@pytest.mark.parametrize("name", NAMES)
def test_same_code(name, without_the_device):
    from torch._inductor.utils import fresh_cache, run_and_get_code
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the device is no sm_90")
    fn, inputs = cases()[name]
    # which of its attention kernels torch takes depends on the card; offline code knows no cuDNN
    library = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    with torch.no_grad(), fresh_cache(), torch._inductor.config.patch(shape_padding=False), library:
        torch._dynamo.reset()
        _, (source,) = run_and_get_code(torch.compile(fn, dynamic=False), *[value.cuda() for value in inputs])
    assert described(_split(source, ())) == without_the_device[name]


if __name__ == "offline":
    found = {name: described(offline_source(fn, inputs, dynamic=False)) for name, (fn, inputs) in cases().items()}
    print(json.dumps(found))
