"""What the ranks of a test run: a layer over several ranks on the tokens given to each, with gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import signal
import time
import weakref
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from diffulex.distributed import ExpertLoad, ParallelConfig, slots
from diffulex.moe import EPFusedMoE, MoESpec, NaiveFusedMoE, TPFusedMoE, expert_parameter_names
from diffulex.moe.dispatcher import static_dispatcher
from lowering.errors import MoEUnsupportedError
from lowering.state import batch_invariant
from tests.support.moe_layers import make_layer
from tests.support.shared_memory import workspace_of_processes


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and how its experts are spread; `tokens[r]` is for rank r ("tp": the first count for all)."""

    spec: MoESpec
    tokens: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    impl: str = "triton"
    memory: bool = False  # "static" through memory that the processes share

    @property
    def mode(self) -> str:
        """ "ep" or "tp"."""
        return dict(self.options).get("mode", "ep")

    def whole_layer(self) -> NaiveFusedMoE:
        """The layer on one rank."""
        return make_layer(self.spec, self.impl, seed=self.seed, dtype=self.dtype)

    def all_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, H] and weights [T, K] in it or fp32, ids [T, K] with some that are no expert; T of all ranks."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        total, top_k = sum(self.tokens), self.spec.routing.top_k
        inner = self.spec.experts.hidden_size
        hidden_TH = torch.randn(total, inner, generator=generator).to(self.dtype)
        weights_TK = torch.rand(total, top_k, generator=generator)
        weights_TK = weights_TK.to(torch.promote_types(self.dtype, torch.float32))
        ids_TK = torch.randint(-1, self.spec.experts.num_experts + 1, (total, top_k), generator=generator)
        return hidden_TH, weights_TK, ids_TK

    def part(self, tensor: Tensor, rank: int) -> Tensor:
        """The rows of one rank; all of them under "tp"."""
        if self.mode == "tp":
            return tensor
        start = sum(self.tokens[:rank])
        return tensor[start : start + self.tokens[rank]]


@functools.cache
def mesh_of(size: int, replicas: int = 1) -> DeviceMesh:
    """Experts over `size` ranks, the rest replicas."""
    return init_device_mesh("cpu", (replicas, size), mesh_dim_names=("dp", "ep"))


def make_sharded(case: Case, size: int, replicas: int = 1) -> Any:
    """This rank's part of the layer, with the weights of the whole one."""
    kind = EPFusedMoE if case.mode == "ep" else TPFusedMoE
    parallel = ParallelConfig(mesh_of(size, replicas), dim="ep", **dict(case.options))
    spec = dataclasses.replace(case.spec, moe_gemm_impl=case.impl)
    chunks = dict(case.options).get("chunks", 1)
    shared = functools.partial(workspace_of_processes, of_call=1 + chunks)
    sharing = mock.patch.object(static_dispatcher, "workspace_for", shared)
    with sharing if case.memory else contextlib.nullcontext():
        layer = kind(spec, parallel=parallel, dtype=case.dtype).eval()
    if case.memory:
        assert set(layer.dispatcher.refusals.values()) == {None}
    layer.load_full(case.whole_layer().state_dict())
    return layer


def expert_results(layer: Any, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the routed experts."""
    hidden_TH, weights_TK = (t.detach().clone().requires_grad_() for t in (hidden_TH, weights_TK))
    out_TH = layer.run_experts(hidden_TH, weights_TK, ids_TK)
    leaves = {"hidden": hidden_TH, "weights": weights_TK}
    leaves |= {n: p for n in ("w13", "w2", "b13", "b2") if (p := getattr(layer, n)) is not None}
    grads = torch.autograd.grad(out_TH, list(leaves.values()), loss_gradient(out_TH, hidden_TH), allow_unused=True)
    named = zip(leaves.items(), grads, strict=True)
    return {"out": out_TH.detach()} | {n: torch.zeros_like(t) if g is None else g for (n, t), g in named}


def second_gradients(layer: Any, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> dict[str, Tensor]:
    """Gradients of a penalty on gradients of the routed experts."""
    hidden_TH, weights_TK = (t.detach().clone().requires_grad_() for t in (hidden_TH, weights_TK))
    out_TH = layer.run_experts(hidden_TH, weights_TK, ids_TK)
    leaves = {"hidden": hidden_TH, "weights": weights_TK, "w13": layer.w13, "w2": layer.w2}
    first = torch.autograd.grad(
        out_TH, [hidden_TH, weights_TK], loss_gradient(out_TH, hidden_TH), create_graph=True, materialize_grads=True
    )
    penalty = torch.stack([grad.square().sum() for grad in first]).sum()
    return dict(zip(leaves, torch.autograd.grad(penalty, list(leaves.values())), strict=True))


def loss_gradient(out_TH: Tensor, hidden_TH: Tensor) -> Tensor:
    """A gradient [T, H] that goes with the token, whichever rank it is on."""
    return (hidden_TH.detach().double() * 1.7).sin().to(out_TH.dtype)


def run_experts(rank: int, case: Case, size: int, replicas: int = 1) -> dict[str, Tensor]:
    """Output and gradients of the routed experts on this rank."""
    layer = make_sharded(case, size, replicas)
    parts = [case.part(tensor, rank % size) for tensor in case.all_inputs()]
    return expert_results(layer, *parts)


def run_on_first_expert(rank: int, case: Case, size: int) -> dict[str, Tensor | None]:
    """Output and what `backward` leaves in every leaf on this rank, for slots that are all the first expert's."""
    layer = make_sharded(case, size)
    return first_expert_results(layer, *(case.part(tensor, rank) for tensor in case.all_inputs()[:2]))


def first_expert_results(layer: Any, hidden_TH: Tensor, weights_TK: Tensor) -> dict[str, Tensor | None]:
    """Output of the routed experts and gradients, None where there is none, for slots of the first expert alone."""
    hidden_TH, weights_TK = (t.detach().clone().requires_grad_() for t in (hidden_TH, weights_TK))
    out_TH = layer.run_experts(hidden_TH, weights_TK, torch.zeros(weights_TK.shape, dtype=torch.int64))
    out_TH.backward(loss_gradient(out_TH, hidden_TH))
    leaves = {"hidden": hidden_TH, "weights": weights_TK}
    leaves |= {n: p for n in ("w13", "w2", "b13", "b2") if (p := getattr(layer, n)) is not None}
    return {"out": out_TH.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def run_trained(rank: int, case: Case, size: int, trained: tuple[str, ...]) -> tuple[str, Tensor | None]:
    """The error of a call, "" if none, and the gradient of hidden states, where only these experts' tensors train."""
    layer = make_sharded(case, size)
    hidden_TH, weights_TK, ids_TK = (case.part(tensor, rank) for tensor in case.all_inputs())
    for name in ("w13", "w2", "b13", "b2"):
        getattr(layer, name).requires_grad_(name in trained)
    try:
        out_TH = layer.run_experts(hidden_TH.requires_grad_(), weights_TK, ids_TK)
    except MoEUnsupportedError as error:
        return str(error), None
    return "", torch.autograd.grad(out_TH, hidden_TH, loss_gradient(out_TH, hidden_TH))[0]


def run_twice(rank: int, case: Case, size: int, compiled: bool = False, invariant: bool = False) -> list[Tensor]:
    """Outputs of two calls of the routed experts on this rank, without gradients; the second compiled where asked.

    invariant: a row's result does not depend on the other rows.
    """
    layer = make_sharded(case, size)
    parts = [case.part(tensor, rank % size) for tensor in case.all_inputs()]
    run = layer.run_experts
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), batch_invariant() if invariant else contextlib.nullcontext():
        return [layer.run_experts(*parts), run(*parts)]


def run_second(rank: int, case: Case, size: int) -> dict[str, Tensor]:
    """Gradients of gradients of the routed experts on this rank."""
    return second_gradients(make_sharded(case, size), *(case.part(tensor, rank) for tensor in case.all_inputs()))


def run_layer(rank: int, case: Case, size: int) -> dict[str, Tensor]:
    """Output, logits and gradients of the whole layer on this rank, under its own parameters."""
    layer = make_sharded(case, size)
    total = sum(case.tokens)
    hidden = torch.randn(total, case.spec.hidden_size, generator=torch.Generator().manual_seed(3)).to(case.dtype)
    return layer_results(layer, case.part(hidden, rank))


def layer_results(layer: Any, hidden_TH: Tensor) -> dict[str, Tensor]:
    """Output, logits and gradients of hidden states and parameters."""
    hidden_TH = hidden_TH.detach().clone().requires_grad_()
    out_TH, logits_TC = layer(hidden_TH)
    leaves = {
        "hidden": hidden_TH,
        **{n.removeprefix("_orig_mod."): p for n, p in layer.named_parameters() if p.requires_grad},
    }
    grads = torch.autograd.grad(out_TH, list(leaves.values()), loss_gradient(out_TH, hidden_TH), allow_unused=True)
    named = zip(leaves.items(), grads, strict=True)
    found = {n: torch.zeros_like(t) if g is None else g for (n, t), g in named}
    return {"out": out_TH.detach(), "logits": logits_TC.detach()} | found


def run_training(rank: int, case: Case, size: int, replicas: int) -> dict[str, Tensor]:
    """Output, logits and gradients of the whole layer in training mode, with a seed of the rank's own."""
    layer = make_sharded(case, size, replicas).train()
    torch.manual_seed(rank)
    return layer_results(layer, case.part(case.all_inputs()[0], rank % size))


def run_compiled(
    rank: int,
    case: Case,
    size: int,
    backend: str,
    steps: tuple[tuple[int, ...], ...],
    train: bool,
    dynamic: bool | None = None,
) -> dict[str, Any]:
    """The layer compiled as one graph, over changing numbers of tokens: its graphs, and results beside eager ones."""
    from torch._dynamo.backends.registry import lookup_backend

    torch._dynamo.reset()
    layer, graphs = make_sharded(case, size), []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=counting, dynamic=dynamic)
    results = []
    for seed, counts in enumerate(steps):
        generator = torch.Generator().manual_seed(rank + 10 * seed)
        hidden_TH = torch.randn(counts[rank], case.spec.hidden_size, generator=generator).to(case.dtype)
        with torch.set_grad_enabled(train):
            if train:
                results.append([layer_results(which, hidden_TH) for which in (compiled, layer)])
            else:
                results.append([{"out": which(hidden_TH)[0]} for which in (compiled, layer)])
    stage = layer.dispatcher.stage.name if case.mode == "ep" else None
    return {"graphs": len(graphs), "results": results, "stage": stage}


def run_without_history(rank: int, case: Case, size: int) -> list[list[Tensor | None]]:
    """Gradients of this rank's hidden states and experts: once all ask for them, once only ranks with tokens do."""
    layer, found = make_sharded(case, size), []
    for everywhere in (True, False):
        hidden_TH, *routing = (case.part(tensor, rank).clone() for tensor in case.all_inputs())
        layer.zero_grad()
        for tensor in (hidden_TH, routing[0]):
            tensor.requires_grad_(everywhere or len(hidden_TH) > 0)
        layer.run_experts(hidden_TH, *routing).square().sum().backward()
        found.append([hidden_TH.grad, layer.w13.grad.clone(), layer.w2.grad.clone()])
    return found


def run_data_parallel(rank: int, case: Case, size: int) -> dict[str, Tensor]:
    """Gradients on this rank under DistributedDataParallel, which averages those of ranks and leaves experts out."""
    layer, ddp = make_sharded(case, size), torch.nn.parallel.DistributedDataParallel
    model = torch.nn.Sequential(layer)  # it leaves out no parameter of the outermost module
    ddp._set_params_and_buffers_to_ignore_for_model(model, expert_parameter_names(model))
    model = ddp(model)
    model(case.part(case.all_inputs()[0], rank))[0].square().sum().backward()
    return {name: tensor.grad for name, tensor in layer.named_parameters()}


class Stack(torch.nn.Module):
    """Two layers one behind the other, and beside them the first one once more."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """hidden [T, H] floating to [T, H]."""
        between_TH = hidden_TH + self.first(hidden_TH)[0]
        return between_TH + self.second(between_TH * 0.5)[0] + self.first(hidden_TH.sin())[0]


def run_stack(rank: int, case: Case, size: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Layers compiled by Inductor and trained with numbers of tokens: the exchanges in the order of each graph's code,
    and results beside eager ones."""
    import torch._inductor.graph as inductor_graph

    orders: list[tuple[str, ...]] = []
    keep = staticmethod(lambda code: orders.append(tuple(re.findall(r"= torch\.ops\.diffulex_exchange\.(\w+)", code))))
    no_caches = torch._inductor.config.patch(force_disable_caches=True)  # what they hold is not generated again
    torch._dynamo.reset()
    stack = Stack(make_sharded(case, size), make_sharded(case, size))
    compiled = torch.compile(stack, fullgraph=True)
    hidden_TH = torch.randn(counts[rank], case.spec.hidden_size, generator=torch.Generator().manual_seed(rank))
    results = []
    with mock.patch.object(inductor_graph.GraphLowering, "save_output_code", keep), no_caches:
        for run in (compiled, stack):
            run.zero_grad()
            given = hidden_TH.to(case.dtype).requires_grad_()
            out = run(given)
            out.square().sum().backward()
            grads = {name: tensor.grad.clone() for name, tensor in stack.named_parameters()}
            results.append({"out": out.detach(), "hidden": given.grad} | grads)
    return {"orders": orders, "results": results}


def run_deep(rank: int, depth: int) -> list[int]:
    """How many of the rows that came to this rank are there at each exchange of a compiled chain of them."""
    group, alive, counts = torch.distributed.group.WORLD.group_name, [], []
    stock = slots.exchange_now

    def counting(rows: Tensor, *args: Any, **options: Any) -> Tensor:
        counts.append(sum(found() is not None for found in alive))
        came = stock(rows, *args, **options)
        alive.append(weakref.ref(came))
        return came

    def chain(hidden_TH: Tensor, splits_2R: Tensor) -> Tensor:
        details = hidden_TH[:, :3].int()
        for _ in range(depth):
            rows_RH, _, on_host_2R = slots.send_rows(hidden_TH, details, splits_2R=splits_2R, group=group)
            made_RH = (rows_RH.sin() @ rows_RH.new_ones(32, 32)).relu()
            back_TH = slots.exchange_rows(made_RH, on_host_2R, count=hidden_TH.shape[0], back=True, group=group)
            hidden_TH = hidden_TH + back_TH
        return hidden_TH

    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True)
    with torch.no_grad(), mock.patch.object(slots, "exchange_now", counting):
        compiled(torch.ones(64, 32), torch.full((2, 2), 32))
    return counts


def run_broken(rank: int, case: Case, size: int, steps: int) -> dict[str, Any]:
    """Routed experts of compiled code that breaks its graph, with another routing at each step: the ops of each graph,
    how many graphs there were after each step, and results beside eager ones."""
    torch._dynamo.reset()
    layer, graphs, counts, results = make_sharded(case, size), [], [], []

    def keeping(graph: Any, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(layer.run_experts, backend=keeping)
    for step in range(steps):
        parts = [case.part(tensor, rank) for tensor in dataclasses.replace(case, seed=step).all_inputs()]
        with torch.no_grad():
            results.append((compiled(*parts), layer.run_experts(*parts)))
        counts.append(len(graphs))
    return {"graphs": graphs, "counts": counts, "results": results}


def run_counted(rank: int, case: Case, size: int) -> dict[str, list[int]]:
    """What the router of this rank's layer chose, counted twice, and once more on its own; and of all ranks."""
    layer, load = make_sharded(case, size), ExpertLoad(case.spec.experts.num_experts)
    hidden_TH, group = case.part(case.all_inputs()[0], rank), layer.parallel.group
    watching = load.watch(layer.router)
    for _ in range(2):
        layer(hidden_TH)
    found = {"total": load.snapshot(group), "own": load.snapshot(), "again": load.total(group).tolist()}
    watching.remove()
    layer(hidden_TH)
    found["unwatched"] = load.snapshot()
    load.reset()
    load(layer.route(hidden_TH).ids)
    return found | {"once": load.snapshot()}


def run_checkpoint(rank: int, case: Case, size: int, folder: str) -> dict[str, Tensor]:
    """This rank's parameters after `load_checkpoint`, the names left over, and those after `load_full`."""
    from diffulex.checkpoint import load_checkpoint

    layer = make_sharded(case, size)
    wanted = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 77.0)
    rest = load_checkpoint({0: layer}, folder, model_type="qwen3_moe")
    return {"loaded": layer.state_dict(), "wanted": wanted, "rest": rest, "owned": layer.owned_experts}


def load_state(rank: int, case: Case, size: int, source: int, other: Case) -> tuple[str, bool]:
    """The error of loading the state of a rank into a layer of another case, "" if none, and whether w13 changed."""
    from lowering.errors import MoECheckpointError

    states: list[Any] = [None] * size
    distributed.all_gather_object(states, make_sharded(case, size).state_dict(), group=mesh_of(size).get_group("ep"))
    layer = make_sharded(dataclasses.replace(other, seed=case.seed + 1), size)
    before, message = layer.w13.clone(), ""
    try:
        layer.load_state_dict(states[source])
    except MoECheckpointError as error:
        message = str(error)
    return message, not torch.equal(layer.w13, before)


def store_sharded(rank: int, case: Case, size: int, folder: str) -> dict[str, Tensor]:
    """The whole state, in one process, of a layer that FSDP2 shards over all ranks, after a distributed checkpoint."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    layers = [make_sharded(dataclasses.replace(case, seed=case.seed + more), 1, replicas=size) for more in range(2)]
    for layer in layers:
        fully_shard(layer, mesh=mesh_of(1, size)["dp"])
    checkpoint.save(get_model_state_dict(layers[0]), checkpoint_id=folder)
    state = get_model_state_dict(layers[1])
    checkpoint.load(state, checkpoint_id=folder)
    told = set_model_state_dict(layers[1], state)
    assert not told.missing_keys and not told.unexpected_keys
    return get_model_state_dict(layers[1], options=StateDictOptions(full_state_dict=True))


def make_mismatched(rank: int, cases: tuple[Case, ...]) -> str:
    """The error of a layer that every rank was given another case for."""
    from lowering.errors import MoEErrorMixin

    try:
        make_sharded(cases[rank], len(cases))
    except (ValueError, TypeError, RuntimeError) as error:
        if not isinstance(error, MoEErrorMixin):
            raise
        return f"{type(error).__name__} {error}"
    return "no error"


def lose_a_rank(rank: int, case: Case, size: int, *, how: str, lost: int) -> tuple[str, str, float]:
    """The type and text of the error of a second call, which one rank does not come to, and the seconds until it."""
    parallel = ParallelConfig(init_device_mesh("cpu", (size,)), **dict(case.options))
    layer = (EPFusedMoE if case.mode == "ep" else TPFusedMoE)(case.spec, parallel=parallel, dtype=case.dtype)
    hidden_TH = case.part(case.all_inputs()[0], rank)
    layer(hidden_TH)
    if rank == lost:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    began = time.monotonic()
    try:
        layer(hidden_TH)
    except RuntimeError as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "", "no error", time.monotonic() - began


def lose_a_rank_again(rank: int, case: Case, size: int, *, alone: tuple[int, ...], lost: int) -> str:
    """The error of a call that one rank does not come to, after exchanges failed on some ranks alone and went on."""
    from diffulex.distributed import faults
    from lowering.errors import MoERankError

    layer = make_sharded(case, size)
    hidden_TH = case.part(case.all_inputs()[0], rank)
    if rank in alone:
        with mock.patch.object(faults, "GRACE", 0.2), contextlib.suppress(MoERankError):
            with faults.naming_lost_ranks(layer.parallel.group):
                raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    layer(hidden_TH)
    if rank == lost:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        layer(hidden_TH)
    except MoERankError as error:
        return str(error)
    return "no error"


def make_on_devices(rank: int, case: Case, devices: tuple[str, ...]) -> str:
    """The error of a layer that every rank makes on another device, or the device of its experts."""
    from lowering.errors import MoEParallelError

    parallel = ParallelConfig(mesh_of(len(devices)), dim="ep", **dict(case.options))
    kind = EPFusedMoE if case.mode == "ep" else TPFusedMoE
    try:
        with torch.device(devices[rank]):
            return kind(case.spec, parallel=parallel).w13.device.type
    except MoEParallelError as error:
        return str(error)


def make_fresh(rank: int, case: Case, size: int) -> dict[str, Tensor]:
    """The parameters of a new layer, drawn with a seed of the rank's own."""
    torch.manual_seed(rank)
    parallel = ParallelConfig(mesh_of(size), dim="ep", **dict(case.options))
    layer = (EPFusedMoE if case.mode == "ep" else TPFusedMoE)(case.spec, parallel=parallel)
    return {"text": repr(layer), **layer.state_dict()}


def run_bench(rank: int, options: Any) -> list[dict[str, Any]]:
    """The rows of `benchmarks.bench_parallel` on this rank."""
    from benchmarks.bench_parallel import run_on_rank

    return run_on_rank(rank, options, init_device_mesh("cpu", (options.ranks,)))
