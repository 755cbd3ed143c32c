"""The catalogue of errors users can meet: every message says what was expected, what came and what to do.

Errors are subclasses of `ValueError`, `TypeError` or `RuntimeError`, so callers that catch the built-in types keep
working.
`Reason` is the value a predicate returns instead of a bare bool: `None` means "yes", a `Reason` says why not.
"""

from __future__ import annotations

import dataclasses
import enum


class MoEErrorMixin:
    """Shared behaviour of the catalogue: a stable id and a three-part message."""

    code = "MOE000"

    @classmethod
    def of(cls, where: str, *, expected: str, got: str, hint: str) -> BaseException:
        """Build the error. `where` names the op or argument; `hint` is the next step for the user."""
        return cls(f"[{cls.code}] {where}: expected {expected}, got {got}. {hint}")  # type: ignore[call-arg, return-value]


class MoEShapeError(MoEErrorMixin, ValueError):
    """A tensor has the wrong rank or a size that does not fit the others."""

    code = "MOE001"


class MoEDtypeError(MoEErrorMixin, TypeError):
    """A tensor has a dtype the op does not take, or two dtypes that must agree do not."""

    code = "MOE002"


class MoEDeviceError(MoEErrorMixin, ValueError):
    """Tensors of one call live on different devices."""

    code = "MOE003"


class MoERangeError(MoEErrorMixin, ValueError):
    """A number is outside the range that has a meaning (k > E, negative k, empty groups)."""

    code = "MOE004"


class MoEOptionError(MoEErrorMixin, ValueError):
    """A named option is unknown (activation, score function, implementation)."""

    code = "MOE005"


class MoEUnsupportedError(MoEErrorMixin, ValueError):
    """The request has a meaning, but this backend does not do it; explicit requests never fall back."""

    code = "MOE006"


class MoEConfigError(MoEErrorMixin, ValueError):
    """A model config does not say what is asked, or says something that has no counterpart here."""

    code = "MOE007"


class MoECheckpointError(MoEErrorMixin, ValueError):
    """A checkpoint does not hold the weights asked for; the attributes list every tensor, the message one of each kind.

    missing     names that are not there
    unexpected  names that are there and belong to nothing
    misshapen   names whose shape or dtype does not fit, with what was expected and what came
    """

    code = "MOE008"
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()


class MoEParallelError(MoEErrorMixin, ValueError):
    """Experts cannot be spread over the ranks as asked, or the ranks were given different layers."""

    code = "MOE009"


class MoEStageError(MoEErrorMixin, RuntimeError):
    """Calls came out of order: tokens were dispatched while results were owed, or combined while none were."""

    code = "MOE010"


class MoERankError(MoEErrorMixin, RuntimeError):
    """A rank did not come to an exchange: it is gone or stuck, or left with an error of its own."""

    code = "MOE011"


class ReasonCode(enum.Enum):
    """Why something was not captured, fused or lowered. `explain` prints these; there is no UNKNOWN."""

    DISABLED = "diffulex is switched off here"
    NOT_CUDA = "not a CUDA device, the op's own kernel runs"
    DEVICE = "the ops have no kernel for the device"
    NO_TRITON = "triton is not installed"
    CAPABILITY = "the device is older than sm_80"
    DTYPE = "the dtype has no generated kernel"
    STRUCTURE = "the graph does not have the structure that was looked for"
    OPTION = "an option of the model has no counterpart in the op"
    SHAPE = "a shape is not what the kernel needs"
    LAYOUT = "the strides are not what the kernel needs"
    ALIGNMENT = "addresses or strides are not multiples of what the kernel needs"
    WRAPPER = "what launches the kernels does not give this one what it needs"
    SCHEDULE = "another way is faster at this size"
    LIBRARY = "it is a library's product, which may sum a row otherwise among other rows"
    SHARED_USE = "an intermediate is also used elsewhere"
    NOT_POINTWISE = "the activation is not a pointwise formula of gate and up"
    EAGER_EXPERTS = "the model runs its own expert loop (experts_implementation='eager')"
    NO_INTERFACE = "the model's experts do not go through transformers' experts interface"
    INTERFACE = "transformers' experts interface leads the model's experts to the ops"
    UNLIKE = "through the ops the module does not compute what its own code does"
    NO_CODE = "the graph is run as it is, without generated code"
    ABSENT = "a package that it needs is not here"
    PEERS = "the ranks cannot read one another's memory"
    MEMORY = "it would take more memory than there is for it"
    STORAGE = "a file cannot be read or written"
    UNVERIFIED = "there is no output of the module's own code to compare with"


@dataclasses.dataclass(frozen=True)
class Reason:
    """A typed refusal: `code` for programs, `detail` for people."""

    code: ReasonCode
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.code.name}: {self.detail or self.code.value}"
