"""How programs with specialised warps share the tiles, and their warps what they were told: functions of the kernel's
text, run in Python; and what the host's descriptors describe.
"""

import math
import re
import textwrap
import threading
import time
import types

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lowering.schedule.schedule import Schedule
from lowering.templates import eager
from lowering.templates.descriptors import host_descriptors

GATED = Schedule.specialized(gated=True)


def kernel_text():
    variant = eager.up_variant(torch.bfloat16, act="silu(g) * u", bias=False)
    return variant.scheduled(GATED, depth=64, strides=(256 * 64, 64, 1)).source()


def function_text(name):
    (function,) = re.findall(rf"^def {name}\(.*?(?=^@|^<|\Z)", kernel_text(), flags=re.DOTALL | re.MULTILINE)
    return function.replace(": gl.constexpr", "")


class Places:
    """Addresses of elements of a tensor."""

    def __init__(self, tensor, index=0):
        self.tensor, self.index = tensor, index

    def __add__(self, index):
        return Places(self.tensor, self.index + index)


class Vectors:
    """What the order of tiles needs of Gluon, with tensors for numbers; of many tiles at once."""

    int32 = torch.int32  # of positive numbers, which `//` and `%` divide as the device does
    where, arange = staticmethod(torch.where), staticmethod(lambda begin, end, layout: torch.arange(begin, end).int())
    sum = staticmethod(lambda values, axis: values.sum(axis).int())
    max = staticmethod(lambda values, axis: values.amax(axis))
    associative_scan = staticmethod(lambda values, axis, add: values.cumsum(axis).int())
    minimum = staticmethod(lambda one, other: torch.minimum(torch.as_tensor(one), torch.as_tensor(other)))
    maximum = staticmethod(lambda one, other: torch.maximum(torch.as_tensor(one), torch.as_tensor(other)))
    BlockedLayout = staticmethod(lambda *args: None)

    def __init__(self, programs):
        self.programs = programs

    def num_programs(self, axis):
        return self.programs

    @staticmethod
    def load(places, mask=True, other=0):
        index = torch.where(torch.as_tensor(mask), places.index, 0)
        return torch.where(torch.as_tensor(mask), places.tensor[index], other)


def tiles_in_order(rows_E, *, programs, tiles_n, group_m):
    """(each expert's first row tile, all tiles [4, tiles]: expert, first row, row behind the last, first column)."""
    offsets = Places(torch.tensor([0, *rows_E]).cumsum(0))
    sizes = {"TILES_N": tiles_n, "GROUP_M": group_m, "E_POW2": 64, "NUM_EXPERTS": len(rows_E), "BLOCK_N": 128}
    names = {"gl": Vectors(programs), "EXPERTS": None, "_add": None, **sizes}
    exec(function_text("_row_tiles") + function_text("_place"), names)
    key_E, total = names["_row_tiles"](offsets)
    keys = types.SimpleNamespace(load=lambda layout: key_E[:, None])
    found = names["_place"](torch.arange(int(total) * tiles_n).int(), total, keys, offsets, 4)
    firsts = {int(key) % sizes["E_POW2"]: int(key) // sizes["E_POW2"] for key in key_E if key < 2**31 - 1}
    return firsts, torch.stack([value.expand(int(total) * tiles_n) for value in found])


ROWS = st.one_of(st.just(0), st.integers(1, 192), st.integers(1, 1500), st.just(64), st.just(193))
TILES_N = st.sampled_from([1, 3, 16, 112])


@given(st.lists(ROWS, min_size=1, max_size=40), st.integers(1, 132), TILES_N, st.integers(1, 9))
@example([5_140_000], 132, 1, 8)
@example([1] * 64, 132, 1, 8)
@example([1500] * 33, 132, 1, 8)
@example([64] + [256] * 40 + [192] * 3, 132, 1, 8)
@example([5760] * 63 + [1], 2000, 1, 8)  # two waves of more row tiles than are counted, on no device there is
def test_tiles_cover_all_rows_of_all_experts(rows_E, programs, tiles_n, group_m):
    """Each row and column once; at most 192 rows a tile, and those of an expert by 64 of one another."""
    _, found = tiles_in_order(rows_E, programs=programs, tiles_n=tiles_n, group_m=group_m)
    begin = 0
    for expert, rows in enumerate(rows_E):
        tiles = found[1:, found[0] == expert]
        for column in range(tiles_n) if rows else ():
            start, end = tiles[:2, tiles[2] == 128 * column].sort(dim=1).values
            assert start[0] == begin and end[-1] == begin + rows
            assert torch.equal(start[1:], end[:-1])
            parts = (end - start + 63) // 64
            assert parts.max() <= 3 and parts.max() - parts.min() <= 1
        assert tiles.shape[1] == tiles_n * -(-rows // 192)
        begin += rows


@given(st.lists(ROWS, min_size=1, max_size=40), st.integers(1, 132), TILES_N)
@example([64, 192], 1, 1)
def test_heavy_tiles_come_first_in_the_last_two_waves(rows_E, programs, tiles_n):
    firsts, found = tiles_in_order(rows_E, programs=programs, tiles_n=tiles_n, group_m=8)
    parts = {expert: math.ceil(rows / 64) for expert, rows in enumerate(rows_E) if rows}
    heaviest = {expert: math.ceil(count / math.ceil(count / 3)) for expert, count in parts.items()}
    assert set(firsts) == set(heaviest)
    total, begin, before, behind = found.shape[1] // tiles_n, 0, [], []
    for expert in heaviest:
        (behind if begin >= total - 2 * programs // tiles_n else before).append(expert)
        begin += -(-rows_E[expert] // 192)
    assert sorted(firsts, key=firsts.get) == before + sorted(behind, key=lambda expert: -heaviest[expert])


@pytest.mark.parametrize("others", [1, 15, 16])
@pytest.mark.parametrize("rows", [128, 384, 500, 640, 1600, 1800, 2200])
def test_few_experts_end_with_light_tiles(rows, others):
    """The last row tiles of at most 16 experts go by rows in the last two waves, heavy ones first; two row tiles, and
    those of more experts, by columns.
    """
    programs, tiles_n = 20, 100
    _, found = tiles_in_order([640] * others + [rows], programs=programs, tiles_n=tiles_n, group_m=8)
    groups, size = divmod(math.ceil(rows / 192), 8)
    by_rows = others < 16 and size > 2
    last = size * (2 * programs // size + 1)
    (start, column), sizes = found[1::2, -last:], (size, -1) if by_rows else (-1, size)
    start, column = (value.reshape(sizes) if by_rows else value.reshape(sizes).T for value in (start, column))
    assert torch.equal(start, start[:, :1].expand_as(start)), "a row tile each"
    assert torch.equal(column, column[:1].expand_as(column)), "a column each"
    parts = (found[2] - found[1] + 63) // 64
    assert not by_rows or (parts[-last:].diff() <= 0).all()
    begin = 4 * tiles_n * others
    for column in (found[3, :begin].reshape(-1, 4), found[3, begin : begin + 8 * tiles_n * groups].reshape(-1, 8)):
        assert torch.equal(column, column[:, :1].expand_as(column)), "elsewhere by columns"


class Barrier:
    """An mbarrier: a phase ends when `count` have arrived. Who waits too long fails."""

    def __init__(self, count):
        self.count, self.arrived, self.phases, self.changed = count, 0, 0, threading.Condition()

    def wait(self, phase):
        with self.changed:
            assert self.changed.wait_for(lambda: self.phases % 2 != phase, timeout=2), "nobody arrives"

    def arrive(self):
        with self.changed:
            self.arrived += 1
            if self.arrived == self.count:
                self.arrived, self.phases = 0, self.phases + 1
                self.changed.notify_all()


class Readers(Barrier):
    """An mbarrier at which all have always arrived."""

    def wait(self, phase):
        pass


class Group:
    """What a group of warps needs of Gluon, of one program of several, and notes what it does; `slow` ones take a while
    to read.
    """

    int32, maximum = torch.int32, staticmethod(max)

    def __init__(self, given, *, number=0, programs=1, taken=None, slow=False):
        self.given, self.number, self.programs, self.slow, self.done = given, number, programs, slow, []
        self.steps = 0  # of all tiles
        self.taken = [0] if taken is None else taken

    def program_id(self, axis):
        return self.number

    def num_programs(self, axis):
        return self.programs

    def atomic_add(self, place, value, sem):
        self.done.append(("take", self.steps))
        self.taken[0] += value
        return self.taken[0] - value

    def full(self, shape, value, dtype, layout):
        return value

    def max(self, value, axis):
        return value

    def store(self, tile):
        self.given[0] = tile
        self.done.append(("store", tile))

    def load(self, layout):
        time.sleep(0.002 * self.slow)
        return self.given[0]

    def wait(self, barrier, phase):
        if isinstance(barrier, Barrier):
            barrier.wait(phase)
            self.done.append(("wait", phase))

    def arrive(self, barrier):
        if isinstance(barrier, Barrier):
            barrier.arrive()
            self.done.append(("arrive", barrier))

    def expect(self, barrier, size):
        self.steps += 1
        assert self.steps < 1000, "no tile is taken"

    def ignore(self, *operands):
        pass

    async_copy_global_to_shared = BlockedLayout = ignore


def load_weights(group, told, read, *, tiles, depth):
    """Run the warp with the weights; the tiles that it loads."""
    ring, had = types.SimpleNamespace(index=lambda stage: stage), []
    names = dict.fromkeys(("gl", "mbarrier", "tma"), group)
    names |= {"TILES_N": 1, "WIDTH_N": 128, "BLOCK_K": 64, "NUM_STAGES": 4}
    names["_place"] = lambda tile, *rest: (had.append(tile) or 0, 0, 64, 0)  # expert, rows, column
    exec(function_text("_load_weights"), names)
    names["_load_weights"](None, None, tiles, None, None, ring, ring, ring, group, told, read, depth)
    return had


@given(st.permutations(range(5)), st.integers(0, 20))
def test_programs_take_each_tile_once_and_tell_their_warps(order, tiles):
    """Whoever comes first. What was told is replaced when all have read it, and then nobody waits for a tile."""
    taken, had, told, read = [0], [], Barrier(1), Readers(1)
    for number in order:
        group = Group([None], number=number, programs=len(order), taken=taken)
        had += load_weights(group, told, read, tiles=tiles, depth=128)
        given = [value for step, value in group.done if step == "store"]
        steps = [[("wait", 1 - turn % 2), ("store", tile), ("arrive", told)] for turn, tile in enumerate(given)]
        assert [step for step in group.done if step[0] != "take"] == [step for turn in steps for step in turn]
        assert all(tile < tiles for tile in given[:-1])
        assert (given[-1] if given else number) >= tiles
    assert sorted(had) == list(range(tiles))


@pytest.mark.parametrize(("steps", "before"), [(1, 1), (3, 1), (4, 1), (5, 2), (20, 17)])
def test_a_tile_is_taken_late(steps, before):
    """With the fourth step of weights from the end, so that a program which is behind leaves tiles to the others."""
    group = Group([None])
    load_weights(group, Barrier(1), Readers(1), tiles=2, depth=64 * steps)
    assert [step for what, step in group.done if what == "take"] == [before, steps + before]


@pytest.mark.parametrize("tiles", [0, 1, 2, 3, 20])
@pytest.mark.parametrize("slow", range(4))
def test_all_groups_have_the_tiles_that_one_warp_takes(tiles, slow):
    """With the barriers' counts of the text, whoever is late to read."""
    counts = dict(re.findall(r"mbarrier\.init\((told|read), count=(\d+)\)", kernel_text()))
    told, read = Barrier(int(counts["told"])), Barrier(int(counts["read"]))
    given, had = [None], [[] for _ in range(5)]

    def loads():
        had[4] += load_weights(Group(given), told, read, tiles=tiles, depth=64)

    def reads(number):
        group = Group(given, slow=number == slow)
        names = {"gl": group, "mbarrier": group}
        exec(function_text("_next_tile"), names)
        tile, phase = 0, 0
        while tile < tiles:
            had[number].append(tile)
            tile = names["_next_tile"](group, told, read, phase, 4)
            phase ^= 1

    failed = []

    def tried(function, *args):
        try:
            function(*args)
        except AssertionError as error:
            failed.append(error)

    threads = [threading.Thread(target=tried, args=(reads, number)) for number in range(4)]
    threads.append(threading.Thread(target=tried, args=(loads,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert had == [list(range(tiles))] * 5


def test_groups_wait_for_one_telling_after_the_other():
    for name in ("_load_rows", "_multiply"):
        text = function_text(name)
        assert text.count("    told_phase = 0\n") == 1
        assert re.search(
            r"\n        tile = _next_tile\(given, told, read, told_phase, \S+\)\n        told_phase \^= 1\n", text
        )


@given(st.lists(st.integers(1, 192), min_size=1, max_size=12))
def test_groups_share_the_parts_of_tiles_whatever_their_rows(rows_of_tiles):
    """Each part is one group's, and a tile's first one that of the group which comes behind the last tile's last."""
    (lines,) = re.findall(r"^ +part = .*\n +turn = .*\n", kernel_text(), flags=re.MULTILINE)
    names = [{"PART": part, "turn": 0} for part in range(3)]
    begun = 0
    for rows in rows_of_tiles:
        for group in names:
            exec(textwrap.dedent(lines), group | {"start": 7, "end": 7 + rows}, group)
        assert sorted(group["part"] for group in names) == [0, 1, 2]
        first = next(group["PART"] for group in names if group["part"] == 0)
        assert first == begun % 3
        begun += -(-rows // 64)


@pytest.mark.parametrize("padding", [0, 64])
def test_the_hosts_descriptors(padding):
    """Of each 32 weight rows 0, 1, 8, 9, 16, 17, 24, 25, 2, 3 and so on, whatever lies between rows."""
    num_experts, rows, depth = 2, 64, 128
    numbers = torch.arange(num_experts * rows * (depth + padding), dtype=torch.int16)
    w = numbers.reshape(num_experts, rows, depth + padding)[..., :depth]
    a = numbers[: 10 * (depth + padding)].reshape(10, depth + padding)[:, :depth]
    described = host_descriptors({"A": a, "W": w}, block_k=64, gather=False)
    assert list(host_descriptors({"A": a, "W": w}, block_k=64, gather=True)) == ["W_DESC"]
    found = {name: of.base.as_strided(of.shape, of.strides) for name, of in described.items()}
    order = [2 * two + 8 * eight + one for two in range(4) for eight in range(4) for one in range(2)]
    assert order[:10] == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]
    assert torch.equal(found["W_DESC"].flatten(1, 3), w.reshape(-1, 32, depth)[:, order])
    assert torch.equal(found["A_DESC"], a)
    assert (described["W_DESC"].block_shape, described["A_DESC"].block_shape) == ([4, 4, 4, 2, 64], [64, 64])
