"""How programs with specialised warps share the tiles, and their warps what they were told: functions of the kernel's
text, run in Python; and what the host's descriptors describe.
"""

import itertools
import math
import re
import textwrap
import threading
import time
import types
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lowering.schedule.schedule import MOST_PIECES, Schedule
from lowering.templates import eager
from lowering.templates.descriptors import host_descriptors


def kernel_text(*, split_k=False, stage="up"):
    up = eager.up_variant(torch.bfloat16, act="silu(g) * u", bias=False)
    variant = up if stage == "up" else eager.down_variant(torch.bfloat16, bias=False)
    schedule = Schedule.specialized(gated=stage == "up", split_k=split_k)
    return variant.scheduled(schedule, depth=64, strides=(256 * 64, 64, 1)).source()


def function_text(name, **kind):
    text = kernel_text(**kind)
    (function,) = re.findall(rf"^def {name}\(.*?(?=^@|^<|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return function.replace(": gl.constexpr", "")


class Places:
    """Addresses of elements of a tensor."""

    def __init__(self, tensor, index=0):
        self.tensor, self.index = tensor, index

    def __add__(self, index):
        return type(self)(self.tensor, self.index + index)


class Vectors:
    """What the order of tiles needs of Gluon, with tensors for numbers; of many tiles at once."""

    int32 = torch.int32  # of positive numbers, which `//` and `%` divide as the device does
    where, arange = staticmethod(torch.where), staticmethod(lambda begin, end, layout: torch.arange(begin, end).int())
    sum = staticmethod(lambda values, axis: values.sum(axis).int())
    max = staticmethod(lambda values, axis: values.amax(axis))
    min = staticmethod(lambda values, axis: values.amin(axis))
    associative_scan = staticmethod(lambda values, axis, add: values.cumsum(axis).int())
    minimum = staticmethod(lambda one, other: torch.minimum(torch.as_tensor(one), torch.as_tensor(other)))
    maximum = staticmethod(lambda one, other: torch.maximum(torch.as_tensor(one), torch.as_tensor(other)))
    BlockedLayout = staticmethod(lambda *args: None)

    def __init__(self, programs):
        self.programs = programs

    def num_programs(self, axis):
        return self.programs

    @staticmethod
    def load(places, mask=True, other=0, cache_modifier=""):
        index = torch.where(torch.as_tensor(mask), places.index, 0)
        return torch.where(torch.as_tensor(mask), places.tensor[index], other)


def tiles_in_order(rows_E, *, programs, tiles_n, group_m):
    """(each expert's first row tile, all tiles [4, tiles]: expert, first row, row behind the last, first column)."""
    offsets = Places(torch.tensor([0, *rows_E]).cumsum(0))
    sizes = {"TILES_N": tiles_n, "GROUP_M": group_m, "E_POW2": 64, "NUM_EXPERTS": len(rows_E), "BLOCK_N": 128}
    names = {"gl": Vectors(programs), "EXPERTS": None, "_add": None, **sizes}
    exec(function_text("_row_tiles") + function_text("_place"), names)
    key_E, total, columns = names["_row_tiles"](offsets)
    keys = types.SimpleNamespace(load=lambda layout: key_E[:, None])
    found = names["_place"](torch.arange(int(total) * tiles_n).int(), total, columns, keys, offsets, 4)
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


@given(st.lists(ROWS, min_size=17, max_size=40), st.integers(1, 132), TILES_N)
@example([0] * 15 + [64, 192], 1, 1)
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


@pytest.mark.parametrize(
    ("tiles_n", "columns", "order"),
    [
        (112, [38, 38, 36], [0, 1, 4, 8, 2, 3, 5, 7]),  # by weight what begins in two waves
        (100, [34, 34, 32], [0, 4, 8, 2, 3, 5, 1, 7]),
        (16, [16], [0, 4, 8, 2, 3, 5, 1, 7]),
    ],
)
def test_few_experts_run_beside_one_another(tiles_n, columns, order):
    """Columns of all at a time that make two waves: heavy row tiles multiply while light ones wait for weights."""
    rows_E = [338, 54, 90, 105, 179, 68, 0, 56, 134]
    _, found = tiles_in_order(rows_E, programs=132, tiles_n=tiles_n, group_m=8)
    row_tiles = 9
    begin = 0
    for block in found.split([row_tiles * width for width in columns], dim=1):
        width = block.shape[1] // row_tiles
        assert block[0].unique_consecutive().tolist() == order
        assert block[3].unique().tolist() == [128 * column for column in range(begin, begin + width)]
        begin += width


@pytest.mark.parametrize(
    ("rows_E", "order"),
    [
        ([338] * 8 + [64], [*range(9)]),  # many row tiles, which would be read for each block of columns
        ([140, 70, 130, 190, 0, 128, 100, 70, 150], [0, 1, 2, 3, 5, 6, 8, 7]),  # no expert waits long for weights
        ([128, 64, 100, 60, 0, 128, 64, 100, 60], [0, 1, 2, 3, 5, 6, 7, 8]),  # no one multiplies for long
        ([64] * 16 + [192], [*range(15), 16, 15]),  # many experts
    ],
)
def test_others_follow_one_another(rows_E, order):
    _, found = tiles_in_order(rows_E, programs=132, tiles_n=112, group_m=8)
    assert found[0].unique_consecutive().tolist() == order


def test_light_tiles_end_the_last_columns_alone():
    """Of the last expert's row tiles by rows: weights of the columns before are read once."""
    _, found = tiles_in_order([64, 64, 1300], programs=132, tiles_n=112, group_m=8)
    of_last = [block[3, block[0] == 2] for block in found.split([9 * 38, 9 * 38, 9 * 36], dim=1)]
    assert [len(columns.unique_consecutive()) == len(columns.unique()) for columns in of_last] == [True, True, False]


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


@given(st.integers(0, 60), TILES_N, st.integers(1, 132), st.integers(128, 600))
@example(9, 16, 132, 224)
@example(10, 16, 132, 224)
@example(11, 3, 132, 128)
@example(33, 4, 132, 128)
@example(1, 1, 1, 128)
def test_few_last_tiles_go_in_pieces(total, tiles_n, programs, steps):
    """Each step of a tile is one piece's, pieces follow one another, and no program has more than one."""
    names = {"gl": Vectors(programs), "TILES_N": tiles_n, "BLOCK_K": 64}
    exec(function_text("_pieces", split_k=True) + function_text("_steps", split_k=True), names)
    whole, pieces = map(int, names["_pieces"](torch.tensor(total)))
    rest = total * tiles_n % programs
    wanted = min(MOST_PIECES, programs // rest) if rest else 1
    if rest:
        assert pieces == wanted
    assert total * tiles_n - whole == (rest if wanted > 1 else 0)
    units = whole + (total * tiles_n - whole) * pieces
    assert units - whole <= programs, "as PARTIALS has room for"
    found = torch.stack(names["_steps"](torch.arange(units).int(), whole, pieces, 64 * steps), 1)
    assert found[:whole].tolist() == [[tile, 0, 64 * steps] for tile in range(whole)]
    for tile, in_pieces in enumerate(found[whole:].reshape(-1, pieces, 3), whole):
        bounds = [0, *in_pieces[:, 2].tolist()]
        assert in_pieces.tolist() == [[tile, *pair] for pair in itertools.pairwise(bounds)]
        assert bounds[-1] == 64 * steps
        assert all(end % 64 == 0 and end - begin >= 64 * (steps // pieces) for begin, end in itertools.pairwise(bounds))


def memory_of(programs, *, split_k=True):
    tensors = {
        "A": None,
        "W": torch.zeros(1, 256, 64, dtype=torch.bfloat16),
        "OFFSETS": torch.zeros(2, dtype=torch.int64),
    }
    schedule = Schedule.specialized(gated=True, split_k=split_k)
    found = eager.specialized_arguments(tensors, schedule, gather=True, programs=programs)
    assert found.pop("W_DESC").base is tensors["W"]
    return found


def test_memory_of_pieces_is_enough():
    memory = memory_of(131)
    assert {name: (tensor.numel(), tensor.dtype) for name, tensor in memory.items()} == {
        "TAKEN": (1 + 3 * 65, torch.int32),  # three parts of each tile
        "PARTIALS": (131 * 3 * 64 * 256, torch.float32),
    }
    assert not memory["TAKEN"].any()
    (taken,) = memory_of(131, split_k=False).values()
    assert taken.tolist() == [0]


class Memory(Places):
    """Memory that is written to as well, of elements of its own type."""

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.tensor.dtype)

    def __getitem__(self, key):
        return Memory(self.tensor, self.index[key])


class Stores(Vectors):
    """What sums of pieces need beside that."""

    int64, SliceLayout = torch.int64, staticmethod(lambda *args: None)

    @staticmethod
    def store(places, values, mask):
        inside = mask.expand(values.shape)
        places.tensor[places.index[inside]] = values[inside]


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
    exec(function_text("_steps") + function_text("_load_weights"), names)
    names["_load_weights"](None, None, tiles, 1, None, None, ring, ring, ring, group, told, read, depth)
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
        exec(function_text("_next_unit"), names)
        tile, phase = 0, 0
        while tile < tiles:
            had[number].append(tile)
            tile = names["_next_unit"](group, told, read, phase, 4)
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


def multiply(part, *, units, total, cut, depth, rings=(), **names):
    """Run a group of warps of one program that has these units of work, with functions and places of `names`."""
    split_k, anything = bool(cut), mock.MagicMock()
    left = iter([*units[1:], 10**6])
    numbers = {"maximum": max, "where": lambda holds, one, other: one if holds else other}
    numbers |= {"program_id": lambda axis: units[0], "arange": lambda *args: torch.arange(64)}
    common = {
        "gl": mock.MagicMock(atomic_add=names.pop("atomic_add", None), **numbers),
        "warpgroup_mma": lambda a, w, acc, is_async: acc,
        "warpgroup_mma_wait": lambda count, deps: deps,
        "_next_unit": lambda *args: next(left),
        "TILES_N": 1,
        "BLOCK_K": 64,
        "NUM_STAGES": 4,
        **dict.fromkeys(("STORED", "PRODUCT", "mbarrier", "fence_async_shared", "_barrier"), anything),
        **dict.fromkeys(("_store", "_store_partial", "_store_sum"), anything),
    }
    exec(function_text("_steps", split_k=split_k) + function_text("_multiply", split_k=split_k), common)
    steps_of, told = common["_steps"], names.pop("steps", None)
    if told is not None:
        common["_steps"] = lambda *args: told(steps_of(*args))
    common |= names
    partials_and_taken = (0, 0) if split_k else ()
    rings = rings or (anything, anything)
    operands = (anything, anything, *partials_and_taken, total, 1, *cut, *[anything] * 4, *rings, *[anything] * 3)
    common["_multiply"](*operands, depth, 64, part)


@pytest.mark.parametrize("split_k", [False, True])
@pytest.mark.parametrize("part", range(3))
def test_groups_give_back_each_step_once(part, split_k):
    """In turn and after its products, whether a group has rows of a tile or none, of whole tiles and of pieces."""
    steps, rows_of_tiles, seen = 130, [192, 10, 100, 70, 192, 1, 64], []
    total = len(rows_of_tiles)
    whole, pieces = (4, 3) if split_k else (total, 1)
    multiply(
        part,
        units=range(whole + (total - whole) * pieces),
        total=total,
        cut=(whole, pieces) if split_k else (),
        depth=64 * steps,
        rings=[types.SimpleNamespace(index=lambda stage, name=name: (name, stage)) for name in ("full", "empty")],
        mbarrier=types.SimpleNamespace(wait=lambda *at: seen.append(at), arrive=lambda at: seen.append(at)),
        _place=lambda tile, *rest: (0, 0, rows_of_tiles[tile], 0),
        atomic_add=lambda *args, sem: 0,
    )
    waited, given_back = [], []
    for at in seen:
        (given_back if at[0] == "empty" else waited).append(at)
        assert len(given_back) <= len(waited)
    assert waited == [(("full", step % 4), step // 4 % 2) for step in range(steps * total)]
    assert given_back == [("empty", step % 4) for step in range(steps * total)]


@given(st.randoms(use_true_random=False), st.integers(0, 3))
def test_pieces_are_added_up_once(random, whole):
    """By who has the last piece of a part, whatever the order: all of them, in the order of the reduction."""
    rows_of_tiles, pieces, steps = [100, 192, 64, 10, 150, 1], 3, 7
    total, counts, kept, added, here = len(rows_of_tiles), {}, {}, [], {}
    memory = memory_of((total - whole) * pieces)
    units = list(range(whole + (total - whole) * pieces))
    random.shuffle(units)

    def begins(found):
        here["tile"], here["begin"], _ = found
        return found

    def place(tile, *rest):
        return 0, 1000 * tile, 1000 * tile + rows_of_tiles[tile], 0

    def count(place, value, sem):
        assert sem == "acq_rel"
        assert 0 < place < len(memory["TAKEN"])
        counts[place] = counts.get(place, 0) + value
        return counts[place] - value

    def keep(place, *sums):
        assert place not in kept
        assert place % (64 * 256) == 0 <= place < memory["PARTIALS"].numel()
        kept[place] = here["tile"], here["begin"]

    def add_up(out, order, place, count, start, end, *rest):
        tile, part = here["tile"], (start - 1000 * here["tile"]) // 64
        assert (count, end) == (pieces, 1000 * tile + rows_of_tiles[tile])
        bounds = [piece * 64 * steps // pieces // 64 * 64 for piece in range(pieces)]
        assert [kept[place + 3 * 64 * 256 * piece] for piece in range(pieces)] == [(tile, begin) for begin in bounds]
        added.append((tile, part))

    functions = {"_place": place, "atomic_add": count, "_store_partial": keep, "_store_sum": add_up, "steps": begins}
    functions["_store"] = lambda *args: added.append((here["tile"], "whole"))
    for part in range(3):
        multiply(part, units=units, total=total, cut=(whole, pieces), depth=64 * steps, **functions)
    parts = [(tile, part) for tile in range(whole, total) for part in range(-(-rows_of_tiles[tile] // 64))]
    stored = [(tile, "whole") for tile in range(whole) for _ in range(-(-rows_of_tiles[tile] // 64))]
    assert sorted(added, key=str) == sorted(parts + stored, key=str)
    assert len(kept) == pieces * len(parts)


@pytest.mark.parametrize("pieces", [2, 3])
def test_sums_of_pieces(pieces):
    """Row by row to where the slots are, ahead of the part's end alone."""
    rows, stride, order_N = 37, 700, torch.randperm(100)
    partials = torch.randn(3, 3, 64, 256)
    memory, out = Memory(partials.flatten()), Memory(torch.full((100 * stride,), -1.0))
    names = {"gl": Stores(programs=1), "ADDED": None}
    exec(function_text("_store_sum", split_k=True, stage="down"), names)
    part, start, begin_n = 1, 20, 256
    names["_store_sum"](out, Memory(order_N), memory + part * 64 * 256, pieces, start, start + rows, begin_n, stride)
    wanted = torch.full((100, stride), -1.0)
    wanted[order_N[start : start + rows], begin_n : begin_n + 256] = partials[:pieces, part, :rows].sum(0)
    torch.testing.assert_close(out.tensor.view(100, stride), wanted)


def test_groups_wait_for_one_telling_after_the_other():
    for name in ("_load_rows", "_multiply"):
        text = function_text(name)
        assert text.count("    told_phase = 0\n") == 1
        assert re.search(
            r"\n        unit = _next_unit\(given, told, read, told_phase, \S+\)\n        told_phase \^= 1\n", text
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
