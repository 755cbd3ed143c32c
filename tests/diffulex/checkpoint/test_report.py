"""An error about many tensors: all of them in its attributes, one of each kind in its message."""

from __future__ import annotations

import pytest

from diffulex.checkpoint.report import KINDS, Problems, shortened
from lowering.errors import MoECheckpointError
from tests.support.catalogue import raises_catalogue


def test_names_that_differ_in_numbers_alone_are_told_once():
    names = [f"layers.{i}.mlp.experts.{e}.{w}.weight" for i in range(3) for e in range(4) for w in ("w1", "w2")]
    assert shortened(names) == (
        "layers.0.mlp.experts.0.w1.weight (and 11 like it), layers.0.mlp.experts.0.w2.weight (and 11 like it)"
    )
    assert shortened(["a.1.b"]) == "a.1.b"
    assert shortened([]) == ""


def test_many_kinds_are_cut_off():
    names = [f"x.{chr(97 + i)}" for i in range(KINDS + 3)]
    assert shortened(names).endswith(", and 3 more kinds")


def test_no_problem_no_error():
    Problems().raise_if_any("here", form="v5")


def test_all_names_are_kept():
    names = [f"layers.{i}.x" for i in range(100)]
    with pytest.raises(MoECheckpointError) as caught:
        Problems(names, ["y"], {"z": "[1] instead of [2]"}).raise_if_any("here", form="v5")
    error = caught.value
    assert error.missing == tuple(names) and error.unexpected == ("y",)
    assert error.misshapen == ("z [1] instead of [2]",)
    with raises_catalogue(
        MoECheckpointError, where="checkpoint here", expected="v5 form", got="100 missing: layers.0.x"
    ):
        raise error
