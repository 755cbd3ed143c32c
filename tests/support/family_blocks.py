"""One MoE block of a transformers family with random weights, run as the model runs it, and what it chose."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffulex.checkpoint import LoadOptions, load_checkpoint, scheme_of
from diffulex.cli.accuracy import Oracle
from diffulex.moe import FusedMoE, TopKOutput, build_moe_block, get_routing_spec, is_moe_layer
from lowering.spec import RoutingSpec

from .block_variants import READ_PER_LAYER, BlockVariant
from .families import DEPTH, build_meta_model

# Modules of a decoder layer that make its MoE block.
_BLOCK = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "mixer")
_GEMMA = ("gemma4_text", "diffusion_gemma_text")
# The block multiplies what its experts return by this attribute, or by K.
_FACTORS = {
    "laguna": "routed_scaling_factor",
    "minimax_m3_vl_text": "routed_scaling_factor",
    "openai_privacy_filter": "num_experts_per_tok",
    "step3p5": "routed_scaling_factor",
}
_INTO_ACTIVATION = re.compile(r"(gate|up)_proj(\.weight)?$|fc1\.weight|input_linear|mlp\.[wv]1$")
_SELECTION = re.compile(r"e_score_correction_bias|balancing_biases|expert_bias")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a block is given: hidden [T, H], and what single families read beside it.

    router_TH  what the router reads, where that is not what the experts read (Gemma 4)
    state_TR   what the router of the layer before handed on (Zaya)
    token_ids  [T] (DeepSeek-V4, hash layers)
    """

    hidden_TH: Tensor
    router_TH: Tensor
    state_TR: Tensor
    token_ids_T: Tensor

    def double(self) -> Tokens:
        return Tokens(self.hidden_TH.double(), self.router_TH.double(), self.state_TR.double(), self.token_ids_T)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a block computed: out [T, H] and the experts of each token, in any order; None: the model did not say."""

    out_TH: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    logits_TC: Tensor | None = None


class _Recorder(TorchFunctionMode):
    """Keeps the last choice of K, for blocks whose experts are not told of it."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.found: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk) and result[0].dim() == 2 and result[0].shape[1] == self.top_k:
            self.found = (result[0], result[1])
        return result


class OwnBlock:
    """The modules of a layer that are its MoE block, with weights.

    family   model type
    parts    name under the decoder layer -> module
    layer    number of the layer
    spec     its router, for the number of experts a token has and where their weights are found
    """

    def __init__(self, family: str, parts: dict[str, nn.Module], *, layer: int, spec: RoutingSpec) -> None:
        self.family, self.layer, self.spec = family, layer, spec
        self.module = nn.ModuleDict(parts).eval()

    def double(self) -> OwnBlock:
        """A copy in fp64, but for what the model's code computes in fp32 whatever its dtype."""
        return OwnBlock(self.family, dict(copy.deepcopy(self.module).double()), layer=self.layer, spec=self.spec)

    def set_experts_implementation(self, name: str) -> None:
        """Choose who runs the experts, as a model does."""
        for module in self.module.modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = name

    def exact(self, tokens: Tokens) -> Seen:
        """The block on T tokens, all of it in fp64: the oracle."""
        oracle = Oracle(self)
        return oracle(oracle.model.run, tokens.double())  # type: ignore[return-value]

    @property
    def main(self) -> nn.Module:
        """The module whose forward is the block's."""
        return next(self.module[name] for name in (*_BLOCK, "router") if name in self.module)

    @property
    def factor(self) -> float:
        """What the block multiplies its experts' results by, behind them."""
        name = _FACTORS.get(self.family)
        if name == "num_experts_per_tok":
            return float(self.spec.top_k)
        return 1.0 if name is None else float(getattr(self.main, name))

    def finish(self, out_TH: Tensor) -> Tensor:
        """What the model does to the result of experts [T, H] inside its block (A.X K1: a norm)."""
        if not hasattr(self.main, "post_mlp_layernorm"):
            return out_TH
        if out_TH.dtype != torch.float64:
            return self.main.post_mlp_layernorm(out_TH)
        oracle = Oracle(self)
        return oracle(oracle.model.main.post_mlp_layernorm, out_TH)

    @torch.no_grad()
    def run(self, tokens: Tokens) -> Seen:
        """The block on T tokens, and the arguments that its experts get."""
        caught: list[Tensor] = []
        logits: list[Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, args: caught.extend(args))
            for name, module in self.module.named_modules()
            if name.endswith("experts") and "shared" not in name
        ]
        if self.spec.logits_given:
            hooks.append(self.main.gate.register_forward_hook(lambda _, args, out: logits.append(out[0])))
        if self.spec.apply_weight_on == "input":
            hooks.append(self.main.router.register_forward_hook(lambda _, args, out: caught.append(out[0])))
        with _Recorder(self.spec.top_k) as recorder:
            out_TH = self._forward(tokens)
        for hook in hooks:
            hook.remove()
        weights_TK, ids_TK = self._choice(caught, recorder.found)
        return Seen(out_TH, weights_TK * self.factor, ids_TK, logits[0] if logits else None)

    def _forward(self, tokens: Tokens) -> Tensor:
        hidden_TH = tokens.hidden_TH
        if self.family in _GEMMA:
            _, weights_TK, ids_TK = self.module["router"](tokens.router_TH)
            return self.module["experts"](hidden_TH, ids_TK, weights_TK)
        extra: dict[str, Tensor] = {}
        if self.family == "zaya":
            extra["prev_router_hidden_states"] = tokens.state_TR[None]
        if self.spec.ids_given:
            extra["input_ids"] = tokens.token_ids_T[None]
        out = self.main(hidden_TH[None], **extra)
        out_TH = (out[0] if isinstance(out, tuple) else out).reshape(hidden_TH.shape)
        return out_TH + self.module["shared_mlp"](hidden_TH) if "shared_mlp" in self.module else out_TH

    def _choice(self, caught: list[Tensor], topk: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Weights [T, K] floating and ids [T, K] int64 out of what the experts got."""
        if self.spec.apply_weight_on == "input":  # scores of all experts, 0 where not chosen
            return caught[0].topk(self.spec.top_k, dim=1)
        fit = [t for t in caught if t.dim() == 2 and t.shape[1] == self.spec.top_k]
        ids = [t for t in fit if not t.is_floating_point()]
        if ids:
            return next(t for t in fit if t.is_floating_point()), ids[0]
        assert topk is not None and self.spec.select_on == "logits"
        return topk[0].softmax(1), topk[1]

    def given_ids(self, tokens: Tokens) -> Tensor | None:
        """Ids [T, K] that a hash table gives, None where the router chooses."""
        return self.main.gate.tid2eid[tokens.token_ids_T] if self.spec.ids_given else None

    def state(self, prefix: str) -> dict[str, Tensor]:
        """All tensors by the names of a checkpoint whose layers stand behind `prefix`."""
        found = self.module.state_dict()
        return {f"{prefix}{self.layer}.{name}": tensor.contiguous() for name, tensor in found.items()}


def _bias_of_choice(spec: RoutingSpec) -> tuple[float, float]:
    """Mean and deviation of the bias of the choice: it changes the choice but does not make it.

    With groups some biased scores are negative, so that what the other groups are filled with matters; filled with 0
    they are all negative, and the one group that is left out is chosen, as ties are nobody's promise.
    """
    mean = {"-inf": -0.5, "0": -1.5}[spec.group_fill] if spec.n_group > 1 else 0.0
    return mean, 0.02 if spec.score == "softmax" else 0.1


def _with_weights(module: nn.Module, *, seed: int, spec: RoutingSpec) -> nn.Module:
    """The module on the CPU in fp32: scores that differ, and pre-activations that reach the limits of activations."""
    mean, deviation = _bias_of_choice(spec)
    module = module.to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        if not tensor.is_floating_point():  # hash tables
            chosen = torch.rand(len(tensor), 16, generator=generator).argsort(1)
            tensor.data.copy_(chosen[:, : tensor.shape[1]])
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if _SELECTION.search(name):
            tensor.data.copy_(mean + noise * deviation)
            skipped = spec.num_null if spec.null == "skip" else 0
            tensor.data[tensor.numel() - skipped :] += 0.3  # chosen by some tokens
        elif name.endswith("scale") or "norm" in name:
            tensor.data.copy_(1 + 0.3 * noise)
        elif tensor.dim() == 1 or name.endswith("bias"):
            tensor.data.copy_(0.3 * noise)
        else:
            wide = 4.0 if _INTO_ACTIVATION.search(name) else 1.0
            tensor.data.copy_(noise * wide * max(tensor.shape[-1], 1) ** -0.5)
    return module


def moe_layer_of(config: Any, family: str) -> int:
    """The last MoE layer of a config."""
    depth = config.num_layers if family == "longcat_flash" else DEPTH
    return max(layer for layer in range(depth) if is_moe_layer(config, layer, side="decoder"))


def build_block(variant: BlockVariant) -> OwnBlock:
    """The model's block, in fp32 on the CPU."""
    family, config = variant.case.model_type, variant.config()
    layer = moe_layer_of(config, family)
    spec = get_routing_spec(config, layer)
    differs = getattr(config, "is_heterogeneous", False) and family not in READ_PER_LAYER
    model = build_meta_model(variant.case, config.per_layer_config[layer] if differs else config)
    parts = _parts(model, layer, family)
    filled = {name: _with_weights(part, seed=seed, spec=spec) for seed, (name, part) in enumerate(parts.items())}
    block = OwnBlock(family, filled, layer=layer, spec=spec)
    block.set_experts_implementation("eager")
    return block


def text_and_vision(block: OwnBlock, config: Any) -> list[tuple[OwnBlock, dict[str, Any]]]:
    """The two banks of experts of an Ernie 4.5 VL block, each as a block of Ernie 4.5 and the config of that."""
    found = []
    for name, width in zip(("text_moe", "vision_moe"), config.moe_intermediate_size, strict=True):
        bank = OwnBlock("ernie4_5_moe", {"mlp": block.main.get_submodule(name)}, layer=block.layer, spec=block.spec)
        own = {"model_type": "ernie4_5_moe", "moe_intermediate_size": width, "moe_num_shared_experts": 0}
        found.append((bank, {**config.to_dict(), **own}))
    return found


def build_ours(block: OwnBlock, config: Any, folder: Path, *, dtype: torch.dtype) -> FusedMoE:
    """Our layer in `dtype`, with the weights of the model's block, which go through a checkpoint in `folder`."""
    ours = build_moe_block("naive", config, block.layer, dtype=dtype).eval()
    load_weights(block, ours, folder)
    return ours


def load_weights(block: OwnBlock, ours: FusedMoE, folder: Path) -> None:
    """Copy the weights of the model's block into ours, through a safetensors file under the model's own names."""
    from safetensors.torch import save_file

    prefix = scheme_of(block.family).layers
    save_file(block.state(prefix), folder / "model.safetensors")
    options = LoadOptions(prefix=prefix)
    load_checkpoint({block.layer: ours}, folder / "model.safetensors", model_type=block.family, options=options)


def _parts(model: nn.Module, layer: int, family: str) -> dict[str, nn.Module]:
    """The modules of the block, under the names they have in their layer."""
    path = next(path for path, _ in model.named_modules() if re.search(rf"(layers|blocks)\.{layer}$", path))
    children = dict(model.get_submodule(path).named_children())
    if family in _GEMMA:
        return {name: children[name] for name in ("router", "experts")}
    names = [name for name in _BLOCK if name in children]
    assert len(names) == 1, names
    return {name: children[name] for name in (*names, "shared_mlp") if children.get(name) is not None}


def make_tokens(count: int, hidden: int, *, state: int = 1, vocabulary: int = 50, seed: int = 0) -> Tokens:
    """Seeded fp32 inputs of `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    floats = [torch.randn(count, size, generator=generator) for size in (hidden, hidden, state)]
    return Tokens(*floats, torch.randint(0, vocabulary, (count,), generator=generator))


@torch.no_grad()
def run_ours(ours: FusedMoE, block: OwnBlock, tokens: Tokens, *, logits_TC: Tensor | None = None) -> Seen:
    """Our layer on what the block was given; `logits_TC` [T, C] where the model computes them with code of its own."""
    choice: list[TopKOutput] = []
    hook = ours.router.register_forward_hook(lambda _, args, out: choice.append(out))
    router_TH = tokens.router_TH if block.family in _GEMMA else None
    out_TH, logits = ours(
        tokens.hidden_TH, router_input=router_TH, router_logits=logits_TC, topk_ids=block.given_ids(tokens)
    )
    hook.remove()
    top_k = block.spec.top_k
    return Seen(block.finish(out_TH), choice[0].weights[:, :top_k], choice[0].ids[:, :top_k], logits)
