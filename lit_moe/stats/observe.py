"""Calibration in one pass: the model runs as it is, and sums remain."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.inference import check_readable, evaluating
from lit_moe.stats.collected import Collected
from lit_moe.stats.observation import Gathered, Observation
from lit_moe.stats.tap import TokenMask, tapped

_MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
    "pixel_values",
)
_CHECKED = 64
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def observe(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    progress: bool = False,
    gather: Collection[Gathered] = (),
) -> Observation:
    """Run the model once over ``batches`` and return what its routed experts did.

    Routing is the model's own; shared experts are not observed; padding does not count. The model
    runs in evaluation mode, without its head, on its own device. With a process group every rank
    must call this with its own share of the batches; all get the sums over all ranks.

    Args:
        model: any supported MoE model.
        batches: dictionaries with ``input_ids`` (B, S) and optionally ``attention_mask``, decoder
            inputs, or ``pixel_values``; other keys are ignored.
        progress: show a progress bar.
        gather: what to add up beside the usual, in the same pass: ``pairs`` (which experts work on
            the same tokens), ``vocabulary`` (which token ids an expert is sent), ``outputs``
            (moments of the experts' outputs). See :class:`lit_moe.stats.LayerStats`.

    Raises:
        NotAnMoEError, UnsupportedModelError: if the model has no experts that can be observed.
        CalibrationError: if there is no batch, if watching changes what the model computes, or
            if activations are not finite (the message names the layer).
        LitMoEError: if ``gather`` names something that does not exist.
    """
    sites = find_sites(model)
    sums = Collected(model, sites, gather)
    with evaluating(model), failing_together():
        _run(model, sites, sums, shown(batches, progress))
    return sums.observation()


def _run(
    model: PreTrainedModel,
    sites: tuple[MoESite, ...],
    sums: Collected,
    batches: Iterable[Mapping[str, Tensor]],
) -> None:
    mask, checked = TokenMask(), False
    for batch in batches:
        inputs = model_inputs(batch, model.device)
        check_readable(model, inputs)
        if not checked:
            _check_undisturbed(model, sites, _start(inputs))
            checked = True
        with tapped(model, sites, sums, mask):
            mask.set(inputs)
            model.base_model(**inputs)
        sums.check_finite()
    if not checked:
        raise CalibrationError("there is no calibration batch; give at least one per rank")


@contextmanager
def failing_together() -> Iterator[None]:
    """Collective: if a rank fails inside the block, all do, instead of waiting for it for ever.

    Raises:
        CalibrationError: on the ranks that did not fail themselves.
    """
    problem: LitMoEError | None = None
    try:
        yield
    except LitMoEError as error:
        problem = error
    if dist.is_available() and dist.is_initialized():
        failed = torch.tensor(int(problem is not None), device=_collective_device())
        dist.all_reduce(failed)
        if problem is None and failed:
            raise CalibrationError(f"{int(failed)} other ranks stopped; their messages say why")
    if problem is not None:
        raise problem


def _collective_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _check_undisturbed(
    model: PreTrainedModel, sites: tuple[MoESite, ...], inputs: dict[str, Tensor]
) -> None:
    """Compare the model's last hidden states with and without the tap on one short sequence."""
    plain = model.base_model(**inputs)[0]
    mask = TokenMask()
    mask.set(inputs)
    with tapped(model, sites, Collected(model, sites, ()), mask):
        watched = model.base_model(**inputs)[0]
    if not plain.isfinite().all():
        return  # NaN differs from NaN; the sums will name the layer
    difference = float((plain - watched).abs().max() / plain.abs().max().clamp(min=1e-12))
    if difference > _TOLERANCE.get(plain.dtype, 5e-2):
        raise CalibrationError(
            f"observing changed the output of {type(model).__name__} by {difference:.1e} of its "
            "largest value on the first batch, so its statistics would not be those of the model; "
            "please report the model type and the versions of torch and transformers"
        )


def model_inputs(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return what of a batch a model's forward takes, on a device."""
    return {key: batch[key].to(device) for key in _MODEL_INPUTS if key in batch}


def _start(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the first row, cut to its first tokens (pixels stay whole)."""
    return {k: v[:1] if k == "pixel_values" else v[:1, :_CHECKED] for k, v in inputs.items()}


def shown(
    batches: Iterable[Mapping[str, Tensor]], progress: bool
) -> Iterable[Mapping[str, Tensor]]:
    """Return the batches, with a progress bar around them if ``progress``."""
    if not progress:
        return batches
    total = len(batches) if isinstance(batches, Sized) else None
    return track(batches, description="observing experts", total=total)
