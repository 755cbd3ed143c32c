"""Mixture-of-Experts models, compiled: `import diffulex`, then `torch.compile(model)`.

The import registers the ops, Inductor's passes and lowerings, and the transformers hook. It loads neither triton nor
transformers and starts no CUDA.
"""

from typing import TYPE_CHECKING, Any

from lowering.inductor.install import install as _install_compiler
from lowering.report import Decision
from lowering.state import batch_invariant, disabled, is_batch_invariant, is_enabled

from .explanation import LayerReport, Report, explain
from .integrations.transformers import install as _install_transformers

if TYPE_CHECKING:
    from .integrations.adapt import AdaptReport, adapt

__version__ = "0.1.0"
__all__ = [
    "AdaptReport",
    "Decision",
    "LayerReport",
    "Report",
    "__version__",
    "adapt",
    "batch_invariant",
    "disabled",
    "explain",
    "is_batch_invariant",
    "is_enabled",
]

_install_compiler()
_install_transformers()


def __getattr__(name: str) -> Any:
    """`adapt` is loaded by those who use it."""
    if name not in ("AdaptReport", "adapt"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .integrations import adapt as loaded

    return getattr(loaded, name)
