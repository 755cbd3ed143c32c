"""What every error of the catalogue owes its reader, and that the ops' own and fake kernels raise the same."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lowering.errors import MoEErrorMixin

MESSAGE = re.compile(
    r"\[(?P<code>MOE\d{3})\] (?P<where>.+?): expected (?P<expected>.+?), got (?P<got>.+?)\. (?P<hint>.+)", re.DOTALL
)


@contextlib.contextmanager
def raises_catalogue(
    kind: type[MoEErrorMixin], *, where: str = "", expected: str = "", got: str = ""
) -> Iterator[None]:
    """The block raises exactly `kind`, its message has all parts, and they contain the given texts."""
    with pytest.raises(kind) as caught:  # type: ignore[call-overload]
        yield
    assert type(caught.value) is kind
    message = str(caught.value)
    found = MESSAGE.fullmatch(message)
    assert found, f"not a message of the catalogue: {message}"
    assert found["code"] == kind.code
    for part, text in (("where", where), ("expected", expected), ("got", got)):
        assert text in found[part], f"{text!r} is not in what was {part}: {message!r}"
    assert found["hint"].endswith("."), f"the hint is not a sentence: {message}"


def named(op: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of an op by the names of its schema."""
    return dict(zip((argument.name for argument in op._schema.arguments), args, strict=False))


def assert_refused(
    op: Any, arguments: dict[str, Any], kind: type[MoEErrorMixin], *, got: str, where: str | None = None
) -> None:
    """The op raises `kind` on CPU, and its fake function on meta tensors; a call of mixed devices is made as it is."""
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    with raises_catalogue(kind, where=op._schema.name if where is None else where, got=got):
        op(**arguments)
    if len({tensor.device for tensor in tensors}) == 1:
        on_meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        with raises_catalogue(kind, where=op._schema.name if where is None else where, got=got):
            op(**on_meta)
