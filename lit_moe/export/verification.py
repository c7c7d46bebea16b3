"""Prove that an exported folder holds the model in memory: reload, compare weights and logits."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype

from lit_moe.accounting import count_bytes
from lit_moe.errors import ExportError
from lit_moe.export.reloading import reload_whole, reloaded_in_pieces
from lit_moe.export.writing import Weights, stored_layout
from lit_moe.inference import evaluating

PROBE_SHAPE = (2, 8)
"""Sequences and tokens that the logits are compared on."""

RELOADED_WHOLE = 1 << 30
"""Bytes of a model up to which a single process reloads it whole, by nothing but transformers."""

_ROUNDINGS_ALLOWED = 16


def max_logit_difference(
    model: PreTrainedModel,
    folder: Path,
    weights: Weights,
    *,
    own_loader: bool,
    in_pieces: bool | None = None,
) -> float:
    """Return the largest absolute difference between logits of ``model`` and of ``folder``.

    The headers of the files are compared with what was to be written (names, shapes, dtypes), then
    every tensor that transformers' loader makes of them (values), then logits (config, structure).
    Both models run in the dtypes of the one in memory. One that was cast as a whole
    (``model.to(bfloat16)``) has also rounded what a fresh load keeps in float32, rotary frequencies
    for instance; that is no fault of the export.

    Leaves the random state, train / eval mode and weights of ``model`` as they were.

    Args:
        model: what was exported.
        folder: where it was written.
        weights: what was written.
        own_loader: load with :func:`lit_moe.checkpoints.load` instead of plain transformers.
        in_pieces: hold one decoder layer of the reloaded model at a time, instead of a second whole
            model; None decides by ``RELOADED_WHOLE`` and by whether there are several ranks. Both
            ways compare the same.

    Raises:
        ExportError: if the folder does not load, misses or adds weights, holds other weights, or
            its logits differ by more than rounding in the model's dtype.
    """
    check_files(folder, stored_layout(model, weights))
    if in_pieces is None:
        in_pieces = _world_size() > 1 or count_bytes(model) > RELOADED_WHOLE
    with torch.random.fork_rng(devices=_cuda_devices()), evaluating(model):
        if in_pieces:
            with reloaded_in_pieces(model, folder, weights, own_loader=own_loader) as reloaded:
                return compare_logits(model, reloaded)
        return compare_logits(model, reload_whole(model, folder, weights, own_loader=own_loader))


def compare_logits(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Return the largest difference between the logits of two models with equal weights.

    Raises:
        ExportError: if it is more than rounding in the model's dtype, or the other does not run.
    """
    inputs = probe_inputs(model)
    expected = _logits(model, inputs)
    try:
        found = _logits(other, inputs)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"the reloaded export does not run: {error}") from error
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


def check_files(folder: Path, layout: dict[str, Tensor]) -> None:
    """Compare what the headers of the weight files say with what was to be written.

    A loader casts what it reads, so that only the header shows in which dtype a bias is stored.
    """
    missing = dict(layout)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dictionary
                part = opened.get_slice(name)
                expected = missing.pop(name, None)
                found = (str_to_torch_dtype[part.get_dtype()], torch.Size(part.get_shape()))
                if expected is None or (expected.dtype, expected.shape) != found:
                    raise ExportError(
                        f"{file.name} holds {name} as {found[0]} of shape {tuple(found[1])}, "
                        f"{_said(expected)}"
                    )
    if missing:
        raise ExportError(f"the export lacks {len(missing)} tensors: {next(iter(missing))}, ...")


def _said(expected: Tensor | None) -> str:
    if expected is None:
        return "which the model does not have"
    return f"but it was to be {expected.dtype} of shape {tuple(expected.shape)}"


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


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # some models draw noise where an input is left out
    output = model(**inputs)
    logits = output.logits if "logits" in output else output[0]
    return logits.float().cpu()


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count()))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
