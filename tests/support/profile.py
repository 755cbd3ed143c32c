"""Counting what ran on the GPU, with the profiler."""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch


def gpu_kernels(call: Callable[[], object]) -> collections.Counter[str]:
    """Names of the kernels one `call` launched, with how often; copies and fills are named as the profiler does."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    device_events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return collections.Counter(event.name for event in device_events)
