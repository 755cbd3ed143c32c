"""Without a GPU: the Triton source that sm_90 would run for the demo's model, and what its compiler says about it."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowering.errors import Reason
from lowering.inductor.fake_device import fake_refusal
from lowering.inductor.offline import KernelFacts, OfflineCode, OfflineKernel, compile_kernels, offline_source
from lowering.report import collect

from .progress import progress
from .table import format_table

_TEMPLATE_PREFIX = "triton_tem_"  # kernels that Inductor makes from a template; in these models all are ours
_STAGES = re.compile(r"moe_(?:route|dispatch|expert_(?:up|down)|combine)")
_HEADER = ("kernel", "launches", "registers", "spills", "shared", "warps", "stages", "wgmma")


@dataclasses.dataclass(frozen=True)
class OfflineFacts:
    """The generated code, what ptxas says of the kernels asked for, the ops that got no kernel, with the reason, and
    the kernels that do not compile, with the error.
    """

    code: OfflineCode
    kernels: tuple[KernelFacts, ...]
    refusals: tuple[str, ...]
    failures: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            (
                shorten(facts.name),
                str(self.code.calls.count(facts.name)),
                str(facts.registers),
                f"{facts.spill_bytes} B",
                f"{facts.shared_bytes} B",
                str(facts.warps),
                str(facts.stages),
                str(facts.wgmma),
            )
            for facts in self.kernels
        ]
        return format_table(_HEADER, rows)


def is_moe_kernel(name: str) -> bool:
    """Whether a generated kernel does a stage of a MoE layer, alone or fused with its neighbours."""
    return "moe_" in name or name.startswith(_TEMPLATE_PREFIX)


def shorten(name: str, width: int = 56) -> str:
    """A generated kernel name of at most `width` characters: its middle is left out, but not the MoE stages in it."""
    if len(name) <= width:
        return name
    middle = "".join(f"{stage}.." for stage in _STAGES.findall(name))
    room = (width - 2 - len(middle)) // 2
    return f"{name[:room]}..{middle}{name[-room:]}"


def compile_offline(config: Any, folder: Path, *, tokens: int, verbose: bool) -> OfflineFacts | Reason:
    """Generate, write to `folder` and compile the kernels of one layer in bf16; or the reason why that cannot be.

    config: transformers' configuration of the model. tokens: the length the schedules are planned for, as a hint; the
    code takes any. verbose: compile all kernels and not only those of the MoE layer.
    """
    reason = fake_refusal()
    if reason is not None:
        return reason
    model = _one_layer(config)
    ids = torch.zeros(1, max(tokens, 2), dtype=torch.int64)
    torch._dynamo.mark_dynamic(ids, 1)
    with progress("sm_90: generating Triton", 1) as bar, collect() as decisions:
        code = offline_source(model, {"input_ids": ids, "use_cache": False}, dtype=torch.bfloat16)
        bar.advance()
    wanted = [kernel for kernel in code.kernels if verbose or is_moe_kernel(kernel.name)]
    _write(code, wanted, folder)
    facts: list[KernelFacts] = []
    failures: list[str] = []
    with progress("sm_90: compiling", max(len(wanted), 1)) as bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # triton 3.9 on its own default
        for kernel in wanted:
            try:
                facts += compile_kernels(dataclasses.replace(code, kernels=(kernel,)))
            except Exception as error:  # whatever Triton or ptxas raises
                failures.append(f"{shorten(kernel.name)} does not compile: {first_line(error)}")
            bar.advance(note=f"{len(facts)} of {len(wanted)} kernels")
    refused = tuple(f"{d.subject}: {d.reason}" for d in decisions if d.kernel_refusal is not None)
    return OfflineFacts(code, tuple(facts), refused, tuple(failures))


def first_line(error: Exception) -> str:
    """The type of an error and the first line it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _one_layer(config: Any) -> nn.Module:
    """The model with one layer and without memory: all layers run the same kernels."""
    from transformers import Qwen3MoeForCausalLM

    settings = config.to_dict() | {"num_hidden_layers": 1, "layer_types": None}
    with torch.device("meta"):
        model: nn.Module = Qwen3MoeForCausalLM(type(config)(**settings))
    return model.eval()


def _write(code: OfflineCode, kernels: Sequence[OfflineKernel], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("triton_*.py"):  # as Inductor calls every kernel; what else is there is not ours
        old.unlink()
    (folder / "wrapper.py").write_text(code.wrapper_source, encoding="utf-8")
    for kernel in kernels:
        (folder / f"{shorten(kernel.name, 100)}.py").write_text(kernel.source, encoding="utf-8")
