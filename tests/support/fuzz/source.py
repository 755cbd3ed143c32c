"""A `Form` as a program: the text of a module with `Model`, `make()` and, where inputs are chosen, a main part."""

from __future__ import annotations

import textwrap

from .draw import GATED, PLAIN, Block, Form

HEAD = '''\
"""{title}"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import use_experts_implementation

import diffulex  # noqa: F401

DTYPE = torch.{dtype}
moe = torch.ops.diffulex


def param(generator, *shape):
    return nn.Parameter((torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(DTYPE))


def grouped_mm(rows, weight, offsets):
    if {torch_mm} and rows.dtype == torch.bfloat16:
        return torch._grouped_mm(rows, weight, offs=offsets)
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, offsets)


def rms(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer(x, weight):
    return F.layer_norm(x, x.shape[-1:], weight)


'''

LOOP = """\
    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for e in range({experts}):
            token, slot = torch.where(ids == e)
            pre = {up}
            out.index_add_(0, token, (({down}) * weights[token, slot, None]).to(out.dtype))
        return out


"""

TAIL = '''\


def make():
    """The model, and inputs to choose from, [2048, H]."""
    model = Model(torch.Generator().manual_seed({seed})).eval().requires_grad_(False)
    return model, torch.randn(2048, {hidden}, generator=torch.Generator().manual_seed({seed} + 1)).to(DTYPE)
'''

MAIN = """

if __name__ == "__main__":
    model, pool = make()
    compiled = torch.compile(model, fullgraph=True, dynamic={dynamic})
    for tokens in {calls}:
        with torch.no_grad():
            pairs = zip(model(pool[tokens]), compiled(pool[tokens]), strict=True)
            print(len(tokens), [float((a.double() - b.double()).abs().sum()) for a, b in pairs])
"""


def write(form: Form, calls: tuple[tuple[int, ...], ...] = ()) -> str:
    """The program of a form; `calls`: the rows of the inputs to choose from that each call takes."""
    init, body, outputs, classes = [], ["x = hidden"], [], []
    for index, block in enumerate(form.blocks):
        writer = _BlockWriter(block, index, hidden=form.hidden)
        writer.write()
        init += writer.init
        body += writer.body
        outputs += writer.outputs
        classes += writer.classes
    body.append(f"return {', '.join(['x', *outputs])},")
    steps = {step for block in form.blocks for step in block.steps}
    torch_mm = "torch_mm" in steps and "dropped" not in steps  # it leaves rows of no expert undefined
    text = HEAD.format(title=f"Seed {form.seed}", dtype=form.dtype, torch_mm=torch_mm)
    text += "".join(classes)
    text += "class Model(nn.Module):\n    def __init__(self, generator):\n        super().__init__()\n"
    text += textwrap.indent("\n".join(init), " " * 8) + "\n\n    def forward(self, hidden, seen=None):\n"
    text += textwrap.indent("\n".join(body), " " * 8) + "\n"
    text += TAIL.format(seed=form.seed, hidden=form.hidden)
    if calls:
        lists = [list(rows) for rows in calls]
        text += MAIN.format(dynamic=True if form.dynamic else None, calls=lists)
    return text


class _BlockWriter:
    """The lines of one block: values are called by what they are and the number of the block."""

    def __init__(self, block: Block, index: int, *, hidden: int) -> None:
        self.block, self.index, self.hidden = block, index, hidden
        self.init: list[str] = []
        self.body: list[str] = []
        self.outputs: list[str] = []
        self.classes: list[str] = []
        self.rows = block.width * (2 if block.gated else 1)
        self.known: dict[str, str] = {}

    def write(self) -> None:
        """Fill the lists."""
        block, i = self.block, self.index
        self.say(f"x{i} = x", f"h{i} = {self.norm(block.pre_norm, 'pre', 'x')}")
        self.router()
        {"spine": self.spine, "interface": self.interface, "ops": self.ops}[block.style]()
        self.around()
        for name in block.extras:
            if name in self.known:
                self.outputs.append(self.known[name])
        for name in block.dead:
            if name in self.known:
                self.say(f"dead{i} = {self.known[name]} * 2")

    def say(self, *lines: str) -> None:
        self.body += lines

    def param(self, name: str, *shape: int) -> str:
        """The attribute of a parameter of this shape."""
        self.init.append(f"self.{name}{self.index} = param(generator, {', '.join(map(str, shape))})")
        return f"self.{name}{self.index}"

    def laid_out(self, name: str, layout: str, shape: tuple[int, int, int]) -> str:
        """A weight [E, rows, columns] in another layout of its storage."""
        experts, rows, columns = shape
        if layout == "transposed":
            return self.param(name, experts, columns, rows) + ".transpose(1, 2)"
        if layout == "padded":
            return self.param(name, experts, rows, columns + 8) + f"[..., :{columns}]"
        if layout == "strided":
            return self.param(name, experts, 2 * rows, columns) + "[:, ::2]"
        return self.param(name, experts, rows, columns)

    def norm(self, kind: str, name: str, value: str) -> str:
        if not kind:
            return value
        weight = self.param(f"{name}_norm", self.hidden)
        return f"{kind}({value}, {weight})"

    def router(self) -> None:
        block, i = self.block, self.index
        if block.shares_router:
            self.say(f"w{i}, ids{i} = w{i - 1}, ids{i - 1}")
            return
        gate = self.param("gate", block.experts, self.hidden)
        self.init.append(f"self.gate{i}.data = 4 * self.gate{i}")  # choices far from ties
        if block.gate_in == "float_weight":
            self.init.append(f"self.gate{i} = nn.Parameter(self.gate{i}.float())")
        linear = f"F.linear(h{i}, {gate})" if block.gate_in == "model" else f"F.linear(h{i}.float(), {gate}.float())"
        self.say(f"logits{i} = {linear}")
        self.known["logits"] = f"logits{i}"
        self.scores()
        self.weights()
        self.known |= {name: f"{name}{i}.sort(-1)[0]" if block.unsorted else f"{name}{i}" for name in ("w", "ids")}

    def scores(self) -> None:
        """Scores [T, E] of all experts in fp32, and the choice by them, or by scores that a bias was added to."""
        block, i, bias = self.block, self.index, ""
        if block.router_bias or block.per_expert:
            self.init.append(f"self.bias{i} = nn.Parameter(torch.rand({block.experts}, generator=generator))")
        if block.router_bias:
            bias = f" + self.bias{i}"
        if block.router in ("topk_softmax", "sigmoid_after"):
            self.say(f"choice{i} = logits{i}.float(){bias}" if bias else f"choice{i} = logits{i}")
            self.choose()
            return
        self.say(
            {
                "softmax": f"probs{i} = logits{i}.softmax(-1, dtype=torch.float32)",
                "softmax_written_out": f"exp{i} = logits{i}.float() - logits{i}.float().amax(-1, keepdim=True)\n"
                f"exp{i} = exp{i}.exp()\n"
                f"probs{i} = exp{i} / exp{i}.sum(-1, keepdim=True)",
                "sigmoid": f"probs{i} = logits{i}.float().sigmoid()",
                "sqrtsoftplus": f"probs{i} = F.softplus(logits{i}.float()).sqrt()",
                "squared": f"probs{i} = logits{i}.float().softmax(-1).square()",
            }[block.router]
        )
        self.known["probs"] = f"probs{i}"
        self.say(f"choice{i} = probs{i}{bias}")
        if block.groups > 1:
            self.grouped()
        self.choose()

    def grouped(self) -> None:
        """All but the best of the groups are filled."""
        block, i = self.block, self.index
        size = block.experts // block.groups
        top = f"topk({min(2, size)}, dim=-1)[0].sum(-1)" if block.group_score == "top2" else "amax(-1)"
        self.say(
            f"groups{i} = choice{i}.view(-1, {block.groups}, {size}).{top}",
            f"if seen is not None:\n    seen.append((groups{i}, 1))",
            f"mask{i} = torch.zeros_like(groups{i}).scatter_(1, groups{i}.topk(1, dim=-1, sorted=False)[1], 1)",
            f"mask{i} = mask{i}.unsqueeze(-1).expand(-1, {block.groups}, {size}).reshape(-1, {block.experts})",
            f'choice{i} = choice{i}.masked_fill(~mask{i}.bool(), float("{block.fill}"))',
        )

    def choose(self) -> None:
        block, i = self.block, self.index
        flag = ", sorted=False" if block.unsorted else ""
        self.say(
            f"if seen is not None:\n    seen.append((choice{i}, {block.top_k}))",
            f"w{i}, ids{i} = choice{i}.topk({block.top_k}, dim=-1{flag})",
        )

    def weights(self) -> None:
        block, i = self.block, self.index
        if block.router == "topk_softmax":
            value = f"logits{i}.gather(1, ids{i})" if block.router_bias else f"w{i}"
            self.say(f"w{i} = {value}.softmax(-1, dtype=torch.float32)")
        elif block.router == "sigmoid_after":
            value = f"logits{i}.gather(1, ids{i})" if block.router_bias else f"w{i}"
            self.say(f"w{i} = {value}.float().sigmoid()")
        elif block.router_bias or block.groups > 1:
            self.say(f"w{i} = probs{i}.gather(1, ids{i})")
        total = f"w{i}.sum(-1, keepdim=True)"
        divided = {"sum": total, "eps": f"({total} + 1e-6)", "clamp": f"{total}.clamp(min=1e-3)"}
        if block.renorm:
            self.say(f"w{i} = w{i} / {divided[block.renorm]}")
        if block.scale != 1.0:
            self.say(f"w{i} = w{i} * {block.scale}")
        if block.per_expert:
            self.say(f"w{i} = w{i} * self.bias{i}[ids{i}]")
        if block.narrow_weights:
            self.say(f"w{i} = w{i}.to(h{i}.dtype)")

    def activation(self) -> str:
        """`pre` [N, J] to `act` [N, I]."""
        block, i = self.block, self.index
        if not block.gated:
            self.say(f"p = pre{i}", f"act{i} = {PLAIN[block.act]}")
        else:
            halves = f"pre{i}[..., ::2], pre{i}[..., 1::2]" if block.interleaved else f"pre{i}.chunk(2, -1)"
            self.say(f"g, u = {halves}", f"act{i} = {GATED[block.act]}")
        return f"act{i}"

    def spine(self) -> None:
        """The grouped-GEMM spine, step by step."""
        block, i, steps = self.block, self.index, set(self.block.steps)
        e, k, cast = block.experts, block.top_k, ".int()" if "int32_ids" in self.block.steps else ""
        w13 = self.laid_out("w13", block.layouts[0], (e, self.rows, self.hidden))
        w2 = self.laid_out("w2", block.layouts[1], (e, self.hidden, block.width))
        stable = "stable_sort" in steps or {"pre", "act", "mixed"} & {*block.extras}  # else any order is right
        self.dropped()
        self.say(f"sorted{i}, perm{i} = torch.sort(kept{i}.reshape(-1){cast}{', stable=True' * bool(stable)})")
        self.say(f"offs{i} = torch.histc(sorted{i}.float(), {e}, 0, {e - 1}).cumsum(0, dtype=torch.int32)")
        token = f"torch.floor_divide(perm{i}, {k})" if "floor_divide" in steps else f"perm{i} // {k}"
        rows = f"h{i}.repeat_interleave({k}, 0)[perm{i}]" if "repeated_rows" in steps else f"h{i}[{token}]"
        self.say(f"rows{i} = {rows}")
        if "masked_rows" in steps:
            self.say(f"rows{i} = rows{i}.masked_fill((sorted{i} >= {e}).unsqueeze(-1), 0.0)")
        if "relu_of_rows" in steps:
            self.say(f"rows{i} = F.relu(rows{i})")
        clamp = f".clamp(0, {e - 1})" if {"clamped_bias", "dropped"} & steps else ""
        self.say(f"pre{i} = grouped_mm(rows{i}, {w13}.transpose(1, 2), offs{i})")
        if block.bias:
            self.say(f"pre{i} = pre{i} + {self.param('b13', e, self.rows)}[sorted{i}{clamp}]")
        self.activation()
        self.say(f"down{i} = grouped_mm(act{i}, {w2}.transpose(1, 2), offs{i})")
        if block.bias:
            self.say(f"down{i} = down{i} + {self.param('b2', e, self.hidden)}[sorted{i}{clamp}]")
        self.back(steps)
        self.known |= {"pre": f"pre{i}", "act": f"act{i}", "offsets": f"offs{i}"}

    def dropped(self) -> None:
        kept = f"ids{self.index}.masked_fill(ids{self.index} == 0, {self.block.experts})"
        self.say(f"kept{self.index} = " + (kept if "dropped" in self.block.steps else f"ids{self.index}"))

    def back(self, steps: set[str]) -> None:
        """Rows in expert order, weighted, to a sum for each token."""
        block, i, k = self.block, self.index, self.block.top_k
        weight = f"w{i}.reshape(-1, 1)[perm{i}]"
        if "weights_as_column" not in steps:
            weight = f"w{i}.reshape(-1)[perm{i}].unsqueeze(-1)"
        if "scaled_rows" in steps:
            self.say(f"down{i} = down{i} * 0.5")
        self.say(f"mixed{i} = down{i} * {weight}")
        if "masked_product" in steps:
            self.say(f"mixed{i} = mixed{i}.masked_fill((sorted{i} >= {block.experts}).unsqueeze(-1), 0.0)")
        if "index_add" in steps:
            self.say(f"routed{i} = torch.zeros_like(h{i}, dtype=mixed{i}.dtype).index_add(0, perm{i} // {k}, mixed{i})")
        else:
            self.say(
                f"inverse{i} = torch.empty_like(perm{i})",
                f"inverse{i}[perm{i}] = torch.arange(perm{i}.shape[0], device=perm{i}.device)",
                f"slots{i} = mixed{i}[inverse{i}].view(-1, {k}, {self.hidden})",
                f"routed{i} = slots{i}.sum(1{', dtype=torch.float32' * ('sum_in_fp32' in steps)})",
            )
        self.say(f"routed{i} = routed{i}.to(h{i}.dtype)")
        self.known |= {"mixed": f"mixed{i}", "routed": f"routed{i}"}

    def ops(self) -> None:
        """The stage ops, with the activation outside."""
        block, i, e = self.block, self.index, self.block.experts
        w13 = self.laid_out("w13", block.layouts[0], (e, self.rows, self.hidden))
        w2 = self.laid_out("w2", block.layouts[1], (e, self.hidden, block.width))
        b13, b2 = (
            (self.param("b13", e, self.rows), self.param("b2", e, self.hidden)) if block.bias else ("None", "None")
        )
        self.dropped()
        self.say(f"order{i}, _, offs{i} = moe.moe_dispatch(kept{i}, {e})")
        self.say(f"pre{i} = moe.moe_expert_up(h{i}, {w13}, {b13}, order{i}, offs{i}, {block.top_k})")
        self.activation()
        self.say(f"mixed{i} = moe.moe_expert_down(act{i}, {w2}, {b2}, order{i}, offs{i})")
        self.say(f"routed{i} = moe.moe_combine(mixed{i}, w{i})")
        names = {"pre": "pre", "act": "act", "offsets": "offs", "mixed": "mixed", "routed": "routed"}
        self.known |= {name: f"{value}{i}" for name, value in names.items()}

    def interface(self) -> None:
        """A module behind transformers' experts interface, as remote code has it."""
        block, i, e, transposed = self.block, self.index, self.block.experts, self.block.layouts[0] == "transposed"
        up, name = (self.hidden, self.rows), "gate_up_proj" if block.gated else "up_proj"
        down = (block.width, self.hidden)
        shapes = {name: up if transposed else up[::-1], "down_proj": down if transposed else down[::-1]}
        lines = [f"        self.{key} = param(generator, {e}, {', '.join(map(str, s))})" for key, s in shapes.items()]
        if block.bias:
            biases = {f"{name}_bias": self.rows, "down_proj_bias": self.hidden}
            lines += [f"        self.{key} = param(generator, {e}, {size})" for key, size in biases.items()]
        if block.gated:
            halves = "x[..., ::2], x[..., 1::2]" if block.interleaved else "x.chunk(2, -1)"
            act = f"    def _apply_gate(self, x):\n        g, u = {halves}\n        return {GATED[block.act]}\n"
        else:
            act = f"    def act_fn(self, p):\n        return {PLAIN[block.act]}\n"
        w13, w2 = (f"self.{key}[e]" + ".t()" * (not transposed) for key in shapes)
        b13, b2 = (f" + self.{key}_bias[e]" if block.bias else "" for key in (name, "down_proj"))
        run = "self._apply_gate" if block.gated else "self.act_fn"
        loop = LOOP.format(experts=e, up=f"hidden[token] @ {w13}{b13}", down=f"{run}(pre) @ {w2}{b2}")
        options = f"is_transposed={transposed}, has_bias={block.bias}, has_gate={block.gated}"
        self.classes.append(
            f"@use_experts_implementation({options}, is_concatenated={not block.interleaved})\n"
            f"class Experts{i}(nn.Module):\n    def __init__(self, config, generator):\n        super().__init__()\n"
            f"        self.num_experts = {e}\n" + "\n".join(lines) + f"\n\n{act}\n{loop}"
        )
        config = 'SimpleNamespace(_experts_implementation="grouped_mm")'
        self.init.append(f"self.experts{i} = Experts{i}({config}, generator)")
        self.say(f"routed{i} = self.experts{i}(h{i}, ids{i}, w{i})")
        self.known["routed"] = f"routed{i}"

    def around(self) -> None:
        """Shared experts, residual, scale and norm."""
        block, i = self.block, self.index
        if block.shared:
            up, gate = (
                self.param("shared_up", block.width, self.hidden),
                self.param("shared_gate", block.width, self.hidden),
            )
            down = self.param("shared_down", self.hidden, block.width)
            self.say(f"shared{i} = F.linear(F.silu(F.linear(h{i}, {gate})) * F.linear(h{i}, {up}), {down})")
            if block.shared == "gated":
                mix = self.param("shared_mix", 1, self.hidden)
                self.say(f"shared{i} = torch.sigmoid(F.linear(h{i}, {mix})) * shared{i}")
        out = f"routed{i}"
        if block.out_scale != 1.0:
            out = f"{out} * {block.out_scale}"
        if block.shared:
            out = f"shared{i} + {out}" if block.shared_first else f"{out} + shared{i}"
        if block.residual:
            out = f"x{i} + {out}"
        self.say(f"x = {out}")
        if block.post_norm:
            self.say(f"x = {self.norm(block.post_norm, 'post', 'x')}")
