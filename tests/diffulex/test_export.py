"""`torch.export` and AOTInductor on a CPU: the ops are in the program and in the package, and both compute the same."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffulex.families.build import fill_weights
from diffulex.moe import build_mlp_or_moe
from tests.support.exporting import Logits, called_ops, export, package, program_ops
from tests.support.models import FAMILIES, TINY, build_model, family_config, token_ids
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROOT = Path(__file__).resolve().parents[2]
TOKENS = (1, 2, 7, 64)
STAGES = dict.fromkeys(("moe_route", "moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine"), 1)
EXPERTS = {name: 1 for name in STAGES if name != "moe_route"}  # the graph pass finds the router later
LAYER = "build_mlp_or_moe"
# Of one family the whole model: attention of the others would only take g++ time.
PACKAGED = ("qwen3_moe", *(f"{family} block" for family in FAMILIES if family != "qwen3_moe"), LAYER)


class Case:
    """A module of one tensor, its fp64 twin, and inputs for any number of tokens."""

    def __init__(self, name: str) -> None:
        self.dim, self.inputs, self.ops = 1, hidden_states, EXPERTS
        if name == LAYER:
            layer = build_mlp_or_moe(family_config("deepseek_v3")[0], 0, nn.Identity)
            fill_weights(layer)
            self.module, self.ops = First(layer.eval()), STAGES
            self.oracle = copy.deepcopy(self.module).double()
            return
        model = build_model(name.removesuffix(" block"), TINY.__class__(layers=1))
        exact = copy.deepcopy(model).double()
        exact.set_experts_implementation("eager")
        if name.endswith(" block"):
            self.module, self.oracle = (First(one.model.layers[0].mlp) for one in (model, exact))
        else:
            self.module, self.oracle = Logits(model), Logits(exact)
            self.inputs = functools.partial(token_ids, model, 1)

    def program(self, strict: bool = True) -> Any:
        return export(self.module, self.inputs(9), dim=self.dim, strict=strict, most=256)

    def check(self, run: Callable[[Tensor], Tensor], what: str) -> None:
        for tokens in TOKENS:
            given = self.inputs(tokens)
            exact = given.double() if given.is_floating_point() else given
            with torch.no_grad():
                wanted = self.oracle(exact)
                assert_oracle_ratio(run(given), self.module(given), wanted, what=f"{what}, {tokens} tokens")


class First(nn.Module):
    """A layer or block without its router's logits."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_1TH: Tensor) -> Tensor:
        out = self.layer(hidden_1TH)
        return out[0] if isinstance(out, tuple) else out


def hidden_states(tokens: int) -> Tensor:
    return torch.randn(1, tokens, TINY.hidden, generator=torch.Generator().manual_seed(tokens))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> its case, and the program and the package of it as files, made once."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def make(name: str) -> tuple[Case, Path, Path]:
        case = Case(name)
        program = case.program()
        assert program_ops(program) == case.ops
        torch.export.save(program, folder / f"{name}_program.pt2")
        return case, folder / f"{name}_program.pt2", package(program, folder / f"{name}.pt2")

    return make


@pytest.mark.parametrize("name", [*FAMILIES, LAYER])
def test_without_dynamo(name):
    """strict=False: the model's own Python is traced."""
    case = Case(name)
    program = case.program(strict=False)
    assert program_ops(program) == case.ops
    case.check(program.module(), "exported")


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGED)
def test_programs_and_packages_compute_the_same(name, saved):
    case, program, packed = saved(name)
    case.check(torch.export.load(program).module(), "saved and loaded")
    assert called_ops(packed) == STAGES
    case.check(torch._inductor.aoti_load_package(str(packed)), "packaged")


FRESH = """
import json, sys, torch
if sys.argv[1] == "with":
    import diffulex
results = {}
for name, load, path in (
    ("program", lambda path: torch.export.load(path).module(), sys.argv[2]),
    ("package", torch._inductor.aoti_load_package, sys.argv[3]),
):
    try:
        with torch.no_grad():
            results[name] = load(path)(torch.arange(1, 8)[None]).flatten().tolist()
    except RuntimeError as error:
        results[name] = str(error)
print(json.dumps([results, [name for name in ("transformers", "lowering") if name in sys.modules]]))
"""


def in_a_fresh_process(diffulex_too: bool, *files: Path) -> tuple[dict[str, Any], list[str], str]:
    """(name -> values or the error, modules loaded, the log)"""
    code = [sys.executable, "-W", "ignore", "-c", FRESH, "with" if diffulex_too else "without", *map(str, files)]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return *json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_a_fresh_process_needs_the_import_and_nothing_else(saved):
    case, *files = saved("qwen3_moe")
    results, modules, _ = in_a_fresh_process(True, *files)
    with torch.no_grad():
        wanted = case.module(torch.arange(1, 8)[None]).flatten()
    for values in results.values():
        torch.testing.assert_close(torch.tensor(values), wanted)
    assert modules == ["lowering"]


@pytest.mark.slow
def test_without_the_import_torch_says_what_is_missing(saved):
    _, *files = saved("qwen3_moe")
    results, modules, log = in_a_fresh_process(False, *files)
    assert modules == []
    assert "deserializing" in results["program"] and "torch.ops.diffulex.moe_dispatch" in log
    assert "diffulex::moe_route" in results["package"]
