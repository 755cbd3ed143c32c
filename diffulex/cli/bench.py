"""`python -m diffulex bench`: times the expert stage of MoE layers against peers, each checked before it is timed."""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowering.errors import MoERangeError, MoEUnsupportedError
from lowering.report import microseconds

from ..benching.shapes import CPU_SHAPES, CPU_TOKENS, MORE_SHAPES, SHAPES, TOKENS, Case, case_of_config, case_of_shape
from . import env
from .demo import choose_device
from .explain import check_writable, memory
from .progress import progress
from .table import format_bytes, format_table

if TYPE_CHECKING:
    from ..benching.cells import Cell, Options
    from ..benching.peers import Peer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MOST_OF_MEMORY = 0.8  # the rest is for activations, the compiler and everything else
COLUMNS = (
    *("device", "torch", "dtype", "from", "routing", "alone", "matrix_rate", "read_rate"),
    *("layer", "E", "K", "H", "I", "tokens", "flop", "bytes", "floor_us", "dense_us"),
    *("peer", "outcome", "us", "relative_error", "mean_ratio", "max_ratio", "detail"),
)


def add_parser(commands: Any) -> None:
    """Add `bench` to the commands."""
    parser = commands.add_parser(
        "bench",
        help="time the expert stage of MoE layers against peers, and against what the device could do",
        description="Times the experts of one MoE layer, from ids and weights (or router logits) to the combined "
        "output, for each peer in turn. On CUDA by replays of CUDA graphs over rotated inputs, on a CPU by the wall "
        "clock, which other work disturbs; medians, microseconds. Each peer's output is checked against a wider dtype "
        "before it is timed: exit code 1 when one is wrong. The floor is the longer of arithmetic and bytes at "
        "rates measured ahead of the cells, and told once more after them; dense, where arithmetic is the longer "
        "one on a GPU, the library's products with as many FLOP, timed in turn with the peers.",
    )
    option = parser.add_argument
    option("--shapes", nargs="+", choices=[*SHAPES, *MORE_SHAPES, *CPU_SHAPES], metavar="NAME",
           help=f"layers: {', '.join(SHAPES)} (default on CUDA), {', '.join(CPU_SHAPES)} (on a CPU), "
           f"{', '.join(MORE_SHAPES)}")  # fmt: skip
    option("--config", type=Path, action="append", default=[], metavar="PATH",
           help="the layer of a model's config.json, given as the file or its folder; may be repeated")  # fmt: skip
    option("--tokens", nargs="+", type=int, metavar="T", help=f"default {' '.join(map(str, TOKENS))}; on a CPU "
           f"{' '.join(map(str, CPU_TOKENS))}")  # fmt: skip
    option("--dtype", choices=DTYPES, help="default bf16; on a CPU fp32")
    option("--from", dest="source", choices=("topk", "logits"), default="topk",
           help="logits: softmax, top-k and renormalisation are timed too (default: topk)")  # fmt: skip
    option("--routing", choices=("uniform", "zipf", "one-hot"), default="uniform",
           help="top-k of N(0, 1) logits; experts as popular as 1 / rank; the same experts for all tokens")  # fmt: skip
    option("--peers", nargs="+", metavar="PEER",
           help="these alone; on CUDA diffulex, stock (transformers' grouped_mm under "
           "torch.compile), vllm; on a CPU diffulex, eager, grouped_mm, batched_mm")  # fmt: skip
    option("--alone", type=float, default=0.0, metavar="SECONDS",
           help="on CUDA: replay each peer by itself for so long before each of its samples, 5 in all; at the "
           "power cap it has its own clocks then, not those its neighbours leave (default: 0, 15 samples)")  # fmt: skip
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    option("--out", type=Path, metavar="FILE", help="also write all numbers there, as CSV")
    option("--picture", type=Path, metavar="FILE", help="also draw the roofline there, as SVG")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure all cells; 0 when every peer is right, 1 when one is wrong."""
    device = choose_device(args.device)
    dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    tokens = args.tokens or list(CPU_TOKENS if device.type == "cpu" else TOKENS)
    for count in tokens:
        if count < 1:
            raise MoERangeError.of("--tokens", expected="at least 1", got=str(count), hint="Give positive numbers.")
    if not 0 <= args.alone < float("inf"):
        raise MoERangeError.of(
            "--alone", expected="0 or more seconds", got=str(args.alone), hint="Half a second will do."
        )
    for option, file in (("--out", args.out), ("--picture", args.picture)):
        if file is not None:
            check_writable(option, file)
    cases = _cases(args, device)
    from ..benching.ceilings import measure_ceilings
    from ..benching.cells import Options
    from ..benching.peers import choose

    _check_memory(cases, device=device, dtype=dtype)
    peers, left_out = choose(args.peers, device=device, dtype=dtype)
    print(f"{env.summary(device)}, {torch.get_num_threads()} CPU thread(s)")
    for name, reason in left_out.items():
        print(f"left out: {name}, {reason}")
    with progress("ceilings", 1), torch.no_grad():
        options = Options(args.source, args.routing, measure_ceilings(device, dtype), args.alone)
    alone = f"; {args.alone:g} s alone before each sample" if args.alone else ""
    print(
        f"{_name(dtype)}, from {args.source}, routing {args.routing}{alone}; ceilings: {options.ceilings}", flush=True
    )
    run_facts = _run_facts(device, dtype, options=options)
    cells: list[Cell] = []
    try:
        with _rows(args.out) as write:
            for cell, case in _measure(cases, tokens, peers=peers, options=options, place=(device, dtype)):
                cells.append(cell)
                for row in csv_rows(cell, case):
                    write([*run_facts, *row])
    finally:  # what was measured before an interruption is told, too
        if cells:
            print(report(cells, [peer.name for peer in peers]))
    if args.picture is not None:
        args.picture.write_text(draw(cells, options, title=f"{_device_name(device)}, {_name(dtype)}"), encoding="utf-8")
    with progress("ceilings", 1), torch.no_grad():
        after = measure_ceilings(device, dtype)  # a device that has worked for minutes is slower than a rested one
    print(f"ceilings after the cells: {after}")
    return int(any(result.outcome == "wrong" for cell in cells for result in cell.results))


def _cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    names = args.shapes
    if names is None:
        names = [] if args.config else list(CPU_SHAPES if device.type == "cpu" else SHAPES)
    return [*map(case_of_shape, names), *map(case_of_config, args.config)]


def _check_memory(cases: Sequence[Case], *, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `MoEUnsupportedError` before anything is measured for a layer whose weights do not fit."""
    from ..benching.layers import weight_bytes

    held = memory(device)
    for case in cases:
        needed = weight_bytes(case.spec, dtype)
        if needed > _MOST_OF_MEMORY * held:
            raise MoEUnsupportedError.of(
                f"bench {case.name}",
                expected=f"weights that fit into {format_bytes(held)} of memory on {device.type}",
                got=format_bytes(needed),
                hint="Leave the layer out, or use --dtype bf16.",
            )


def _measure(
    cases: Sequence[Case],
    tokens: Sequence[int],
    *,
    peers: Sequence[Peer],
    options: Options,
    place: tuple[torch.device, torch.dtype],
) -> Iterator[tuple[Cell, Case]]:
    """The cells as they are done; the weights of one layer at a time are held."""
    from ..benching.cells import measure_cell
    from ..benching.layers import build_layer

    device, dtype = place
    with progress("cells", len(cases) * len(tokens), unit="cell") as bar:
        for case in cases:
            layer = build_layer(case, dtype=dtype, device=device)
            for count in tokens:
                yield measure_cell(layer, count, peers=peers, options=options), case
                bar.advance(note=f"{case.name} {count}")
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            del layer


@contextlib.contextmanager
def _rows(file: Path | None) -> Iterator[Any]:
    """What writes a row of the CSV, at once; does nothing without a file."""
    if file is None:
        yield lambda row: None
        return
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)

        def write(row: Sequence[Any]) -> None:
            writer.writerow(row)
            stream.flush()

        write(COLUMNS)
        yield write


def _run_facts(device: torch.device, dtype: torch.dtype, *, options: Options) -> list[str]:
    rates = (f"{rate:.4g}" for rate in (options.ceilings.matrix_rate, options.ceilings.read_rate))
    alone = f"{options.alone:g}"
    return [_device_name(device), torch.__version__, _name(dtype), options.source, options.routing, alone, *rates]


def csv_rows(cell: Cell, case: Case) -> list[list[str]]:
    """The columns of a cell from `layer` on, a row for each peer."""
    shape = case.shape
    sizes = [str(size) for size in (shape.num_experts, shape.top_k, shape.hidden, shape.intermediate)]
    work = [f"{value:.6g}" for value in (cell.work.flop, cell.work.bytes, cell.floor)]
    work.append("" if cell.dense is None else f"{cell.dense:.4g}")
    rows = []
    for result in cell.results:
        verdict = result.verdict
        errors = (verdict.relative, verdict.ratio.mean, verdict.ratio.largest) if verdict else (None, None, None)
        numbers = ["" if value is None else f"{value:.4g}" for value in (result.microseconds, *errors)]
        rows.append([cell.layer, *sizes, str(cell.tokens), *work, result.peer, result.outcome, *numbers, result.detail])
    return rows


def report(cells: Sequence[Cell], peers: Sequence[str]) -> str:
    """The table, and why times are missing in it; ratios are to the first peer, the faster one where they exceed 1."""
    first, others = peers[0], peers[1:]
    header = ["layer", "tokens", "floor", "dense", *peers, *(f"{name}/{first}" for name in others), f"floor/{first}"]
    table, notes = [], []
    for cell in cells:
        times = {result.peer: result.microseconds for result in cell.results}
        row = [cell.layer, str(cell.tokens), _time(cell.floor), _time(cell.dense)]
        row += [_time(result.microseconds) if result.outcome == "timed" else result.outcome for result in cell.results]
        row += [_ratio(value, times[first]) for value in (*(times[name] for name in others), cell.floor)]
        table.append(row)
        notes += [
            f"{cell.layer}, {cell.tokens} tokens, {result.peer}: {result.outcome}, {result.detail}"
            for result in cell.results
            if result.outcome != "timed"
        ]
    return "\n".join([format_table(header, table), *_errors(cells, peers), *notes])


def _errors(cells: Sequence[Cell], peers: Sequence[str]) -> list[str]:
    """The relative error of each peer, as the median over its cells."""
    told = []
    for name in peers:
        verdicts = [result.verdict for cell in cells for result in cell.results if result.peer == name]
        known = [verdict.relative for verdict in verdicts if verdict is not None and not verdict.problem]
        told += [f"{name} {statistics.median(known):.1e}"] if known else []
    return [f"relative errors, medians over the cells: {', '.join(told)}"] if told else []


def _time(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 10000 else f"{value:.0f}"


def _ratio(value: float | None, first: float | None) -> str:
    return "-" if value is None or first is None else f"{value / first:.2f}"


def draw(cells: Sequence[Cell], options: Options, *, title: str) -> str:
    """The roofline picture of all times."""
    from ..benching.picture import Mark, roofline

    marks = []
    for cell in cells:
        for result in cell.results:
            if result.microseconds is not None:
                words = f"{microseconds(result.microseconds)}, floor {microseconds(cell.floor)}"
                rate = 1e6 * cell.work.flop / result.microseconds
                marks.append(Mark(cell.layer, result.peer, cell.tokens, cell.work.intensity, rate, words))
    return roofline(marks, options.ceilings, title=f"{title}, from {options.source}, routing {options.routing}")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)
