"""What the demo prints about the three variants, and what it checks of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from lowering.report import Decision

from ..explanation import LayerReport, Report, make_report
from . import compare, text
from .accuracy import ErrorRatio, Oracle
from .compare import Result, Task
from .model import moe_block_name
from .table import Check, format_table

MOST_GRAPHS_ON_CPU = 3
MOST_KERNELS_PER_BLOCK = 7  # one for each of the five stages; two are left for the router's product, a library call


def describe_model(model: Any, preset: str) -> str:
    """One line with the sizes of a Qwen3-MoE model."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{type(model).__name__}, preset {preset}: {config.num_hidden_layers} layer(s), hidden {config.hidden_size}, "
        f"{config.num_experts} experts of width {config.moe_intermediate_size}, top {config.num_experts_per_tok}, "
        f"{parameters / 1e6:.2f} M parameters"
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of stock eager, stock compiled and diffulex, in this order, and the oracle they are measured by."""

    model: Any
    task: Task
    results: tuple[Result, Result, Result]
    references: dict[int, compare.Reference]
    oracle: Oracle

    @property
    def ours(self) -> Result:
        """The result of diffulex."""
        return self.results[2]

    @functools.cached_property
    def ratios(self) -> tuple[dict[int, ErrorRatio], dict[int, ErrorRatio]]:
        """Error ratios by token count, of stock compiled and of diffulex."""
        eager, stock, ours = self.results
        return (
            compare.accuracy(stock, eager, references=self.references),
            compare.accuracy(ours, eager, references=self.references),
        )

    @functools.cached_property
    def explanation(self) -> Report:
        """What `diffulex.explain` would say, from the compilations that were made here."""
        counts = self.ours.counts
        reasons = tuple(reason for reason, _ in counts.break_reasons)
        decisions = [self._named_in_model(decision) for decision in self.ours.decisions]
        return make_report(self.model, decisions, graphs=counts.graphs, breaks=counts.breaks, break_reasons=reasons)

    def _named_in_model(self, decision: Decision) -> Decision:
        """The decision with the name its layer has in the model: one block was compiled alone, too."""
        block = moe_block_name(self.model)
        if decision.layer.partition(".")[0] not in dict(self.model.get_submodule(block).named_children()):
            return decision
        return dataclasses.replace(decision, layer=f"{block}.{decision.layer}")

    def continuation(self, result: Result) -> tuple[str, bool]:
        """How a continuation compares with that of stock eager, in words, and whether it counts as the same.

        Two tokens whose float64 logits are closer than the error that eager makes are a tie: neither choice is wrong,
        and what follows cannot be compared.
        """
        eager = self.results[0]
        position = compare.first_difference(result, eager)
        if position is None:
            return "same", True
        tie = compare.is_tie(result, eager, position=position, task=self.task, model=self.model, oracle=self.oracle)
        return f"{'tie' if tie else 'differs'} at byte {position + 1}", tie

    def text(self) -> str:
        """All tables."""
        prompt, written = text.PROMPT, text.decode(self.results[0].continuation)
        dtype = str(self.model.dtype).removeprefix("torch.")
        parts = [
            f"\n== {dtype}: error against fp64 as a multiple of stock eager's (mean / largest), and ms per step ==",
            self._cases(),
            *self._footnotes(),
            "\n== Compilation ==",
            self._variants(),
            f"continuation, greedy: {prompt!r} -> {written!r}",
            self._kernel_note(),
            "\n== diffulex.explain ==",
            str(self.explanation),
        ]
        return "\n".join(parts)

    def _cases(self) -> str:
        names = [result.variant.name for result in self.results]
        header = ("tokens", "runs on", "compared", *(f"error {n}" for n in names[1:]), *(f"ms {n}" for n in names))
        stock, ours = self.ratios
        rows = []
        for case in self.task.cases:
            times = [result.milliseconds.get(case.tokens) for result in self.results]
            cells = ["-" if time is None else f"{time:.2f}" for time in times]
            place = "MoE block *" if case.refusal else "model"
            masks = self.references[case.tokens].compared
            compared = f"{sum(int(mask.sum()) for mask in masks)}/{sum(mask.numel() for mask in masks)}"
            rows.append((str(case.tokens), place, compared, str(stock[case.tokens]), str(ours[case.tokens]), *cells))
        return format_table(header, rows)

    def _footnotes(self) -> list[str]:
        refused = {case.tokens: case.refusal for case in self.task.cases if case.refusal}
        compared = "compared: tokens whose experts no rounding of stock eager's router logits changes, out of all"
        timed = "ms: medians, one variant after the other, so that other work on the machine shows; see benchmarks/"
        return [compared, timed] + [
            f"* stock eager cannot run the model on {tokens} tokens ({reason}); one MoE block runs them instead"
            for tokens, reason in refused.items()
        ]

    def _variants(self) -> str:
        rows = [
            ("greedy continuation", "(reference)", *(self.continuation(result)[0] for result in self.results[1:])),
            ("graphs", "-", *(str(result.counts.graphs) for result in self.results[1:])),
            ("graph breaks", "-", *(str(result.counts.breaks) for result in self.results[1:])),
            ("recompiles over the token counts", "-", *(str(result.counts.recompiles) for result in self.results[1:])),
            ("first pass with compilation, s", *(f"{result.first_seconds:.1f}" for result in self.results)),
            ("kernels per MoE layer", *self._kernels()),
        ]
        return format_table(("", *(result.variant.name for result in self.results)), rows)

    def _kernels(self) -> list[str]:
        if self.ours.kernels is not None:
            return [str(result.kernels) for result in self.results]
        most = max((len(layer.stages) for layer in self.explanation.layers), default=0)
        return ["-", "-", f"{most} ops"]

    def _kernel_note(self) -> str:
        if self.ours.kernels is not None:
            return (
                "kernels per MoE layer: device kernels in one call of a MoE block alone, router included, "
                f"{compare.KERNEL_TOKENS} tokens, counted by torch.profiler"
            )
        return "kernels per MoE layer: on the CPU, the ops that a layer calls (listed below); on CUDA, device kernels"

    def checks(self) -> list[Check]:
        """What the demo promises of diffulex."""
        words, same = self.continuation(self.ours)
        broken = [f"{tokens} tokens: {ratio.problem}" for tokens, ratio in self.ratios[1].items() if ratio.problem]
        report, graphs = self.explanation, self.ours.counts.graphs
        checks = [
            Check("same greedy continuation as stock eager", "" if same else words),
            Check("fp64 ratio rule at every token count", "; ".join(broken)),
            Check("every MoE layer captured", _layers_problem(report)),
            Check("no graph breaks", ", ".join(report.break_reasons)),
        ]
        if self.ours.kernels is None:
            problem = f"{graphs} graphs" if graphs > MOST_GRAPHS_ON_CPU else ""
            checks.append(Check(f"at most {MOST_GRAPHS_ON_CPU} graphs", problem))
            return checks
        slow = [layer.name for layer in report.layers if layer.backend != "generated Triton"]
        checks.append(Check("every MoE layer runs generated Triton", ", ".join(slow)))
        many = f"{self.ours.kernels} kernels" if self.ours.kernels > MOST_KERNELS_PER_BLOCK else ""
        checks.append(
            Check(f"at most {MOST_KERNELS_PER_BLOCK} kernels per MoE layer, the router's product included", many)
        )
        return checks


def _layers_problem(report: Report) -> str:
    if not report.layers:
        return "the model has no MoE layers"
    missing: list[LayerReport] = [layer for layer in report.layers if not layer.captured]
    return "; ".join(f"{layer.name}: {layer.reason}" for layer in missing)
