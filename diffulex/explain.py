"""`diffulex.explain(model, *inputs)`: what the compiler did with each MoE layer, and why where it did nothing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import nn

from lowering.errors import Reason, ReasonCode
from lowering.inductor.fresh import fresh_caller
from lowering.report import Decision, collect

_GEMM_OPS = ("moe_expert_up", "moe_expert_down")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One MoE layer. `captured`: its experts run through the ops; `form`: sizes and activation of its region;
    `kernels`: one line per stage that was lowered.
    """

    name: str
    captured: bool
    backend: str
    form: str
    kernels: tuple[str, ...]
    router: str
    activation: str
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The layers of a model, and what Dynamo did with it: graphs, graph breaks and their reasons."""

    layers: tuple[LayerReport, ...]
    graphs: int
    breaks: int
    break_reasons: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = dataclasses.field(default=(), repr=False)

    @property
    def all_captured(self) -> bool:
        """Whether there are MoE layers and each runs through the ops."""
        return bool(self.layers) and all(layer.captured for layer in self.layers)

    def to_json(self) -> str:
        """The report as a JSON object, decisions left out."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "decisions"}
        return json.dumps(fields, indent=2)

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} MoE layers, {self.graphs} graph(s), {self.breaks} graph break(s)"]
        lines += [f"  break: {reason}" for reason in self.break_reasons]
        for layer in self.layers:
            state = f"captured, {layer.backend}" if layer.captured else f"not captured: {layer.reason}"
            lines.append(f"{layer.name}: {state}")
            if layer.captured:
                lines += [
                    f"  form        {layer.form}",
                    f"  router      {layer.router}",
                    f"  activation  {layer.activation}",
                ]
                lines += [f"  {kernel}" for kernel in layer.kernels]
        return "\n".join(lines)


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold experts, by name: transformers' experts classes and modules of the same make."""
    found = {}
    for name, module in model.named_modules():
        weights = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if hasattr(module, "num_experts") and len(weights) >= 2:
            found[name] = module
    return found


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Compile `model` once for these inputs (tensors [B, S] or [T, H] of any dtype), run it, and report.

    A model in eval mode is explained for inference, one in train mode for training (unless inside `torch.no_grad`).
    Compiles afresh with caches off, so that every decision is seen; the model and earlier compilations are untouched.
    """
    from torch._dynamo.utils import counters  # here, not above: these load triton
    from torch._inductor import config as inductor_config

    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    graphs_before, breaks_before = counters["stats"]["unique_graphs"], counters["graph_break"].copy()
    with (
        torch.set_grad_enabled(model.training and torch.is_grad_enabled()),
        inductor_config.patch(force_disable_caches=True),
        collect() as decisions,
    ):
        torch.compile(fresh_caller(model))(*args, **kwargs)
    graphs, breaks = counters["stats"]["unique_graphs"] - graphs_before, counters["graph_break"] - breaks_before
    return Report(layer_reports(model, decisions), graphs, breaks.total(), tuple(breaks), tuple(decisions))


def layer_reports(model: nn.Module, decisions: list[Decision]) -> tuple[LayerReport, ...]:
    """What the decisions of one or more compilations of `model` come to, for each of its MoE layers."""
    return tuple(_layer(name, module, decisions) for name, module in find_experts(model).items())


def _belongs(decision: Decision, name: str) -> bool:
    """Whether a decision is about the experts `name`; their router is another child of the same block."""
    layer = decision.layer
    if decision.subject == "moe_route":
        name, layer = name.rpartition(".")[0], layer.rpartition(".")[0]
    # what was compiled may hold the model, so that its layers' names are longer
    return name in ("", layer) or layer.endswith(f".{name}")


def _layer(name: str, module: nn.Module, decisions: list[Decision]) -> LayerReport:
    mine = [decision for decision in decisions if _belongs(decision, name)]
    lowered = {d.subject.removeprefix("diffulex::"): d for d in mine if d.stage == "lower"}
    captured = all(op in lowered for op in _GEMM_OPS)
    generated = captured and all(lowered[op].reason is None for op in _GEMM_OPS)
    kernels = tuple(
        f"{op:11} {d.outcome}{f' ({d.reason})' if d.reason is not None else ''}" for op, d in lowered.items()
    )
    return LayerReport(
        name=name,
        captured=captured,
        form=_outcome(mine, "region"),
        backend="generated Triton" if generated else "the ops' own kernels" if captured else "stock",
        kernels=kernels,
        router=_outcome(mine, "route_pass"),
        activation=_outcome(mine, "activation_pass"),
        reason=None if captured else str(_why_not(module, mine)),
    )


def _outcome(decisions: list[Decision], subject: str) -> str:
    for decision in decisions:
        if decision.subject == subject:
            return decision.outcome + (f" ({decision.reason})" if decision.reason is not None else "")
    return "not looked at"


def _why_not(module: nn.Module, decisions: list[Decision]) -> Reason:
    for decision in decisions:
        if decision.subject == "spine_pass" and decision.reason is not None:
            return decision.reason
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation == "eager":
        return Reason(ReasonCode.EAGER_EXPERTS)
    if implementation is None:
        return Reason(ReasonCode.NO_INTERFACE)
    return Reason(ReasonCode.STRUCTURE, f"experts_implementation={implementation!r} left no expert ops in the graph")
