"""Experts that are modules of Linears: their weights as views of one tensor per layer, which the ops read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .expert import ExpertShape
from .form import PREFIX, Adapted, random_hidden, run_experts, watched

_SEEN = "_adapted_seen"
_KINDS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)  # Tensor: as functional_call passes them
Rows = list[list[nn.Linear]]


@dataclasses.dataclass(frozen=True)
class StackedOptions:
    """at: name of the list of experts, empty for the module itself; kind: their class; shape: how one computes."""

    at: str
    kind: type[nn.Module]
    shape: ExpertShape
    extra: Any = None


class _Hung(NamedTuple):
    """A Linear, where it and its parameters hang, and the addresses of their values, 0 for a bias that is not there."""

    modules: dict[str, Any]
    name: str
    linear: nn.Linear
    parameters: dict[str, Any]
    weight: nn.Parameter
    weight_at: int
    bias: nn.Parameter | None
    bias_at: int


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What was there when parameters became views: a look at it is much shorter than at what is there now.

    parts    the experts and all modules in them
    linears  those of an expert one after the other
    values   their parameters
    wholes   the tensors [E, ...] of any dtype
    """

    experts: list[nn.Module]
    parts: list[nn.Module]
    linears: list[_Hung]
    values: list[nn.Parameter]
    wholes: dict[str, Tensor | None]


class _Joined(torch.autograd.Function):
    """A tensor [E, R, ...] whose rows are the parameters, as if it were made of them: gradients go to the parameters.

    Nothing is copied: the parameters are views of it.
    """

    generate_vmap_rule = True  # forward without a context, and this: as the transforms of torch.func want it

    @staticmethod
    def forward(whole: Tensor, sizes: list[int], *parts: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.sizes = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(part for own in grads[0].unbind(0) for part in own.split(ctx.sizes)))


class StackedExperts(Adapted):
    """Base of the forms whose experts are modules of their own.

    `adapted_*` are tensors that are no part of the state dict, and the parameters views of them. Where a parameter was
    given another tensor since, its layer's weights are stacked for the call.
    """

    options: ClassVar[StackedOptions]

    def experts_list(self) -> list[nn.Module]:
        """The modules of the experts, in order."""
        return list_of_experts(self.get_submodule(self.options.at))

    def banks(self) -> dict[str, Rows]:
        """`w13`: the Linears of each expert whose rows lie one under the other, `w2`: the one behind them."""
        experts, shape = [expert._modules for expert in self.experts_list()], self.options.shape
        found: Any = {
            "w13": [[expert.get(name) for name in shape.ups] for expert in experts],
            "w2": [[expert.get(shape.down)] for expert in experts],
        }
        return found

    def prepare(self) -> None:
        """Move the weights of all experts into one tensor each for `w13`, `w2` and their biases."""
        if self._as_seen():
            return
        vars(self).pop(_SEEN, None)
        if self.state() == "own":
            self._buffers.update({name: None for name in self._buffers if name.startswith(PREFIX)})
            return
        if _realign not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_realign)
        with torch.no_grad():
            for name, rows in self.banks().items():
                self._stack(_key(name, "weight"), [[linear.weight for linear in row] for row in rows])
                if rows[0][0].bias is not None:
                    self._stack(_key(name, "bias"), [[linear.bias for linear in row] for row in rows])
        self._look()

    def _stack(self, name: str, rows: list[list[Tensor]]) -> None:
        first, sizes = rows[0][0], [part.shape[0] for part in rows[0]]
        whole = self._buffers.get(name)
        shape = (len(rows), sum(sizes), *first.shape[1:])
        if whole is None or (whole.shape, whole.dtype, whole.device) != (shape, first.dtype, first.device):
            whole = first.new_empty(shape)
        for own, row in zip(whole, rows, strict=True):
            for parameter, part in zip(row, own.split(sizes), strict=True):
                part.copy_(parameter)
                parameter.data = part
        self.register_buffer(name, whole, persistent=False)

    def _look(self) -> None:
        """Remember what is there, for `_as_seen`."""
        experts, shape = self.experts_list(), self.options.shape
        parts = [part for expert in experts for part in expert.modules()]
        linears: Any = [(e._modules, name, e._modules[name]) for e in experts for name in (*shape.ups, shape.down)]
        values = [value for *_, linear in linears for value in (linear.weight, linear.bias) if value is not None]
        if any(isinstance(value, FakeTensor) for value in values):  # has no address
            return
        hung = [
            _Hung(modules, name, linear, linear._parameters, weight, weight.data_ptr(), bias, _at(bias))
            for modules, name, linear in linears
            for weight, bias in ((linear.weight, linear.bias),)
        ]
        wholes = {name: buffer for name, buffer in self._buffers.items() if name.startswith(PREFIX)}
        setattr(self, _SEEN, _Seen(experts, parts, hung, values, wholes))

    def _as_seen(self) -> bool:
        """Whether everything is as when the parameters became views."""
        seen: _Seen | None = vars(self).get(_SEEN)
        if seen is None or not _identical(self.experts_list(), seen.experts):
            return False
        kind = self.options.kind
        if any(type(expert) is not kind for expert in seen.experts) or any(watched(part) for part in seen.parts):
            return False
        for modules, name, linear, parameters, weight, weight_at, bias, bias_at in seen.linears:
            # most of what an eager call asks, so that it is asked without further calls
            if (
                modules.get(name) is not linear
                or type(linear) is not nn.Linear
                or parameters.get("weight") is not weight
                or parameters.get("bias") is not bias
                or weight.data_ptr() != weight_at
                or (bias is not None and bias.data_ptr() != bias_at)
            ):
                return False
        return all(whole is not None and self._buffers.get(name) is whole for name, whole in seen.wholes.items())

    def restore(self) -> None:
        """Give every parameter a tensor of its own again."""
        wholes = {name: buffer for name, buffer in self._buffers.items() if name.startswith(PREFIX)}
        for name in wholes:
            delattr(self, name)
        vars(self).pop(_SEEN, None)
        for key in [key for key, hook in self._load_state_dict_post_hooks.items() if hook is _realign]:
            del self._load_state_dict_post_hooks[key]
        moved = {whole.untyped_storage().data_ptr() for whole in wholes.values() if whole is not None}
        for parameter in self.get_submodule(self.options.at).parameters():
            if type(parameter) is nn.Parameter and parameter.untyped_storage().data_ptr() in moved:
                parameter.data = parameter.data.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = [name for name in self._buffers if name.startswith(PREFIX)]
        kept = {name: self._buffers.pop(name) for name in names}  # parameters are converted, and the rest made of them
        result = super()._apply(fn, recurse)
        for name, whole in kept.items():
            self.register_buffer(name, whole, persistent=False)
        if not self._as_seen():
            kept.clear()
            vars(self).pop(_SEEN, None)
            self._buffers.update(dict.fromkeys(names))  # before new ones are made, the old ones' memory is free
            self.prepare()
        return result

    def __reduce__(self) -> Any:
        """Copies are made of the parameters, and the tensors that they are views of made anew."""
        rebuild, arguments, state = super().__reduce__()
        buffers = {name: buffer for name, buffer in self._buffers.items() if not name.startswith(PREFIX)}
        return rebuild, arguments, {key: value for key, value in state.items() if key != _SEEN} | {"_buffers": buffers}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(dict(state))
        self.prepare()

    def unwatched(self) -> bool:
        """Whether the experts are what they were: plain Linears, without hooks, all of one dtype on one device."""
        return self.state() != "own"

    @torch.compiler.assume_constant_result
    def state(self) -> str:
        """`whole`: the parameters are views of the tensors; `apart`: some are not; `own`: the module's code must run.

        Compiled code keeps the state that it was compiled in.
        """
        if self._as_seen():
            return "whole"
        if any(type(expert) is not self.options.kind for expert in self.experts_list()):
            return "own"
        facts: dict[tuple[str, str], set[Any]] = {}
        for name, rows in self.banks().items():
            for linear in (linear for row in rows for linear in row):
                if type(linear) is not nn.Linear:
                    return "own"
                for kind, parameter in linear._parameters.items():
                    if parameter is not None and type(parameter) not in _KINDS:
                        return "own"
                    fact = None if parameter is None else (parameter.dtype, parameter.device)
                    facts.setdefault((name, kind), set()).add(fact)
        if any(watched(part) for expert in self.experts_list() for part in expert.modules()):
            return "own"
        alike = all(len(found) == 1 for found in facts.values()) and len(set.union(*facts.values()) - {None}) == 1
        return "apart" if alike else "own"

    def _is_whole(self, banks: dict[str, Rows]) -> bool:
        """Whether the tensors are what the parameters say, those included that `functional_call` puts in their place.

        Compiled code without gradients looks at the first parameter of a layer alone.
        """
        if self.state() != "whole":
            return False
        seen: _Seen = getattr(self, _SEEN)
        if not torch.is_grad_enabled():
            return banks["w13"][0][0].weight is seen.values[0]
        found = [
            parameter
            for ups, (down,) in zip(banks["w13"], banks["w2"], strict=True)
            for linear in (*ups, down)
            for parameter in (linear.weight, linear.bias)
            if parameter is not None
        ]
        return all(parameter is value for parameter, value in zip(found, seen.values, strict=True))

    def _read(self, name: str, kind: str, rows: Rows, *, whole: bool) -> Tensor | None:
        """`w13` [E, J, H] or `w2` [E, H, I] in the dtype of the experts, or its bias [E, J] or [E, H] if it has one."""
        if getattr(rows[0][0], kind) is None:
            return None
        if whole and not torch.is_grad_enabled():
            return self._buffers[_key(name, kind)]
        parts = [[getattr(linear, kind) for linear in row] for row in rows]
        if not whole:
            return torch.stack([row[0] if len(row) == 1 else torch.cat(row) for row in parts])
        sizes = [part.shape[0] for part in parts[0]]
        joined: Any = _Joined.apply(self._buffers[_key(name, kind)], sizes, *(part for row in parts for part in row))
        return joined

    def stacked(self, hidden_TH: Tensor, ids_TK: Tensor, *, weights_TK: Tensor) -> Tensor:
        """hidden [T, H] floating, ids [T, K] int, weights [T, K] floating, to [T, H] in hidden's dtype."""
        banks = self.banks()
        whole = self._is_whole(banks)
        w13_EJH, b13_EJ, w2_EHI, b2_EH = (
            self._read(name, kind, rows, whole=whole) for name, rows in banks.items() for kind in ("weight", "bias")
        )
        assert w13_EJH is not None and w2_EHI is not None
        return run_experts(
            hidden_TH,
            ids_TK,
            weights_TK=weights_TK,
            w13_EJH=w13_EJH,
            w2_EHI=w2_EHI,
            gate=self._gated,
            b13_EJ=b13_EJ,
            b2_EH=b2_EH,
        )

    def _gated(self, pre_NJ: Tensor) -> Tensor:
        return self.options.shape.gated(self.experts_list()[0], pre_NJ)


def _key(name: str, kind: str) -> str:
    return f"{PREFIX}{name}" if kind == "weight" else f"{PREFIX}{name}_bias"


def _at(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def _identical(left: list[nn.Module], right: list[nn.Module]) -> bool:
    return len(left) == len(right) and all(one is other for one, other in zip(left, right, strict=True))


def _realign(module: Any, _: Any) -> None:
    """After a state is loaded: parameters that were replaced become views again, of the same tensors where they fit."""
    module.prepare()


def list_of_experts(container: Any) -> list[nn.Module]:
    """The children of a list or dict of modules, in order, one as often as it is there; dropout beside them is none."""
    children = container.values() if isinstance(container, nn.ModuleDict) else container
    return [child for child in children if not isinstance(child, nn.Dropout)]


def each_expert(module: Any, generator: torch.Generator, *, options: StackedOptions) -> Tensor:
    """One random row [E, H] in the weights' dtype through each expert: by itself, or, once adapted, by the ops."""
    experts = list_of_experts(module.get_submodule(options.at))
    weight = next(experts[0].parameters())
    hidden_EH = random_hidden(weight, generator, len(experts), options.shape.hidden)
    if not isinstance(module, StackedExperts):
        return torch.cat([expert(row) for expert, row in zip(experts, hidden_EH.split(1), strict=True)])
    ids_E1 = torch.arange(len(experts), device=weight.device).unsqueeze(1)
    return module.stacked(hidden_EH, ids_E1, weights_TK=torch.ones_like(ids_E1, dtype=weight.dtype))
