"""A compilation of its own: Dynamo keeps what it compiled by code object, and what it learned by its name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

_count = itertools.count()


def fresh_caller(target: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `target` and has a code object and a name of its own, so that compiling it reuses nothing.

    What was compiled of `target` before is neither looked at nor dropped. Arguments and result are those of `target`.
    """

    def caller(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    # sizes that were seen to change are remembered by file, line and name
    caller.__code__ = caller.__code__.replace(co_name=f"caller_{next(_count)}")
    return caller


def fresh_backend() -> Callable[..., Any]:
    """Inductor as a backend of its own: Dynamo reuses no graph for it that another one compiled.

    That matters where a graph breaks: frames inside have code objects that others compile too.
    """

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    return backend
