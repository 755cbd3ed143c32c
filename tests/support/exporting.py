"""Models as programs of `torch.export` and as packages of AOTInductor, and what is found in them."""

from __future__ import annotations

import collections
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffulex

# The wrapper's own code is not what is tested, and g++ takes longest for it.
INDUCTOR = {"aot_inductor.compile_wrapper_opt_level": "O0"}


class Logits(nn.Module):
    """A causal LM as a function of its ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


def export(module: nn.Module, example: Tensor, *, dim: int, strict: bool = True, most: int = 4096) -> Any:
    """The program of a module of one tensor, for 1 to `most` tokens along `dim`; skips where stock has none either."""
    shapes = ({dim: torch.export.Dim("tokens", min=1, max=most)},)
    with torch.no_grad():
        try:
            return torch.export.export(module, (example,), dynamic_shapes=shapes, strict=strict)
        except torch._dynamo.exc.UserError as error:
            with diffulex.disabled(), pytest.raises(torch._dynamo.exc.UserError):
                torch.export.export(module, (example,), dynamic_shapes=shapes, strict=strict)
            return pytest.skip(f"without diffulex this torch does not export the model either: {error}")


def program_ops(program: Any) -> dict[str, int]:
    """How often a program calls each of the ops."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return dict(collections.Counter(name.split(".")[1] for name in names if name.startswith("diffulex.")))


def package(program: Any, path: Path) -> Path:
    """The program compiled ahead of time, at `path`, which ends in .pt2."""
    return Path(
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(INDUCTOR))
    )


def called_ops(path: Path) -> dict[str, int]:
    """How often the code in a package calls each of the ops' own kernels."""
    found: collections.Counter[str] = collections.Counter()
    for text in _texts(path, ".wrapper.json"):
        targets = [entry["node"]["target"] for entry in json.loads(text)["nodes"]]
        found.update(target.split("::")[1].split(".")[0] for target in targets if target.startswith("diffulex::"))
    return dict(found)


def source(path: Path) -> str:
    """The C++ text of a package, the names of its Triton kernels included."""
    return "\n".join(_texts(path, ".cpp"))


def _texts(path: Path, suffix: str) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return [archive.read(name).decode() for name in archive.namelist() if name.endswith(suffix)]


class _Keeping(nn.Module):
    """A router whose choice of experts is kept in a list."""

    def __init__(self, router: nn.Module, kept: list[Tensor]) -> None:
        super().__init__()
        self.router, self.kept = router, kept

    def forward(self, *args: Tensor) -> Any:
        out = self.router(*args)
        self.kept.append(out[-1])
        return out


class Routed(nn.Module):
    """A module of one tensor that also returns which experts its one router chose, sorted ids [T, K].

    Near ties fall either way in 16-bit arithmetic: errors are compared where all runs chose alike.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.kept = module, []
        (block,) = (part for part in module.modules() if hasattr(part, "gate") and hasattr(part, "experts"))
        block.gate = _Keeping(block.gate, self.kept)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        out = self.module(inputs)
        return out, self.kept.pop().long().sort(dim=-1).values
