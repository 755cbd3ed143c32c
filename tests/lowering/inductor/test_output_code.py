"""Generated code is collected, and who collected it before still gets it."""

import torch
from torch._inductor.graph import GraphLowering

from lowering.inductor.offline import launches
from lowering.inductor.output_code import collect_output_code
from tests.support.two_layers import Model


def test_code_is_collected_inside_the_block_alone(monkeypatch):
    others = []
    monkeypatch.setattr(GraphLowering, "save_output_code", others.append)
    model = Model().eval()
    torch._dynamo.reset()
    with torch.no_grad(), collect_output_code() as outer, collect_output_code() as inner:
        torch.compile(model)(*model.inputs)
    assert len(inner) == 1 and inner == outer == others
    assert "torch.ops.diffulex.moe_expert_up" in inner[0]
    assert GraphLowering.save_output_code == others.append
    torch._dynamo.reset()


def test_launches_of_a_wrapper():
    calls = ["b.run(1)", "a.run()", "c.run()", "b.run()"]
    kernels = [f"{name} = async_compile.triton('{name}', '')" for name in "ab"]
    assert launches("\n".join([*calls, *kernels])) == ("b", "a", "b")
    assert launches("#include <torch/all.h>\nint main() { return 0; }") == ()
