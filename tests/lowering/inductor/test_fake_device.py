"""The faked H100 answers like one, refuses where it must, and leaves nothing behind."""

import importlib.util
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowering.errors import MoEDeviceError, MoEUnsupportedError, ReasonCode
from lowering.inductor import fake_device
from lowering.inductor.fake_device import A100, H100, fake_gpu, fake_refusal
from lowering.inductor.fake_guard import guard_registry
from tests.support.catalogue import raises_catalogue

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")


def owners():
    """Everything that has attributes which the fake device changes."""
    import triton
    from torch._dynamo import device_interface
    from torch._inductor import constant_folding, select_algorithm
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from torch.fx.experimental import proxy_tensor

    modules = [torch.cuda, torch.accelerator, device_interface, joint_graph, post_grad, triton_helpers, fake_tensor]
    classes = [constant_folding.ConstantFolder, GraphLowering, select_algorithm.AlgorithmSelectorCache]
    return [*modules, proxy_tensor, *classes, fake_tensor.FakeTensorMode, triton.runtime.driver]


COUNTERS = {"cache_hits", "cache_misses", "cache_bypasses"}  # FakeTensorMode counts all work done with fake tensors


def snapshot():
    from torch._dynamo.device_interface import get_registered_device_interfaces

    dicts = [("interfaces", dict(get_registered_device_interfaces()))]
    dicts.append(("sdpa", torch.ops.aten.scaled_dot_product_attention.default.py_kernels))
    dicts += [(str(owner), vars(owner)) for owner in owners()]
    taken = {(where, str(name)): id(value) for where, items in dicts for name, value in items.items()}
    taken = {key: value for key, value in taken.items() if key[1] not in COUNTERS}
    return taken | {("guard", str(slot)): pointer for slot, pointer in enumerate(guard_registry())}


def changed(before, after):
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


@pytest.fixture(scope="module", autouse=True)
def everything_loaded():
    """What is imported or registered on first use is no change."""
    with fake_gpu():
        pass


def test_nothing_is_left_behind():
    before = snapshot()
    with fake_gpu():
        inside = changed(before, snapshot())
    assert {name for _, name in inside} >= {"is_available", "_active", "cuda:0", "avoid_device_init"}
    assert not changed(before, snapshot())
    assert bool(guard_registry()[1]) == torch.backends.cuda.is_built()  # a CPU build has no guard for CUDA


def test_nothing_is_left_behind_after_an_error():
    before = snapshot()
    with pytest.raises(KeyError), fake_gpu():
        raise KeyError
    assert not changed(before, snapshot())


def test_a_patch_that_cannot_be_made_undoes_the_others(monkeypatch):
    before = snapshot()
    monkeypatch.setattr(fake_device, "_cuda_answers", lambda gpu: {"is_available": None, "no_such_name": None})
    with pytest.raises(AttributeError, match="no_such_name"), fake_gpu():
        pass
    assert not changed(before, snapshot())


def test_blocks_nest():
    with fake_gpu():
        with fake_gpu() as gpu:
            assert gpu is H100
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()


def test_another_thread_waits_until_the_device_is_gone():
    entered, seen = threading.Event(), []

    def other():
        entered.set()
        with fake_gpu():
            seen.append("inside")

    thread = threading.Thread(target=other)
    with fake_gpu():
        thread.start()
        entered.wait()
        thread.join(0.2)
        assert thread.is_alive() and not seen
    thread.join(30)
    assert seen == ["inside"] and not torch.cuda.is_available()


def test_another_gpu_inside_is_refused():
    with fake_gpu(A100) as outer, fake_gpu(A100):
        assert outer is A100 and torch.cuda.get_device_capability() == (8, 0)
        with raises_catalogue(MoEDeviceError, where="fake_gpu", got=H100.name), fake_gpu(H100):
            pass
    with fake_gpu():
        assert torch.cuda.get_device_capability() == (9, 0)


def test_it_answers_like_an_h100():
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.utils import get_gpu_type
    from torch.utils._triton import has_triton

    assert not has_triton()
    with fake_gpu():
        import triton

        assert torch.cuda.get_device_capability() == (9, 0)
        assert has_triton() and get_gpu_type() == "cuda"
        properties = DeviceProperties.create(torch.device("cuda", 0))
        assert (properties.cc, properties.multi_processor_count) == (90, 132)
        assert triton.runtime.driver.active.get_current_target().arch == 90
        utils = triton.runtime.driver.active.utils
        assert utils.get_device_properties(0)["max_shared_mem"] == 232_448
    assert not has_triton()


def test_fake_tensors_can_be_indexed_and_moved():
    with fake_gpu(), FakeTensorMode():
        x_TH = torch.randn(8, 4, device="cuda")
        assert x_TH[torch.zeros(3, dtype=torch.int64, device="cuda")].shape == (3, 4)
        assert x_TH[1:, None, ..., 0].device.type == torch.randn(3).to("cuda").device.type == "cuda"


def test_real_tensors_on_the_device_are_refused():
    with fake_gpu(), pytest.raises(MoEDeviceError, match="fake tensors only"):
        torch.empty(3, device="cuda")


def test_a_real_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a real one")
    assert fake_refusal().code is ReasonCode.OPTION
    with pytest.raises(MoEDeviceError, match="a real one"), fake_gpu():
        pass


def test_missing_triton_is_refused(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert fake_refusal().code is ReasonCode.NO_TRITON
    with pytest.raises(MoEUnsupportedError, match="pip install triton"), fake_gpu():
        pass
