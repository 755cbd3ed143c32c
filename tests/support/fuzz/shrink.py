"""Makes the form of a failing program smaller for as long as it fails in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .check import Result, check
from .draw import Block, Form

_MOST = 60  # programs to try


def _simpler(form: Form) -> Iterator[Form]:
    """Forms that are one step simpler."""
    if len(form.blocks) > 1:
        yield form.replace(blocks=form.blocks[:1])
        if not form.blocks[1].shares_router:
            yield form.replace(blocks=form.blocks[1:])
    if form.dynamic:
        yield form.replace(dynamic=False, tokens=form.tokens[:1])
    if form.dtype != "float32":
        yield form.replace(dtype="float32")
    plain = Block()
    for index, block in enumerate(form.blocks):
        for field in dataclasses.fields(Block):
            value, default = getattr(block, field.name), getattr(plain, field.name)
            smaller = [value[:at] + value[at + 1 :] for at in range(len(value))] if default == () else [default]
            for other in smaller if value != default else ():
                blocks = list(form.blocks)
                blocks[index] = dataclasses.replace(block, **{field.name: other})
                sizes = {(block.experts, block.top_k) for block in blocks}
                if blocks[index].is_sound() and (len(sizes) == 1 or not blocks[-1].shares_router):
                    yield form.replace(blocks=tuple(blocks))


def shrunk(result: Result, *, inductor: bool) -> Result:
    """The result of the simplest form found that has the same kind of problem."""
    tried, going = 0, True
    while going and tried < _MOST:
        going = False
        for form in _simpler(result.form):
            tried += 1
            found = check(form, inductor=inductor)
            if found.problem and found.kind == result.kind:
                result, going = found, True
                break
            if tried >= _MOST:
                break
    return result
