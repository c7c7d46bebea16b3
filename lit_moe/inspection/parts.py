"""Which part of a model a tensor belongs to, and how much there is of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_moe.accounting import tensor_at
from lit_moe.adapters import MoESite
from lit_moe.inspection.findings import Size

PARTS = (
    "embeddings",
    "attention",
    "dense MLP",
    "shared experts",
    "routed experts",
    "routers",
    "head",
    "other",
)

_ATTENTION_WORDS = ("attn", "attention", "mamba", "conv", "mixer", "delta", "ssm", "linear_att")
_MLP_WORDS = ("mlp", "feed_forward", "ffn")
_MLP_PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}
_OTHER_WORDS = ("vision", "visual", "audio", "multi_modal", "resampler")


def size_of_parts(
    model: PreTrainedModel, sites: Sequence[MoESite], dtype: torch.dtype
) -> dict[str, Size]:
    """Return the size of every part; a tensor that two parts share counts for the first."""
    special = _part_of_special_tensors(model, sites)
    blocks = [site.name for site in sites]
    routers = tuple(f"{site.router}." for site in sites)
    # Experts that are modules of their own: no tensor of theirs is indexed by experts.
    modules = tuple(f"{site.experts}." for site in sites if not site.rows("expert"))
    elements, num_bytes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    seen: set[int] = set()
    for name, tensor in _persistent_tensors(model):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        part = special.get(id(tensor))
        part = part or ("routed experts" if name.startswith(modules) else None)
        part = part or ("routers" if name.startswith(routers) else None)
        part = part or part_by_name(name, blocks)
        itemsize = dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
        elements[part] += tensor.numel()
        num_bytes[part] += tensor.numel() * itemsize
    return {part: Size(elements[part], num_bytes[part]) for part in PARTS if elements[part]}


def _part_of_special_tensors(model: PreTrainedModel, sites: Sequence[MoESite]) -> dict[int, str]:
    """Return id of tensor -> part where modules and sites say it, without guessing by name.

    Not by name: a tensor that an encoder and a decoder share is met under only one of its names.
    """
    found = {
        id(tensor_at(model, axis.name)): "routed experts" if axis.kind == "expert" else "routers"
        for site in sites
        for axis in site.axes
    }
    ends = (("head", model.get_output_embeddings()), ("embeddings", model.get_input_embeddings()))
    for part, end in ends:
        found |= {} if end is None else {id(parameter): part for parameter in end.parameters()}
    return found


def part_by_name(name: str, blocks: Sequence[str]) -> str:
    """Guess from the words of a dotted name; inside an MoE block only from those after it."""
    block = next((b for b in blocks if name.startswith(f"{b}.")), None)
    words = name.removeprefix(f"{block}.").lower().split(".")[:-1]
    if any(word.startswith(_OTHER_WORDS) for word in name.lower().split(".")):
        return "other"
    if any("shared" in word for word in words):
        return "shared experts"
    if _is_norm(words) or (block and not words):
        return "other"
    if words and words[-1].startswith("embed_tokens"):  # gemma4 has some for each layer
        return "embeddings"
    if not block and words and words[-1] in _MLP_PROJECTIONS:  # nemotron_h calls all of it mixer
        return "dense MLP"
    if any(known in word for word in words for known in _ATTENTION_WORDS):
        return "attention"
    return "dense MLP" if block or any(w.startswith(_MLP_WORDS) for w in words) else "other"


def _is_norm(words: Sequence[str]) -> bool:
    """Whether the module is a norm, or lies in one (a list of norms, or a gate of a norm)."""
    return "norm" in "".join(words[-1:]) or any(word.endswith("layernorm") for word in words)


def _persistent_tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer
