"""The pass in Inductor's slot: beside other passes, with an identity, off when switched off."""

import pytest
import torch._inductor.config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import lowering.graph.pipeline
from lowering.inductor.identity import identity
from lowering.inductor.passes import MoEPasses, install_pass
from lowering.state import batch_invariant, disabled


class Other(CustomGraphPass):
    def __init__(self, name="other", identity=b"1"):
        self.name, self.identity = name, identity

    def __call__(self, graph):
        graph.seen.append(self.name)

    def uuid(self):
        return self.identity


@pytest.fixture
def graph(monkeypatch):
    """An empty graph that notes which passes looked at it."""
    monkeypatch.setattr(lowering.graph.pipeline, "run_passes", lambda graph: graph.seen.append("ours"))
    graph = Graph()
    graph.seen = []
    return graph


@pytest.mark.parametrize("others", [None, Other("a"), [Other("a"), Other("b")], (Other("a"),)])
def test_passes_that_were_there_run_first(graph, others):
    MoEPasses(others)(graph)
    names = (
        [] if others is None else [other.name for other in (others if isinstance(others, list | tuple) else [others])]
    )
    assert graph.seen == [*names, "ours"]


def test_disabled_leaves_the_other_passes(graph):
    with disabled():
        MoEPasses(Other("a"))(graph)
    assert graph.seen == ["a"]


def test_identity_is_that_of_the_package_and_its_switches_and_the_others():
    assert MoEPasses().uuid() == (identity(),)
    assert MoEPasses(Other(identity=b"2")).uuid() == (identity(), b"2")
    assert MoEPasses([Other(identity=b"2"), Other(identity=b"3")]).uuid() == (identity(), b"2", b"3")
    with disabled():
        off = MoEPasses().uuid()
    with batch_invariant():
        invariant = MoEPasses().uuid()
    assert len({off, invariant, MoEPasses().uuid()}) == 3


@pytest.mark.parametrize("other", [lambda graph: None, Other(identity=None)], ids=["function", "no_uuid"])
def test_a_pass_without_an_identity_bypasses_the_cache(other):
    """A key without it would serve code of another version of that pass."""
    assert MoEPasses(other).uuid() is None
    assert MoEPasses([Other(), other]).uuid() is None


@pytest.mark.parametrize("before", [None, Other("a")])
def test_the_pass_is_put_in_front_of_what_stands_there_once(before, graph):
    with inductor_config.patch(joint_custom_pre_pass=before):
        install_pass()
        first = inductor_config.joint_custom_pre_pass
        install_pass()
        assert inductor_config.joint_custom_pre_pass is first
        first(graph)
    assert graph.seen == (["ours"] if before is None else ["a", "ours"])
