"""A report as one HTML page that loads nothing: each form of layer before and after, or why it is as it was."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lowering.report import Decision, microseconds

from .drawing import Bar, Box, Row, draw, text

if TYPE_CHECKING:
    from ..explanation import LayerReport, Report

# what stock PyTorch runs for each stage; a name of the activation or the shared expert is put in where it is known
_STOCK = {
    "moe_route": ("routing", "scores, top-k, renormalisation"),
    "moe_dispatch": ("slots by expert", "sort, histogram, cumulative sum"),
    "moe_expert_up": ("first GEMM", "gather of rows, grouped GEMM, activation"),
    "moe_expert_down": ("second GEMM", "grouped GEMM, scatter back to slot order"),
    "moe_combine": ("combination", "product with the weights, sum over K"),
    "moe_expert_grad_weight": ("weight gradient", "grouped GEMM over the rows of each expert"),
}
_NUMBER = re.compile(r"[0-9]{1,12}")
_MOST_NAMES = 3
_FIELDS = ("form", "router", "activation", "shared_expert", "schedules", "invariance", "times")

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--box:#f6f8fa;--bad:#b42318;
--stock:#8c959f;--moe_route:#8250df;--moe_dispatch:#0969da;--moe_expert_up:#1a7f37;--moe_expert_down:#9a6700;
--moe_combine:#bf3989;--moe_expert_grad_weight:#57606a;--whole:#afb8c1;--floor:#0969da}
@media(prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--box:#151b23;
--bad:#ff7b72;--stock:#656c76;--moe_route:#ab7df8;--moe_dispatch:#4493f8;--moe_expert_up:#3fb950;
--moe_expert_down:#d29922;--moe_combine:#db61a2;--moe_expert_grad_weight:#9198a1;--whole:#3d444d;--floor:#4493f8}}
body{margin:2rem auto;max-width:1040px;padding:0 1rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin:2.5rem 0 .25rem;overflow-wrap:anywhere}
p,li{color:var(--soft);margin:.25rem 0;overflow-wrap:anywhere}.refused{color:var(--bad)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.5rem 0}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}svg{display:block;max-width:100%;height:auto;margin:.75rem 0}
svg text{fill:var(--ink);font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
svg .title{font-weight:600}svg .line{fill:var(--soft);font-size:12.5px}svg .heading{fill:var(--soft)}
svg .box{fill:var(--box);stroke:var(--line)}svg .arrow{fill:none;stroke:var(--soft);stroke-width:1.5}
svg .whole{fill:var(--whole)}svg .floor{fill:var(--floor)}
""" + "".join(f"svg rect.{kind}{{fill:var(--{kind})}}" for kind in ("stock", *_STOCK))  # fmt: skip


def page(report: Report) -> str:
    """The page. Layers with the same form, kernels and reasons are one picture; times in it are means over them."""
    counts = f"{len(report.layers)} MoE layers, {report.graphs} graph(s), {report.breaks} graph break(s)"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>diffulex: {text(counts)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>MoE layers, compiled</h1><p>{text(f'{counts}, explained for {report.mode}')}</p>",
        _list("Graph breaks", report.break_reasons),
        *(_section(layers) for layers in groups(report.layers)),
        _list("In no layer known by name", report.unattributed),
        "</body></html>\n",
    ]
    return "".join(parts)


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<h2>{text(title)}</h2><ul>{items}</ul>" if lines else ""


def groups(layers: Iterable[LayerReport]) -> list[list[LayerReport]]:
    """Layers that differ in names and measured times alone are together, in the order in which they first came."""
    found: dict[LayerReport, list[LayerReport]] = {}
    for layer in layers:
        plain = tuple(dataclasses.replace(decision, layer="") for decision in layer.lowered)
        found.setdefault(dataclasses.replace(layer, name="", kernels=(), lowered=plain), []).append(layer)
    return list(found.values())


def joined_names(names: Sequence[str]) -> str:
    """`layers.0-47.mlp` of names that differ in one number, otherwise the first few."""
    pieces = [(_NUMBER.split(name), [int(number) for number in _NUMBER.findall(name)]) for name in names]
    texts, numbers = pieces[0]
    if all(other == texts and len(own) == len(numbers) for other, own in pieces):
        places = [place for place in range(len(numbers)) if len({own[place] for _, own in pieces}) > 1]
        if len(places) == 1:
            told = _NUMBER.findall(names[0])
            told[places[0]] = _ranges(sorted({own[places[0]] for _, own in pieces}))
            return "".join(part for pair in zip(texts, [*told, ""], strict=True) for part in pair)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return told if len(runs) == 1 else f"{{{told}}}"


def _section(layers: Sequence[LayerReport]) -> str:
    first = layers[0]
    names = joined_names([layer.name or "(the model)" for layer in layers])
    count = f" ({len(layers)} layers)" if len(layers) > 1 else ""
    parts = [f"<section><h2>{text(names)}{count}</h2>"]
    if first.captured:
        parts.append(f"<p>captured, {text(first.backend)}</p>")
    else:
        parts.append(f'<p class="refused">not captured: {text(first.reason or "")}</p>')
    parts.append(draw(rows(layers), label=f"{names}, before and after"))
    if first.captured:
        told = ((name, getattr(first, name)) for name in _FIELDS)
        parts.append("<dl>" + "".join(f"<dt>{_word(k)}</dt><dd>{text(v)}</dd>" for k, v in told if v) + "</dl>")
        parts.append(f"<p>{_note(first, len(layers))}</p>")
    return "".join([*parts, "</section>"])


def _word(field: str) -> str:
    return field.replace("_", " ")


def _note(layer: LayerReport, count: int) -> str:
    """How the left side is known, and what the bars are."""
    notes = ["Left: what stands for these stages in a graph of transformers' grouped_mm."]
    if any(decision.cost is not None for decision in layer.lowered):
        notes.append("Bars: predicted times, or measured ones, to one scale; the coloured part is the floor.")
    if count > 1 and layer.generated:
        notes.append("Names of kernels are those of the first of these layers; elsewhere other things may be fused.")
    if count > 1 and layer.measured_us is not None:
        notes.append(f"Measured times are means over the {count} layers; those in the list are of the first.")
    return " ".join(notes)


def rows(layers: Sequence[LayerReport]) -> list[Row]:
    """A row for each stage in the order of the layer; one that says why, where the layer was not captured."""
    first = layers[0]
    if not first.captured:
        reason = Box("the same", (first.reason or "",))
        return [Row("stock", Box("the layer's own operations"), (reason,))]
    found: dict[str, list[Box]] = {}
    for place, decision in enumerate(first.lowered):
        times = [layer.lowered[place].measured_us for layer in layers]
        known = [time for time in times if time is not None]
        mean = statistics.fmean(known) if known else None
        found.setdefault(decision.subject, []).append(_kernel(dataclasses.replace(decision, measured_us=mean), first))
    return [row for stage in _STOCK for row in _rows(stage, found.get(stage, []), first)]


def _rows(stage: str, kernels: Sequence[Box], layer: LayerReport) -> list[Row]:
    """The row of a stage, and behind it those of what was not taken into it."""
    title, words = _STOCK[stage]
    boxes, behind = tuple(dict.fromkeys(kernels)), []
    if stage == "moe_route" and not boxes:
        return [Row("stock", Box(title, (words,)), (Box("ordinary operations", (layer.router,)),))]
    if not boxes:
        return []
    if stage == "moe_expert_up" and layer.activation.startswith("stays"):
        words = words.removesuffix(", activation")
        behind.append(Row("stock", Box("activation"), (Box("ordinary operations", (layer.activation,)),)))
    if stage == "moe_expert_down" and layer.shared_expert:
        behind.append(Row("stock", Box("shared expert"), (Box("shared expert", (layer.shared_expert,)),)))
    return [Row(stage, Box(title, (words,)), boxes), *behind]


def _kernel(decision: Decision, layer: LayerReport) -> Box:
    cost, measured = decision.cost, decision.measured_us
    lines = [decision.outcome]
    if decision.subject == "moe_combine" and not layer.form.endswith("then -"):
        lines[0] += f"; read by {layer.form.rpartition('then ')[2]}"
    if decision.reason is not None:
        lines.append(str(decision.reason))
    lines += decision.kernels
    if cost is not None:
        lines.append(str(cost))
    if measured is not None:
        floor = f", {cost.floor_us / measured:.0%} of it is the floor" if cost is not None else ""
        lines.append(f"measured {microseconds(measured)}{floor}")
    shown = measured if measured is not None else cost.predicted_us if cost is not None else None
    bar = None if shown is None else Bar(shown, cost.floor_us if cost is not None else 0.0)
    return Box(decision.subject, tuple(lines), bar)
