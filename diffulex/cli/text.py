"""The bundled text and its byte-level vocabulary: no tokeniser file, nothing to download."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence

import torch
from torch import Tensor

PAD, BOS, EOS = 256, 257, 258
VOCAB_SIZE = 264  # 256 bytes, three specials, and unused ids up to a multiple of 8
TITLE = "Alice's Adventures in Wonderland"
PROMPT = "Alice was beginning to get very tired"


def load_text() -> str:
    """The bundled text, public domain."""
    return (importlib.resources.files("diffulex") / "data" / "alice.txt").read_text(encoding="utf-8")


def encode(text: str) -> list[int]:
    """The UTF-8 bytes of `text` as token ids."""
    return list(text.encode("utf-8"))


def decode(ids: Sequence[int]) -> str:
    """The text of token ids; special and unused ids are left out, broken UTF-8 becomes U+FFFD."""
    return bytes(number for number in ids if number < PAD).decode("utf-8", errors="replace")


def load_ids() -> Tensor:
    """The token ids [N] int64 of the bundled text."""
    return torch.tensor(encode(load_text()), dtype=torch.int64)


def batch(ids_N: Tensor, *, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Random stretches [rows, length] int64 of the token ids [N] int64."""
    starts = torch.randint(0, ids_N.numel() - length + 1, (rows,), generator=generator)
    return torch.stack([ids_N[start : start + length] for start in starts.tolist()])


def stretches(ids_N: Tensor, *, count: int, length: int) -> list[Tensor]:
    """`count` inputs [1, length] int64 spread evenly over the token ids [N] int64; single tokens have no context, so
    they are spread evenly over the bytes instead. Copies: Dynamo would guard on what a view is a view of.
    """
    if length == 1:
        ids_N = torch.arange(PAD)
    last = ids_N.numel() - length
    starts = (last * i // max(count - 1, 1) for i in range(count))
    return [ids_N[start : start + length][None].clone() for start in starts]
