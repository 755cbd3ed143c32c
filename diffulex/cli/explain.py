"""`python -m diffulex explain`: builds a model from its configuration and prints what the compiler does with it."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowering.errors import MoEConfigError, MoEErrorMixin, MoEOptionError, MoERangeError, MoEUnsupportedError

from ..explaining.offline import explain_offline
from ..explanation import Report, explain
from ..families.build import options_of
from .demo import choose_device
from .progress import progress
from .table import format_bytes

_MOST_OF_MEMORY = 0.8  # the rest is for activations, the compiler and everything else


def add_parser(commands: Any) -> None:
    """Add `explain` to the commands."""
    parser = commands.add_parser(
        "explain",
        help="what the compiler does with each MoE layer of a model, and why where it does nothing",
        description="Builds a model with random weights from a configuration, compiles it once and prints "
        "diffulex.explain's report. Nothing is downloaded.",
    )
    option = parser.add_argument
    option("model", metavar="MODEL", help="a directory with a config.json, or a model type of transformers such as "
           "qwen3_moe, which is built small")  # fmt: skip
    option("--tokens", type=int, default=64, metavar="N", help="length of the input (default 64)")
    option("--layers", type=int, metavar="N", help="build only the first N layers")
    option("--json", action="store_true", help="print the report as JSON")
    option("--html", type=Path, metavar="FILE", help="also write the report as one HTML page, with a picture")
    option("--measure", action="store_true", help="profile a few runs and report what each stage took")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "h100"),
        default="auto",
        help="default: cuda where there is one; h100: code is generated for one, no GPU is needed and nothing runs",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report of one model."""
    for option, value in (("--tokens", args.tokens), ("--layers", args.layers)):
        if value is not None and value < 1:
            raise MoERangeError.of(option, expected="at least 1", got=str(value), hint="Give a positive number.")
    if args.html is not None:
        check_writable("--html", args.html)
    report = _report(args)
    print(report.to_json() if args.json else report)
    if args.html is not None:
        args.html.write_text(report.to_html(), encoding="utf-8")
    return 0


def _report(args: argparse.Namespace) -> Report:
    config, absent = load_config(args.model, layers=args.layers), args.device == "h100"
    if absent and args.measure:
        raise MoEOptionError.of(
            "--measure", expected="a device that is there", got="--device h100", hint="Leave one of the two out."
        )
    device = torch.device("meta") if absent else choose_device(args.device)
    model = build_model(config, device)
    on = torch.device("cpu") if absent else device
    ids = torch.randint(1, model.config.get_text_config().vocab_size, (1, args.tokens), device=on)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    with progress("compiling", 1), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dynamo_pgo")  # explain compiles without caches, as it should
        if not absent:
            return explain(model, measure=args.measure, **inputs)
        try:
            return explain_offline(model, **inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise MoEUnsupportedError.of(
                "explain",
                expected="a model that compiles without a graph break",
                got=f"{config.model_type}: {' '.join(str(error).split())[:200]}",
                hint="Other devices tell where it breaks; diffulex.adapt(model) swaps experts that wait for the host.",
            ) from error


def check_writable(option: str, file: Path) -> None:
    """Raise `MoEOptionError` before anything is computed for a file that cannot be written."""
    try:
        with file.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise MoEOptionError.of(
            option, expected="a file that can be written", got=f"{file} ({error.strerror})", hint="Name another one."
        ) from error


def load_config(name: str, *, layers: int | None = None) -> Any:
    """transformers' configuration in a directory, or a small one of a model type; cut to `layers` where given."""
    from transformers import CONFIG_MAPPING, AutoConfig

    folder = Path(name)
    if (folder / "config.json").is_file():
        with _refused("a config.json that transformers reads"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
    elif name in CONFIG_MAPPING:
        with _refused(f"a configuration of {name} that can be made small"):
            config = AutoConfig.for_model(name, **options_of(name, AutoConfig.for_model(name)))
    else:
        raise MoEOptionError.of(
            "explain",
            expected="a directory with a config.json, or a model type of transformers",
            got=repr(name),
            hint="For example `python -m diffulex explain qwen3_moe`.",
        )
    return config if layers is None else _cut(config, layers)


@contextlib.contextmanager
def _refused(expected: str) -> Iterator[None]:
    """Whatever transformers raises in the block becomes the catalogue's error, with the cause attached."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MoEErrorMixin):
            raise
        raise MoEConfigError.of(
            "explain",
            expected=expected,
            got=" ".join(f"{type(error).__name__}: {error}".split())[:200],
            hint="Write a config.json with sizes that fit, and give its directory.",
        ) from error


def _cut(config: Any, layers: int) -> Any:
    """The configuration with fewer layers; lists with an entry a layer are cut too."""
    settings, before = config.to_dict(), config.num_hidden_layers
    cut = {key: value[:layers] for key, value in settings.items() if isinstance(value, list) and len(value) == before}
    return type(config)(**{**settings, **cut, "num_hidden_layers": layers})


def build_model(config: Any, device: torch.device) -> Any:
    """A causal LM in eval mode with random weights: bfloat16 on CUDA and the meta device, float32 on the CPU."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise MoEOptionError.of(
            "explain",
            expected="a causal language model",
            got=f"model type {config.model_type!r}",
            hint="Call diffulex.explain(model, *inputs) from Python for other models.",
        )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with _refused(f"a configuration that {config.model_type} can be built from"):
        with torch.device("meta"):
            weightless = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        if device.type == "meta":
            return weightless
        _check_memory(weightless, device)
        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _check_memory(model: Any, device: torch.device) -> None:
    """Raise `MoEUnsupportedError` where the weights of a model on the meta device do not fit into memory."""
    needed = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    held = memory(device)
    if needed > _MOST_OF_MEMORY * held:
        raise MoEUnsupportedError.of(
            "explain",
            expected=f"weights that fit into {format_bytes(held)} of memory on {device.type}",
            got=format_bytes(needed),
            hint="Use --layers to build only the first layers.",
        )


def memory(device: torch.device) -> int:
    """Bytes of memory of the device, whoever uses them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
