"""What docs/threats.md says: strangers' words do not get into generated code, and what is written is the user's alone.

That nothing is unpickled or evaluated is a gate of tests/test_house.py.
"""

import ast
import os
import re
import stat
from pathlib import Path

import pytest
import torch

from lowering.activation import ALIASES
from lowering.errors import MoEOptionError
from lowering.inductor.offline import offline_source
from lowering.inductor.passes import register_lowerings
from lowering.schedule import storage
from lowering.schedule.device import H100
from lowering.schedule.schedule import GemmShape
from lowering.spec import OP_OPTIONS, RoutingSpec
from lowering.templates import eager, standalone
from tests.support.tuned import model_times, tuned_folder
from tests.support.two_layers import Model

ROOT = Path(__file__).resolve().parents[1]
PROOF = "proof_of_concept"
HOSTILE = (
    f"__import__('os').system('{PROOF}')",
    f"g * u\nimport {PROOF}",
    f"g * u; {PROOF}()",
    f"g.{PROOF}",
    f"g[{PROOF}]",
    f"(lambda {PROOF}: g)(u)",
    f"(g, {PROOF} := u)[0]",
    f"[{PROOF} for {PROOF} in g]",
    f"f'{{{PROOF}}}'",
    f"'{PROOF}' * u",
    f"tl.{PROOF}(g)",
    f"{PROOF}(g) * u",
    f"silu(g, {PROOF}=u)",
    f"silu(*{PROOF})",
    f"g if {PROOF} else u",
    "<< act >>",
    "{{def_kernel('A')}}",
    f"{PROOF}\x00",
)


ARGUMENTS = torch.ones(2, 4), torch.ones(3, 4, 4), None, torch.arange(2).int(), torch.tensor([0, 1, 2, 2]).int(), 1


@pytest.mark.parametrize("act", HOSTILE, ids=repr)
def test_an_activation_is_a_formula_or_refused(act):
    """By the op, and before a text is rendered."""
    with pytest.raises(MoEOptionError):
        eager.up_variant(torch.float32, act=act, bias=False).source()
    with pytest.raises(MoEOptionError):
        torch.ops.diffulex.moe_expert_up(*ARGUMENTS, act)


@pytest.mark.parametrize("act", [f"g # {PROOF}", "g\\\n+ 0.0", "( g )"], ids=repr)
def test_what_is_rendered_is_written_anew(act):
    plain = eager.up_variant(torch.float32, act="g + 0.0" if "+" in act else "g", bias=False)
    found = eager.up_variant(torch.float32, act=act, bias=False)
    assert found.source() == plain.source() and found.name == plain.name


@pytest.mark.parametrize("name", [name for name in OP_OPTIONS if isinstance(getattr(RoutingSpec(1), name), str)])
def test_a_routers_words_are_of_a_list(name):
    spec = RoutingSpec(2, **{name: f"{getattr(RoutingSpec(1), name)}\nimport {PROOF}"})
    with pytest.raises(MoEOptionError):
        torch.ops.diffulex.moe_route(torch.ones(3, 4), None, None, *spec.op_args())


@pytest.mark.parametrize("name", [name for name in OP_OPTIONS if isinstance(getattr(RoutingSpec(1), name), float)])
def test_a_routers_numbers_are_numbers(name):
    spec = RoutingSpec(2, **{name: PROOF})
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        torch.ops.diffulex.moe_route(torch.ones(3, 4), None, None, *spec.op_args())


class Named(torch.nn.Module):
    """Modules with a name that would be code if it were pasted."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, Model(breaks=False))
        self.name = name

    def forward(self, *tensors):
        return getattr(self, self.name)(*tensors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")
def test_names_of_modules_are_in_no_code():
    """But in comments of the wrapper, which Inductor writes and `ast` does not see."""
    register_lowerings()
    name = f"x'''\nimport {PROOF}\n\"\"\"\n{PROOF}()\n#{{{{{PROOF}}}}}"
    model = Named(name)
    code = offline_source(model, getattr(model, name).inputs)
    assert code.kernels
    for text in (code.wrapper_source, *(kernel.source for kernel in code.kernels)):
        assert PROOF not in ast.unparse(ast.parse(text))


def test_rendered_kernels_are_named_by_letters_and_digits():
    for act in ALIASES:
        assert re.fullmatch(r"[a-z0-9_]+", eager.up_variant(torch.float32, act=act, bias=True).name)


@pytest.fixture
def permissive():
    """A process that would let everyone write."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("permissive")
def test_what_is_written_is_private_whatever_the_umask(tmp_path, monkeypatch):
    shape, key = GemmShape(8, 256, 128, True), storage.key_of(H100)
    with tuned_folder(tmp_path) as folder:
        assert storage.save(key, {shape: {8: model_times(shape, H100, 8, count=1)}}) is None
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / key.file_name).stat().st_mode) == 0o600
    standalone._folder_of.cache_clear()
    assert stat.S_IMODE(standalone._source_folder().stat().st_mode) == 0o700


def test_the_note_names_what_there_is():
    """Files that it points to, and the functions."""
    text = (ROOT / "docs/threats.md").read_text()
    for path in re.findall(r"`((?:lowering|diffulex|tests)/[\w/]+\.(?:py|md))`", text):
        assert (ROOT / path).is_file(), path
    assert {"safetensors", "JSON", "pickle", "0600", "0700"} <= set(re.findall(r"\w+", text))
