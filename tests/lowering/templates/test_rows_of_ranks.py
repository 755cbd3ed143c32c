"""`moe_rows_of_ranks`: rows by their addresses, in the interpreter, where all ranks have memory of one process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffulex.distributed.symmetric import rows_at
from lowering.templates import eager, standalone
from lowering.templates.render import template_text
from tests.support.interpreter import interpreter
from tests.support.launches import compile_for_h100, interpret, on_meta

# the kernel gets addresses, and only its own process knows those of its tensors
OF_RANKS = """

class of_ranks:
    def __class_getitem__(cls, grid):
        import torch

        def run(own, places, out, integers, *ranks):
            bases = torch.tensor([0 if rank == own else rows.data_ptr() for rank, rows in enumerate(ranks)])
            _moe_rows_of_ranks_kernel[grid](ranks[own], places, bases, out, *integers)

        return run
"""


def rows_of(rank, count, width):
    return torch.arange(count * width).view(count, width) + 1000 * rank


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 5, 8]), st.data())
def test_rows_come_from_the_rank_of_their_place(size, part, width, data):
    own = data.draw(st.integers(0, size - 1))
    places = data.draw(st.lists(st.integers(-1, size * part - 1), min_size=1, max_size=5))
    ranks, places_N = [rows_of(rank, size * part, width) for rank in range(size)], torch.tensor(places)
    out_NX = torch.full((len(places), width), -7)
    tensors = {"ROWS": ranks[own], "PLACES": places_N, "BASES": places_N, "OUT": out_NX}
    constants = {"RANKS": size, "OWN": own, "BLOCK": 4, "ALIGNED": width % 2 == 0}
    kernel = standalone.render(
        template_text("moe_rows_of_ranks"), "moe_rows_of_ranks", constants=tuple(constants.items()), output_rank=2
    )
    integers = [value for value in kernel.arguments(tensors) if isinstance(value, int)]
    grid = (len(places), -(-width // 4))
    after = interpreter().kernel(
        kernel.source + OF_RANKS, [own, places_N, out_NX, integers, *ranks], grid=grid, name="of_ranks"
    )
    every = torch.cat([rows[own * part : (own + 1) * part] for rows in ranks])
    assert torch.equal(after[2], rows_at(every, places_N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8])
@pytest.mark.parametrize(("width", "skipped"), [(8, 0), (3, 0), (8, 1), (1, 1), (1500, 0)])
def test_any_dtype_and_width_by_words_that_fit(monkeypatch, dtype, width, skipped):
    interpret(monkeypatch)
    rows = torch.randint(0, 200, (5 * width + skipped,)).to(dtype)[skipped:].view(5, width)
    places_N = torch.tensor([3, -1, 0, 4])
    found = eager.rows_of_ranks(rows, places_N, torch.zeros(1, dtype=torch.int64), own=0)
    assert found.dtype == dtype and torch.equal(found, rows_at(rows, places_N))


@pytest.mark.parametrize(("width", "skipped"), [(4, 0), (8, 0), (8, 4), (16, 8)])
def test_nothing_is_promised_of_addresses_that_does_not_hold(monkeypatch, width, skipped):
    given = {}
    monkeypatch.setattr(standalone, "launch", lambda text, tensors, **options: given.update(options["constants"]))
    rows = torch.zeros(3 * width + skipped, dtype=torch.bfloat16)[skipped:].view(3, width)
    eager.rows_of_ranks(rows, torch.tensor([0]), torch.zeros(1, dtype=torch.int64), own=0)
    assert given["ALIGNED"] == (rows.data_ptr() % 16 == 0 and 2 * width % 16 == 0)


@pytest.mark.parametrize("aligned", [True, False])
def test_loads_are_as_wide_as_addresses_allow(aligned):
    rows, places, bases = (on_meta(*shape, dtype=torch.int64) for shape in ((64, 1792), (16,), (2,)))
    tensors = {"ROWS": rows, "PLACES": places, "BASES": bases, "OUT": on_meta(16, 1792, dtype=torch.int64)}
    constants = {"RANKS": 2, "OWN": 0, "BLOCK": 1024, "ALIGNED": aligned}
    kernel, facts = compile_for_h100(
        template_text("moe_rows_of_ranks"), tensors, constants=constants, num_warps=4, num_stages=1
    )
    assert facts["spilled"] == 0
    assert ("ld.global.v2.b64" in kernel.asm["ptx"]) == aligned
