"""What is read from Dynamo's counters."""

import torch

from diffulex.cli import measure


def compile_and_call(function, *lengths):
    measure.reset_dynamo()
    compiled = torch.compile(function, backend="eager")
    for length in lengths:
        compiled(torch.ones(length))
    return measure.dynamo_counts()


def test_one_graph_and_its_recompilations_are_counted():
    assert compile_and_call(lambda x: x + 1, 3) == measure.DynamoCounts(1, (), 0)
    assert compile_and_call(lambda x: x + 1, 1, 3, 5, 9) == measure.DynamoCounts(2, (), 1)


def test_breaks_are_counted_with_their_reasons():
    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    counts = compile_and_call(broken, 4)
    assert counts.graphs == 2 and counts.breaks == 1 and counts.recompiles == 0
    assert len(counts.break_reasons) == 1


def test_times_are_medians_of_several_calls():
    calls = []
    assert measure.milliseconds(lambda: calls.append(1)) >= 0
    assert len(calls) == 50
