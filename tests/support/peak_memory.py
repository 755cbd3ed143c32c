"""Resident memory of loading and saving, measured in a process of its own; prints JSON of bytes per scenario.

The figure is the kernel's own: the peak of the resident set (VmHWM, reset by writing 5 to clear_refs) above what was
resident before. It counts pages of mapped files as well as allocations, torch's and everyone else's.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from diffulex.checkpoint import Block, LoadOptions, SaveOptions, load_checkpoint, save_checkpoint

EXPERTS, WIDTH, HIDDEN = 16, 1024, 512
EXPERT_BYTES = 2 * WIDTH * HIDDEN * 4  # gate and up rows of one expert, fp32: the largest tensor of an expert
SHARD_BYTES = EXPERTS * 3 * WIDTH * HIDDEN * 4
_CLEAR = Path("/proc/self/clear_refs")


def is_supported() -> bool:
    """Whether the kernel keeps a peak that can be reset."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def peak_above(run: Callable[[], object]) -> int:
    """Bytes by which the resident set grew at its peak while `run` ran."""
    _CLEAR.write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _block(value: float, *, dtype: torch.dtype = torch.float32) -> Block:
    sizes = {"gate.weight": (EXPERTS, HIDDEN), "w13": (EXPERTS, 2 * WIDTH, HIDDEN), "w2": (EXPERTS, HIDDEN, WIDTH)}
    return Block({name: torch.full(size, value, dtype=dtype) for name, size in sizes.items()})


def _whole_shard(block: Block, folder: Path) -> None:
    """How it must not be done."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.0.mlp."
    names = {"gate.weight": "gate.weight", "w13": "experts.gate_up_proj", "w2": "experts.down_proj"}
    for name, key in names.items():
        block.params[name].copy_(tensors[prefix + key])


def main(folder: Path) -> None:
    """Save under every layout, and load it in several ways."""
    found: dict[str, int] = {}
    block = _block(1.0)
    forms = {"v5": ("mixtral", "v5"), "v4": ("mixtral", "v4"), "transposed": ("qwen3_vl_moe", "v4")}

    def save(name: str) -> None:
        model_type, form = forms[name]
        save_checkpoint({0: block}, folder / name, model_type=model_type, options=SaveOptions(form=form))

    def load(name: str, target: Block, *, window: int) -> None:
        load_checkpoint({0: target}, folder / name, model_type=forms[name][0], options=LoadOptions(window=window))

    save("v5")  # what is imported and allocated once does not count
    load("v5", block, window=0)
    shutil.rmtree(folder / "v5")
    for name in forms:
        found[f"save {name}"] = peak_above(lambda name=name: save(name))
        found[f"load {name}"] = peak_above(lambda name=name: load(name, block, window=0))
    half = _block(0.0, dtype=torch.bfloat16)
    found["load converted"] = peak_above(lambda: load("v5", half, window=0))
    found["load a window"] = peak_above(lambda: load("v5", block, window=4 * EXPERT_BYTES))
    found["load unbounded"] = peak_above(lambda: load("v5", block, window=1 << 40))
    found["whole shard"] = peak_above(lambda: _whole_shard(block, folder / "v5"))
    assert all(bool((t == 1.0).all()) for t in [*block.params.values(), *half.params.values()])
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
