"""Write a model as a Hugging Face folder that loads, or write nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from lit_moe.adapters import find_sites
from lit_moe.errors import ExportError
from lit_moe.export.compressed import (
    Names,
    check_compressible,
    check_layers_alike,
    config_entry,
    packed,
    sparse_24,
)
from lit_moe.export.compressed_reading import verify_compressed
from lit_moe.export.documents import write_documents
from lit_moe.export.padding import padded
from lit_moe.export.remote_code import (
    check_loadable,
    forget_remote_code,
    loads_without_help,
    write_remote_code,
)
from lit_moe.export.staging import check_space, check_target, staged
from lit_moe.export.verification import max_logit_difference
from lit_moe.export.writing import Weights, write_weights
from lit_moe.heterogeneous import (
    GLOBAL_VALUES_READABLE,
    global_values_readable,
    heterogeneous_configs,
)
from lit_moe.mixed_routing import CONFIG_KEY
from lit_moe.plans import Plan
from lit_moe.progress import late_progress_bars

Layout = Literal["plain", "per_layer_config", "padded", "mixed_routers", "compressed_2_4"]
Wanted = Literal["auto", "per_layer_config", "padded", "compressed_2_4"]
_BY_REMOTE_CODE = ("per_layer_config", "mixed_routers")

_LOG = logging.getLogger(__name__)
_ROOM_FOR_SMALL_FILES = 1 << 20


@dataclass(frozen=True)
class ExportResult:
    """What an export left behind.

    Attributes:
        path: the folder.
        max_abs_logit_difference: between the model in memory and the reloaded folder; None if the
            export was not verified.
        layout: ``plain`` (all layers alike), ``per_layer_config`` (counts per layer; needs
            lit-moe's loader or the remote code in the folder), ``padded`` (loads as plain) or
            ``mixed_routers`` (all layers alike, but routers mix; plain transformers loads a
            likeness, lit-moe's loader and the remote code the model) or ``compressed_2_4``
            (packed zeros; :func:`lit_moe.export.load_compressed` loads it, transformers does not).
    """

    path: Path
    max_abs_logit_difference: float | None
    layout: Layout


def export(  # noqa: PLR0913 - all but the first two are options with defaults
    model: PreTrainedModel,
    path: str | Path,
    *,
    tokenizer: Any = None,
    plan: Plan | None = None,
    report: Mapping[str, Any] | None = None,
    layout: Wanted = "auto",
    overwrite: bool = False,
    verify: bool = True,
) -> ExportResult:
    """Write ``model`` as a Hugging Face folder with the key layout of its family.

    Atomic: the folder appears under its name only when it is complete and verified. Models whose
    layers all have the same number of experts load with plain transformers. Call on one rank only.

    Args:
        model: whole, on one rank; not changed.
        path: the folder to make.
        tokenizer: saved beside the model; anything with ``save_pretrained``.
        plan: how the experts were chosen, saved as ``lit_moe_plan.json``.
        report: what the run knows so far (see :mod:`lit_moe.report`), saved as ``report.json`` and
            used in the model card.
        layout: for layers that keep different numbers of experts. ``auto`` is
            ``per_layer_config``; ``padded`` fills up with experts that are never chosen, which
            plain transformers loads, where the router has a bias to say so. For 2:4 zeros:
            ``compressed_2_4`` stores what stays and where, see :mod:`lit_moe.export.compressed`.
        overwrite: replace an older model folder at ``path``.
        verify: reload the folder and compare weights and logits, see
            :func:`lit_moe.export.verification.max_logit_difference`.

    Raises:
        ExportError: if the layout is unknown, the path is taken, the disk is full, or the folder
            does not reload as the same model. Nothing is left behind then, and an older folder is
            untouched.
    """
    check_layout(layout)
    target = check_target(path, overwrite=overwrite)
    weights, config, chosen = _prepared(model, layout)
    names = check_compressible(model) if chosen == "compressed_2_4" else None
    needed = weights.num_bytes() + _ROOM_FOR_SMALL_FILES
    check_space(target, needed)
    with staged(target, needed, overwrite=overwrite) as folder:
        # transformers reads every key of the config while it saves
        with global_values_readable(), late_progress_bars():
            model.save_pretrained(folder, state_dict={})
        write_weights(model, weights, folder, pack=partial(packed, names=names) if names else None)
        _write_config(model, config, chosen, folder)
        if names:
            _add_to_config(folder, quantization_config=config_entry(model, weights, names))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        difference = _verified(model, folder, weights, chosen, names) if verify else None
        result = ExportResult(target, difference, chosen)
        write_documents(folder, model, result=_as_dict(result), plan=plan, report=report)
    _LOG.info("exported to %s (largest logit difference after reload: %s)", target, difference)
    return result


def check_layout(layout: str) -> None:
    """Refuse a layout that :func:`export` does not know, or has no library for.

    Raises:
        ExportError: naming those that it knows, or what to install.
    """
    if layout not in get_args(Wanted):
        known = ", ".join(map(repr, get_args(Wanted)))
        raise ExportError(f"layout={layout!r} is unknown; it can be {known}")
    if layout == "compressed_2_4":
        sparse_24()


def _verified(
    model: PreTrainedModel, folder: Path, weights: Weights, layout: Layout, names: Names | None
) -> float | None:
    if names:
        return verify_compressed(model, folder, weights, names)
    own_loader = layout in _BY_REMOTE_CODE
    return max_logit_difference(model, folder, weights, own_loader=own_loader)


def _prepared(model: PreTrainedModel, layout: str) -> tuple[Weights, PreTrainedConfig, Layout]:
    """Return tensors by name in the model, the config that goes with them, and the layout."""
    sites = find_sites(model)
    held, config = model.state_dict(), model.config
    changed: dict[str, Callable[[Tensor], Tensor]] = {}
    chosen: Layout = "mixed_routers" if getattr(config, CONFIG_KEY, None) else "plain"
    if chosen == "mixed_routers" and layout == "padded":
        raise ExportError(
            "layout='padded' is for plain routers, but those of this model mix probabilities of "
            "former experts; leave layout at 'auto'"
        )
    if heterogeneous_configs(config) and not getattr(type(model), "builds_per_layer", False):
        chosen = "padded" if layout == "padded" else "per_layer_config"
    if layout == "compressed_2_4":
        check_layers_alike(model, chosen)
        chosen = "compressed_2_4"
    if chosen == "padded":
        changed, config = padded(model, sites, held)
    if chosen in _BY_REMOTE_CODE:
        check_loadable(model)
    # Selection compares nearly equal scores: serving engines read these biases as they are stored.
    biases = [a for s in sites for a in s.axes if a.kind in ("router", "select_bias")]
    for name in {a.name for a in biases if a.kind == "select_bias" or held[a.name].ndim == 1}:
        if held[name].is_floating_point():
            held[name] = held[name].float()
    return Weights(held, changed), config, chosen


def _write_config(
    model: PreTrainedModel, config: PreTrainedConfig, layout: Layout, folder: Path
) -> None:
    """Complete the config.json that ``save_pretrained`` wrote for the model in memory."""
    file = folder / CONFIG_NAME
    content = json.loads(file.read_text(encoding="utf-8"))
    if layout == "padded":
        config.architectures, config.dtype = content["architectures"], content["dtype"]
        content = json.loads(config.to_json_string())
    forget_remote_code(model, content, folder)
    if layout in _BY_REMOTE_CODE:
        content["auto_map"] = write_remote_code(model, folder)
    for part in _parts(content):
        part.pop(GLOBAL_VALUES_READABLE, None)
    _write_json(content, file)
    if layout == "per_layer_config" and not loads_without_help(folder):
        for part in _parts(content):
            if "per_layer_config" in part:
                part[GLOBAL_VALUES_READABLE] = True
        _write_json(content, file)


def _add_to_config(folder: Path, **entries: Any) -> None:
    file = folder / CONFIG_NAME
    _write_json({**json.loads(file.read_text(encoding="utf-8")), **entries}, file)


def _parts(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config.json and its nested configs."""
    yield content
    for value in content.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _write_json(content: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_dict(result: ExportResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "max_abs_logit_difference": result.max_abs_logit_difference,
        "layout": result.layout,
    }
