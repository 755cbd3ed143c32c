"""How fast a device multiplies and reads, measured; what a layer has to do; and how long that takes at least."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lowering.spec import ExpertSpec

from .inputs import Inputs
from .timing import call_seconds

# side of the product and bytes that are read; smaller on a CPU, where both would take minutes
_SIDE = {"cuda": 8192, "cpu": 2048}
_READ_BYTES = {"cuda": 4 << 30, "cpu": 1 << 29}
# on a CPU in 16 bits torch is several times faster with the second factor transposed, as weights are
_PRODUCT: dict[str, Callable[..., Tensor]] = {"cuda": torch.matmul, "cpu": functional.linear}
# a GPU's clocks sink as it works, so its usual rate counts; other work on a CPU makes a ceiling too low, never too high
_CHOSEN: dict[str, Callable[[list[float]], float]] = {"cuda": statistics.median, "cpu": min}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device and dtype: FLOP/s of a square product, bytes/s of reading a long vector."""

    matrix_rate: float
    read_rate: float

    def __str__(self) -> str:
        return f"{_si(self.matrix_rate)}FLOP/s, {_si(self.read_rate)}B/s"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call has to do: FLOP, and bytes that have to be moved."""

    flop: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flop / self.bytes

    def floor(self, ceilings: Ceilings) -> float:
        """Microseconds a call should take at least: arithmetic or bytes, whichever is longer.

        An estimate: another kernel may read faster than the one that was measured.
        """
        return 1e6 * max(self.flop / ceilings.matrix_rate, self.bytes / ceilings.read_rate)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The rates of the device, measured now: a product in the dtype, a sum in fp32."""
    kind, chosen = device.type, _CHOSEN[device.type]
    side = _SIDE[kind] // (2 if kind == "cpu" and dtype.itemsize == 2 else 1)  # CPUs may emulate 16-bit products
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    matrix_rate = 2 * side**3 / chosen(call_seconds(lambda: _PRODUCT[kind](first, second), device=device))
    big = torch.randn(_READ_BYTES[kind] // 4, device=device)
    return Ceilings(matrix_rate, big.numel() * 4 / chosen(call_seconds(big.sum, device=device)))


def dense_products(spec: ExpertSpec, rows: int, *, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """As many FLOP as the experts have on so many rows (slots), in the library's products with one weight for all rows.

    Timed in turn with the peers it shares their clocks, as the ceiling, measured on a rested device, does not.
    """
    hidden, inner = spec.hidden_size, spec.intermediate_size
    sizes = ((rows, hidden), (hidden, (2 if spec.gated else 1) * inner), (rows, inner), (inner, hidden))
    first_NH, up_HJ, act_NI, down_IH = (torch.randn(size, dtype=dtype, device=device) for size in sizes)

    def run() -> None:
        first_NH @ up_HJ
        act_NI @ down_IH

    return run


def work_of(spec: ExpertSpec, inputs: Sequence[Inputs], *, source: str = "topk") -> Work:
    """The work of a call, as the mean over input sets (hidden [T, H] in the dtype of the weights) of one token count.

    Weights are read once for each expert that the ids name, hidden states read and written once, and logits read
    where the source has them. Biases, ids, weights of the tokens, and what passes between the GEMMs are not counted.
    """
    matrices, size = 3 if spec.gated else 2, inputs[0].hidden_TH.element_size()
    hit = sum(one.ids_TK.unique().numel() for one in inputs) / len(inputs)
    matrix, slots = spec.hidden_size * spec.intermediate_size, inputs[0].ids_TK.numel()
    moved = (hit * matrices * matrix + 2 * inputs[0].hidden_TH.numel()) * size
    if source == "logits":
        moved += inputs[0].logits_TE.numel() * inputs[0].logits_TE.element_size()
    return Work(2.0 * matrices * slots * matrix, float(moved))


def _si(value: float) -> str:
    """`755 T`, `86.4 G`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:.0f} {unit}"
    return f"{value:.3g} "
