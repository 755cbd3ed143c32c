"""Finding the files of a checkpoint, and what is said of those that cannot be read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from diffulex.checkpoint import CheckpointReader, MoECheckpointError
from tests.support.catalogue import raises_catalogue

A, B = torch.arange(24.0).view(4, 3, 2), torch.tensor(7, dtype=torch.int64)


def _index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _read_all(path):
    with CheckpointReader(path) as reader:
        return {name: reader.read(name).clone() for name in reader.files}


@pytest.mark.parametrize("how", ["file", "folder", "index file", "folder with index", "folder of shards"])
def test_the_same_tensors_from_wherever_they_are(how, tmp_path):
    if how in ("file", "folder"):
        save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
        found = _read_all(tmp_path / "model.safetensors" if how == "file" else tmp_path)
    else:
        save_file({"a": A}, tmp_path / "x.safetensors")
        save_file({"b": B}, tmp_path / "y.safetensors")
        if "index" in how:
            _index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
        found = _read_all(tmp_path / "model.safetensors.index.json" if how == "index file" else tmp_path)
    assert found.keys() == {"a", "b"}
    assert torch.equal(found["a"], A) and torch.equal(found["b"], B)


def test_a_single_file_goes_before_an_index(tmp_path):
    """As in transformers: an index beside it was left by something else."""
    save_file({"a": A}, tmp_path / "model.safetensors")
    _index(tmp_path, {"b": "model.safetensors"})
    assert _read_all(tmp_path).keys() == {"a"}


@pytest.mark.parametrize("window", [0, 1 << 30], ids=["anew each time", "kept open"])
def test_rows_and_facts(window, tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path, window=window) as reader:
        assert reader.info("a") == ((4, 3, 2), "F32") and reader.info("b") == ((), "I64")
        for start in range(4):
            assert torch.equal(reader.read("a", start=start, stop=start + 1), A[start : start + 1])
        assert torch.equal(reader.read("a", start=1, stop=3), A[1:3])
        assert reader.read("a", start=2, stop=2).shape == (0, 3, 2)


def test_a_file_is_opened_anew_after_a_window(tmp_path, monkeypatch):
    import safetensors

    opened = []
    original = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *args, **kw: opened.append(1) or original(*args, **kw))
    save_file({"a": A}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path, window=2 * A[0].nbytes) as reader:
        opened.clear()
        for start in range(4):
            reader.read("a", start=start, stop=start + 1)
    assert len(opened) == 2


def _refused(path, *, got):
    with raises_catalogue(MoECheckpointError, where=str(path), got=got):
        _read_all(path)


def test_no_such_file(tmp_path):
    _refused(tmp_path / "nowhere", got="no such file")
    _refused(tmp_path, got="no .safetensors file in the folder")


def test_a_pickled_checkpoint(tmp_path):
    torch.save({"a": A}, tmp_path / "pytorch_model.bin")
    _refused(tmp_path, got="no .safetensors file")


def test_a_file_that_is_cut_off(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": A}, file)
    file.write_bytes(file.read_bytes()[:-8])
    _refused(file, got="")
    file.write_bytes(b"")
    _refused(file, got="")


NO_INDEX = ["{", "[]", '{"metadata": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 7}}', '{"weight_map": null}']


@pytest.mark.parametrize("text", [*NO_INDEX, "[" * 100_000, '{"weight_map": {"a": null}}'])
def test_an_index_that_is_none(text, tmp_path):
    save_file({"a": A}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(MoECheckpointError, match="an index without a weight_map"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("where", ["../outside.safetensors", "a/../../outside.safetensors", "/{}/outside.safetensors"])
def test_shards_outside_of_the_folder_are_not_opened(where, tmp_path):
    save_file({"a": A}, tmp_path / "outside.safetensors")
    (folder := tmp_path / "checkpoint").mkdir()
    _index(folder, {"a": where.format(tmp_path)})
    with pytest.raises(MoECheckpointError, match="shards outside of its folder"):
        CheckpointReader(folder / "model.safetensors.index.json")


def test_shards_in_a_folder_below_and_links_to_elsewhere(tmp_path):
    """As caches of downloads have them."""
    save_file({"a": A}, tmp_path / "blob")
    (folder := tmp_path / "checkpoint" / "parts").mkdir(parents=True)
    (folder / "x.safetensors").symlink_to(tmp_path / "blob")
    _index(folder.parent, {"a": "parts/x.safetensors"})
    with CheckpointReader(folder.parent / "model.safetensors.index.json") as reader:
        assert torch.equal(reader.read("a"), A)


def test_shards_that_are_not_there(tmp_path):
    save_file({"a": A}, tmp_path / "x.safetensors")
    _index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors", "c": "z.safetensors"})
    with pytest.raises(MoECheckpointError, match=r"no y\.safetensors, z\.safetensors beside it \(2 of 3\)"):
        CheckpointReader(tmp_path)


def test_an_index_that_promises_more_than_a_shard_holds(tmp_path):
    save_file({"a": A}, tmp_path / "x.safetensors")
    _index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    with CheckpointReader(tmp_path) as reader:
        with pytest.raises(MoECheckpointError, match="no b, which the index says it holds"):
            reader.info("a")
