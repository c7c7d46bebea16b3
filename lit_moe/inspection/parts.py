"""Which part of a model a tensor belongs to, and how much there is of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

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
_OTHER_WORDS = ("vision", "visual", "audio")


def size_of_parts(
    model: PreTrainedModel, sites: Sequence[MoESite], dtype: torch.dtype
) -> dict[str, Size]:
    """Return the size of every part; a tensor that two parts share counts for the first."""
    named = _part_of_special_tensors(model, sites)
    blocks = [site.name for site in sites]
    routers = tuple(f"{site.router}." for site in sites)
    elements, num_bytes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    seen: set[int] = set()
    for name, tensor in _persistent_tensors(model):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        part = named.get(name) or ("routers" if name.startswith(routers) else None)
        part = part or _part_by_name(name, blocks)
        itemsize = dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
        elements[part] += tensor.numel()
        num_bytes[part] += tensor.numel() * itemsize
    return {part: Size(elements[part], num_bytes[part]) for part in PARTS if elements[part]}


def _part_of_special_tensors(model: PreTrainedModel, sites: Sequence[MoESite]) -> dict[str, str]:
    """Return tensor name -> part where modules and sites say it, without guessing by name."""
    found = {
        axis.name: "routed experts" if axis.kind == "expert" else "routers"
        for site in sites
        for axis in site.axes
    }
    ends = (("head", model.get_output_embeddings()), ("embeddings", model.get_input_embeddings()))
    for part, end in ends:
        mine = set() if end is None else {id(parameter) for parameter in end.parameters()}
        found |= {n: part for n, p in model.named_parameters() if id(p) in mine}
    return found


def _part_by_name(name: str, blocks: Sequence[str]) -> str:
    """Guess from the words of a dotted name; inside an MoE block only from those after it."""
    block = next((b for b in blocks if name.startswith(f"{b}.")), None)
    words = name.removeprefix(f"{block}.").lower().split(".")[:-1]
    if any(word.startswith(_OTHER_WORDS) for word in name.lower().split(".")):
        return "other"
    if any("shared" in word for word in words):
        return "shared experts"
    if words and "norm" in words[-1]:
        return "other"
    if any(known in word for word in words for known in _ATTENTION_WORDS):
        return "attention"
    return "dense MLP" if block or any(w.startswith(_MLP_WORDS) for w in words) else "other"


def _persistent_tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer
