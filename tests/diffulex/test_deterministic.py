"""The same bits every time: one digest of a hundred forwards, and of forty forwards with their gradients."""

import hashlib

import pytest
import torch

from tests.support.graphs import Captured
from tests.support.inputs import DEVICES
from tests.support.moe_layers import SPECS, make_inputs, make_layer, widened

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
FORWARDS, TRAINED = 100, 40
DTYPES = (torch.float32, torch.bfloat16)
FAMILIES = ("deepseek_v3", "gpt_oss", "qwen2_moe")


def digest(tensors):
    """sha256 over the bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def made(name, dtype, device, tokens=33):
    spec = widened(SPECS[name])
    return make_layer(spec, dtype=dtype).to(device), make_inputs(spec, tokens).to(dtype).to(device).hidden_TH


def forward(call, hidden_TH):
    with torch.no_grad():
        return digest(call(hidden_TH))


def trained(layer, call, hidden_TH):
    """Of the loss, and of every gradient."""
    hidden_TH = hidden_TH.detach().clone().requires_grad_()
    loss = call(hidden_TH)[0].float().square().mean()
    leaves = [hidden_TH, *(p for p in layer.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return digest([loss, *(grad for grad in grads if grad is not None)])


def assert_one_digest(layer, call, hidden_TH, record_property):
    forwards = {forward(call, hidden_TH) for _ in range(FORWARDS)}
    steps = {trained(layer, call, hidden_TH) for _ in range(TRAINED)}
    record_property("digests_of_100_forwards", len(forwards))
    record_property("digests_of_40_steps", len(steps))
    assert len(forwards) == len(steps) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_eager(name, dtype, device, record_property):
    layer, hidden_TH = made(name, dtype, device)
    assert_one_digest(layer, layer, hidden_TH, record_property)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled(name, device, record_property):
    """On a CPU without code generation: its loops are Inductor's own."""
    layer, hidden_TH = made(name, torch.bfloat16, device)
    captured = Captured()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else captured.backend)
    assert_one_digest(layer, compiled, hidden_TH, record_property)


def test_what_is_drawn_is_seen():
    """The control: a router whose input is disturbed in training."""
    layer, hidden_TH = made("dbrx", torch.float32, "cpu")
    layer.train()
    assert len({trained(layer, layer, hidden_TH) for _ in range(5)}) == 5
    layer.eval()
    assert len({trained(layer, layer, hidden_TH) for _ in range(5)}) == 1


def test_one_bit_is_seen():
    tensor = torch.ones(3, dtype=torch.bfloat16)
    other = tensor.clone()
    other.view(torch.int16)[1] ^= 1
    assert digest([tensor]) != digest([other]) and digest([tensor]) == digest([tensor.clone()])
