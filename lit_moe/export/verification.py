"""Prove that an exported folder holds the model in memory: reload, compare weights and logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.checkpoints import auto_class, load, model_class, read_config
from lit_moe.errors import ExportError, LitMoEError
from lit_moe.inference import evaluating
from lit_moe.progress import late_progress_bars

PROBE_SHAPE = (2, 8)
"""Sequences and tokens that the logits are compared on."""

_ROUNDINGS_ALLOWED = 16


def max_logit_difference(
    model: PreTrainedModel, folder: Path, *, own_loader: bool, same_shapes: bool
) -> float:
    """Return the largest absolute difference between logits of ``model`` and of ``folder``.

    Both are compared in the dtypes of the model in memory. One that was cast as a whole
    (``model.to(bfloat16)``) has also rounded what a fresh load keeps in float32, rotary frequencies
    for instance; that is no fault of the export.

    Holds a second copy of the model for its duration. Leaves the random state, train / eval mode
    and weights of ``model`` as they were.

    Args:
        model: what was exported.
        folder: where it was written.
        own_loader: load with :func:`lit_moe.checkpoints.load` instead of plain transformers.
        same_shapes: whether weights can be compared one by one as well.

    Raises:
        ExportError: if the folder does not load, misses or adds weights, holds other weights, or
            its logits differ by more than rounding in the model's dtype.
    """
    with torch.random.fork_rng(devices=_cuda_devices()), evaluating(model):
        reloaded = _reload(model, folder, own_loader=own_loader)
        if same_shapes:
            _compare_weights(model, reloaded)
        _match_dtypes(model, reloaded)
        inputs = probe_inputs(model)
        expected, found = _logits(model, inputs), _logits(reloaded, inputs)
    difference = float((expected - found).abs().max())
    allowed = (
        _ROUNDINGS_ALLOWED * torch.finfo(model.dtype).eps * max(1.0, float(expected.abs().max()))
    )
    if not difference <= allowed:  # also true for NaN
        raise ExportError(
            f"the reloaded export is not the model in memory: logits differ by {difference:.3g}, "
            f"{model.dtype} rounding explains {allowed:.3g}"
        )
    return difference


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return fixed inputs of the kind that ``model`` takes: token ids or random pixels."""
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (PROBE_SHAPE[0], model.config.num_channels, height, width)
        pixels = torch.randn(shape, generator=generator)
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    ids = torch.randint(config.vocab_size, PROBE_SHAPE, generator=generator)
    ids = _without_special_ids(ids, model).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def _without_special_ids(ids: Tensor, model: PreTrainedModel) -> Tensor:
    """Replace ids with a meaning (padding, image placeholders) by an ordinary one."""
    named = {**vars(model.config), **vars(model.config.get_text_config())}
    special = {v for k, v in named.items() if k.endswith(("token_id", "token_index"))}
    taken = torch.tensor(sorted(v for v in special if isinstance(v, int)), dtype=torch.long)
    ordinary = next(i for i in range(len(taken) + 1) if i not in taken)
    return torch.where(torch.isin(ids, taken), ordinary, ids)


def _reload(model: PreTrainedModel, folder: Path, *, own_loader: bool) -> PreTrainedModel:
    options: dict[str, Any] = {"output_loading_info": True}
    if device_map := getattr(model, "hf_device_map", None):
        options["device_map"] = device_map
    try:
        reloaded, info = _load(folder, own_loader=own_loader, **options)
    except (LitMoEError, OSError, RuntimeError, ValueError) as error:
        raise ExportError(f"the export does not load: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(str(name) for name in info[kind])
            raise ExportError(f"the reloaded export has {kind}: {', '.join(names[:5])}")
    _match_implementations(model, reloaded)
    return (reloaded if device_map else reloaded.to(model.device)).eval()


def _load(folder: Path, *, own_loader: bool, **options: Any) -> Any:
    if own_loader:
        return load(folder, **options)
    config = read_config(folder)
    with late_progress_bars():
        return auto_class(config, model_class(config)).from_pretrained(folder, **options)


def _compare_weights(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    """Compare every tensor: a probe of a few tokens does not reach every expert."""
    found = reloaded.state_dict()
    for name, tensor in model.state_dict().items():
        other = found.get(name)
        if other is None or tensor.shape != other.shape:
            raise ExportError(f"the reloaded export has no {name} of shape {tuple(tensor.shape)}")
        narrow = min(tensor.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(tensor.to(narrow), other.to(tensor.device, narrow)):
            raise ExportError(f"the reloaded export holds other values in {name}")


def _match_implementations(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    """Implementations round differently, and in bf16 that changes which expert is chosen."""
    experts = model.get_experts_implementation()
    if reloaded.get_experts_implementation() != experts:
        reloaded.set_experts_implementation(experts)
    attention = model.config._attn_implementation
    if reloaded.config._attn_implementation != attention:
        reloaded.set_attn_implementation(attention)


def _match_dtypes(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    for name, tensor in _tensors(reloaded):
        if name in dtypes and tensor.dtype != dtypes[name]:
            tensor.data = tensor.data.to(dtypes[name])


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers, also those that are never saved."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # some models draw noise where an input is left out
    output = model(**inputs)
    logits = output.logits if "logits" in output else output[0]
    return logits.float().cpu()


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count()))
