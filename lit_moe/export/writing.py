"""Write the weights of a model folder one decoder layer at a time, whatever the model's size.

``save_pretrained`` converts the whole model to the key layout of its family first, and for fused
experts that means copying most of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict, str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

_SHARD_SIZE = "5GB"
_LAYER = re.compile(r"(.*?\.\d+)\.")
_ALIGNMENT = 8
Pack = Callable[[dict[str, Tensor]], dict[str, Tensor]]
_CODES = {dtype: code for code, dtype in str_to_torch_dtype.items()}


@dataclass(frozen=True)
class Weights:
    """Tensors by their names in the model, as they are to be stored.

    Attributes:
        held: tensors as the model has them.
        changed: name -> what makes the stored tensor of the held one, each time it is asked for.
    """

    held: Mapping[str, Tensor]
    changed: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        change = self.changed.get(name)
        return self.held[name] if change is None else change(self.held[name])

    def outline(self, name: str) -> Tensor:
        """Return the stored tensor without memory: its shape and dtype."""
        change, outline = self.changed.get(name), self.held[name].to("meta")
        return outline if change is None else change(outline)

    def num_bytes(self) -> int:
        """Bytes on disk; tensors that share memory (tied embeddings) are written once."""
        once = {t.data_ptr(): name for name, t in self.held.items()}
        return sum(_size(self.outline(name)) for name in once.values())


def layer_of(name: str) -> str:
    """Return the path of the decoder layer that a tensor belongs to, '' if to none."""
    found = _LAYER.match(name)
    return "" if found is None else found[1]


def stored_layout(model: PreTrainedModel, weights: Weights) -> dict[str, Tensor]:
    """Return tensors without memory by the names under which a model folder stores them."""
    layout: dict[str, Tensor] = {}
    for group in _groups(model, weights):
        layout |= _reverted(model, {name: weights.outline(name) for name in group})
    return layout


def layer_by_layer(model: PreTrainedModel, weights: Weights) -> Iterator[dict[str, Tensor]]:
    """Yield tensors by the names under which a model folder stores them, one layer at a time."""
    for group in _groups(model, weights):
        yield _reverted(model, {name: weights[name] for name in group})


def write_weights(
    model: PreTrainedModel, weights: Weights, folder: Path, *, pack: Pack | None = None
) -> None:
    """Write safetensors files, several with an index if they are large, with the family's keys.

    Holds one decoder layer beside the weights themselves.

    Args:
        model: the weights are of.
        weights: to be written.
        folder: without any weights yet.
        pack: turns tensors of a layer into what is stored for them; knows tensors without memory.
    """
    pack = pack or _as_they_are
    layout = pack(stored_layout(model, weights))
    split = split_torch_state_dict_into_shards(
        layout, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD_SIZE
    )
    with ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for file, names in split.filename_to_tensors.items():
            stream: BinaryIO = stack.enter_context((folder / file).open("wb"))
            offsets = _write_header(stream, {name: layout[name] for name in names})
            places |= {name: (stream, offset) for name, offset in offsets.items()}
        for tensors in layer_by_layer(model, weights):
            for name, tensor in pack(tensors).items():
                place, offset = places[name]
                place.seek(offset)
                place.write(_bytes_of(tensor))
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _as_they_are(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def _groups(model: PreTrainedModel, weights: Weights) -> list[list[str]]:
    """Return the names that are to be stored, those together that are converted together."""
    names = _stored_once(model, weights)
    by_layer: dict[str, list[str]] = {}
    for name in names:
        by_layer.setdefault(layer_of(name), []).append(name)
    groups = list(by_layer.values())
    outlines = {name: weights.outline(name) for name in names}
    together = _reverted(model, outlines)
    apart = [_reverted(model, {n: outlines[n] for n in group}) for group in groups]
    shapes = {name: tensor.shape for part in apart for name, tensor in part.items()}
    if shapes == {name: tensor.shape for name, tensor in together.items()}:
        return groups
    return [names]  # a family that converts several layers into one tensor


def _stored_once(model: PreTrainedModel, weights: Weights) -> list[str]:
    """Return names without those that another name stands for, or that are never stored.

    transformers decides, on stand-ins: it would clone parts of one buffer (ZeRO keeps all in one).
    """
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = {name: tensor for name, tensor in weights.held.items() if name not in ignored}
    stand_ins: dict[object, Tensor] = {}
    for name, tensor in kept.items():
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name
        kept[name] = stand_ins.setdefault(place, torch.empty(1))
    return list(remove_tied_weights_from_state_dict(kept, model))


def _reverted(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return revert_weight_conversion(model, tensors)


def _write_header(stream: BinaryIO, layout: Mapping[str, Tensor]) -> dict[str, int]:
    """Write the header of a safetensors file and return where each tensor begins."""
    ordered = sorted(layout, key=lambda name: (-layout[name].element_size(), name))
    ends, entries = 0, {}
    for name in ordered:
        begin, ends = ends, ends + _size(layout[name])
        entries[name] = _entry(layout[name], begin, ends)
    content = {"__metadata__": {"format": "pt"}, **entries}
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    stream.write(len(header).to_bytes(_ALIGNMENT, "little") + header)
    start = stream.tell()
    stream.truncate(start + ends)
    return {name: start + entries[name]["data_offsets"][0] for name in ordered}


def _entry(tensor: Tensor, begin: int, end: int) -> dict[str, Any]:
    return {
        "dtype": _CODES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [begin, end],
    }


def _bytes_of(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
