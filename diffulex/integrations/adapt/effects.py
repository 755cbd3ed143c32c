"""Runs of a module that leave nothing behind: what its forward sets is noted and taken back, and chance kept out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .form import PREFIX

_HELD = ("_parameters", "_buffers", "_modules")
_MISSING = object()


class Effects:
    """Notes in `changed` which attributes and buffers a run changes, as `child.name`, and takes the changes back."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = dict(module.named_modules())
        self.changed: set[str] = set()

    def __enter__(self) -> Effects:
        self._attributes = {name: dict(vars(part)) for name, part in self._parts.items()}
        self._contents = [
            (name, key, value, value.copy())
            for name, attributes in self._attributes.items()
            for key, value in attributes.items()
            if key not in _HELD and isinstance(value, list | dict | set)
        ]
        self._buffers = [
            (name, part, key, buffer, buffer.clone())
            for name, part in self._parts.items()
            for key, buffer in part._buffers.items()
            if buffer is not None and not key.startswith(PREFIX)
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, part in self._parts.items():
            before, now = self._attributes[name], part.__dict__
            for key in before.keys() | now.keys():
                if key not in _HELD and not _same(before.get(key, _MISSING), now.get(key, _MISSING)):
                    self._note(name, key)
            for key in now.keys() - before.keys():
                del now[key]
            now.update(before)
        for name, key, value, kept in self._contents:
            if not _same_contents(value, kept):
                self._note(name, key)
                _refill(value, kept)
        for name, part, key, buffer, values in self._buffers:
            now_there = part._buffers.get(key)
            if now_there is not buffer or not torch.equal(buffer, values):
                self._note(name, key)
                part._buffers[key] = buffer
                buffer.copy_(values)

    def _note(self, name: str, key: str) -> None:
        self.changed.add(f"{name}.{key}" if name else key)


def _same(before: Any, now: Any) -> bool:
    return before is now or (isinstance(before, int | float | str) and type(before) is type(now) and before == now)


def _same_contents(value: Any, kept: Any) -> bool:
    if len(value) != len(kept):
        return False
    if isinstance(value, set):
        return bool(value == kept)
    if isinstance(value, list):
        return all(_same(old, new) for old, new in zip(kept, value, strict=True))
    return all(key in value and _same(old, value[key]) for key, old in kept.items())


def _refill(value: Any, kept: Any) -> None:
    value.clear()
    if isinstance(value, list):
        value.extend(kept)
    else:
        value.update(kept)


class _Marked(nn.Dropout):
    """Dropout without chance: it scales features by where they are, so that another place for it shows."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Hidden states [..., H] floating, to [..., H] of the same dtype."""
        scale_H = torch.linspace(0.5, 1.5, input.shape[-1], dtype=input.dtype, device=input.device)
        return input * scale_H if self.training else input


@contextlib.contextmanager
def quiet(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Eval or train mode, dropout without chance, no gradients, autocast or inference mode.

    All as before afterwards, the random state included.
    """
    modes = {part: part.training for part in module.modules()}
    dropouts = [part for part in module.modules() if type(part) is nn.Dropout]
    devices = {parameter.device for parameter in module.parameters()}
    cuda = sorted((device for device in devices if device.type == "cuda"), key=str)
    with contextlib.ExitStack() as stack:
        for kind in {device.type for device in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(cuda))
        try:
            module.train(training)
            for dropout in dropouts:
                dropout.__class__ = _Marked
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode
            for dropout in dropouts:
                dropout.__class__ = nn.Dropout
