"""`diffulex.explain(model, *inputs)`: what the compiler did with each MoE layer, and why where it did nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from lowering.errors import Reason, ReasonCode
from lowering.inductor.fresh import fresh_backend, fresh_caller
from lowering.inductor.output_code import collect_output_code
from lowering.report import Cost, Decision, collect, microseconds
from lowering.state import is_batch_invariant, is_enabled

from .explaining.kernels import named
from .integrations.transformers import DEVICES

_GEMM_OPS = frozenset({"moe_expert_up", "moe_expert_down"})
_LAYER_SUBJECTS = _GEMM_OPS | {"spine_pass"}
# these work on the router, or on what else is another child of the block that holds the experts
_ROUTER_SUBJECTS = frozenset(
    {"moe_route", "router_linear_pass", "route_linear_pass", "route_linear", "batch_invariance"}
)
_NO_LIMIT = 1 << 20  # frames behind graph breaks keep what earlier reports compiled of them
INFERENCE, TRAINING = "inference (no_grad)", "training"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One MoE layer. `captured`: its experts run through the ops; `form`: sizes and activation of its region;
    `kernels`: one line per stage that was lowered, more where graphs or directions differ; `shared_expert`: what became
    of a dense MLP beside the experts, empty where there is none; `lowered`: the decisions behind `kernels`;
    `schedules`: whether those of the expert GEMMs come from the cost model or from tuning, empty without any;
    `invariance`: inside `batch_invariant()` whether all that is known of the layer is covered, or what is not.
    """

    name: str
    captured: bool
    backend: str
    form: str
    kernels: tuple[str, ...]
    router: str
    activation: str
    reason: str | None = None
    shared_expert: str = ""
    schedules: str = ""
    invariance: str = ""
    lowered: tuple[Decision, ...] = dataclasses.field(default=(), repr=False)

    @property
    def stages(self) -> frozenset[str]:
        """The ops the layer runs."""
        return frozenset(kernel.split()[0] for kernel in self.kernels)

    @property
    def generated(self) -> tuple[str, ...]:
        """The generated kernels in the order of the stages; Inductor calls them after the operations they come from."""
        return tuple(dict.fromkeys(name for decision in self.lowered for name in decision.kernels))

    @property
    def cost(self) -> Cost | None:
        """What the cost model says of the routed experts' GEMMs (weight gradients aside) together, one after the other.

        None where it does not know one of them: on devices that are not described, and in dtypes that are not.
        """
        costs = [decision.cost for decision in self.lowered if decision.subject in _GEMM_OPS]
        known = [cost for cost in costs if cost is not None]
        if not known or len(known) < len(costs):
            return None
        sums = {
            name: sum(getattr(cost, name) for cost in known) for name in ("bytes", "flop", "floor_us", "predicted_us")
        }
        usual = [cost.usual_us for cost in known if cost.usual_us is not None]
        usual_us = sum(usual) if len(usual) == len(known) else None
        return Cost(known[0].device, max(cost.rows for cost in known), **sums, usual_us=usual_us)

    @property
    def measured_us(self) -> float | None:
        """Microseconds of all stages together that were measured, with what is fused into them; None without any."""
        times = [decision.measured_us for decision in self.lowered if decision.measured_us is not None]
        return sum(times) if times else None

    @property
    def times(self) -> str:
        """Bytes, FLOP and times in one line; empty where nothing is known."""
        cost, measured = self.cost, self.measured_us
        told = [] if cost is None else [
            f"{_si(cost.bytes)}B and {_si(cost.flop)}FLOP in the routed experts' GEMMs on {cost.device}, {cost}",
        ]  # fmt: skip
        if measured is not None:
            floor = "" if cost is None else f" (floor: {cost.floor_us / measured:.0%})"
            count = sum(decision.measured_us is not None for decision in self.lowered)
            told.append(f"measured {microseconds(measured)} in {count} of {len(self.lowered)} stages{floor}")
        return "; ".join(told)

    def to_dict(self) -> dict[str, Any]:
        """What JSON says of the layer."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "lowered"}
        stages = [
            {"stage": d.subject, "kernel": d.outcome, "generated": d.kernels, **_times(d.cost, d.measured_us)}
            for d in self.lowered
        ]
        return fields | {"stages": stages, **_times(self.cost, self.measured_us)}


@dataclasses.dataclass(frozen=True)
class Report:
    """The layers of a model, and what Dynamo did with it: graphs, graph breaks and their reasons.

    mode: what was compiled, inference or training. unattributed: stages that were lowered for no layer known by name.
    """

    layers: tuple[LayerReport, ...]
    graphs: int
    breaks: int
    break_reasons: tuple[str, ...] = ()
    mode: str = INFERENCE
    unattributed: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = dataclasses.field(default=(), repr=False)

    @property
    def all_captured(self) -> bool:
        """Whether there are MoE layers and each runs through the ops."""
        return bool(self.layers) and all(layer.captured for layer in self.layers)

    def to_json(self) -> str:
        """The report as a JSON object, decisions left out."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "decisions"}
        return json.dumps(fields | {"layers": [layer.to_dict() for layer in self.layers]}, indent=2)

    def to_html(self) -> str:
        """The report as one HTML page with a picture of each form of layer, before and after; it loads nothing."""
        from .explaining.picture import page

        return page(self)

    def __str__(self) -> str:
        counts = f"{len(self.layers)} MoE layers, {self.graphs} graph(s), {self.breaks} graph break(s)"
        lines = [f"{counts}, explained for {self.mode}"]
        lines += [f"  break: {reason}" for reason in self.break_reasons]
        for layer in self.layers:
            state = f"captured, {layer.backend}" if layer.captured else f"not captured: {layer.reason}"
            lines.append(f"{layer.name or '(the model)'}: {state}")
            if layer.captured:
                lines += [
                    f"  form        {layer.form}",
                    f"  router      {layer.router}",
                    f"  activation  {layer.activation}",
                ]
                lines += [f"  shared      {layer.shared_expert}"] if layer.shared_expert else []
                lines += [f"  schedules   {layer.schedules}"] if layer.schedules else []
                lines += [f"  invariance  {layer.invariance}"] if layer.invariance else []
                lines += [f"  times       {layer.times}"] if layer.times else []
                lines += [f"  {kernel}" for kernel in layer.kernels]
                lines += [f"  generated   {name}" for name in layer.generated]
        if self.unattributed:
            lines += ["in no layer known by name:", *(f"  {kernel}" for kernel in self.unattributed)]
        return "\n".join(lines)


def _times(cost: Cost | None, measured_us: float | None) -> dict[str, Any]:
    times: dict[str, Any] = {"cost": None, "measured_us": measured_us}
    if cost is not None:
        times["cost"] = dataclasses.asdict(cost) | {"floor_of_predicted": cost.floor_us / cost.predicted_us}
        if measured_us is not None:
            times["floor_of_measured"] = cost.floor_us / measured_us
    return times


def _si(number: float) -> str:
    """`1.21 G` of 1.21e9."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g} "


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold experts, by name: modules called `experts`, and those with weights of rank 3 for `num_experts`.

    A module with one such weight is half of a layer's experts: the module around it is given instead. Modules swapped
    by `diffulex.adapt` are given where the compiler meets their ops, and nothing below them.
    """
    found: dict[str, nn.Module] = {}
    adapted: list[str] = []
    for name, module in model.named_modules():
        if any(not outer or name.startswith(f"{outer}.") for outer in adapted):
            continue
        if getattr(module, "adapted_form", None):
            adapted.append(name)
            found[name.rpartition(".")[0] if module.called_by_parent else name] = module
            continue
        banks = sum(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        if name.rpartition(".")[2] == "experts" or (hasattr(module, "num_experts") and banks > 1):
            found[name] = module
        elif hasattr(module, "num_experts") and banks == 1:
            parent = name.rpartition(".")[0]
            found.setdefault(parent, model.get_submodule(parent))
    return found


def explain(model: nn.Module, *args: Any, measure: bool = False, **kwargs: Any) -> Report:
    """Compile `model` once for these inputs (tensors [B, S] or [T, H] of any dtype), run it, and report.

    measure: profile a few further runs, and report what each stage took (in inference; what cannot be measured is
    `MoEUnsupportedError`).

    A model in eval mode is explained for inference, under `torch.no_grad`, one in train mode for training (unless
    inside `torch.no_grad`). Compiles afresh with caches off, so that every decision is seen; the model and earlier
    compilations are untouched. Where graphs break, what was compiled behind the breaks stays until
    `torch._dynamo.reset()` and counts to Dynamo's recompile limit.
    """
    from torch._dynamo import config as dynamo_config  # here, not above: these load triton
    from torch._dynamo.utils import counters
    from torch._inductor import config as inductor_config

    from lowering.inductor.offline import launches

    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    training = model.training and torch.is_grad_enabled()
    graphs_before, breaks_before = counters["stats"]["unique_graphs"], counters["graph_break"].copy()
    with (
        torch.set_grad_enabled(training),
        inductor_config.patch(force_disable_caches=True),
        dynamo_config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT),
        collect() as decisions,
    ):
        compiled = torch.compile(fresh_caller(model), backend=fresh_backend())
        if measure:
            from .explaining.measure import check_measurable, measured

            check_measurable(training=training)
        with collect_output_code() as wrappers:
            compiled(*args, **kwargs)
        decisions[:] = named(decisions, [name for wrapper in wrappers for name in launches(wrapper)])
        if measure:
            decisions[:] = measured(lambda: compiled(*args, **kwargs), decisions)
    graphs, breaks = counters["stats"]["unique_graphs"] - graphs_before, counters["graph_break"] - breaks_before
    report = make_report(model, decisions, graphs=graphs, breaks=breaks.total(), break_reasons=tuple(breaks))
    return dataclasses.replace(report, mode=TRAINING if training else INFERENCE)


def make_report(
    model: nn.Module, decisions: Iterable[Decision], *, graphs: int, breaks: int, break_reasons: tuple[str, ...] = ()
) -> Report:
    """What the decisions of one or more compilations of `model` for inference come to, for each of its MoE layers.

    Layers without a module of experts are told by the names that the decisions give them.
    """
    decisions = tuple(decisions)
    experts: dict[str, nn.Module | None] = dict(find_experts(model))
    for decision in decisions:
        if decision.layer and decision.subject in _LAYER_SUBJECTS and _owner(decision, experts) is None:
            experts[decision.layer] = None
    mine: dict[str | None, list[Decision]] = {name: [] for name in (*experts, None)}
    for decision in decisions:
        mine[_owner(decision, experts)].append(decision)
    layers = tuple(_layer(name, module, mine[name]) for name, module in experts.items())
    unattributed = _lines(decision for decision in mine[None] if decision.stage == "lower" or decision.reason)
    return Report(layers, graphs, breaks, break_reasons, unattributed=unattributed, decisions=decisions)


def _owner(decision: Decision, names: Collection[str]) -> str | None:
    """The experts a decision is about, of all those with these names: the longest name that fits."""
    layer = decision.layer
    found = _fitting(layer, names) or _only_end(layer, names)
    if found is None and decision.subject in _ROUTER_SUBJECTS:
        blocks = {name.rpartition(".")[0]: name for name in names}
        while layer and found is None:  # from the router outwards, to the first module that has experts
            block = _fitting(layer, blocks)
            found = _fitting(layer, names) or (blocks[block] if block else None)
            layer = layer.rpartition(".")[0]
        found = blocks.get("") if found is None else found
    return "" if found is None and "" in names else found


def _fitting(layer: str, names: Iterable[str]) -> str | None:
    """The longest of the names that are the end of `layer`: what was compiled may hold the model that is explained."""
    return max((name for name in names if name and f".{layer}".endswith(f".{name}")), key=len, default=None)


def _only_end(layer: str, names: Iterable[str]) -> str | None:
    """The name that ends with `layer`, if it is the only one: what was compiled may be a part of the model."""
    ends = [name for name in names if layer and name.endswith(f".{layer}")]
    return ends[0] if len(ends) == 1 else None


def _lines(decisions: Iterable[Decision]) -> tuple[str, ...]:
    """One line for each thing that was said of a subject, the subjects in the order in which they first came."""
    told: dict[str, dict[str, None]] = {}
    for decision in decisions:
        told.setdefault(decision.subject, {})[decision.told] = None
    width = max(map(len, told), default=0)
    return tuple(f"{subject:{width}} {line}" for subject, lines in told.items() for line in lines)


def _layer(name: str, module: nn.Module | None, decisions: list[Decision]) -> LayerReport:
    lowered = [decision for decision in decisions if decision.stage == "lower"]
    captured = {decision.subject for decision in lowered} >= _GEMM_OPS
    generated = captured and all(decision.kernel_refusal is None for decision in lowered)
    return LayerReport(
        name=name,
        captured=captured,
        form=_outcomes(decisions, "region"),
        backend="generated Triton" if generated else "the ops' own kernels" if captured else "stock",
        kernels=_lines(lowered),
        router=_outcomes(decisions, "route_pass"),
        activation=_outcomes(decisions, "activation_pass"),
        shared_expert=_outcomes(decisions, "shared_expert_pass", "shared_expert", default=""),
        schedules=_outcomes(decisions, "schedules", default=""),
        invariance=_invariance(decisions),
        reason=None if captured else str(_why_not(module, decisions)),
        lowered=tuple(lowered),
    )


def _invariance(decisions: list[Decision]) -> str:
    if not is_batch_invariant():
        return ""
    told = _outcomes(decisions, "batch_invariance", default="")
    return f"but for: {told}" if told else "what is computed for a token does not depend on the batch"


def _outcomes(decisions: list[Decision], *subjects: str, default: str = "not looked at") -> str:
    told = dict.fromkeys(decision.told for decision in decisions if decision.subject in subjects)
    return "; ".join(told) or default


def _why_not(module: nn.Module | None, decisions: list[Decision]) -> Reason:
    if not is_enabled():
        return Reason(ReasonCode.DISABLED)
    for decision in decisions:
        if decision.subject == "spine_pass" and decision.reason is not None:
            return decision.reason
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation is None or not hasattr(module, "has_gate"):  # what transformers' interface gives to experts
        kind = getattr(module, "moe_gemm_impl", None)
        return Reason(ReasonCode.NO_INTERFACE) if kind is None else Reason(ReasonCode.OPTION, f"moe_gemm_impl={kind!r}")
    if implementation == "eager":
        return Reason(ReasonCode.EAGER_EXPERTS)
    device = next((parameter.device.type for parameter in module.parameters()), "cpu") if module is not None else "cpu"
    if device not in DEVICES:
        return Reason(ReasonCode.DEVICE, f"device {device}")
    return Reason(ReasonCode.STRUCTURE, f"experts_implementation={implementation!r} left no expert ops in the graph")
