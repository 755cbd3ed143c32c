"""Checkpoint -> MoE blocks: find the names, check every one of them, then copy one expert's tensor at a time."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from lowering.errors import MoECheckpointError, MoEOptionError

from .block import Block, Owned, Part, Stored, block_of, stored_tensors
from .reader import DTYPES, WINDOW, CheckpointReader
from .report import Problems, shortened
from .rules import EXPERT, Rule
from .schemes import Scheme, scheme_of

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Blocks = Mapping[int, nn.Module | Block]


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How to read a checkpoint.

    form    naming form of the scheme ("v5", "v4"); None: the one that fits best
    prefix  what stands in front of a layer's number (`model.language_model.layers.`); None: found out
    owned   experts to read, by number or by predicate, for blocks that hold a part of them; None: what the block says
    window  bytes of a file that may stay mapped while others are read, or one tensor of an expert if that is larger
    """

    form: str | None = None
    prefix: str | None = None
    owned: Owned = None
    window: int = WINDOW


@torch.no_grad()
def load_checkpoint(
    blocks: Blocks, path: str | Path, *, model_type: str, options: LoadOptions | None = None
) -> list[str]:
    """Copy the weights of MoE blocks out of safetensors files, and return the names of all other tensors.

    blocks      layer number -> MoE layer, or `Block` of parameters; w13 [E, J, H], w2 [E, H, I] and so on are
                overwritten in place, floating tensors of another dtype are converted
    path        folder of a transformers checkpoint, one `.safetensors` file, or an index
    model_type  as the config has it; picks the naming scheme

    Names and shapes are checked before anything is written: `MoECheckpointError` lists everything that is missing,
    that belongs to the blocks but has no place in them, or that does not fit; the shared experts of no width that some
    models have are passed over. Beside the blocks themselves, memory holds one tensor of one expert, and pages of the
    file that the kernel can drop, at most a window of them. Owned experts alone are read.
    """
    options = options or LoadOptions()
    scheme = scheme_of(model_type)
    found = {layer: block_of(block, owned=options.owned) for layer, block in blocks.items()}
    for layer, block in found.items():
        block.check(f"checkpoint, layer {layer}")
    with CheckpointReader(path, window=options.window) as reader:
        prefix = _find_prefix(reader, scheme, blocks=found, options=options)
        form, stored = _choose_form(reader, scheme, blocks=found, prefix=prefix, form=options.form)
        problems = Problems(sorted({t.key for t in stored} - {*reader.files}), [], _misshapen(reader, stored))
        if len(problems.missing) == len(stored):
            problems.hint = f"The checkpoint has {shortened(reader.files) or 'no tensor'}; check the model type."
        rest = _sort_others(
            {*reader.files} - {t.key for t in stored},
            problems,
            blocks={f"{prefix}{layer}.": block for layer, block in found.items()},
            rules=scheme.forms[form],
            roots=_roots(scheme),
        )
        problems.unexpected[:] = [name for name in problems.unexpected if 0 not in reader.info(name)[0]]
        problems.raise_if_any(str(path), form=f"{form} ({scheme.types[0]})")
        _copy(reader, stored)
    return rest


def _find_prefix(reader: CheckpointReader, scheme: Scheme, *, blocks: Mapping[int, Block], options: LoadOptions) -> str:
    """What stands in front of the layers' numbers: the prefix under which most of the scheme's names exist."""
    if options.prefix is not None:
        return options.prefix
    ends = {
        f"{layer}.{rule.key.replace(EXPERT, str(min(block.experts, default=0)))}"
        for layer, block in blocks.items()
        for rules in scheme.forms.values()
        for rule in rules
    }
    votes = Counter(name.removesuffix(end) for name in reader.files for end in _suffixes(name) if end in ends)
    best = [prefix for prefix, count in votes.items() if count == max(votes.values())]
    if len(best) > 1:
        raise MoECheckpointError.of(
            f"checkpoint {reader.path}",
            expected=f"layers {', '.join(map(str, blocks))} with names of {scheme.types[0]} under one prefix",
            got=f"the prefixes {', '.join(sorted(best))}",
            hint="Say which with LoadOptions(prefix=...).",
        )
    return best[0] if best else scheme.layers


def _suffixes(name: str) -> Iterator[str]:
    """The name, and it without its first, first two, ... parts."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _prefixes(name: str) -> Iterator[str]:
    """The name's first, first two, ... parts, each with its dot."""
    parts = name.split(".")
    return (".".join(parts[:i]) + "." for i in range(1, len(parts)))


def _choose_form(
    reader: CheckpointReader, scheme: Scheme, *, blocks: Mapping[int, Block], prefix: str, form: str | None
) -> tuple[str, list[Stored]]:
    """The form with the fewest names missing, then misshapen, and its tensors."""
    if form is not None and form not in scheme.forms:
        raise MoEOptionError.of(
            "checkpoint",
            expected=f"a form of {', '.join(scheme.forms)}",
            got=repr(form),
            hint=f"{scheme.types[0]} has these forms; None finds out.",
        )
    ranked: list[tuple[float, int, str, list[Stored]]] = []
    for name, rules in scheme.forms.items():
        if form in (None, name):
            stored = [
                tensor
                for layer, block in blocks.items()
                for tensor in stored_tensors(block, rules, prefix=f"{prefix}{layer}.")
            ]
            missing = sum(tensor.key not in reader.files for tensor in stored)
            ranked.append((missing / max(len(stored), 1), len(ranked), name, stored))
    ranked.sort(key=lambda entry: entry[:2])
    tied = [entry for entry in ranked if entry[0] == ranked[0][0]]
    if len(tied) > 1 and tied[0][3]:  # the same names in another layout: shapes decide
        tied.sort(key=lambda entry: len(_misshapen(reader, entry[3])))
    return tied[0][2], tied[0][3]


def _misshapen(reader: CheckpointReader, stored: list[Stored]) -> dict[str, str]:
    wrong = {}
    for tensor in sorted(stored, key=lambda t: str(reader.files.get(t.key, ""))):
        if tensor.key not in reader.files:
            continue
        shape, dtype = reader.info(tensor.key)
        if shape != tensor.shape:
            wrong[tensor.key] = f"{list(shape)} instead of {list(tensor.shape)}"
        elif DTYPES.get(dtype) != tensor.dtype and not {DTYPES.get(dtype), tensor.dtype} <= {*_FLOATS}:
            wrong[tensor.key] = f"{dtype} instead of {tensor.dtype}"
    return wrong


def _sort_others(
    names: Collection[str],
    problems: Problems,
    *,
    blocks: Mapping[str, Block],
    rules: tuple[Rule, ...],
    roots: tuple[str, ...],
) -> list[str]:
    """Of the names that no block takes, those that are not the blocks' at all; `problems` gets the unexpected ones.

    blocks   prefix of a layer -> its block
    roots    what a block's names begin with behind that prefix

    Experts of other ranks are neither.
    """
    rest = []
    for name in sorted(names):
        prefix = next((prefix for prefix in _prefixes(name) if prefix in blocks), None)
        tail = name.removeprefix(prefix or "")
        if prefix is None or not tail.startswith(roots):
            rest.append(name)
            continue
        found = [(rule, match) for rule in rules if (match := rule.pattern.fullmatch(tail))]
        block = blocks[prefix]
        if any(not rule.param for rule, _ in found):
            rest.append(name)
        elif not any(r.per_expert and r.param in block.params and int(m[1]) < block.total for r, m in found):
            problems.unexpected.append(name)
    return rest


def _roots(scheme: Scheme) -> tuple[str, ...]:
    """The modules of a layer that a scheme knows in any of its forms: a checkpoint may hold one form alone."""
    return tuple({rule.key.partition(".")[0] + "." for rules in scheme.forms.values() for rule in rules})


def _copy(reader: CheckpointReader, stored: list[Stored]) -> None:
    for tensor in sorted(stored, key=lambda t: str(reader.files[t.key])):
        for part in tensor.parts:
            _copy_part(reader, tensor, part)


def _copy_part(reader: CheckpointReader, tensor: Stored, part: Part) -> None:
    if part.piece is None:
        return
    rows = reader.read(tensor.key) if tensor.whole else reader.read(tensor.key, start=part.start, stop=part.stop)
    views = tensor.views(part, rows)
    assert views is not None
    views[0].copy_(views[1])
