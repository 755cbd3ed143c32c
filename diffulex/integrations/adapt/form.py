"""What a form of experts is: a class whose forward calls the ops, mixed into a module's own, and how to check it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lowering import ops
from lowering._checks import FLOATS
from lowering.errors import Reason, ReasonCode
from lowering.state import is_enabled

from ..transformers import DEVICES

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")  # under these names modules keep their activation
TOKENS = 16  # of a random input
PREFIX = "adapted_"  # of the names of buffers that forms add to modules

Gate = Callable[[Tensor], Tensor]


class Adapted(nn.Module):
    """Base of the forms. `stock` is the module's own class and `options` what was recognised of it.

    The module keeps its parameters, buffers, hooks, children and names: `__class__` is all that changes.

    adapted_form      what reports call the form; empty for modules that are part of another's form
    called_by_parent  the module around it calls its methods, so that the compiler counts its ops to that module
    bypassed          children whose own forward the form does without
    trains            whether the form computes what the module's own code does in training too
    own_training      why not
    """

    stock: ClassVar[Any]
    options: ClassVar[Any]
    adapted_form: ClassVar[str] = ""
    called_by_parent: ClassVar[bool] = False
    bypassed: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = True
    own_training: Reason | None = None
    parameters_of_forward: ClassVar[dict[str, Any]] = {}

    if TYPE_CHECKING:  # what the stock class has

        def __getattr__(self, name: str) -> Any: ...

    def runs_ops(self, hidden: Tensor | None) -> bool:
        """Whether the ops run for hidden [..., H] of any dtype.

        Not inside `disabled()`, on devices without them, in training that the form does not reproduce, nor where
        something waits for calls of modules that the form does without.
        """
        if hidden is None or not is_enabled() or hidden.device.type not in DEVICES:
            return False
        return (self.trains or not self.training) and self.unwatched()

    @torch.compiler.assume_constant_result
    def unwatched(self) -> bool:
        """Whether no hook and no other forward waits for a call of a module that the form does without.

        Compiled code keeps the answer it was compiled with, as it does for hooks of other modules.
        """
        return not any(watched(self.get_submodule(name)) for name in self.bypassed)

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Arguments in the order of the module's own signature, however they were passed, defaults for those left out.

        None for hidden states, which `runs_ops` says no to, where the module's own code has to tell what it makes of
        them: one is missing, or there are more than the form knows.
        """
        names = self.parameters_of_forward
        given = dict(zip(names, args, strict=False))
        known = len(args) <= len(names) and all(name in names and name not in given for name in kwargs)
        values = tuple((names | given | kwargs)[name] for name in names)
        missing = any(value is inspect.Parameter.empty for value in values)
        return values if known and not missing else (None, *values[1:])

    def prepare(self) -> None:
        """Called once the module has its new class."""

    def restore(self) -> None:
        """Called before the module gets its own class back."""

    def __reduce__(self) -> Any:
        """Copies and pickles are made from the module's own class: this one has no name to be found by."""
        return _rebuild, (self.stock, form_of(type(self)), self.options, self.trains), self.__getstate__()


def form_of(kind: type[nn.Module]) -> type[Adapted]:
    """The form that an adapted module's class was made from."""
    return kind.__bases__[0]


_CLASSES: dict[Any, Any] = {}


def adapted_class(form: Any, stock: Any, *, options: Hashable, trains: bool = True) -> Any:
    """The subclass of a module's own class that computes in a form; one object for equal arguments."""
    key = (form, stock, options, trains)
    if key not in _CLASSES:
        names = {
            "__module__": stock.__module__,
            "__doc__": form.__doc__,
            "stock": stock,
            "options": options,
            "trains": trains,
            "parameters_of_forward": dict(itertools.islice(_parameters_of(stock.forward).items(), 1, None)),
        }
        _CLASSES.setdefault(key, type(stock.__name__, (form, stock), names))  # threads get one class, too
    return _CLASSES[key]


def _rebuild(stock: type[nn.Module], form: type[Adapted], options: Hashable, trains: bool) -> nn.Module:
    kind = adapted_class(form, stock, options=options, trains=trains)
    return kind.__new__(kind)


def watched(module: nn.Module) -> bool:
    """Whether calls of a module do more than its class says: hooks, or a forward of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooked) or "forward" in module.__dict__


Sample = Callable[[Any, torch.Generator], tuple[Tensor, ...]]
Run = Callable[[Any, tuple[Tensor, ...]], Any]


def call_forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The module's forward on tensors [..., H] of its dtype, without its hooks."""
    return module.forward(*inputs)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One guess of how a module computes.

    form, options  the class to mix in, and what it needs to know
    sample         random inputs for the module, of the dtype and device of its weights
    reads          the parameters, buffers and children that the form computes with, by name; it may have no others
    children       modules below it that change with it, by name
    run            calls the module on the inputs
    probe          one more thing that must not change, in eval mode, as a tensor made of hidden states [T, H]
    """

    form: type[Adapted]
    sample: Sample
    options: Any = None
    reads: tuple[str, ...] = ()
    children: tuple[tuple[str, type[Adapted]], ...] = ()
    run: Run = call_forward
    probe: Callable[[Any, torch.Generator], Tensor] | None = None


def run_experts(
    hidden_TH: Tensor,
    ids_TK: Tensor,
    *,
    weights_TK: Tensor,
    w13_EJH: Tensor,
    w2_EHI: Tensor,
    gate: Gate,
    b13_EJ: Tensor | None = None,
    b2_EH: Tensor | None = None,
) -> Tensor:
    """Experts by the ops: hidden [T, H] floating, ids [T, K] int, weights [T, K] floating, to [T, H] in hidden's dtype.

    `gate` takes the rows [N, J] in expert order to [N, I].
    """
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, w2_EHI.shape[0])
    pre_NJ = ops.moe_expert_up(hidden_TH.to(w13_EJH.dtype), w13_EJH, b13_EJ, order_N, offsets_E1, ids_TK.shape[1])
    slots_NH = ops.moe_expert_down(gate(pre_NJ).to(w2_EHI.dtype), w2_EHI, b2_EH, order_N, offsets_E1)
    return ops.moe_combine(slots_NH, weights_TK).to(hidden_TH.dtype)


def bank(module: nn.Module, name: str, *, rank: int = 3) -> Tensor | None:
    """The parameter of this name and rank, e.g. [E, J, H] in any dtype, that the module itself holds."""
    found = module._parameters.get(name)
    return found if found is not None and found.dim() == rank else None


def activation_name(module: nn.Module) -> str | None:
    """The attribute that is the module's activation."""
    return next((name for name in ACTIVATIONS if callable(getattr(module, name, None))), None)


def arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of what the module's forward takes, `*args` and `**kwargs` left out."""
    return tuple(_parameters_of(module.forward))


def _parameters_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in found if parameter.kind not in kinds}


def weights_reason(module: nn.Module) -> Reason | None:
    """Why the ops cannot take the module's weights, whatever its form."""
    for name, parameter in module.named_parameters():
        if parameter.dtype not in FLOATS:
            return Reason(ReasonCode.DTYPE, f"{name} is {parameter.dtype}, the ops take floating point weights")
        if type(parameter) is not nn.Parameter:
            return Reason(ReasonCode.STRUCTURE, f"{name} is a {type(parameter).__name__}, not a plain parameter")
        if parameter.device.type == "meta":
            return Reason(ReasonCode.UNVERIFIED, "its weights are on the meta device: load them first")
        if parameter.device.type not in DEVICES:
            return Reason(ReasonCode.DEVICE, f"device {parameter.device.type}")
    for name, child in module.named_modules():
        if "forward" in vars(child):
            return Reason(ReasonCode.STRUCTURE, f"the forward of {name or 'the module'} was replaced by other code")
    return None


def random_hidden(weight: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    """Normal values of a shape [..., H] in the dtype and on the device of a weight."""
    return torch.randn(shape, generator=generator).to(device=weight.device, dtype=weight.dtype)


def random_choice(weight: Tensor, generator: torch.Generator, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """ids [T, K] int64, different in a row, that name every expert; weights [T, K] in a weight's dtype and place."""
    top_k = min(3, num_experts)
    tokens = max(TOKENS, -(-num_experts // top_k))
    tokens += tokens % 2
    order = torch.randperm(num_experts, generator=generator)
    ids_TK = order[torch.arange(tokens * top_k) % num_experts].view(tokens, top_k)
    weights_TK = torch.rand(tokens, top_k, generator=generator) + 0.1
    return ids_TK.to(weight.device), weights_TK.to(device=weight.device, dtype=weight.dtype)
