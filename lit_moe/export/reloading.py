"""Load an exported folder by transformers, whole or without a second copy of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, core_model_loading

from lit_moe.checkpoints import auto_class, load, model_class, read_config
from lit_moe.errors import ExportError, LitMoEError
from lit_moe.export.writing import Weights, layer_of
from lit_moe.progress import late_progress_bars

_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"


def reload_whole(
    model: PreTrainedModel, folder: Path, weights: Weights, *, own_loader: bool
) -> PreTrainedModel:
    """Return the model in ``folder``, a second copy of ``model``.

    Args:
        model: what was exported.
        folder: where it was written.
        weights: what was written.
        own_loader: load with :func:`lit_moe.checkpoints.load` instead of plain transformers.

    Raises:
        ExportError: if the folder does not load, or holds other weights.
    """
    reloaded = _load(model, folder, own_loader=own_loader)
    names = reloaded.state_dict()
    _check_names(model, names)
    for name, tensor in names.items():
        check_equal(name, weights[name], tensor)
    match_dtypes(model, reloaded)
    return reloaded if hasattr(model, "hf_device_map") else nn.Module.to(reloaded, model.device)


@contextmanager
def reloaded_in_pieces(
    model: PreTrainedModel, folder: Path, weights: Weights, *, own_loader: bool
) -> Iterator[PreTrainedModel]:
    """Yield the model in ``folder`` without ever holding more than one decoder layer of it.

    Transformers' loader runs as ever, but each tensor that it would put into the new model is
    compared with the one that was to be written, and dropped. What was proven equal the new model
    then borrows from ``model``; dead experts of a padded layer are there while the layer runs.

    Args:
        model: what was exported.
        folder: where it was written.
        weights: what was written.
        own_loader: load with :func:`lit_moe.checkpoints.load` instead of plain transformers.

    Raises:
        ExportError: if the folder does not load, or holds other weights.
    """
    with _one_at_a_time(), _compared_and_dropped(weights):
        reloaded = _load(model, folder, own_loader=own_loader)
    names = reloaded.state_dict()
    _check_names(model, names)
    own = model.state_dict()
    same = {name: own[name] for name, t in names.items() if own[name].shape == t.shape}
    reloaded.load_state_dict(same, strict=False, assign=True)
    match_dtypes(model, reloaded)
    removers = [
        _there_while_it_runs(reloaded, path, {n: (weights, own[n].dtype) for n in absent})
        for path, absent in _by_layer(name for name in names if name not in same).items()
    ]
    try:
        yield reloaded
    finally:
        for remove in removers:
            remove()


def check_equal(name: str, expected: Tensor, found: Tensor) -> None:
    """Compare a reloaded tensor with what was written, in the narrower of their dtypes.

    Raises:
        ExportError: if a value differs.
    """
    if expected.shape != found.shape:
        raise ExportError(f"the reloaded export has no {name} of shape {tuple(expected.shape)}")
    narrow = min(expected.dtype, found.dtype, key=lambda dtype: dtype.itemsize)
    if not torch.equal(expected.to(found.device, narrow), found.to(narrow)):
        raise ExportError(f"the reloaded export holds other values in {name}")


def _load(model: PreTrainedModel, folder: Path, *, own_loader: bool) -> PreTrainedModel:
    options: dict[str, Any] = {"output_loading_info": True}
    if device_map := getattr(model, "hf_device_map", None):
        options["device_map"] = device_map
    try:
        loaded: Any = (load if own_loader else _plain_load)(folder, **options)
    except ExportError:
        raise
    except (LitMoEError, OSError, RuntimeError, ValueError) as error:
        raise ExportError(f"the export does not load: {error}") from error
    reloaded, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(str(name) for name in info[kind])
            raise ExportError(f"the reloaded export has {kind}: {', '.join(names[:5])}")
    match_implementations(model, reloaded)
    return reloaded.eval()


def _plain_load(folder: Path, **options: Any) -> Any:
    config = read_config(folder)
    with late_progress_bars():
        return auto_class(config, model_class(config)).from_pretrained(folder, **options)


def _check_names(model: PreTrainedModel, found: dict[str, Tensor]) -> None:
    own = model.state_dict().keys()
    if own != found.keys():
        odd = sorted(own ^ found.keys())
        raise ExportError(f"the reloaded export has other tensors than the model: {odd[0]}")


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep transformers from reading all tensors ahead in threads."""
    before = os.environ.get(_SEQUENTIAL)
    os.environ[_SEQUENTIAL] = "1"
    try:
        yield
    finally:
        del os.environ[_SEQUENTIAL]
        if before is not None:
            os.environ[_SEQUENTIAL] = before


@contextmanager
def _compared_and_dropped(weights: Weights) -> Iterator[None]:
    """Let loaded tensors be compared instead of kept; the model's own stay without memory."""
    loader: Any = core_model_loading
    keep = loader.set_param_for_module
    shapes: dict[int, dict[str, torch.Size]] = {}

    def compare(
        model: PreTrainedModel, name: str, found: Tensor, info: Any, quantizer: Any
    ) -> None:
        if id(model) not in shapes:  # a state dict for every tensor would take long
            shapes[id(model)] = {n: tensor.shape for n, tensor in model.state_dict().items()}
        if name not in weights.held or shapes[id(model)].get(name) != found.shape:
            keep(model, name, found, info, quantizer)  # transformers then tells what is wrong
            return
        check_equal(name, weights[name], found)
        info.missing_keys.discard(name)
        model.get_parameter_or_buffer(name)._is_hf_initialized = True

    loader.set_param_for_module = compare
    try:
        yield
    finally:
        loader.set_param_for_module = keep


def _by_layer(names: Iterator[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(layer_of(name) or name.rpartition(".")[0], []).append(name)
    return found


def _there_while_it_runs(
    reloaded: PreTrainedModel, path: str, absent: dict[str, tuple[Weights, torch.dtype]]
) -> Callable[[], None]:
    """Give tensors to a module before its forward and take them away behind it."""

    def enter(*_: Any) -> None:
        for name, (weights, dtype) in absent.items():
            _put(reloaded, name, weights[name].to(dtype))

    def leave(*_: Any) -> None:
        for name, (weights, dtype) in absent.items():
            _put(reloaded, name, weights.outline(name).to(dtype))

    unit = reloaded.get_submodule(path)
    before = unit.register_forward_pre_hook(enter, prepend=True)
    behind = unit.register_forward_hook(leave, always_call=True)

    def remove() -> None:
        before.remove()
        behind.remove()

    return remove


def _put(model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor


def match_implementations(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    """Implementations round differently, and in bf16 that changes which expert is chosen."""
    experts = model.get_experts_implementation()
    if reloaded.get_experts_implementation() != experts:
        reloaded.set_experts_implementation(experts)
    attention = model.config._attn_implementation
    if reloaded.config._attn_implementation != attention:
        reloaded.set_attn_implementation(attention)


def match_dtypes(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    """Bring what has memory to the dtypes and devices that it has in ``model``."""
    own = dict(_tensors(model))
    for name, tensor in _tensors(reloaded):
        if name in own and not tensor.is_meta:
            tensor.data = tensor.data.to(own[name].device, own[name].dtype)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers, also those that are never saved."""
    yield from model.named_parameters()
    yield from model.named_buffers()
