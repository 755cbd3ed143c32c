"""Time the routed experts of a layer on several GPUs of one host against one GPU with as many tokens as a rank has.

    python -m benchmarks.bench_parallel --out parallel.csv

From hidden states, ids and weights to the weighted sum of the experts, compiled, bf16. Starts its own processes. Ways:
`naive` (exact splits, read on the host), `static` and `sums` (static shapes; results of slots, or a sum a token and
rank, travel back), `parts` (`sums` with chunks=2: a rank's own tokens, whose GEMMs the exchanges go on beside, and the
peers'), `tp-experts` and `tp-width`. Times are medians over rounds, of the slowest rank, in microseconds: of CUDA
graphs, but for `naive`, whose exchange no graph holds. `gain` is the throughput as a multiple of one GPU's; `overlap`
the sum of dispatch, experts and combine, each timed alone (for `parts` those of `sums`), over the whole. `share` is
what of that sum is communication (with the sums of K slots in `combine`, but for tp). `pair` is dispatch and combine in
one CUDA graph without experts, `pair nccl` the same without symmetric memory (`static` alone). What ways have in common
is timed once: dispatch and experts of `static`, `sums` and `parts`. Each way is checked before it is timed: against a
single rank that has the tokens of all, bit by bit, and by the ratio rule on sampled rows; a wrong one stops the run.
`host` is a probe in turns with `naive`, which waits for the host: the median microseconds, on the slowest rank, in
which it issues 64 additions of eight numbers, one by one in eager torch, whatever the layers are.
The most tokens of a rank come first, then the fewest with `static`, then the rest. Stops before a cell that would go
past --seconds, and names what was left out. With --device cpu, over gloo and without compilation, it only shows that it
runs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.parallel_cells import TINY, WAYS, Options, cells, shape_of
from benchmarks.parallel_clock import RankClock
from diffulex.benching.check import exact_rows, spread
from diffulex.benching.inputs import Inputs, draw_logits, route
from diffulex.benching.shapes import SHAPES, Shape
from diffulex.cli.accuracy import error_ratio
from diffulex.distributed import ParallelConfig
from diffulex.distributed.agreement import told_by_ranks
from diffulex.distributed.collectives import sum_of_ranks
from diffulex.moe import EPFusedMoE, MoESpec, NaiveFusedMoE, TPFusedMoE
from lowering.spec import ExpertSpec, RoutingSpec

PARTS = ("dispatch", "experts", "combine")
COLUMNS = (
    *("device", "ranks", "shape", "experts_in_all", "tokens", "way", "one_us", "time_us", "gain"),
    *("dispatch_us", "experts_us", "combine_us", "share", "overlap", "pair_us", "pair_nccl_us"),
    *("host_us", "graph", "host_syncs", "check", "transport"),
)
SHOWN = ("shape", "tokens", "way", "one_us", "time_us", "gain", *(f"{part}_us" for part in PARTS), "share", "overlap")
SHOWN = (*SHOWN, "pair_us", "pair_nccl_us", "host_us", "check")


class Bench(RankClock):
    """One rank's side of the measurement; all ranks make the same calls."""

    def __init__(self, rank: int, options: Options, mesh: DeviceMesh) -> None:
        super().__init__(
            torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu"), mesh.get_group()
        )
        self.rank, self.options, self.mesh = rank, options, mesh
        self._known: dict[tuple[object, ...], Any] = {}

    def once(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """What `make` gave the first time; the ranks ask for the same keys in the same order."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def whole(self, name: str) -> NaiveFusedMoE:
        """The layer of a shape on one GPU, with the same weights on every rank."""

        def make() -> NaiveFusedMoE:
            shape = shape_of(name, self.options)
            experts = ExpertSpec(shape.num_experts, shape.hidden, shape.intermediate, "silu(g) * u")
            spec = MoESpec(shape.hidden, RoutingSpec(shape.top_k), experts)
            torch.manual_seed(0)
            made = NaiveFusedMoE(spec, device=self.device, dtype=torch.bfloat16).eval().requires_grad_(False)
            for parameter in made.parameters():
                parameter.normal_(std=0.02)
            return made

        return self.once(("whole", name), make)  # type: ignore[no-any-return]

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled as one graph for static shapes; as it is on a CPU."""
        if not self.cuda:
            return function
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, dynamic=False)

    def layer(self, way: str, whole: NaiveFusedMoE, tokens: int) -> Any:
        """The layer of a way, with the weights of the whole one."""
        kind = TPFusedMoE if WAYS[way].get("mode") == "tp" else EPFusedMoE
        capacity = {"max_tokens_per_rank": tokens} if WAYS[way].get("dispatcher") == "static" else {}
        parallel = ParallelConfig(self.mesh, **WAYS[way], **capacity)
        made = kind(whole.spec, parallel=parallel, device=self.device, dtype=whole.w13.dtype).eval()
        made.load_full(whole.state_dict())
        return made.requires_grad_(False)


def inputs_of(rank: int, shape: Shape, tokens: int, *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H] bf16, weights [T, K] fp32 and ids [T, K] int64 of a rank, uniformly routed."""
    generator = torch.Generator(device).manual_seed(rank)
    logits_TE = draw_logits("uniform", tokens, shape=shape, generator=generator)
    weights_TK, ids_TK = route(logits_TE, shape.top_k, dtype=torch.float32)
    hidden_TH = torch.randn(tokens, shape.hidden, device=device, generator=generator).bfloat16()
    return hidden_TH, weights_TK, ids_TK


def verdict(found_TH: Tensor, wanted_TH: Tensor, *, whole: NaiveFusedMoE, inputs: tuple[Tensor, ...]) -> str:
    """`bitwise`, or the error as a multiple of eager torch's; raises `RuntimeError` where it breaks the ratio rule.

    found and wanted [T, H] bf16, inputs hidden [T, H], weights [T, K] and ids [T, K].
    """
    index_R = spread(found_TH.shape[0], 64).to(found_TH.device)
    hidden_RH, weights_RK, ids_RK = (tensor[index_R] for tensor in inputs)
    sampled = Inputs(hidden_RH, ids_RK, weights_RK, hidden_RH)
    shim: Any = SimpleNamespace(weights=lambda: whole.expert_weights)
    with torch.no_grad():
        exact, eager = (exact_rows(shim, sampled, source="topk", dtype=d) for d in (torch.float64, found_TH.dtype))
    ratio = error_ratio([found_TH[index_R]], [eager], oracle=[exact])
    if ratio.problem:
        raise RuntimeError(f"wrong result: {ratio.problem}")
    return "bitwise" if torch.equal(found_TH, wanted_TH) else f"{ratio.mean:.2f}x eager"


def parts_of(bench: Bench, layer: Any, inputs: tuple[Tensor, ...], *, cell: tuple[str, int, str]) -> dict[str, float]:
    """Microseconds of each part of a way, and of `pair` where the exchange has static shapes."""
    (name, tokens, way), clock = cell, functools.partial(bench.time, tokens=cell[1])
    if isinstance(layer, TPFusedMoE):
        return _parts_of_tensor_parallel(bench, layer, inputs, tokens=tokens)
    dispatcher, static = layer.dispatcher, layer.parallel.dispatcher == "static"
    shared = (name, tokens, "static" if static else way)  # the same callables

    def dispatch(hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, ...]:
        sent = dispatcher._dispatch(hidden_TH, ids_TK, weights_TK)
        return sent.recv_hidden_states, sent.recv_local_expert_ids, sent.recv_weights

    def experts(rows_RH: Tensor, ids_RK: Tensor) -> Tensor:
        return layer._slots(rows_RH, ids_RK, experts=layer.expert_weights)

    def combine(slots_NH: Tensor) -> Tensor:
        return dispatcher._combine(slots_NH, sent.metadata)

    def pair(hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, slots_NH: Tensor) -> Tensor:
        sent = dispatcher._dispatch(hidden_TH, ids_TK, weights_TK)
        return dispatcher._combine(slots_NH, sent.metadata)

    def of_whole() -> dict[str, float]:
        """What does not depend on what travels back."""
        run = bench.compiled(experts)
        return {
            "experts": clock(run, sent.recv_hidden_states, sent.recv_local_expert_ids, graph=static),
            "dispatch": clock(bench.compiled(dispatch), *inputs, graph=static),
        }

    def of_return() -> dict[str, float]:
        times = {"combine": clock(bench.compiled(combine), slots_NH, graph=static)}
        if not static:
            return times
        times["pair"] = clock(bench.compiled(pair), *inputs, slots_NH)
        if way == "static" and dispatcher.workspace is not None:
            with mock.patch.object(dispatcher, "workspace", None):
                times["pair_nccl"] = clock(bench.compiled(pair), *inputs, slots_NH)
        return times

    with torch.no_grad():
        sent = dispatcher._dispatch(hidden_TH=inputs[0], weights_TK=inputs[1], ids_TK=inputs[2])
        rows = dispatcher._num_slots(sent.metadata)
        slots_NH = torch.randn(rows, inputs[0].shape[1], device=bench.device, dtype=torch.bfloat16)
    times = bench.once(("whole times", *shared), of_whole)
    return times | bench.once(("return", name, tokens, way.replace("parts", "sums")), of_return)  # type: ignore[no-any-return]


def _parts_of_tensor_parallel(
    bench: Bench, layer: TPFusedMoE, inputs: tuple[Tensor, ...], *, tokens: int
) -> dict[str, float]:
    clock, group = functools.partial(bench.time, tokens=tokens), bench.group.group_name
    with mock.patch("diffulex.moe.layer.tp_impl.sum_of_ranks", lambda partial, group: partial):
        times = {"experts": clock(bench.compiled(layer.run_experts), *inputs)}
    sums_TH = torch.randn(inputs[0].shape, device=bench.device)
    return times | {"combine": clock(lambda sums_TH: sum_of_ranks(sums_TH, group).bfloat16(), sums_TH)}


def measure(bench: Bench, cell: tuple[str, int, str]) -> dict[str, object]:
    """The row of a shape, tokens and way: checked, timed, and its parts."""
    name, tokens, way = cell
    shape, whole = shape_of(name, bench.options), bench.whole(name)
    own = inputs_of(bench.rank, shape, tokens, device=bench.device)
    one_us = bench.once(
        ("one", name, tokens), lambda: bench.time(bench.compiled(whole.run_experts), *own, tokens=tokens)
    )
    layer = bench.layer(way, whole, tokens)
    tensor_parallel, static = isinstance(layer, TPFusedMoE), WAYS[way].get("dispatcher") == "static"
    inputs = inputs_of(0, shape, tokens, device=bench.device) if tensor_parallel else own
    function = bench.compiled(layer.run_experts)
    with torch.no_grad():
        found_TH = function(*inputs).clone()
        wanted_TH = bench.once(
            ("wanted", name, tokens, tensor_parallel),
            lambda: _of_one_rank(bench, whole, inputs, everyone=not tensor_parallel),
        )
        check = verdict(found_TH, wanted_TH, whole=whole, inputs=inputs)
        syncs = _host_syncs(function, inputs) if static and bench.cuda else ""
    del wanted_TH, found_TH
    if way == "naive":
        time_us, host_us = bench.beside_host(function, *inputs, tokens=tokens)
    else:
        time_us, host_us = bench.time(function, *inputs, tokens=tokens), None
    parts = parts_of(bench, layer, inputs, cell=cell)
    every = sum(parts.get(part, 0.0) for part in PARTS)
    times = {f"{part}_us": f"{value:.4g}" for part, value in parts.items()}
    return times | {
        "device": _device_name(bench),
        "ranks": bench.options.ranks,
        "shape": name,
        "tokens": tokens,
        "way": way,
        "experts_in_all": shape.num_experts,
        "one_us": f"{one_us:.4g}",
        "time_us": f"{time_us:.4g}",
        "gain": f"{one_us / time_us * (1 if tensor_parallel else bench.options.ranks):.3f}",
        "share": f"{1 - parts['experts'] / every:.3f}",
        "overlap": f"{every / time_us:.3f}",
        "host_us": "" if host_us is None else f"{host_us:.4g}",
        "graph": bench.cuda and way != "naive",
        "host_syncs": syncs,
        "check": "; ".join(sorted(set(told_by_ranks(bench.group, check)))),
        "transport": "all-reduce" if tensor_parallel else layer.dispatcher.transport,
    }


def _of_one_rank(bench: Bench, whole: NaiveFusedMoE, inputs: tuple[Tensor, ...], *, everyone: bool) -> Tensor:
    """What a single rank makes of the tokens of all of them: this rank's part, [T, H] bf16."""
    if not everyone:
        return whole.run_experts(*inputs)
    size, tokens = bench.options.ranks, inputs[0].shape[0]
    gathered = []
    for tensor in inputs:
        parts = [torch.empty_like(tensor) for _ in range(size)]
        distributed.all_gather(parts, tensor, group=bench.group)
        gathered.append(torch.cat(parts))
    function = bench.compiled(whole.run_experts)
    return function(*gathered)[bench.rank * tokens : (bench.rank + 1) * tokens].clone()


def _host_syncs(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> str:
    """`0`, as torch raises where a call waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "0"


def _device_name(bench: Bench) -> str:
    return torch.cuda.get_device_name() if bench.cuda else "cpu"


def run_on_rank(rank: int, options: Options, mesh: DeviceMesh) -> list[dict[str, object]]:
    """All cells, on this rank of an initialised group; the first rank prints and writes them."""
    bench, began, longest, rows, left_out = Bench(rank, options, mesh), time.time(), 0.0, [], []
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    say(f"{options.ranks} x {_device_name(bench)}, torch {torch.__version__}; microseconds")
    say(table([dict(zip(SHOWN, SHOWN, strict=True))]))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(options.out, "w", newline="")) if rank == 0 else None
        writer = csv.DictWriter(file, COLUMNS) if file is not None else None
        if writer is not None:
            writer.writeheader()
        for cell in cells(options):
            started = time.time()
            if told_by_ranks(bench.group, started - began + longest > options.seconds)[0]:
                left_out.append(" ".join(map(str, cell)))
                continue
            row = measure(bench, cell)
            longest = max(longest, time.time() - started)
            rows.append(row)
            say(f"{table([row])}  [{time.time() - started:.0f} s]")
            if writer is not None and file is not None:
                writer.writerow(row)
                file.flush()
    say(f"left out: {', '.join(left_out) or 'nothing'}; {time.time() - began:.0f} s")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The columns that are shown, a line for each row."""
    return "\n".join(" ".join(f"{row.get(column, '')!s:>12}" for column in SHOWN) for row in rows)


def _spawned(rank: int, options: Options, store: str) -> None:
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=options.ranks
    )
    run_on_rank(rank, options, init_device_mesh(options.device, (options.ranks,)))
    distributed.destroy_process_group()


def main() -> None:
    """Parse arguments and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen3", "dsv3"], choices=[*SHAPES, *TINY])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 64, 1024])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--experts", type=int, help="experts of the dsv3 shape, 64 if not given")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", default="parallel.csv")
    given = vars(parser.parse_args())
    options = Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_spawned, (options, str(Path(folder) / "store")), nprocs=options.ranks)


if __name__ == "__main__":
    main()
