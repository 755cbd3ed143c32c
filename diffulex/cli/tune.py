"""`python -m diffulex tune`: times schedules of a model's expert GEMMs on this GPU, for the plans that follow."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowering.errors import MoEDeviceError, MoEOptionError, MoERangeError
from lowering.schedule.device import H100, DeviceSpec, device_spec

from ..benching.inputs import ROUTINGS
from ..benching.shapes import MORE_SHAPES, SHAPES, TOKENS, Case, case_of, case_of_config, case_of_shape
from . import env
from .explain import check_writable
from .progress import progress
from .table import format_table

if TYPE_CHECKING:
    from ..tuning.cells import Cell
    from ..tuning.measure import Measure
    from ..tuning.search import Result

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SHAPES = {**SHAPES, **MORE_SHAPES}


def add_parser(commands: Any) -> None:
    """Add `tune` to the commands."""
    parser = commands.add_parser(
        "tune",
        help="time schedules of a model's expert GEMMs on this GPU, for the plans that follow",
        description="Times the schedules that the cost model ranks first for each expert GEMM of a layer at some token "
        "counts, next to the planned ones, by CUDA-graph replays in turn over rotated routings. Results are compared "
        "with the planned schedule's before they are timed. The times are kept beside Inductor's caches, and later "
        "plans for the same GEMMs on this kind of device go by them. Exit code 1 when a cell got no times.",
    )
    option = parser.add_argument
    option("models", nargs="*", metavar="MODEL_OR_CONFIG", help="a config.json, the folder that holds one, or a model "
           "type of transformers such as qwen3_moe, in the sizes that it has by default")  # fmt: skip
    option("--shapes", nargs="+", choices=_SHAPES, default=[], metavar="NAME", help=f"layers: {', '.join(_SHAPES)}")
    option("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="T",
           help=f"default {' '.join(map(str, TOKENS))}")  # fmt: skip
    option("--dtype", choices=_DTYPES, default="bf16", help="default bf16; fp16 has the same plans")
    option("--routing", choices=ROUTINGS, default="uniform", help="how tokens choose experts (default uniform)")
    option("--best", type=int, default=24, metavar="N",
           help="schedules a cell, beside the planned ones (default 24); 0: all that could win")  # fmt: skip
    option("--seconds", type=float, default=math.inf, metavar="S",
           help="begin no further cell after so long; default: no limit")  # fmt: skip
    option("--csv", type=Path, metavar="FILE", help="also write all times there")
    option("--no-save", action="store_true", help="keep nothing")
    option("--dry-run", action="store_true", help="list the cells, without a GPU too; nothing is timed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune all cells; 0 when each that there was time for got times and they are kept as asked for, else 1."""
    _check(args)
    from ..tuning.cells import cells_of
    from ..tuning.measure import on_gpu

    cells = cells_of(_cases(args), args.tokens, dtype=_DTYPES[args.dtype])
    if args.dry_run:
        device = device_spec() if torch.cuda.is_available() else H100
        print(f"for {device.name}, nothing is timed\n{dry_run(cells, device, best=args.best)}")
        return 0
    if (refusal := env.generation_refusal()) is not None:
        raise MoEDeviceError.of(
            "tune",
            expected="a CUDA device with generated kernels",
            got=str(refusal),
            hint="Tune on the machine that is to run the model; --dry-run needs no GPU.",
        )
    if args.csv is not None:
        check_writable("--csv", args.csv)
    device = device_spec()
    print(f"{env.summary(torch.device('cuda'))}, {args.dtype}, routing {args.routing}", flush=True)
    with on_gpu(device.shared_memory, routing=args.routing) as measure, torch.no_grad():
        return run_cells(args, cells, device=device, measure=measure)


def run_cells(args: argparse.Namespace, cells: Sequence[Cell], *, device: DeviceSpec, measure: Measure) -> int:
    """As `run`, on a device and with what times there. Each cell is kept at once, for what may end this process."""
    from lowering.schedule import plan, storage

    from ..tuning.search import report, report_after, table_of, tune

    results: list[Result] = []
    key, reason = storage.key_of(device), None
    try:
        with progress("tuning", len(cells), unit="cell") as bar, _csv(args.csv) as write:
            for result in tune(cells, device=device, best=args.best, measure=measure, seconds=args.seconds):
                results.append(result)
                write(result)
                if not args.no_save and reason is None:
                    reason = storage.save(key, table_of([result]))
                bar.advance(note=str(result.cell))
    finally:  # what was timed before an interruption is told, too
        plan.refresh()
        print(report(results, cells[len(results) :]))
        if reason is not None:
            print(f"not saved, {reason}")
        elif not args.no_save:
            print(report_after(results, device))
            print(f"saved for {device.name}: the times of {sum(result.best is not None for result in results)} cells")
    return int(reason is not None or any(result.best is None for result in results))


def dry_run(cells: Sequence[Cell], device: DeviceSpec, *, best: int) -> str:
    """The cells with the number of schedules that would be timed for each, and the planned ones."""
    from ..tuning.cells import NOW, planned, to_time

    rows = [
        (str(cell), str(cell.rows), str(len(to_time(cell, device, best=best))), str(planned(cell, device)[NOW]))
        for cell in cells
    ]
    return format_table(("cell", "rows", "schedules", "planned"), rows)


def _check(args: argparse.Namespace) -> None:
    """Raise the catalogue's error for arguments without a meaning."""
    if not (args.models or args.shapes):
        names = ", ".join(_SHAPES)
        raise MoEOptionError.of("tune", expected=f"a model, or --shapes out of {names}", got="none", hint="Name one.")
    numbers = [("--tokens", count, 1) for count in args.tokens] + [
        ("--best", args.best, 0),
        ("--seconds", args.seconds, 0),
    ]
    for option, number, least in numbers:
        if not number >= least:
            raise MoERangeError.of(option, expected=f"at least {least}", got=str(number), hint="Give another number.")


def _cases(args: argparse.Namespace) -> list[Case]:
    return [*map(case_of_shape, args.shapes), *map(_case_of_model, args.models)]


def _case_of_model(name: str) -> Case:
    """The experts of a config.json, or those that a model type of transformers has by default."""
    if Path(name).exists():
        return case_of_config(Path(name))
    from transformers import CONFIG_MAPPING, AutoConfig

    if name not in CONFIG_MAPPING:
        raise MoEOptionError.of(
            "tune",
            expected="a config.json, the folder that holds one, or a model type of transformers",
            got=repr(name),
            hint="For example `python -m diffulex tune qwen3_moe`.",
        )
    return case_of(AutoConfig.for_model(name), name=name)


@contextlib.contextmanager
def _csv(file: Path | None) -> Iterator[Callable[[Result], None]]:
    if file is None:
        yield lambda result: None
        return
    from ..tuning.search import writer_of

    with file.open("w", newline="", encoding="utf-8") as stream:
        yield writer_of(stream)
