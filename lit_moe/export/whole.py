"""A whole model on the first rank, of one whose parameters are spread over ranks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.accounting import count_bytes
from lit_moe.adapters import find_sites
from lit_moe.errors import ExportError
from lit_moe.export.reloading import match_implementations
from lit_moe.export.remote_code import built_anew
from lit_moe.export.staging import check_space, scratch_folder
from lit_moe.export.verification import compare_logits
from lit_moe.inference import evaluating
from lit_moe.sharding.partitions import has_master, is_managed, is_partitioned, stream_whole


@contextmanager
def whole_on_first_rank(
    model: PreTrainedModel,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Iterator[PreTrainedModel | None]:
    """Yield what is to be exported on rank 0, and None elsewhere.

    That is the model itself if it is whole and has the wanted dtype. Of one that is spread over
    ranks, whose engine holds wider master weights than the model uses, or that is to be cast, it is
    a copy whose weights are files beside ``target``, mapped into memory: they are gathered one by
    one, and no rank ever holds more than one tensor besides its own share. The files are gone
    afterwards, and the model is what it was. Collective: every rank must enter.

    Args:
        model: whole, or partitioned by ZeRO-3, with or without an engine.
        target: where an export is going to be; there must be room for the model twice.
        dtype: of the weights, except biases that steer selection; None for that of the masters.
        verify: if a copy is made, check that the model runs as its config says, which is what the
            copy is built from.

    Raises:
        ExportError: if there is no room, or the model is not what its config says.
    """
    masters = _wants_masters(model, dtype)
    if not (is_partitioned(model) or masters or _is_cast(model, dtype)):
        yield model if _rank() == 0 else None
        return
    _check_room(model, target)
    if verify:
        _check_together(model, everywhere=is_partitioned(model))
    if _rank() > 0:
        if is_partitioned(model) or masters:
            for _ in stream_whole(model, masters=masters):
                pass
        yield None
        return
    with scratch_folder(target) as folder:
        yield _mapped_copy(model, folder, stream_whole(model, masters=masters), dtype)


def check_as_configured(model: PreTrainedModel) -> None:
    """Compare a model's logits with those of one built from its config around the same tensors.

    Holds no tensor twice. Collective if the model is partitioned.

    Raises:
        ExportError: if they differ by more than rounding.
    """
    twin = built_anew(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        twin.get_submodule(owner)._parameters[last] = parameter
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        twin.get_submodule(owner)._buffers[last] = buffer
    match_implementations(model, twin)
    with evaluating(model), evaluating(twin):
        compare_logits(model, twin)


def _is_cast(model: PreTrainedModel, dtype: torch.dtype | None) -> bool:
    """Whether any weight would be written in another dtype than it has."""
    exact = selection_biases(model)
    own = {
        t.dtype for n, t in model.state_dict().items() if t.is_floating_point() and n not in exact
    }
    return dtype is not None and own != {dtype}


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _wants_masters(model: PreTrainedModel, dtype: torch.dtype | None) -> bool:
    """Whether bf16 or fp16 weights would be written where the engine knows more digits."""
    wanted = torch.float32 if dtype is None else dtype
    if not is_managed(model) or wanted.itemsize <= model.dtype.itemsize:
        return False
    return any(map(has_master, model.parameters()))


def _check_room(model: PreTrainedModel, target: Path) -> None:
    refused: list[str | None] = [None]
    if _rank() == 0:
        try:
            check_space(target, 2 * count_bytes(model))
        except ExportError as error:
            refused = [str(error)]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(refused)
    if refused[0] is not None:
        raise ExportError(refused[0])


def _check_together(model: PreTrainedModel, *, everywhere: bool) -> None:
    """Collective: let no rank go on to gather weights where the model is not what it should be."""
    refused = None
    if everywhere or _rank() == 0:
        try:
            check_as_configured(model)
        except ExportError as error:
            refused = str(error)
    said = [refused]
    if dist.is_available() and dist.is_initialized():
        said = [None] * dist.get_world_size()
        dist.all_gather_object(said, refused)
    for sentence in said:
        if sentence is not None:
            raise ExportError(sentence)


def _mapped_copy(
    model: PreTrainedModel,
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    exact = selection_biases(model)
    stored = {}
    for number, (name, tensor) in enumerate(tensors):
        cast = dtype is not None and tensor.is_floating_point() and name not in exact
        kind = dtype if cast and dtype is not None else tensor.dtype
        stored[name] = _on_disk(tensor, folder / f"{number}.bin", kind)
    whole = built_anew(model)
    whole.load_state_dict(stored, assign=True)
    whole.tie_weights()
    _copy_unsaved_buffers(model, whole)
    vars(whole)["generation_config"] = getattr(model, "generation_config", None)
    return whole.eval()


def selection_biases(model: PreTrainedModel) -> set[str]:
    """Return the names of biases that steer selection, which bf16 would make equal."""
    return {a.name for s in find_sites(model) for a in s.axes if a.kind == "select_bias"}


def _on_disk(tensor: Tensor, file: Path, dtype: torch.dtype) -> Tensor:
    """Write a tensor into a file and return it as that file."""
    if tensor.numel() == 0:
        return tensor.to("cpu", dtype, copy=True)
    with file.open("wb") as stream:  # else a full disk ends the process without a word
        os.posix_fallocate(stream.fileno(), 0, tensor.numel() * dtype.itemsize)
    mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=dtype)
    return mapped.view(tensor.shape).copy_(tensor)


def _copy_unsaved_buffers(model: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Fill buffers that no checkpoint holds, such as rotary frequencies."""
    for name, buffer in model.named_buffers():
        path, _, last = name.rpartition(".")
        owner = whole.get_submodule(path)
        unset = owner._buffers[last]
        if unset is not None and unset.is_meta:
            owner._buffers[last] = buffer.detach().cpu().clone()
