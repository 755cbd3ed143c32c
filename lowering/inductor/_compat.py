"""All private names of Inductor this project uses, and where versions differ. Importing this imports Inductor."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch._guards import CompileContext
from torch._inductor import config, ir
from torch._inductor.codegen.common import TritonScratchWorkspace, get_device_op_overrides
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import (
    empty_strided,
    fallback_handler,
    lowerings,
    make_pointwise,
    process_subgraph_nodes,
    register_lowering,
)
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    TritonTemplateKernel,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V, ops
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, has_free_unbacked_symbols
from torch.utils._ordered_set import OrderedSet

__all__ = [
    "SymbolicGridFn",
    "TritonTemplate",
    "V",
    "begin_early",
    "config",
    "contiguous_inputs",
    "current_fx_node",
    "empty_strided",
    "fallback",
    "fixed_layout",
    "freeze_layout",
    "generated_begin_early",
    "guard_less_equal",
    "inline",
    "ir",
    "is_aligned",
    "known_less_equal",
    "known_size",
    "known_stride",
    "knows_launches",
    "lends_scratch",
    "lowerings",
    "may_guard",
    "realize_inputs",
    "register_lowering",
    "rounded",
    "run_template",
    "size_hint",
    "slot_of_expert",
    "static_size",
]


def fallback(op: Any, *args: Any) -> Any:
    """The op's own kernel as an extern call of the generated wrapper."""
    return fallback_handler(op, add_to_fallback_set=False)(*args)


def fixed_layout(like: Any, dtype: torch.dtype, size: Sequence[Any]) -> Any:
    """A contiguous layout on the device of the IR node `like`."""
    return ir.FixedLayout(like.get_device(), dtype, list(size))


def known_size(size: Any) -> int | None:
    """A size as an int where it is one, sympy's integers included; None where it is symbolic."""
    return int(size) if isinstance(size, int | sympy.Integer) else None


def size_hint(size: Any) -> int | None:
    """A size, where it is symbolic that of the inputs which are compiled for; no guard.

    None where data decides it, unless it was said what to expect (`torch._dynamo.mark_unbacked` with `hint_override`).
    """
    known = known_size(size)
    if known is not None:
        return known
    if not free_unbacked_symbols(size) <= set(V.graph.sizevars.shape_env.var_to_hint_override):
        return None
    return int(V.graph.sizevars.optimization_hint(size))


def static_size(size: Any) -> int:
    """A size as an int, guarded on where it is symbolic (weights of functions compiled with dynamic=True)."""
    return int(V.graph.sizevars.guard_int(size))


def known_stride(stride: Any, multiple: int) -> int | None:
    """A stride as an int; `multiple` where it is symbolic and known to be one of its multiples, else None."""
    known = known_size(stride)
    if known is None and V.graph.sizevars.statically_known_multiple_of(stride, multiple):
        return multiple
    return known


def rounded(node: Any, dtype: torch.dtype) -> Any:
    """An fp32 IR node cast to `dtype`, and rounded to it for what is fused behind, too, which is computed in fp32."""

    def narrow(value: Any) -> Any:
        return ops.to_dtype(ops.to_dtype(value, dtype, use_compute_types=False), dtype)

    return make_pointwise(narrow, override_return_dtype=dtype)(node)


def add_product(total: Any | None, left: Any, right: Any) -> Any:
    """The fp32 IR node total + left * right, rounded once; without a total 0 is one.

    Written as a product and a sum, the code around would decide which of them the GPU's assembler rounds in one.
    """
    if total is None:
        return make_pointwise(lambda x, y: ops.fma(x, y, ops.constant(0.0, torch.float32)))(left, right)
    return make_pointwise(ops.fma)(left, right, total)


def slot_of_expert(slots: Any, ids: Any, k: int, *, num_experts: int) -> Any:
    """Slot k of every token, [T, H] fp32, of slots [T * K, H]: 0, and not read, where ids [T, K] hold no expert."""
    (num_tokens, top_k), load_slot, load_id = ids.get_size(), slots.make_loader(), ids.make_loader()

    def inner(index: Sequence[Any]) -> Any:
        token, column = index
        number = load_id([token, sympy.Integer(k)])
        bounds = [ops.constant(value, ids.get_dtype()) for value in (0, num_experts)]
        known = ops.and_(ops.ge(number, bounds[0]), ops.lt(number, bounds[1]))
        read = functools.partial(load_slot, [token * top_k + k, column])
        return ops.masked(known, lambda: ops.to_dtype(read(), torch.float32), 0.0)

    ranges = [num_tokens, slots.get_size()[1]]
    return ir.Pointwise.create(device=slots.get_device(), dtype=torch.float32, inner_fn=inner, ranges=ranges)


def freeze_layout(node: Any) -> None:
    """Keep the strides that a realized IR node has: until then its users may still change them."""
    node.freeze_layout()


def guard_less_equal(size: Any, bound: int) -> bool:
    """Decide `size <= bound` now and guard on the answer: one graph per side, CUDA graphs stay possible."""
    return bool(V.graph.sizevars.shape_env.evaluate_expr(sympy.Le(size, bound)))


def known_less_equal(size: Any, bound: int) -> bool:
    """Whether `size <= bound` is known without a guard."""
    return bool(V.graph.sizevars.statically_known_leq(size, bound))


def may_guard(size: Any) -> bool:
    """Whether `size` may be guarded on: data does not decide it, and guards are checked where the code is called.

    Dynamo checks them. Packages of AOTInductor and graphs compiled without Dynamo run at any size, and Inductor's own
    kernels, which a guard makes narrower, would be wrong beyond it.
    """
    return not (has_free_unbacked_symbols(size) or V.graph.aot_mode or CompileContext.try_get() is None)


def is_aligned(node: Any, size: int) -> bool:
    """Whether the storage of an IR node begins at a multiple of `size` bytes: it is a buffer, or a view at one."""
    # inputs that are not 16-byte aligned are copied by the wrapper, unless Inductor was told not to
    name, offset = node.get_name(), node.get_layout().offset
    return name not in V.graph.unaligned_buffers and V.graph.sizevars.statically_known_multiple_of(
        offset * node.get_dtype().itemsize, size
    )


def is_backward() -> bool:
    """Whether the graph being lowered is that of a backward pass."""
    return bool(V.graph.is_backward)


def calls_python() -> bool:
    """Whether what is generated of the graph being lowered can call ops that have only a kernel in Python."""
    return not V.graph.cpp_wrapper


def lends_scratch() -> bool:
    """Whether the graph being lowered lends its kernels scratch memory, which descriptors lie in, for every program."""
    return not V.graph.cpp_wrapper or _cpp_wrapper_counts_programs()


@functools.cache
def _cpp_wrapper_counts_programs() -> bool:
    """Inductor's C++ wrapper of torch 2.11 lends the memory of one program: the others would write behind it."""
    lent = get_device_op_overrides("cuda").cpp_scratch(0, TritonScratchWorkspace(1, lambda: ""))
    return lent is not None and any("grid_0" in line for line in lent[0])


def contiguous_inputs(*nodes: Any) -> list[Any]:
    """The IR nodes realized as contiguous buffers, which whoever reads the nodes later reads as well."""
    for node in nodes:
        node.realize()  # else what is computed here is copied, and computed again by others
    return [ir.ExternKernel.require_contiguous(node) for node in nodes]


def current_fx_node() -> torch.fx.Node | None:
    """The FX node that is being lowered, or None outside a graph."""
    node = V.current_node
    return node if isinstance(node, torch.fx.Node) else None


def move_before(place: torch.fx.Node, nodes: Sequence[torch.fx.Node]) -> None:
    """Lower these FX nodes, which come behind `place` and in this order, right before it.

    What they read is then kept to the end: who reads it last was found by the order there was.
    """
    for node in nodes:
        place.prepend(node)
        V.graph.user_to_last_uses.pop(node, None)


@contextlib.contextmanager
def _fresh_origins() -> Iterator[None]:
    """What is lowered inside does not come from the FX node being lowered outside, also by the names of kernels."""
    outside, ir.IRNode._current_origins = ir.IRNode._current_origins, OrderedSet()
    try:
        yield
    finally:
        ir.IRNode._current_origins = outside


_MODULES = ("nn_module_stack", "fwd_nn_module_stack")


def inline(function: Callable[..., Any], args: Sequence[torch.fx.Node | None]) -> Any:
    """Lower what `function` makes of the values of these FX nodes, as if its operations stood in the graph, in the
    place of the node being lowered.
    """
    nodes = [arg for arg in args if arg is not None]

    def of_nodes(*values: Any) -> Any:
        given = iter(values)
        return function(*(None if arg is None else next(given) for arg in args))

    traced = make_fx(of_nodes, decomposition_table=select_decomp_table())(*(node.meta["val"] for node in nodes))
    here = current_fx_node()
    place = {} if here is None else {name: here.meta[name] for name in _MODULES if name in here.meta}
    for node in traced.graph.nodes:
        node.meta.update(place)
        if node.op == "call_function":
            node.meta.setdefault("original_aten", node.target)  # kernels are named after it
    with _fresh_origins():
        return process_subgraph_nodes(traced, [V.graph.env[node] for node in nodes])


def run_template(
    template: TritonTemplate,
    inputs: Sequence[Any],
    layout: Any,
    *,
    num_warps: int,
    num_stages: int,
    constants: dict[str, Any],
    mutated_inputs: Sequence[Any] | None = None,
    early: bool = False,
) -> Any:
    """One template choice, so nothing is benchmarked and neighbours fuse; raises when Inductor refuses the template.

    early: the kernel begins before the last one has ended, see `early`.
    """
    choices: list[Any] = []
    extra: dict[str, Any] = {} if mutated_inputs is None else {"mutated_inputs": list(mutated_inputs)}
    if early:
        constants = {**constants, "EARLY": True}
        extra["triton_meta"] = {"launch_pdl": True}
        begin_early(V.graph)
    error = template.maybe_append_choice(
        choices,
        input_nodes=list(inputs),
        layout=layout,
        num_warps=num_warps,
        num_stages=num_stages,
        **extra,
        **constants,
    )
    if error is not None:
        raise error
    result = autotune_select_algorithm(template.name, choices, list(inputs), layout)
    return result[0] if isinstance(result, tuple) else result  # a node in torch 2.11, a tuple later


_early_graphs: weakref.WeakSet[Any] = weakref.WeakSet()
_LAUNCH_METHODS = ("_enable_pdl_codegen", "_handle_pdl_before_access", "_handle_pdl_after_load", "_filter_pdl")


def begin_early(graph: Any) -> None:
    """Have the kernels that Inductor itself generates for `graph` begin early, too, as described in `early`.

    Under `enable_pdl` Inductor puts their waits ahead of what the kernel before wrote by name. That misses buffers a
    template mutates, memory that is used again under another name, and kernels that read nothing; and a template that
    lets its dependents go early makes this matter. In `graph` they wait ahead of all else instead.
    """
    if knows_launches():
        _wait_first()
        _early_graphs.add(graph)


def knows_launches() -> bool:
    """Whether this Inductor has the methods that `begin_early` replaces."""
    return all(hasattr(TritonKernel, name) for name in (*_LAUNCH_METHODS, "GDC_WAIT", "GDC_LAUNCH"))


def generated_begin_early(graph: Any) -> bool:
    """Whether Inductor's own kernels for `graph` begin early: `begin_early` was called, and knew this Inductor."""
    return graph in _early_graphs


@functools.cache
def _wait_first() -> None:
    stock_enabled, stock_before, stock_after, stock_filter = (getattr(TritonKernel, name) for name in _LAUNCH_METHODS)

    def early() -> bool:
        if V.graph not in _early_graphs or isinstance(V.kernel, TritonTemplateKernel):
            return False
        device = V.graph.get_current_device_or_throw()
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)

    def enabled() -> bool:
        return early() or stock_enabled()

    def unless_early(stock: Callable[..., None]) -> Callable[..., None]:
        def handle(self: Any, *args: Any, **kwargs: Any) -> None:
            if not early():
                stock(self, *args, **kwargs)

        return handle

    def wait_first(self: Any, code: Any) -> None:
        if early():
            code._lines[:0] = [self.GDC_WAIT, self.GDC_LAUNCH]
        else:
            stock_filter(self, code)

    TritonKernel._enable_pdl_codegen = staticmethod(enabled)
    TritonKernel._handle_pdl_before_access = unless_early(stock_before)
    TritonKernel._handle_pdl_after_load = unless_early(stock_after)
    TritonKernel._filter_pdl = wait_first
