"""A whole model on the first rank, of one whose parameters are spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters.discovery import build_on_meta
from lit_moe.export.staging import scratch_folder
from lit_moe.heterogeneous import per_layer_counts
from lit_moe.partitions import is_partitioned, stream_whole


@contextmanager
def whole_on_first_rank(model: PreTrainedModel, target: Path) -> Iterator[PreTrainedModel | None]:
    """Yield the model itself if it is whole; else a whole copy on rank 0 and None elsewhere.

    The copy's weights are files beside ``target``, mapped into memory: they are gathered one by
    one, and no rank ever holds more than one tensor besides its own share. The files are gone
    afterwards. Collective: every rank must enter.

    Args:
        model: whole, or partitioned by ZeRO-3, with or without an engine.
        target: where an export is going to be; there must be room for the model twice.
    """
    if not is_partitioned(model):
        yield model
        return
    if dist.get_rank() > 0:
        for _ in stream_whole(model):
            pass
        yield None
        return
    with scratch_folder(target) as folder:
        yield _mapped_copy(model, folder)


def _mapped_copy(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    stored = {
        name: _on_disk(tensor, folder / f"{number}.bin")
        for number, (name, tensor) in enumerate(stream_whole(model))
    }
    with per_layer_counts(model.config, type(model)):
        whole = build_on_meta(type(model), model.config)
    whole.load_state_dict(stored, assign=True)
    whole.tie_weights()
    _copy_unsaved_buffers(model, whole)
    vars(whole)["generation_config"] = getattr(model, "generation_config", None)
    return whole.eval()


def _on_disk(tensor: Tensor, file: Path) -> Tensor:
    """Write a tensor into a file and return it as that file."""
    if tensor.numel() == 0:
        return tensor.cpu().clone()
    mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


def _copy_unsaved_buffers(model: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Fill buffers that no checkpoint holds, such as rotary frequencies."""
    for name, buffer in model.named_buffers():
        path, _, last = name.rpartition(".")
        owner = whole.get_submodule(path)
        unset = owner._buffers[last]
        if unset is not None and unset.is_meta:
            owner._buffers[last] = buffer.detach().cpu().clone()
