"""Mixture-of-Experts models, compiled: `import diffulex`, then `torch.compile(model)`.

The import registers the ops, Inductor's passes and lowerings, and the transformers hook. It loads neither triton nor
transformers and starts no CUDA.
"""

from lowering.inductor.install import install as _install_compiler
from lowering.report import Decision
from lowering.state import disabled, is_enabled

from .explanation import LayerReport, Report, explain
from .integrations.transformers import install as _install_transformers

__version__ = "0.1.0"
__all__ = ["Decision", "LayerReport", "Report", "__version__", "disabled", "explain", "is_enabled"]

_install_compiler()
_install_transformers()
