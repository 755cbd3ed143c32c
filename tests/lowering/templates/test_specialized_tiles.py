"""How programs with specialised warps share the tiles, and their warps what they were told: functions of the kernel's
text, run in Python; and what the host's descriptors describe.
"""

import dataclasses
import re
import textwrap
import threading
import time
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowering.schedule.schedule import Schedule
from lowering.templates import eager
from lowering.templates.descriptors import host_descriptors

GATED = Schedule.specialized(gated=True)


def kernel_text(*, paced=False):
    variant = dataclasses.replace(eager.up_variant(torch.bfloat16, act="silu(g) * u", bias=False), paced=paced)
    return variant.scheduled(GATED, depth=64, strides=(256 * 64, 64, 1)).source()


def function_text(name, **options):
    (function,) = re.findall(rf"^def {name}\(.*?(?=^@|^<|\Z)", kernel_text(**options), flags=re.DOTALL | re.MULTILINE)
    return function


class Language:
    """What `_keep_step` needs of Gluon, for one program beside others that count once for each of its polls."""

    def __init__(self, others):
        self.count, self.others, self.polls = 0, others, 0

    def atomic_add(self, place, value, sem):
        self.count += value

    def load(self, place, volatile):
        assert volatile, "what others wrote since has to be seen"
        self.polls += 1
        self.count += self.others
        return self.count

    @staticmethod
    def where(condition, one, other):
        return one if condition else other


@pytest.mark.parametrize(
    ("others", "goal", "patience", "left", "polls"),
    [
        (10, 0, 9, 9, 1),  # enough have counted
        (10, 35, 9, 9, 4),  # soon
        (0, 35, 9, 0, 10),  # never: no further wait
        (0, 35, 0, 0, 1),
    ],
)
def test_a_program_waits_for_the_others_but_not_for_good(others, goal, patience, left, polls):
    language = Language(others)
    names = {"gl": language}
    exec(function_text("_keep_step", paced=True), names)
    assert names["_keep_step"](None, goal, patience) == left and language.polls == polls


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

    int32 = torch.int32

    def __init__(self, given, *, number=0, programs=1, taken=None, slow=False):
        self.given, self.number, self.programs, self.slow, self.done = given, number, programs, slow, []
        self.taken = [0] if taken is None else taken

    def program_id(self, axis):
        return self.number

    def num_programs(self, axis):
        return self.programs

    def atomic_add(self, place, value, sem):
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

    def ignore(self, *operands):
        pass

    expect = async_copy_global_to_shared = BlockedLayout = ignore


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
        assert group.done == [step for turn in steps for step in turn]
        assert all(tile < tiles for tile in given[:-1])
        assert (given[-1] if given else number) >= tiles
    assert sorted(had) == list(range(tiles))


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
        exec(function_text("_next_tile").replace(": gl.constexpr", ""), names)
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


def test_row_tiles_cover_an_expert():
    """The kernel's formula: in order, without a gap, at most 192 rows each, and by 64 rows of one another."""
    for rows in (1, 63, 64, 65, 192, 193, 255, 256, 257, 1000, 1024, 5_140_000):
        chunks = (rows + 63) // 64
        row_tiles = (chunks + 2) // 3
        whole = chunks // row_tiles
        more = chunks - whole * row_tiles
        begins = [(tile * whole + min(tile, more)) * 64 for tile in range(row_tiles)]
        ends = [min(rows, begin + (whole + (tile < more)) * 64) for tile, begin in enumerate(begins)]
        assert begins == [0, *ends[:-1]] and ends[-1] == rows
        heights = [(end - begin + 63) // 64 for begin, end in zip(begins, ends, strict=True)]
        assert max(heights) <= 3 and max(heights) - min(heights) <= 1


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
