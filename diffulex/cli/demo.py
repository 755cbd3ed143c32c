"""`python -m diffulex demo`: a Qwen3-MoE model is built, saved, loaded, trained, and run three ways side by side."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowering.errors import MoEDeviceError, MoEOptionError, MoERangeError, Reason

from . import compare, env, measure, offline, report, text, train
from .model import PRESETS, Preset, build_config, build_model, quiet_transformers, save_and_load
from .table import Check, format_bytes

_COUNTS = (0, 1, 2, 7, 64, 129, 512)
_MOST_TOKENS = 4096
_CONTINUATION = 32
_COMPARED_16_BIT = 2048  # the rule leaves 16-bit errors 10 % of room; fewer tokens scatter by more than that
_FOLDER = Path("diffulex-demo")


def add_parser(commands: Any) -> None:
    """Add `demo` to the commands."""
    parser = commands.add_parser(
        "demo",
        help="build, train and compile a small MoE model, and compare it with stock PyTorch",
        description="Builds a Qwen3-MoE causal LM from transformers' classes, saves it, loads it back, trains it on a "
        "bundled text, and compares stock eager, stock torch.compile and diffulex. Exit code 1 when a check fails.",
    )
    option = parser.add_argument
    option("--preset", choices=PRESETS, default="tiny", help="shapes of the model; the large one is meant for GPUs")
    option("--layers", type=int, metavar="N", help="number of layers (default: the preset's)")
    option("--seed", type=int, default=0, metavar="S", help="of weights and training batches (default: 0)")
    option("--train-seconds", type=float, default=20.0, metavar="X", help="0 leaves the weights random (default: 20)")
    option("--tokens", type=int, nargs="+", default=list(_COUNTS), metavar="T", help="input lengths to compare on, in "
           f"this order (default: {' '.join(map(str, _COUNTS))})")  # fmt: skip
    option("--output", type=Path, metavar="DIR", help="keep the untrained checkpoint and the generated source in DIR "
           f"(default: no checkpoint, source in ./{_FOLDER})")  # fmt: skip
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    option("--verbose", action="store_true", help="list all kernels for sm_90, not only those of MoE layers")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when every check holds, 1 when one fails."""
    started = time.perf_counter()
    device, preset = choose_device(args.device), PRESETS[args.preset]
    layers = preset.layers if args.layers is None else args.layers
    check_ranges(layers=layers, tokens=args.tokens, train_seconds=args.train_seconds)
    check_output(args.output)
    quiet_transformers()
    with _threads(preset, device):
        with _folder(args.output) as folder:
            model, loaded = _prepare(args, build_config(preset, layers), device=device, folder=folder)
        checks = [loaded, *_compare(args, model)]
        if device.type == "cpu":
            checks += _offline(args, model.config)
    print("\n== Checks ==")
    print("\n".join(map(str, checks)))
    failed = [check for check in checks if check.problem]
    verdict = f"{len(failed)} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks hold"
    print(f"\n{verdict}, {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0


def choose_device(name: str) -> torch.device:
    """The device for --device; `cuda` is an error where there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise MoEDeviceError.of(
            "--device",
            expected="a CUDA device",
            got="none (torch.cuda.is_available() is False)",
            hint="Use --device cpu, or install a CUDA build of torch.",
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def check_ranges(*, layers: int, tokens: list[int], train_seconds: float) -> None:
    """Raise `MoERangeError` for numbers without a meaning."""
    bad_tokens = [count for count in tokens if not 0 <= count <= _MOST_TOKENS]
    if bad_tokens:
        _refuse("--tokens", f"counts from 0 to {_MOST_TOKENS}", str(bad_tokens[0]))
    if layers < 1:
        _refuse("--layers", "at least 1", str(layers))
    if not 0 <= train_seconds < float("inf"):
        _refuse("--train-seconds", "a number of seconds", str(train_seconds))


def check_output(folder: Path | None) -> None:
    """Make the folder for --output; raise `MoEOptionError` where that cannot be."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoEOptionError.of(
            "--output",
            expected="a directory, there or to be made",
            got=f"{folder} ({error.strerror})",
            hint="Name another one.",
        ) from error


def _refuse(option: str, expected: str, got: str) -> None:
    raise MoERangeError.of(option, expected=expected, got=got, hint="See `python -m diffulex demo --help`.")


@contextlib.contextmanager
def _threads(preset: Preset, device: torch.device) -> Iterator[None]:
    """One thread for a small model on the CPU: its operations are too short to be shared, waiting costs more."""
    before = torch.get_num_threads()
    if device.type == "cpu" and preset.hidden < 512:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    """Where the model is saved."""
    if output is not None:
        yield output / "model"
        return
    with tempfile.TemporaryDirectory(prefix="diffulex-demo-") as folder:
        yield Path(folder) / "model"


def _prepare(args: argparse.Namespace, config: Any, *, device: torch.device, folder: Path) -> tuple[Any, Check]:
    """Build, save, load back and train the model; it comes in the dtype it is compared in."""
    print("== Model ==")
    print(f"{env.summary(device)}, {torch.get_num_threads()} CPU thread(s)")
    model = build_model(config, seed=args.seed, device=device)
    print(report.describe_model(model, args.preset))
    loaded = save_and_load(model, folder)
    del model
    differ = f"{len(loaded.different)} differ" if loaded.different else "all equal"
    print(f"saved and loaded back: {format_bytes(loaded.bytes)} of safetensors, {loaded.tensors} tensors, {differ}")
    ids_N = text.load_ids()
    training = train.train(loaded.model, ids_N, preset=PRESETS[args.preset], seconds=args.train_seconds, seed=args.seed)
    print(f"training (stock, eager, float32) on {text.TITLE}, {ids_N.numel()} bytes: {training}", flush=True)
    check = Check(
        "weights equal after loading", f"{differ}: {', '.join(loaded.different[:3])}" if loaded.different else ""
    )
    return loaded.model.to(torch.float32 if device.type == "cpu" else torch.bfloat16).eval(), check


def _compare(args: argparse.Namespace, model: Any) -> list[Check]:
    """Run the three variants; prints the tables and returns the checks."""
    task = compare.make_task(
        model,
        text.load_ids(),
        counts=list(dict.fromkeys(args.tokens)),
        compared=PRESETS[args.preset].compared if model.dtype == torch.float32 else _COMPARED_16_BIT,
        length=_CONTINUATION,
        prompt=text.PROMPT,
    )
    oracle = compare.Oracle(model)
    references = compare.run_oracle(oracle, model, task=task)
    measure.start_compiler(model.device)
    variants = (compare.EAGER, compare.STOCK, compare.OURS)
    eager, stock, ours = compare.with_kernels([compare.run_variant(v, model, task=task) for v in variants], model)
    comparison = report.Comparison(model, task, (eager, stock, ours), references, oracle)
    print(comparison.text(), flush=True)
    return comparison.checks()


def _offline(args: argparse.Namespace, config: Any) -> list[Check]:
    """Write and compile the Triton source for sm_90; prints the table and returns the check."""
    print("\n== Triton source for sm_90 (H100), made and compiled without one: one layer, bfloat16 ==")
    folder = (args.output or _FOLDER) / "sm_90"
    promise = "the MoE layer is generated Triton on sm_90"
    try:
        facts = offline.compile_offline(config, folder, tokens=max(args.tokens), verbose=args.verbose)
    except Exception as error:  # whatever the compiler raises, the verdict is told
        traceback.print_exc()
        return [Check(promise, f"no source: {offline.first_line(error)}")]
    if isinstance(facts, Reason):
        print(f"skipped, {facts}")
        return []
    print(facts)
    print("registers and spilled bytes are per thread, shared memory per block; wgmma counts instructions in the PTX")
    print(f"written to {folder}/: wrapper.py, and one file per kernel")
    return [Check(promise, "; ".join((*facts.refusals, *facts.failures)))]
