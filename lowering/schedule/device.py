"""What the cost model knows of a device: a handful of numbers read from its properties, no table of GPUs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

# dense 16-bit FLOP per clock and SM by major capability (vendor whitepapers: A100 2048, H100 4096, B200 8192)
_MATRIX_FLOP_PER_CLOCK = {8: 2048, 9: 4096, 10: 8192, 12: 2048}


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
    """A GPU as the cost model sees it.

    bandwidth        bytes per second from device memory, by memory clock and bus width
    matrix_rate      dense 16-bit FLOP per second at boost clock
    shared_memory    bytes a block can have
    l2_size          bytes
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    bandwidth: float
    matrix_rate: float
    shared_memory: int
    l2_size: int

    @classmethod
    def of_properties(cls, properties: Any) -> DeviceSpec:
        """From `torch.cuda.get_device_properties`-like properties (clocks in kHz, bus width in bits)."""
        capability = (properties.major, properties.minor)
        clock = getattr(properties, "clock_rate", 1_755_000) * 1e3
        memory_clock = getattr(properties, "memory_clock_rate", 2_619_000) * 1e3
        bus_bytes = getattr(properties, "memory_bus_width", 5120) / 8
        flop_per_clock = _MATRIX_FLOP_PER_CLOCK.get(capability[0], 1024)
        return cls(
            name=properties.name,
            capability=capability,
            num_sms=properties.multi_processor_count,
            bandwidth=2 * memory_clock * bus_bytes,
            matrix_rate=properties.multi_processor_count * clock * flop_per_clock,
            shared_memory=getattr(properties, "shared_memory_per_block_optin", 101_376),
            l2_size=getattr(properties, "L2_cache_size", 40 << 20),
        )


@functools.cache
def device_spec(index: int = 0) -> DeviceSpec:
    """The CUDA device `index`."""
    return DeviceSpec.of_properties(torch.cuda.get_device_properties(index))


H100 = DeviceSpec("H100", (9, 0), 132, 3.35e12, 1.07e15, 232_448, 50 << 20)
H200 = DeviceSpec("H200", (9, 0), 132, 4.81e12, 1.07e15, 232_448, 60 << 20)
