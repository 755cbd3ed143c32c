"""Files written piece by piece: what safetensors reads, how shards are cut, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffulex.checkpoint import MoECheckpointError
from diffulex.checkpoint.reader import DTYPES
from diffulex.checkpoint.writer import Entry, bytes_of, write_shards
from lowering.errors import MoEDtypeError, MoEOptionError
from tests.support.catalogue import raises_catalogue


def entry(key, tensor):
    return Entry(key, tuple(tensor.shape), tensor.dtype, lambda: iter([tensor]))


def tensor_of(dtype, *shape):
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_read_back(dtype, tmp_path):
    tensors = {"x": tensor_of(dtype, 3, 2), "none": tensor_of(dtype, 0, 4), "one": tensor_of(dtype)}
    write_shards(tmp_path, [entry(*item) for item in tensors.items()], max_shard_size=1000)
    found = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        bits, expected = (t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(bits, expected), name


def test_tensors_of_many_dtypes_are_aligned_and_marked_as_torch(tmp_path):
    tensors = {f"t{i}": tensor_of(dtype, 3) for i, dtype in enumerate(DTYPES.values())}
    write_shards(tmp_path, [entry(*item) for item in tensors.items()], max_shard_size=1000)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    assert all(facts["data_offsets"][0] % DTYPES[facts["dtype"]].itemsize == 0 for facts in header.values())
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in tensors.items())


def test_pieces_follow_one_another(tmp_path):
    whole = tensor_of(torch.float32, 4, 3)
    strided = tensor_of(torch.float32, 3, 4).t()
    entries = [
        Entry("rows", (4, 3), torch.float32, lambda: iter(whole.split(1))),
        Entry("strided", (4, 3), torch.float32, lambda: iter([strided])),
    ]
    write_shards(tmp_path, entries, max_shard_size=1000)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["rows"], whole) and torch.equal(found["strided"], strided)


def test_shards_are_cut_where_the_next_tensor_would_not_fit(tmp_path):
    sizes = {"a": 10, "b": 10, "c": 30, "d": 5, "e": 15, "f": 1}
    entries = [entry(name, tensor_of(torch.uint8, size)) for name, size in sizes.items()]
    write_shards(tmp_path, entries, max_shard_size=20)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards: dict[str, str] = {}
    for name, file in index["weight_map"].items():
        shards[file] = shards.get(file, "") + name
    assert [shards[file] for file in sorted(shards)] == ["ab", "c", "de", "f"]
    assert sorted(shards) == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file, names in shards.items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert sorted(opened.keys()) == [*names]
    assert {path.name for path in tmp_path.iterdir()} == {*shards, "model.safetensors.index.json"}


def test_a_folder_with_a_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    with raises_catalogue(MoECheckpointError, expected="a folder without a checkpoint", got="model-00001"):
        write_shards(tmp_path, [entry("a", torch.zeros(1))], max_shard_size=10)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path):
    def broken():
        yield torch.zeros(1)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_shards(tmp_path, [Entry("a", (2,), torch.float32, broken)], max_shard_size=10)
    assert not [*tmp_path.iterdir()]


def test_a_dtype_the_format_does_not_have(tmp_path):
    with raises_catalogue(MoEDtypeError, where="checkpoint, a", got="torch.complex64"):
        write_shards(tmp_path, [entry("a", torch.zeros(1, dtype=torch.complex64))], max_shard_size=10)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("size", "count"),
    [(7, 7), ("7", 7), ("7B", 7), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2KiB", 2048), ("1TiB", 1 << 40)],
)
def test_sizes(size, count):
    assert bytes_of(size) == count


@pytest.mark.parametrize("size", [0, -1, "0GB", "GB", "5XB", "5 GBs", ""])
def test_sizes_that_are_none(size):
    with raises_catalogue(MoEOptionError, expected="max_shard_size", got=repr(size)):
        bytes_of(size)
