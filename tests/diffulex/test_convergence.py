"""Small stock models learn the bundled text as they do in eager mode: the losses of 20 steps, and whom tokens go to."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffulex  # noqa: F401  captures the layers
from diffulex.cli import text
from lowering.graph.pipeline import run_passes
from tests.diffulex.test_families import fp64_copy
from tests.support.graphs import backend_with, calls
from tests.support.models import FAMILIES, ModelSizes, build_model
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
STEPS, LENGTH = 20, 24
SIZES = ModelSizes(vocab=text.VOCAB_SIZE)


class Choices(TorchDispatchMode):
    """The experts of each token, ascending, of every stock router that is run inside the block."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default and args[0].dim() == 2 and args[0].shape[1] == SIZES.experts:
            self.found.append(out[1].sort(1).values)
        return out


class Routes:
    """A backend that runs the passes, and the experts of each token of every `moe_route` that has run: `.found`."""

    def __init__(self):
        self.found = []
        self.backend = backend_with(run_passes, before_run=self._watch)

    def _route(self, *args):
        out = torch.ops.diffulex.moe_route.default(*args)
        self.found.append(out[1].long().sort(1).values)
        return out

    def _watch(self, module, inputs):
        for node in calls(module.graph, torch.ops.diffulex.moe_route.default):
            node.target = self._route
        module.recompile()


def batches():
    ids_N, generator = text.load_ids(), torch.Generator().manual_seed(0)
    return [text.batch(ids_N, rows=1, length=LENGTH, generator=generator) for _ in range(STEPS)]


def losses(model, call, before=lambda ids: None):
    """The loss [1] of each step of gradient descent, before it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for ids in batches():
        before(ids)
        logits = call(input_ids=ids, use_cache=False).logits  # transformers' own loss is in fp32 whatever they are
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps(family, record_property):
    eager = build_model(family, SIZES).train()
    exact, ours = fp64_copy(eager), copy.deepcopy(eager)
    routes, stock = Routes(), []
    compiled = torch.compile(ours, backend=routes.backend, fullgraph=True)

    def choose(ids):
        """With the parameters that the step has, which the compiled model is about to run with."""
        with torch.no_grad(), Choices() as choices:
            ours(input_ids=ids, use_cache=False)
        stock.extend(choices.found)

    found, wanted, oracle = losses(ours, compiled, choose), losses(eager, eager), losses(exact, exact)
    errors = [(losses.double() - oracle).abs().mean().item() for losses in (found, wanted)]
    record_property("error_of_losses_over_eagers", round(errors[0] / errors[1], 2))
    assert_oracle_ratio(found, wanted, oracle, what="losses")
    assert wanted[-5:].mean() < wanted[:5].mean(), "it learns"
    assert len(routes.found) == len(stock) == STEPS * SIZES.layers
    assert all(torch.equal(ids, others) for ids, others in zip(routes.found, stock, strict=True))
