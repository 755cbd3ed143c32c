"""The bundled text and the byte-level vocabulary."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffulex.cli import text


@given(st.text())
def test_text_survives_the_vocabulary(written):
    ids = text.encode(written)
    assert all(0 <= number < text.PAD for number in ids)
    assert text.decode(ids) == written


def test_specials_and_broken_bytes_do_not_stop_decoding():
    assert text.decode([text.BOS, *text.encode("caf"), 0xC3, text.EOS, text.VOCAB_SIZE - 1]) == "caf\ufffd"


def test_bundled_text_is_there_and_holds_the_prompt():
    written = text.load_text()
    assert 10_000 < len(written.encode()) < 30_000
    assert text.PROMPT in written
    assert text.decode(text.load_ids().tolist()) == written


def test_batches_are_stretches_of_the_text_and_the_same_for_a_seed():
    ids_N = text.load_ids()
    one, two = (text.batch(ids_N, rows=3, length=20, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.shape == (3, 20) and torch.equal(one, two)
    assert all(text.decode(row) in text.load_text() for row in one.tolist())


def test_stretches_cover_the_text_from_end_to_end():
    ids_N = torch.arange(100)
    first, middle, last = text.stretches(ids_N, count=3, length=10)
    assert first.tolist() == [list(range(10))] and last.tolist() == [list(range(90, 100))]
    assert middle.shape == (1, 10) and not middle._is_view()  # Dynamo would guard on what it is a view of
    assert [t.shape for t in text.stretches(ids_N, count=1, length=0)] == [(1, 0)]


def test_single_tokens_are_spread_over_the_bytes():
    singles = text.stretches(text.load_ids(), count=256, length=1)
    assert [t.tolist() for t in singles] == [[[byte]] for byte in range(256)]
