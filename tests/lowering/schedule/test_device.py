"""A device description follows from what a driver reports."""

from types import SimpleNamespace

import pytest
import torch

from lowering.inductor import fake_device
from lowering.schedule.device import H100, H200, DeviceSpec, device_spec


def test_the_properties_of_an_h100():
    found = DeviceSpec.of_properties(fake_device.H100)
    assert (found.capability, found.num_sms, found.shared_memory) == (H100.capability, H100.num_sms, H100.shared_memory)
    assert found.bandwidth == pytest.approx(H100.bandwidth, rel=0.01)
    assert found.matrix_rate == pytest.approx(H100.matrix_rate, rel=0.01)
    assert found.l2_size == H100.l2_size


@pytest.mark.parametrize(("major", "factor"), [(8, 0.5), (9, 1.0), (10, 2.0), (12, 0.5), (99, 0.25)])
def test_the_matrix_rate_is_that_of_the_generation(major, factor):
    """Relative to Hopper at the same clock and SM count; an unknown generation counts as slow."""
    properties = SimpleNamespace(name="x", major=major, minor=0, multi_processor_count=100, clock_rate=1_000_000)
    assert DeviceSpec.of_properties(properties).matrix_rate == pytest.approx(factor * 100 * 1e9 * 4096)


def test_missing_properties_have_defaults():
    """Older torch reports neither clocks nor the bus width."""
    properties = SimpleNamespace(name="x", major=9, minor=0, multi_processor_count=132)
    found = DeviceSpec.of_properties(properties)
    assert all(value > 0 for value in (found.bandwidth, found.matrix_rate, found.shared_memory, found.l2_size))


def test_named_devices_differ_where_they_do():
    assert H200.bandwidth > H100.bandwidth
    assert (H200.num_sms, H200.matrix_rate) == (H100.num_sms, H100.matrix_rate)


@pytest.mark.gpu
def test_the_device_at_hand():
    found = device_spec(0)
    properties = torch.cuda.get_device_properties(0)
    assert (found.name, found.num_sms) == (properties.name, properties.multi_processor_count)
    assert 1e11 < found.bandwidth < 2e13
    assert 1e13 < found.matrix_rate < 1e16
    assert found is device_spec(0)
