"""What one rank of a sharded run holds, from the config alone: the parts put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel

from lit_moe.adapters import MoESite
from lit_moe.inspection.activations import activation_bytes
from lit_moe.inspection.census import ParameterSize, census, largest_layer, largest_module
from lit_moe.inspection.findings import Layer, nearest
from lit_moe.inspection.ranks import Held, Loading, RankNeeds, RankRequest, Training
from lit_moe.inspection.zero_memory import (
    PERSISTENT,
    gathered_bytes,
    gradient_bytes,
    itemsize,
    optimizer_bytes,
    parameter_bytes,
    shard,
    step_bytes,
)


def rank_needs(
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    layers: Sequence[Layer],
    request: RankRequest,
    *,
    persistent: int = PERSISTENT,
) -> RankNeeds:
    """Return what a rank holds when the whole, and when the pruned model is trained.

    Args:
        model: on the meta device.
        sites: its MoE layers.
        layers: the same as findings, with their legal counts.
        request: the run.
        persistent: size up to which stage 3 keeps parameters whole.
    """
    kept = [nearest(layer.legal_counts, request.keep_ratio * layer.num_experts) for layer in layers]
    whole = [site.num_experts for site in sites]
    sizes = census(model, sites, kept)
    activations = _activations(model, sites, request)
    return RankNeeds(
        request,
        whole=_training(sizes, whole, request, activations, pruned=False, persistent=persistent),
        pruned=_training(sizes, kept, request, activations, pruned=True, persistent=persistent),
        loading=tuple(_loading(sizes, request)),
    )


def _activations(
    model: PreTrainedModel, sites: Sequence[MoESite], request: RankRequest
) -> dict[str, Held]:
    if request.tokens_per_rank is None:
        return {}
    estimate = activation_bytes(
        model,
        sites,
        tokens=request.tokens_per_rank,
        itemsize=itemsize(request),
        teacher=request.teacher,
    )
    return {"activations, about": Held(device=estimate)}


def _training(
    sizes: Sequence[ParameterSize],
    experts: Sequence[int],
    request: RankRequest,
    activations: dict[str, Held],
    *,
    pruned: bool,
    persistent: int,
) -> Training:
    before = [size.before for size in sizes]
    trained = [size.after for size in sizes if size.after] if pruned else before
    teacher = largest_module(sizes, pruned=False) if request.teacher else 0
    lasting = {
        "parameters": parameter_bytes(trained, request, persistent=persistent),
        "gradients": gradient_bytes(trained, request),
        "optimizer state": optimizer_bytes(trained, request),
    }
    if request.teacher:
        lasting["teacher"] = parameter_bytes(before, request, persistent=persistent)
    backward = dict(activations)
    if request.stage == 3:
        largest = largest_module(sizes, pruned=pruned)
        backward["largest module, gathered"] = gathered_bytes(largest, teacher, request)
    step = {"fp32 gradients of the step": step_bytes(trained, request)}
    return Training((min(experts), max(experts)), sum(trained), lasting, backward, step)


def _loading(sizes: Sequence[ParameterSize], request: RankRequest) -> Iterator[Loading]:
    """Yield what loading and observing hold, the whole model on each rank and, if possible, not.

    A checkpoint is read once for model and teacher. Sharded, only rank 0 reads it; each rank then
    runs with one decoder layer whole at a time.
    """
    elements = [size.before for size in sizes]
    models = 2 if request.teacher else 1
    whole = itemsize(request) * sum(elements)
    yield Loading(shard_on_load=False, host=models * whole, device=models * whole)
    if request.stage == 3:
        shards = itemsize(request) * models * shard(elements, request)
        layer = itemsize(request) * largest_layer(sizes)
        held = Held(layer, shards) if request.offloads_parameters else Held(shards + layer)
        yield Loading(shard_on_load=True, host=whole + held.host, device=held.device)
