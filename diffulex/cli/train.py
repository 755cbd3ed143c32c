"""A few seconds of training on the bundled text, stock and eager, so that outputs mean something."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from . import text
from .model import Preset
from .progress import progress

_WARM_UP = 0.05


@dataclasses.dataclass(frozen=True)
class Training:
    """What training did: cross entropy in nats per byte, first and mean of the last steps."""

    steps: int
    seconds: float
    first_loss: float
    last_loss: float

    def __str__(self) -> str:
        if not self.steps:
            return "none"
        return f"{self.steps} steps in {self.seconds:.0f} s, loss {self.first_loss:.2f} -> {self.last_loss:.2f}"


def train(model: Any, ids_N: Tensor, *, preset: Preset, seconds: float, seed: int) -> Training:
    """Train `model` in place with AdamW on random stretches of the token ids [N] int64 for about `seconds`.

    The learning rate follows the clock: a short warm-up, then down to zero in a straight line.
    """
    losses: list[float] = []
    if seconds <= 0:
        return Training(0, 0.0, 0.0, 0.0)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=preset.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    device = next(model.parameters()).device
    model.train()
    started = time.perf_counter()
    with progress("training", seconds, unit="s") as bar:
        elapsed = 0.0
        while elapsed < seconds:
            for group in optimizer.param_groups:
                group["lr"] = preset.learning_rate * _rate(elapsed / seconds)
            ids = text.batch(ids_N, rows=preset.rows, length=preset.length, generator=generator).to(device)
            losses.append(_step(model, ids, optimizer))
            now = time.perf_counter() - started
            bar.advance(min(now, seconds) - elapsed, note=f"loss {losses[-1]:.2f}")
            elapsed = now
    model.eval()
    last = losses[-10:]
    return Training(len(losses), elapsed, losses[0], sum(last) / len(last))


def _rate(done: float) -> float:
    return min(done / _WARM_UP, (1 - done) / (1 - _WARM_UP)) + 0.01


def _step(model: Any, ids: Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
