"""Runs a program eagerly, compiled and in fp64, and says what differs.

Tokens whose choice of experts rounding could change are left out of the inputs; then ids have to be equal, and errors
are compared by the ratio rule over all calls of a program.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import linecache
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffulex.cli.accuracy import Widen, error_ratio
from lowering.graph.pipeline import run_passes
from lowering.report import Decision, collect
from tests.support.graphs import applied, backend_with, trace

from .draw import Form
from .source import write

TOKENS = 96  # compared of each program; where their error is too large, SECOND_LOOK more decide
SECOND_LOOK = 1536
MOST_GRAPHS = 3  # over any token counts, on a CPU
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a program. problem: empty where all is well; decisions: of the passes and lowerings."""

    form: Form
    problem: str
    text: str
    decisions: tuple[Decision, ...] = ()

    @property
    def kind(self) -> str:
        """The first word of the problem: an exception, `output`, `graphs` or `few`."""
        return self.problem.partition(":")[0].partition(" ")[0]


def load(text: str) -> ModuleType:
    """The program as a module; errors inside show its lines."""
    name = f"fuzzed_{next(_numbers)}"
    module, file = ModuleType(name), f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), vars(module))
    return module


def _wide(model: Any, hidden_TH: Tensor, *args: Any) -> tuple[Tensor, ...]:
    with torch.no_grad(), Widen():
        return model(hidden_TH.double(), *args)


def clear_rows(model: Any, double: Any, pool_PH: Tensor) -> Tensor:
    """The numbers of the rows of [P, H] floating whose experts, and their order, no rounding could change."""
    seen: list[tuple[Tensor, int]] = []
    exact: list[tuple[Tensor, int]] = []
    with torch.no_grad():
        model(pool_PH, seen)
    _wide(double, pool_PH, exact)
    clear_P = torch.ones(pool_PH.shape[0], dtype=torch.bool)
    for (scores_PE, top_k), (oracle_PE, _) in zip(seen, exact, strict=True):
        same = scores_PE.double() == oracle_PE  # infinities
        error_P = torch.where(same, 0.0, (scores_PE.double() - oracle_PE).abs()).amax(-1)
        best_PE = torch.nn.functional.pad(oracle_PE.sort(-1, descending=True).values, (0, 1), value=-torch.inf)
        gap_P = (best_PE[:, :top_k] - best_PE[:, 1 : top_k + 1]).amin(-1)
        clear_P &= gap_P > 4 * torch.maximum(error_P, error_P.quantile(0.9))
    return clear_P.nonzero()[:, 0]


def _calls(form: Form, rows: Tensor, total: int) -> list[Tensor]:
    """The rows of each call: every token count of the form, until `total` tokens were given out."""
    calls, start = [], 0
    for tokens in itertools.cycle(form.tokens):
        calls.append(torch.arange(start, start + tokens) % len(rows))
        start += tokens
        if len(calls) >= len(form.tokens) and (start >= min(total, len(rows)) or not any(form.tokens)):
            return [rows[index] for index in calls]
    raise AssertionError("a cycle has no end")


class _Counted:
    """A backend, and how many graphs it was given."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.graphs = backend, 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        self.graphs += 1
        return (lookup_backend(self.backend) if isinstance(self.backend, str) else self.backend)(graph, inputs)


def _traced(form: Form) -> bool:
    """Whether the passes get the graph without Dynamo, in a third of the time: where nothing needs Dynamo."""
    return form.seed % 4 > 0 and not form.dynamic and all(block.style != "interface" for block in form.blocks)


def _through_passes(model: Any, hidden_TH: Tensor) -> Any:
    """The model's graph for hidden [T, H] floating after the passes, as a function of such tensors."""
    names, values = zip(*model.named_parameters(), strict=True)

    def run(hidden_TH: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (hidden_TH,))

    module = applied(run_passes, trace(run, hidden_TH, *values))
    return lambda hidden_TH: module(hidden_TH, *values)


def _problems(outputs: dict[str, list[tuple[Tensor, ...]]]) -> Iterator[tuple[str, bool]]:
    """What differs, output by output: ids and offsets at all, values by their error; and whether it may be chance."""
    for index in range(len(outputs["eager"][0])):
        ours, eager, oracle = ([call[index] for call in outputs[name]] for name in ("ours", "eager", "oracle"))
        if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in eager]:
            yield f"output {index}: {ours[0].dtype} {ours[0].shape}, eager {eager[0].dtype} {eager[0].shape}", False
        elif not ours[0].is_floating_point():
            if not all(map(torch.equal, ours, eager)):
                yield f"output {index}: other integers", False
        elif (ratio := error_ratio(ours, eager, oracle=oracle)).problem:
            few = ours[0].dtype != torch.float32 and ratio.mean is not None and ratio.mean < 2
            yield f"output {index}: {ratio.problem}", few


def check(form: Form, *, inductor: bool = False) -> Result:
    """Compile the program of a form, by the passes and the interpreter of graphs or all of Inductor, and compare."""
    text = write(form, tuple(tuple(range(tokens)) for tokens in form.tokens))
    with collect() as decisions:
        try:
            problem, calls = _run(form, text, inductor)
            text = write(form, tuple(tuple(rows.tolist()) for rows in calls))
        except Exception as error:  # of any kind: it is what was looked for
            problem = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}"
    return Result(form, problem, text, tuple(decisions))


def _run(form: Form, text: str, inductor: bool) -> tuple[str, list[Tensor]]:
    model, pool_PH = load(text).make()
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    rows = clear_rows(model, double, pool_PH)
    if len(rows) < 18:
        return f"few clear tokens: {len(rows)}", []
    backend = _Counted("inductor" if inductor else backend_with(run_passes))
    if not inductor and _traced(form):
        compiled = _through_passes(model, pool_PH[rows[: form.tokens[0]]])
    else:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=form.dynamic or None)
    found: list[tuple[str, bool]] = []
    for total in (TOKENS, SECOND_LOOK):
        calls = _calls(form, rows, total)
        inputs = [pool_PH[index] for index in calls]
        with torch.no_grad():
            outputs = {name: [f(x) for x in inputs] for name, f in (("ours", compiled), ("eager", model))}
        outputs["oracle"] = [_wide(double, x) for x in inputs]
        found = list(_problems(outputs))
        if backend.graphs > MOST_GRAPHS:
            return f"graphs: {backend.graphs} for {form.tokens} tokens", calls
        if not any(chance for _, chance in found):
            break
    return "; ".join(problem for problem, _ in found), calls[: 2 * len(form.tokens)]
