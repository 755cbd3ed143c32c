"""`python -m diffulex env`: versions, device and state, to be sent along with a bug report."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import platform
import sys
from typing import Any

import torch

from lowering.errors import Reason, ReasonCode
from lowering.inductor.identity import fingerprint
from lowering.settings import SETTINGS
from lowering.state import is_enabled

_OLDEST_CAPABILITY = (8, 0)


def add_parser(commands: Any) -> None:
    """Add `env` to the commands."""
    parser = commands.add_parser(
        "env",
        help="versions, device, hooks and caches of this installation",
        description="Prints versions, the device, whether kernels would be generated, what is hooked in, and caches.",
    )
    parser.set_defaults(run=run)


def run(_args: argparse.Namespace) -> int:
    """Print the facts, one a line."""
    facts = [*_versions(), *_device(), *_settings(), *_hooks(), *_caches()]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:{width}}  {value}")
    return 0


def version_of(package: str) -> str:
    """The installed version, without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def summary(device: torch.device) -> str:
    """One line on what runs here."""
    from .. import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (
        f"diffulex {__version__}, torch {torch.__version__}, triton {version_of('triton')}, "
        f"transformers {version_of('transformers')}, {name}"
    )


def generation_refusal() -> Reason | None:
    """Why no Triton kernels would be generated here; None when they would be."""
    if not is_enabled():
        return Reason(ReasonCode.DISABLED)
    if not torch.cuda.is_available():
        return Reason(ReasonCode.NOT_CUDA, "no CUDA device; on the CPU the ops' own kernels run")
    if importlib.util.find_spec("triton") is None:
        return Reason(ReasonCode.NO_TRITON)
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST_CAPABILITY:
        return Reason(ReasonCode.CAPABILITY, f"sm_{capability[0]}{capability[1]}")
    return None


def _versions() -> list[tuple[str, str]]:
    from .. import __version__

    return [
        ("diffulex", f"{__version__}, fingerprint of lowering {fingerprint()[:16]}"),
        ("python", f"{platform.python_version()}, {sys.executable}"),
        ("platform", platform.platform()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        ("triton", version_of("triton")),
        ("transformers", version_of("transformers")),
    ]


def _device() -> list[tuple[str, str]]:
    facts = [("CPU threads", str(torch.get_num_threads()))]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        name = f"{device.name}, sm_{device.major}{device.minor}, {device.multi_processor_count} SMs, {memory:.1f} GiB"
        facts.append((f"cuda:{index}", name))
    if len(facts) == 1:
        facts.append(("CUDA device", "none"))
    refusal = generation_refusal()
    return [*facts, ("generated kernels", "yes" if refusal is None else f"no, {refusal}")]


def _settings() -> list[tuple[str, str]]:
    """Every field of the settings is the environment variable of its name."""
    return [
        (f"DIFFULEX_{field.name.upper()}", f"{getattr(SETTINGS, field.name)} (read at import)")
        for field in dataclasses.fields(SETTINGS)
    ]


def _hooks() -> list[tuple[str, str]]:
    import torch._inductor.compile_fx  # noqa: F401  the pass is put in place when this is loaded
    import torch._inductor.config as inductor_config

    from lowering.inductor.passes import MoEPasses

    installed = isinstance(inductor_config.joint_custom_pre_pass, MoEPasses)
    return [
        ("enabled", "yes" if is_enabled() else "no"),
        ("Inductor pass", "installed" if installed else "not installed, something replaced joint_custom_pre_pass"),
        ("transformers hook", _transformers_hook()),
    ]


def _transformers_hook() -> str:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        return f"not registered, {error}"
    from ..integrations.transformers import NAME

    return f"registered as {NAME!r}" if NAME in ALL_EXPERTS_FUNCTIONS else "not registered"


def _caches() -> list[tuple[str, str]]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    facts = [("Inductor cache", cache_dir())]
    if importlib.util.find_spec("triton") is not None:
        import triton

        facts.append(("Triton cache", str(triton.knobs.cache.dir)))
    return facts
