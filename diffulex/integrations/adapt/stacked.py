"""Experts that are modules of Linears: their weights as views of one tensor per layer, which the ops read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .form import Adapted, Gate, activation_name, run_experts

# gate, up and down, or up and down of experts without a gate, as modules call them
_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("linear", "linear_v", "linear_1"),
    ("wi_0", "wi_1", "wo"),
    ("up_proj", "down_proj"),
    ("w1", "w2"),
    ("wi", "wo"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
)


@dataclasses.dataclass(frozen=True)
class StackedOptions:
    """at: name of the list of experts, empty for the module itself; ups, down: their Linears; act, dropout: between."""

    at: str
    ups: tuple[str, ...]
    down: str
    act: str
    dropout: str = ""
    extra: Any = None


def stacked_options(experts: list[nn.Module], at: str, *, extra: Any = None) -> StackedOptions | None:
    """How a layer's experts are made, if all are made alike of two or three Linears and an activation."""
    if not experts or any(type(expert) is not type(experts[0]) for expert in experts):
        return None
    first = experts[0]
    linears = {name for name, child in first.named_children() if type(child) is nn.Linear}
    names = next((names for names in _NAMES if set(names) == linears), None)
    act = activation_name(first)
    others = {name: child for name, child in first.named_children() if name not in linears and name != act}
    dropout = next((name for name, child in others.items() if isinstance(child, nn.Dropout)), "")
    if names is None or act is None or set(others) - {dropout} or dict(first.named_parameters(recurse=False)):
        return None
    options = StackedOptions(at, names[:-1], names[-1], act, dropout, extra)
    shapes = {tuple(_facts(getattr(expert, name)) for name in names) for expert in experts}
    return options if len(shapes) == 1 else None


def _facts(linear: nn.Linear) -> tuple[Any, ...]:
    return tuple(linear.weight.shape), linear.weight.dtype, linear.weight.device, linear.bias is not None


class StackedExperts(Adapted):
    """Base of the forms whose experts are modules of their own.

    Inference reads `adapted_*`, tensors that are no part of the state dict; training stacks the parameters each step.
    """

    options: ClassVar[StackedOptions]

    def experts_list(self) -> list[Any]:
        """The modules of the experts, in order."""
        return list((self.get_submodule(self.options.at) if self.options.at else self).children())

    def linears(self) -> dict[str, list[list[nn.Linear]]]:
        """`w13`: the Linears of each expert whose rows lie one under the other, `w2`: the one behind them."""
        experts = self.experts_list()
        return {
            "w13": [[getattr(expert, name) for name in self.options.ups] for expert in experts],
            "w2": [[getattr(expert, self.options.down)] for expert in experts],
        }

    def prepare(self) -> None:
        """Move the weights of all experts into one tensor each for `w13`, `w2` and their biases."""
        with torch.no_grad():
            for name, rows in self.linears().items():
                self._stack(f"adapted_{name}", [[linear.weight for linear in row] for row in rows])
                if rows[0][0].bias is not None:
                    self._stack(f"adapted_{name}_bias", [[linear.bias for linear in row] for row in rows])

    def _stack(self, name: str, rows: list[list[Tensor]]) -> None:
        whole = torch.stack([torch.cat(row) for row in rows])
        for own, row in zip(whole, rows, strict=True):
            for parameter, part in zip(row, own.split([p.shape[0] for p in row]), strict=True):
                parameter.data = part
        self.register_buffer(name, whole, persistent=False)

    def restore(self) -> None:
        """Give every parameter a tensor of its own again."""
        for name in [name for name in self._buffers if name.startswith("adapted_")]:
            delattr(self, name)
        for rows in self.linears().values():
            for linear in (linear for row in rows for linear in row):
                for parameter in linear.parameters():
                    parameter.data = parameter.data.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.prepare()
        return result

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(dict(state))
        self.prepare()  # copies of parameters are no views

    def plain(self) -> bool:
        """Whether the experts are still what they were, and not wrapped by adapters or quantised since."""
        return all(type(linear) is nn.Linear for rows in self.linears().values() for row in rows for linear in row)

    def weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """`w13` [E, J, H] or `w2` [E, H, I] in the dtype of the experts, and its bias [E, J] or [E, H]."""
        rows = self.linears()[name]
        biased = rows[0][0].bias is not None
        if torch.is_grad_enabled() and any(linear.weight.requires_grad for row in rows for linear in row):
            weight = torch.stack([_joined([linear.weight for linear in row]) for row in rows])
            return weight, torch.stack([_joined([linear.bias for linear in row]) for row in rows]) if biased else None
        if not torch.compiler.is_compiling() and not self._aligned(rows, getattr(self, f"adapted_{name}")):
            self.prepare()
        return getattr(self, f"adapted_{name}"), getattr(self, f"adapted_{name}_bias") if biased else None

    def _aligned(self, rows: list[list[nn.Linear]], whole: Tensor) -> bool:
        """Whether parameters still are the views that they were made: code may have given them other tensors."""
        return all(row[0].weight.data_ptr() == own.data_ptr() for row, own in zip(rows, whole, strict=True))

    def stacked(self, hidden_TH: Tensor, ids_TK: Tensor, *, weights_TK: Tensor) -> Tensor:
        """hidden [T, H] floating, ids [T, K] int, weights [T, K] floating, to [T, H] in hidden's dtype."""
        (w13_EJH, b13_EJ), (w2_EHI, b2_EH) = self.weights("w13"), self.weights("w2")
        return run_experts(
            hidden_TH,
            ids_TK,
            weights_TK=weights_TK,
            w13_EJH=w13_EJH,
            w2_EHI=w2_EHI,
            gate=self._gate(),
            b13_EJ=b13_EJ,
            b2_EH=b2_EH,
        )

    def _gate(self) -> Gate:
        first, options = self.experts_list()[0], self.options
        act = getattr(first, options.act)

        def gate(pre_NJ: Tensor) -> Tensor:
            if len(options.ups) == 2:
                gate_NI, up_NI = pre_NJ.chunk(2, dim=-1)
                act_NI = act(gate_NI) * up_NI
            else:
                act_NI = act(pre_NJ)
            return getattr(first, options.dropout)(act_NI) if options.dropout else act_NI

        return gate


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
