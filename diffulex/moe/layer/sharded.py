"""What layers over several ranks share: the ranks agree on the layer, and each holds its part of the experts."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from lowering.activation import is_gated
from lowering.errors import MoECheckpointError, MoEErrorMixin, MoEOptionError
from lowering.reference.moe_block import ExpertWeights

from ...distributed.agreement import check_agreement, flat_fields
from ...distributed.faults import naming_lost_ranks
from ...distributed.parallel import ParallelConfig
from .base import FusedMoE
from .experts import slots_function, weighted_on_input
from .spec import MoESpec

EXPERT_PARAMS = ("w13", "w2", "b13", "b2")
_EXTRA = "_extra_state"  # the name that torch gives it


def expert_parameter_names(model: torch.nn.Module) -> list[str]:
    """The parameters of a model that each rank holds for itself, those of its experts, under their names in the model.

    What gives one rank's parameters to all, or averages their gradients, has to leave these out.
    """
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, ShardedFusedMoE)]
    own = [(path, name) for path, layer in layers for name in EXPERT_PARAMS if getattr(layer, name) is not None]
    return [f"{path}.{name}" if path else name for path, name in own]


class ShardedFusedMoE(FusedMoE):
    """A layer whose experts lie on several ranks, and all else on each; made by all ranks of the group together.

    Making it compares the ranks' specs and options (`MoEParallelError` names what differs, and the ranks), and gives
    every rank the first one's replicated parameters. Each rank draws its own experts: seed the ranks differently, or
    load a checkpoint. Gradients of replicated parameters are those of the rank's tokens, those of experts the sums over
    the tokens of all ranks: see `expert_parameter_names`.

    With replicas in `parallel.placement` a layer is for inference: the gradients of copies would have to be added up.

    A `state_dict` says which experts it holds, in `_extra_state`, and loads into layers that hold the same ones alone;
    one that does not say it, as older ones, loads where the shapes fit.

    owned_experts  the experts that w13 [E', J', H], w2 [E', H, I'], b13 and b2 have rows for, in order
    """

    mode = ""
    owned_experts: tuple[int, ...]

    def __init__(
        self,
        spec: MoESpec,
        *,
        parallel: ParallelConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        parallel.check_mesh()
        problem = self._problem(spec, parallel)
        options = dataclasses.replace(parallel, placement=None)
        fields = flat_fields(spec) | {name: text for name, text in flat_fields(options).items() if name != "mesh"}
        fields |= {"layer": type(self).__name__, "dtype": str(dtype or torch.get_default_dtype())}
        fields |= {"placement": str(parallel.placement and parallel.placement.owned)}
        fields |= {"device": torch.empty(0, device=device).device.type}  # what is on meta is not given out
        check_agreement(
            type(self).__name__, parallel.group, fields=fields, problem=None if problem is None else str(problem)
        )
        super().__init__(spec, device=device, dtype=dtype)
        self.parallel = parallel
        self._slots = slots_function(spec)
        self._weight_on_input = spec.routing.apply_weight_on == "input"
        self._split = parallel.mode == "tp" and parallel.shard == "width"
        num_experts, width = spec.experts.num_experts, spec.experts.intermediate_size
        self._width = parallel.width_of(width) if self._split else (0, width)
        self.owned_experts = (
            tuple(range(num_experts)) if self._split else parallel.experts_of(num_experts).owned[parallel.rank]
        )
        start, stop = self._width
        self.register_experts(len(self.owned_experts), stop - start, device=device, dtype=dtype)
        if self._split and parallel.rank:
            self.register_parameter("b2", None)  # added once, by the first rank
        self._replicate()
        self._prepare(parallel)

    def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        """As `FusedMoE.forward` for hidden_states [..., H] floating, by all ranks.

        Outside of compiled code, raises `MoERankError` where a rank does not come: see `naming_lost_ranks`.
        """
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, **given)
        with naming_lost_ranks(self.parallel.group, where=type(self).__name__):
            return super().forward(hidden_states, **given)

    def _prepare(self, parallel: ParallelConfig) -> None:
        """Make what `run_experts` needs beside the weights."""

    @abstractmethod
    def _run_weighted(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
        """The sum of this rank's experts, weighted on the output; see `RunExperts`."""

    def _run_placed(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """`_run_weighted` with the weight where the model has it."""
        experts = self.expert_weights
        if self._weight_on_input:
            return weighted_on_input(self._run_weighted, hidden_TH, weights_TK, ids_TK, experts=experts)
        return self._run_weighted(hidden_TH, weights_TK, ids_TK, experts=experts)

    def _problem(self, spec: MoESpec, parallel: ParallelConfig) -> BaseException | None:
        """Why this rank cannot make the layer, found before the ranks wait for one another."""
        try:
            spec.check()
            slots_function(spec)
            if parallel.mode != self.mode:
                raise MoEOptionError.of(
                    type(self).__name__,
                    expected=f"a ParallelConfig of mode {self.mode!r}",
                    got=repr(parallel.mode),
                    hint="build_moe_block takes the mode as its first argument.",
                )
            parallel.check(spec.experts.num_experts, spec.experts.intermediate_size)
            self._check_backend(spec, parallel)
        except (ValueError, TypeError, RuntimeError) as problem:
            if not isinstance(problem, MoEErrorMixin):
                raise
            return problem
        return None

    @classmethod
    def _check_backend(cls, spec: MoESpec, parallel: ParallelConfig) -> None:
        """Raise where the layer cannot run as asked, before the ranks wait for one another."""

    @torch.no_grad()
    def _replicate(self) -> None:
        """The first rank's values of everything but the experts, on all ranks; the first copy's, of each expert."""
        group = self.parallel.group
        source = distributed.get_global_rank(group, 0)
        for name, tensor in self._tensors().items():
            if name not in EXPERT_PARAMS and not tensor.is_meta:
                distributed.broadcast(tensor.detach(), src=source, group=group)
        for expert, ranks in () if self._split else self.parallel.experts_of(self.num_experts).replicas.items():
            for rows in (self.w13, self.w2, self.b13, self.b2):
                if rows is not None and not rows.is_meta:
                    held = self.parallel.rank in ranks
                    row = rows[self.owned_experts.index(expert)] if held else torch.empty_like(rows[0])
                    distributed.broadcast(row.detach(), src=distributed.get_global_rank(group, ranks[0]), group=group)

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers, as `state_dict` names them."""
        return {name: value for name, value in self.state_dict(keep_vars=True).items() if name != _EXTRA}

    def get_extra_state(self) -> Tensor:
        """What `state_dict` says of the experts: the slice of their width, then their numbers, [N] int64 on the CPU.

        A tensor, so that safetensors and distributed checkpoints take it.
        """
        return torch.tensor([*self._width, *self.owned_experts], dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raise `MoECheckpointError` unless `state`, [N] of any dtype, is of the experts that this layer holds."""
        own, given = self.get_extra_state(), state.detach()
        # Whoever casts a whole state_dict casts this, too; on the meta device there is nothing to compare.
        if given.is_meta or torch.equal(own.to(given.dtype), given.cpu()):
            return
        expected, got = (
            f"experts {numbers[2:]}, units {numbers[:2]} of their width" for numbers in (own.tolist(), given.tolist())
        )
        raise MoECheckpointError.of(
            f"{type(self).__name__} on rank {self.parallel.rank}",
            expected=f"the state of {expected}",
            got=got,
            hint="Make the layer with the placement of the state, on as many ranks, or pass a whole one to load_full.",
        )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As `nn.Module` has it, but other experts are refused before any value is taken, and none need be named."""
        key = prefix + _EXTRA
        if key in state_dict:
            self.set_extra_state(state_dict[key])
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [name for name in missing_keys if name != key]

    @torch.no_grad()
    def load_full(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole layer: `NaiveFusedMoE.state_dict()`, w13 [E, J, H] floating and so on.

        Raises `MoECheckpointError` where names are missing or unexpected or shapes are others; then nothing is taken.
        """
        own = self._tensors()
        spare = {"b2"} if self.spec.experts.bias else set()  # where another rank adds it
        missing, unexpected = {*own} - {*state}, {*state} - {*own} - spare
        if missing or unexpected:
            raise MoECheckpointError.of(
                f"{type(self).__name__}.load_full",
                expected=f"the names {', '.join(own)}",
                got=f"{', '.join(sorted(missing)) or 'none'} missing, {', '.join(sorted(unexpected)) or 'none'} more",
                hint="Pass the state_dict of the NaiveFusedMoE of the same config.",
            )
        whole = self._expert_shapes(self.num_experts, self.intermediate_size)
        shapes = {name: whole.get(name, tuple(tensor.shape)) for name, tensor in own.items()}
        misshapen = [name for name, shape in shapes.items() if tuple(state[name].shape) != shape]
        if misshapen:
            raise MoECheckpointError.of(
                f"{type(self).__name__}.load_full",
                expected=", ".join(f"{name} {shapes[name]}" for name in misshapen),
                got=", ".join(f"{name} {tuple(state[name].shape)}" for name in misshapen),
                hint="Pass the state_dict of the NaiveFusedMoE of the same config.",
            )
        for name, tensor in own.items():
            tensor.detach().copy_(self.shard_of(name, state[name]) if name in EXPERT_PARAMS else state[name])

    def shard_of(self, name: str, full: Tensor) -> Tensor:
        """This rank's part of w13 [E, J, H], w2 [E, H, I], b13 [E, J] or b2 [E, H] of the whole layer, any dtype."""
        part = full[list(self.owned_experts)]
        start, stop = self._width
        if name == "b2" or stop - start == self.intermediate_size:
            return part
        if name == "w2":
            return part[:, :, start:stop]
        spec = self.spec.experts
        if not is_gated(spec.act):
            return part[:, start:stop]
        if spec.interleaved:
            return part[:, 2 * start : 2 * stop]
        gate, up = part.chunk(2, dim=1)
        return torch.cat((gate[:, start:stop], up[:, start:stop]), dim=1)

    def extra_repr(self) -> str:
        """The sizes here and in all, for `print(model)`."""
        held, width = self.w2.shape[0], self.w2.shape[2]
        return (
            f"{held} of E={self.num_experts}, {width} of I={self.intermediate_size}, K={self.top_k}, "
            f"rank {self.parallel.rank} of {self.parallel.size}, moe_gemm_impl={self.moe_gemm_impl!r}"
        )
