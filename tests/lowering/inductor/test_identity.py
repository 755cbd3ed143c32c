"""The fingerprint changes with every file that decides what is generated, and with nothing else."""

import contextlib
import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import diffulex  # noqa: F401  what it does at import
from lowering.inductor import identity
from lowering.state import batch_invariant, disabled


@pytest.fixture
def fingerprint_of(tmp_path, monkeypatch):
    """A copy of the package, and its fingerprint."""
    copy = tmp_path / "lowering"
    shutil.copytree(identity._ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(identity, "_ROOT", copy)
    return copy, identity.fingerprint.__wrapped__


def files():
    found = [path.relative_to(identity._ROOT).as_posix() for path in sorted(identity._ROOT.rglob("*"))]
    return [path for path in found if path.endswith((".py", ".jinja"))]


def test_a_copy_has_the_fingerprint_of_the_original(fingerprint_of):
    _, fingerprint = fingerprint_of
    assert fingerprint() == identity.fingerprint()
    assert len(fingerprint()) == 64


def test_every_source_of_the_package_counts(fingerprint_of):
    copy, fingerprint = fingerprint_of
    seen = {fingerprint()}
    for name in files():
        path = copy / name
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        seen.add(fingerprint())
        path.write_bytes(before)
    assert len(seen) == len(files()) + 1
    assert {
        "graph/spine_pass.py",
        "inductor/lowerings.py",
        "templates/moe_expert_gemm.jinja",
        "ops/_library.py",
    } <= set(files())


def test_new_gone_and_renamed_files_count(fingerprint_of):
    copy, fingerprint = fingerprint_of
    first = fingerprint()
    (copy / "new.py").write_text("")
    with_new = fingerprint()
    (copy / "new.py").rename(copy / "renamed.py")
    renamed = fingerprint()
    (copy / "renamed.py").unlink()
    (copy / "spec.py").unlink()
    assert len({first, with_new, renamed, fingerprint()}) == 4


def test_what_only_lies_there_does_not_count(fingerprint_of):
    copy, fingerprint = fingerprint_of
    first = fingerprint()
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "spec.cpython-311.pyc").write_bytes(b"x")
    (copy / "notes.md").write_text("x")
    for path in copy.rglob("*.py"):
        path.touch()
    assert fingerprint() == first


def test_the_fingerprint_is_read_once():
    """It stands in every cache key; the files do not change under a running process."""
    assert identity.fingerprint() is identity.fingerprint()


def test_each_side_of_each_switch_has_an_identity_of_its_own():
    seen = []
    for blocks in ((), (disabled,), (batch_invariant,), (disabled, batch_invariant)):
        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block())
            seen.append(identity.identity())
    assert len(set(seen)) == 4
    assert identity.identity() == seen[0]


def test_moving_a_switch_moves_the_tag():
    """In a process where `import diffulex` has put it there."""
    before = torch.compiler.config.cache_key_tag
    assert identity.identity() in before
    with batch_invariant():
        assert identity.identity() in torch.compiler.config.cache_key_tag != before
    assert torch.compiler.config.cache_key_tag == before


def test_the_tag_is_put_right_while_a_graph_is_traced(monkeypatch):
    """Before its key is made: tuned times may have come since."""
    with torch.compiler.config.patch(cache_key_tag=torch.compiler.config.cache_key_tag):
        monkeypatch.setattr(identity.tuned, "mark", lambda: "0123abcd")
        assert "0123abcd" not in torch.compiler.config.cache_key_tag
        with FakeTensorMode():
            ids_TK = torch.zeros(3, 2, dtype=torch.int32)
            torch.ops.diffulex.moe_dispatch(ids_TK, 4)
        assert torch.compiler.config.cache_key_tag.endswith(f"diffulex-{identity.identity()}")
        assert identity.identity().endswith("-0123abcd")


@pytest.mark.parametrize("tag", ["", "mine"])
def test_the_tag_of_the_caches_follows_the_identity(tag):
    with torch.compiler.config.patch(cache_key_tag=tag):
        for _ in range(2):  # what is there already is put right
            identity.tag_caches()
            assert torch.compiler.config.cache_key_tag == f"{tag}{'+' * bool(tag)}diffulex-{identity.identity()}"
        with batch_invariant():
            identity.tag_caches()
            assert torch.compiler.config.cache_key_tag == f"{tag}{'+' * bool(tag)}diffulex-{identity.identity()}"
