"""Weight pruning as calls: decide on masks, apply them, measure what is zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, adapter_for, find_sites
from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.models import sharing_copy
from lit_moe.sharding.partitions import gathered
from lit_moe.sparsity.calibration import observe_inputs, walk_layers
from lit_moe.sparsity.layers import check_widths, matrices_of, thin_layer
from lit_moe.sparsity.layout import shapes_of, write_matrices, zero_matrices
from lit_moe.sparsity.masks import WeightMasks, pack
from lit_moe.sparsity.moments import InputMoments
from lit_moe.sparsity.options import SparsityOptions

Batches = Iterable[Mapping[str, Tensor]]
OnLayer = Callable[[str], None]


@dataclass(frozen=True)
class Thinning:
    """What a pruning did.

    Attributes:
        masks: which weights stay.
        unrouted: layer -> experts that saw no token; only layers with some.
    """

    masks: WeightMasks
    unrouted: dict[str, list[int]] = field(default_factory=dict)


def weight_masks(
    model: PreTrainedModel,
    batches: Batches | None = None,
    options: SparsityOptions | None = None,
    **fields: Any,
) -> WeightMasks:
    """Return which weights of the routed experts should stay; the model stays as it is.

    Applied with :func:`apply_masks` they give what :func:`sparsify` gives, except for
    ``sparsegpt``, which also changes the weights that stay. Holds a second copy of the experts
    while it works.

    Args:
        model: any supported MoE model.
        batches: see :func:`sparsify`.
        options: see :class:`SparsityOptions`.
        **fields: single options instead: ``method="wanda", pattern="2:4"`` or ``ratio=0.5``.

    Raises:
        LitMoEError: see :func:`sparsify`.
    """
    options = _options(options, fields)
    check_request(model, options)
    return sparsify(sharing_copy(model), batches, options).masks


@torch.no_grad()
def sparsify(
    model: PreTrainedModel,
    batches: Batches | None = None,
    options: SparsityOptions | None = None,
    *,
    on_layer: OnLayer | None = None,
    **fields: Any,
) -> Thinning:
    """Zero weights of all routed experts, in place; shapes and all other tensors stay.

    With a process group every rank must call this with its own share of the batches; all decide
    the same. Tensors that another model shares are replaced, not written. If it breaks off, the
    layers that are done stay pruned.

    Args:
        model: any supported MoE model.
        batches: dictionaries with ``input_ids`` (B, S) and optionally ``attention_mask``, decoder
            inputs, or ``pixel_values``; not needed for ``magnitude``.
        options: see :class:`SparsityOptions`.
        on_layer: called with the name of each layer when it is done.
        **fields: single options instead of ``options``.

    Raises:
        LitMoEError: for a pattern that does not fit a matrix, before anything is run.
        CalibrationError: if there is no text, activations are not finite, or experts saw no token
            under ``unrouted: error``.
    """
    options = _options(options, fields)
    check_request(model, options)
    work = _Work(model, options, on_layer)
    if not options.needs_text:
        for site in work.sites:
            work.thin(site, None)
    elif batches is None:
        raise CalibrationError(
            f"method={options.method!r} needs calibration batches; give some, or "
            "method: magnitude, which looks at weights only"
        )
    elif options.earlier == "dense" and options.method != "sparsegpt":
        moments = observe_inputs(model, batches, method=options.method)
        for site in work.sites:
            work.thin(site, moments.pop(site.name))
    else:  # products of inputs are too large to keep for all layers at once
        again = options.earlier == "pruned"
        walk_layers(model, batches, work.thin, method=options.method, again=again)
    return work.result()


@torch.no_grad()
def apply_masks(model: PreTrainedModel, masks: WeightMasks) -> None:
    """Zero the weights that masks leave out, in place; everything else keeps its bits.

    Tensors that another model shares are replaced, not written.

    Raises:
        PlanError: if the masks are of another model. Nothing has been touched then.
    """
    masks.check_fits(shapes_of(model), family=model.config.model_type)
    adapter = adapter_for(model.config)
    for site in find_sites(model):
        keep = {name: mask.to(model.device) for name, mask in masks.keep(site.name).items()}
        zero_matrices(model, adapter, site, keep)


@torch.no_grad()
def masks_from_moments(
    model: PreTrainedModel,
    moments: Mapping[str, InputMoments],
    options: SparsityOptions,
    *,
    progress: float = 1.0,
) -> WeightMasks:
    """Return masks for the weights as they now are, from sums that were taken before.

    Args:
        model: stays as it is.
        moments: layer -> sums, see :func:`observe_inputs`; empty for ``magnitude``.
        options: ``sparsegpt`` needs a pass of its own and cannot be used here.
        progress: how far on the way from no zeros (0) to the pattern (1).
    """
    work = _Work(model, options, None)
    pattern = options.parsed.at(progress)
    for site in work.sites:
        with gathered(model.get_submodule(site.experts)):
            weights = work.adapter.expert_weights(model, site)
            thinned = thin_layer(site.name, weights, moments.get(site.name), options, pattern)
            work.note(site, thinned.keep, thinned.unrouted)
    return work.result().masks


@torch.no_grad()
def measure_sparsity(model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Return layer -> matrix -> fraction of weights that are exactly 0."""
    adapter = adapter_for(model.config)
    found = {}
    for site in find_sites(model):
        with gathered(model.get_submodule(site.experts)):
            weights = adapter.expert_weights(model, site)
            found[site.name] = {
                name: 1 - int(torch.count_nonzero(weights[name])) / weights[name].numel()
                for name in matrices_of(weights)
            }
    return found


def check_request(model: PreTrainedModel, options: SparsityOptions) -> None:
    """Refuse a pattern that some matrix of the model cannot bear.

    Raises:
        LitMoEError: naming layer, matrix and numbers.
    """
    adapter = adapter_for(model.config)
    for site in find_sites(model):
        check_widths(site, adapter.expert_weights(model, site), options.parsed)


class _Work:
    """Masks of the layers that are done."""

    def __init__(
        self, model: PreTrainedModel, options: SparsityOptions, on_layer: OnLayer | None
    ) -> None:
        self.adapter, self.sites = adapter_for(model.config), find_sites(model)
        self._model, self._options, self._on_layer = model, options, on_layer
        self._bits: dict[str, dict[str, Tensor]] = {}
        self._widths: dict[str, dict[str, int]] = {}
        self._unrouted: dict[str, list[int]] = {}

    def thin(self, site: MoESite, moments: InputMoments | None) -> None:
        """Decide on one layer and write it."""
        weights = self.adapter.expert_weights(self._model, site)
        thinned = thin_layer(site.name, weights, moments, self._options)
        if thinned.weights:
            write_matrices(self._model, self.adapter, site, thinned.weights)
        else:
            zero_matrices(self._model, self.adapter, site, thinned.keep)
        self.note(site, thinned.keep, thinned.unrouted)
        if self._on_layer is not None:
            self._on_layer(site.name)

    def note(self, site: MoESite, keep: dict[str, Tensor], unrouted: tuple[int, ...]) -> None:
        """Remember what was decided for one layer."""
        self._bits[site.name] = {name: pack(mask) for name, mask in keep.items()}
        self._widths[site.name] = {name: mask.shape[-1] for name, mask in keep.items()}
        if unrouted:
            self._unrouted[site.name] = list(unrouted)

    def result(self) -> Thinning:
        """Return everything in module order."""
        names = [site.name for site in self.sites]
        masks = WeightMasks(
            {name: self._bits[name] for name in names},
            {name: self._widths[name] for name in names},
            method=self._options.method,
            pattern=str(self._options.parsed),
            family=self._model.config.model_type,
        )
        unrouted = {name: self._unrouted[name] for name in names if name in self._unrouted}
        return Thinning(masks, unrouted)


def _options(options: SparsityOptions | None, fields: Mapping[str, Any]) -> SparsityOptions:
    known = SparsityOptions.__dataclass_fields__
    for name in fields:
        if name not in known:
            raise LitMoEError(f"there is no option {name!r}; known: {', '.join(known)}")
    return SparsityOptions(**fields) if options is None else replace(options, **fields)
