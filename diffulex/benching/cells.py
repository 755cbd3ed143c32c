"""One cell of the benchmark: a layer at one token count, checked and timed for each peer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowering.errors import Reason, ReasonCode

from .ceilings import Ceilings, Work, dense_products, work_of
from .check import Checker, Verdict
from .inputs import Inputs, count_of_sets, make_inputs
from .layers import Layer
from .peers import Peer, Prepared, Runner
from .timing import capture, round_robin, wall_clock

_DENSE = "dense products"  # its name among what is timed


@dataclasses.dataclass(frozen=True)
class Options:
    """What is the same in all cells: where timing begins ("topk", "logits"), how tokens are routed, the ceilings.

    alone: seconds for which each peer runs by itself before each of its samples, of which there are fewer then (CUDA)
    """

    source: str
    routing: str
    ceilings: Ceilings
    alone: float = 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one peer in one cell: microseconds where it was timed, `skipped` where it was not run, else its verdict."""

    peer: str
    microseconds: float | None = None
    verdict: Verdict | None = None
    skipped: Reason | None = None

    @property
    def outcome(self) -> str:
        """Is "timed", "skipped" or "wrong"."""
        if self.skipped is not None:
            return "skipped"
        return "wrong" if self.verdict is not None and self.verdict.problem else "timed"

    @property
    def detail(self) -> str:
        """Why it has no time, or nothing."""
        return str(self.skipped) if self.skipped is not None else self.verdict.problem if self.verdict else ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Of one layer at one token count: the work of a call, its floor in microseconds, and the peers' results.

    dense: microseconds of the library's products with as many FLOP, timed in turn with the peers; None where bytes
    decide, and on a CPU.
    """

    layer: str
    tokens: int
    work: Work
    floor: float
    results: tuple[Result, ...]
    dense: float | None = None

    def time_of(self, peer: str) -> float | None:
        """Microseconds of a peer, None where it has none."""
        return next((result.microseconds for result in self.results if result.peer == peer), None)


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A CUDA graph, or a call for each input set; and what it runs on, as a graph keeps nothing alive."""

    timed: Any
    kept: tuple[Runner, list[Prepared]]


def measure_cell(layer: Layer, tokens: int, *, peers: Sequence[Peer], options: Options) -> Cell:
    """Check each peer, then time those that are right, all in turn."""
    case, device = layer.case, layer.device
    with torch.no_grad():
        inputs = make_inputs(
            case.shape,
            tokens,
            sets=count_of_sets(tokens),
            routing=options.routing,
            dtype=layer.dtype,
            device=device,
        )
        checker = Checker(layer, inputs, source=options.source)
        prepared = [_prepare(peer, layer, inputs, checker=checker, source=options.source) for peer in peers]
        work = work_of(case.spec, inputs, source=options.source)
        timed = {result.peer: ready.timed for result, ready in prepared if ready is not None}
        if device.type == "cuda" and work.intensity > options.ceilings.matrix_rate / options.ceilings.read_rate:
            products = dense_products(case.spec, inputs[0].ids_TK.numel(), dtype=layer.dtype, device=device)
            timed[_DENSE] = capture(products, [()] * len(inputs))
        turns: dict[str, Any] = {"rounds": 5, "alone": options.alone} if options.alone else {}
        times = round_robin(timed, len(inputs), **turns) if device.type == "cuda" else wall_clock(timed)
    results = [dataclasses.replace(result, microseconds=times.get(result.peer)) for result, _ in prepared]
    return Cell(case.name, tokens, work, work.floor(options.ceilings), tuple(results), dense=times.get(_DENSE))


def _prepare(
    peer: Peer, layer: Layer, inputs: Sequence[Inputs], *, checker: Checker, source: str
) -> tuple[Result, _Ready | None]:
    """The result of a peer but its time, and what is to be timed: nothing where it does not run, or is wrong."""
    on_cuda = layer.device.type == "cuda"
    reason = peer.refuses(layer, inputs[0].hidden_TH.shape[0])
    if reason is not None:
        return Result(peer.name, skipped=reason), None
    try:
        with _fresh_compiler() if on_cuda else contextlib.nullcontext(), peer.state():
            runner = peer.build(layer, source)
            arguments = [runner.prepare(one) for one in inputs]
            verdict = checker(lambda number: runner.run(*arguments[number]))
            result = Result(peer.name, verdict=verdict)
            if verdict.problem:
                return result, None
            timed: Any = capture(runner.run, arguments) if on_cuda else _calls(runner.run, arguments)
            return result, _Ready(timed, (runner, arguments))
    except torch.OutOfMemoryError as error:
        return Result(peer.name, skipped=Reason(ReasonCode.MEMORY, str(error).split(". ")[0])), None


def _calls(run: Callable[..., Tensor], arguments: Sequence[Prepared]) -> list[Callable[[], Tensor]]:
    return [functools.partial(run, *one) for one in arguments]


@contextlib.contextmanager
def _fresh_compiler() -> Iterator[None]:
    """Nothing that Dynamo compiled for another peer counts towards its limits, or is taken for this one's."""
    torch._dynamo.reset()
    yield
