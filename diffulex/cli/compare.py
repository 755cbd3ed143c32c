"""Runs one model three ways on the same inputs: stock eager, stock torch.compile, and torch.compile with diffulex."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowering.report import Decision, collect
from lowering.state import disabled

from . import measure, text
from .accuracy import ErrorRatio, Oracle, error_ratio
from .model import moe_block
from .progress import progress
from .routing import reference

KERNEL_TOKENS = 64
_MOST_INPUTS = 256


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the model."""

    name: str
    compiled: bool
    stock: bool


EAGER = Variant("stock eager", compiled=False, stock=True)
STOCK = Variant("stock compiled", compiled=True, stock=True)
OURS = Variant("diffulex", compiled=True, stock=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """One token count: its inputs, on the model or, where the stock model cannot run it (`refusal`), on one MoE block.

    inputs: token ids [1, T] int64, or hidden states [1, T, H] in the model's dtype.
    """

    tokens: int
    inputs: tuple[Tensor, ...]
    refusal: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """What every variant runs: the cases, and `length` tokens from `prompt` [1, P] int64, chosen greedily."""

    cases: tuple[Case, ...]
    prompt: Tensor
    length: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What one variant did. outputs: logits [1, T, V] or hidden states [1, T, H] of each case, in the model's dtype.

    milliseconds: of one step, for the cases that the model itself runs. first_seconds: the first pass over everything,
    in which the compiler works. kernels: device kernels of one call of a MoE block, None without a CUDA device.
    """

    variant: Variant
    outputs: dict[int, list[Tensor]]
    continuation: list[int]
    counts: measure.DynamoCounts
    first_seconds: float
    milliseconds: dict[int, float]
    kernels: int | None
    decisions: tuple[Decision, ...]


def make_task(model: Any, ids_N: Tensor, *, counts: Sequence[int], compared: int, length: int, prompt: str) -> Task:
    """Inputs of every token count from the text's ids [N] int64; counts the stock model refuses go to one MoE block.

    compared: tokens that errors are averaged over, as several inputs where the count is smaller.
    """
    cases = []
    for tokens in counts:
        many = max(1, min(_MOST_INPUTS, compared // max(tokens, 1)))
        inputs = tuple(ids.to(model.device) for ids in text.stretches(ids_N, count=many, length=tokens))
        refusal = _refusal(model, inputs[0])
        if refusal:
            generator = torch.Generator().manual_seed(tokens)
            hidden = torch.randn(1, tokens, model.config.hidden_size, generator=generator)
            inputs = (hidden.to(model.device, model.dtype),)
        cases.append(Case(tokens, inputs, refusal))
    return Task(tuple(cases), torch.tensor([text.encode(prompt)], device=model.device), length)


def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits [1, T, V], in the model's dtype, of token ids [1, T] int64, without a cache of keys and values."""
    result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def _refusal(model: Any, ids: Tensor) -> str:
    """Why stock eager cannot run these inputs, or nothing."""
    refusal = ""
    try:
        with torch.no_grad():
            logits(model, ids)
    except Exception as error:  # whatever it is, it is what a user of the stock model meets
        refusal = f"{type(error).__name__}: {error}".partition("\n")[0]
    return refusal


@dataclasses.dataclass(frozen=True)
class Reference:
    """Float64 outputs of one case, logits [1, T, V] or hidden states [1, T, H], and per input the tokens [T], bool,
    that are compared.
    """

    outputs: tuple[Tensor, ...]
    compared: tuple[Tensor, ...]


def run_oracle(oracle: Oracle, model: Any, *, task: Task) -> dict[int, Reference]:
    """The reference of each case, by token count."""
    found: dict[int, Reference] = {}
    with disabled(), progress("fp64 oracle", len(task.cases)) as bar:
        for case in task.cases:
            bar.advance(note=f"{case.tokens} tokens")
            pair = (moe_block(model), moe_block(oracle.model)) if case.refusal else (model, oracle.model)
            pairs = [_reference(case, inputs, pair, oracle) for inputs in case.inputs]
            found[case.tokens] = Reference(tuple(out for out, _ in pairs), tuple(clear for _, clear in pairs))
    return found


def _reference(case: Case, inputs: Tensor, pair: tuple[Any, Any], oracle: Oracle) -> tuple[Tensor, Tensor]:
    return reference(
        lambda module, given: _step(case, module, module)(given), inputs, module=pair[0], exact=pair[1], oracle=oracle
    )


def _step(case: Case, model: Any, block: Any) -> Callable[[Tensor], Tensor]:
    return block if case.refusal else functools.partial(logits, model)


def run_variant(variant: Variant, model: Any, *, task: Task) -> Result:
    """Run the task one way. Nothing compiled before is used, so graphs and seconds are those of a first run."""
    measure.reset_dynamo()
    steps = 2 * len(task.cases) + 2
    with _surroundings(variant), collect() as decisions, progress(variant.name, steps) as bar:
        run, block = (torch.compile(part) if variant.compiled else part for part in (model, moe_block(model)))
        started = time.perf_counter()
        outputs: dict[int, list[Tensor]] = {}
        for case in task.cases:
            bar.advance(note=f"{case.tokens} tokens")
            outputs[case.tokens] = [_step(case, run, block)(inputs) for inputs in case.inputs]
        bar.advance(note=f"continuation of {task.length} bytes")
        continuation = continue_greedily(run, task.prompt, length=task.length)
        first_seconds, counts = time.perf_counter() - started, measure.dynamo_counts()
        milliseconds = {}
        for case in task.cases:
            bar.advance(note=f"timing {case.tokens} tokens")
            if not case.refusal:
                milliseconds[case.tokens] = measure.milliseconds(functools.partial(logits, run, case.inputs[0]))
        bar.advance(note="")
    return Result(variant, outputs, continuation, counts, first_seconds, milliseconds, None, tuple(decisions))


def with_kernels(results: Sequence[Result], model: Any) -> list[Result]:
    """The results with their kernels on a CUDA device. After all of them were timed: what has been profiled once
    launches kernels more slowly for good.
    """
    if model.device.type != "cuda":
        return list(results)
    counted = []
    for result in results:
        measure.reset_dynamo()
        with _surroundings(result.variant):
            block = torch.compile(moe_block(model)) if result.variant.compiled else moe_block(model)
            counted.append(dataclasses.replace(result, kernels=_block_kernels(block, model)))
    return counted


@contextlib.contextmanager
def _surroundings(variant: Variant) -> Iterator[None]:
    """Inference with empty compiler caches; stock variants with diffulex switched off."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if variant.stock:
            stack.enter_context(disabled())
        if variant.compiled:
            from torch._inductor.utils import fresh_cache

            stack.enter_context(fresh_cache())
        yield


def _block_kernels(block: Any, model: Any) -> int:
    hidden_STH = torch.randn(1, KERNEL_TOKENS, model.config.hidden_size, device=model.device, dtype=model.dtype)
    return measure.device_kernels(functools.partial(block, hidden_STH))


def continue_greedily(run: Any, prompt: Tensor, *, length: int) -> list[int]:
    """The `length` most likely token ids after `prompt` [1, P] int64, one after the other.

    Every step recomputes the whole prefix: lengths grow by one, which one dynamic graph covers, and no cache of keys
    and values adds graphs of its own to the comparison.
    """
    ids = prompt
    for _ in range(length):
        chosen = logits(run, ids)[:, -1:].argmax(-1)
        ids = torch.cat([ids, chosen], 1)
    return [int(number) for number in ids[0, prompt.shape[1] :].tolist()]


def accuracy(result: Result, eager: Result, *, references: dict[int, Reference]) -> dict[int, ErrorRatio]:
    """The ratio rule for every token count, over the tokens that are compared; there has to be one."""
    ratios: dict[int, ErrorRatio] = {}
    for tokens, outputs in result.outputs.items():
        known = references[tokens]
        if tokens and not any(bool(clear.any()) for clear in known.compared):
            ratios[tokens] = ErrorRatio(None, None, "no token is compared, all routers' choices are within rounding")
            continue
        ours, stock, exact = (
            [output[:, clear] for output, clear in zip(found, known.compared, strict=True)]
            for found in (outputs, eager.outputs[tokens], known.outputs)
        )
        ratios[tokens] = error_ratio(ours, stock, oracle=exact)
    return ratios


def first_difference(result: Result, eager: Result) -> int | None:
    """Position of the first token that differs between two continuations, None where they are the same."""
    pairs = zip(result.continuation, eager.continuation, strict=True)
    return next((position for position, (ours, stock) in enumerate(pairs) if ours != stock), None)


def is_tie(result: Result, eager: Result, *, position: int, task: Task, model: Any, oracle: Oracle) -> bool:
    """Whether the two tokens chosen at `position` are closer in float64 than the errors eager makes there."""
    taken = torch.tensor([eager.continuation[:position]], device=task.prompt.device, dtype=torch.int64)
    ids = torch.cat([task.prompt, taken], 1)
    exact_V = oracle(functools.partial(logits, oracle.model), ids)[0, -1]
    with torch.no_grad(), disabled():
        error = (logits(model, ids)[0, -1].double() - exact_V).abs().max()
    gap = (exact_V[eager.continuation[position]] - exact_V[result.continuation[position]]).abs()
    return bool(gap <= 2 * error)
