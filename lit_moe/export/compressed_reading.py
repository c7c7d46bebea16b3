"""Folders of packed 2:4 weights, read back by the library that wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.accounting import count_bytes
from lit_moe.checkpoints import check_weights, is_packed, model_class, read_config
from lit_moe.errors import ExportError, LitMoEError
from lit_moe.export.compressed import packed, sparse_24
from lit_moe.export.reloading import check_equal, match_dtypes, match_implementations
from lit_moe.export.verification import RELOADED_WHOLE, check_files, compare_logits
from lit_moe.export.writing import Weights, layer_by_layer, stored_layout
from lit_moe.inference import evaluating
from lit_moe.progress import late_progress_bars

_PACKED = ("shape", "compressed", "bitmask")


def load_compressed(
    folder: str | Path, *, dtype: torch.dtype | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a folder that was exported with ``layout="compressed_2_4"``; the model is dense again.

    Args:
        folder: of the export.
        dtype: of the weights; None keeps the stored one.
        **kwargs: passed on to ``from_pretrained``.

    Returns:
        The model in evaluation mode.

    Raises:
        LitMoEError: if the folder is damaged or not packed in this way.
        ExportError: if compressed-tensors is not there.
    """
    config = read_config(folder)
    if not is_packed(config):
        raise LitMoEError(f"{folder} holds no packed 2:4 weights; load it with lit_moe.load")
    check_weights(folder)
    del config.quantization_config
    state = dict(unpacked(folder))
    cls: Any = model_class(config)
    options = {"config": config, "dtype": dtype or config.dtype or "auto", **kwargs}
    with late_progress_bars():
        model: PreTrainedModel = cls.from_pretrained(None, state_dict=state, **options)
    return model.eval()


def unpacked(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder by name as they were before they were packed, one at a time."""
    with ExitStack() as stack:
        places = _places(Path(folder), stack)
        for name in places:
            module, _, part = name.rpartition(".")
            if part not in _PACKED or f"{module}.bitmask" not in places:
                yield name, _read(places, name)
            elif part == "compressed":
                yield f"{module}.weight", _read(places, f"{module}.weight")


def verify_compressed(
    model: PreTrainedModel, folder: Path, weights: Weights, names: frozenset[str]
) -> float | None:
    """Compare a packed folder with the model in memory; leaves the model as it was.

    Headers are compared with what was to be written and every unpacked tensor with the model's;
    up to ``RELOADED_WHOLE`` bytes the folder is also loaded whole and run.

    Returns:
        The largest difference of logits; None if the model is too large to be loaded twice.

    Raises:
        ExportError: if the folder holds anything else than the model.
    """
    check_files(folder, packed(stored_layout(model, weights), names))
    with ExitStack() as stack:
        places = _places(folder, stack)
        for tensors in layer_by_layer(model, weights):
            for name, tensor in tensors.items():
                check_equal(name, tensor, _read(places, name))
    if count_bytes(model) > RELOADED_WHOLE:
        return None
    with torch.random.fork_rng(), evaluating(model):
        return compare_logits(model, _reloaded(model, folder))


def _reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    try:
        reloaded = load_compressed(folder, dtype=model.dtype)
    except (LitMoEError, OSError, RuntimeError, ValueError) as error:
        raise ExportError(f"the export does not load: {error}") from error
    match_implementations(model, reloaded)
    match_dtypes(model, reloaded)
    moved: Any = reloaded
    return moved.to(model.device)


def _read(places: Mapping[str, Any], name: str) -> Tensor:
    """Return one tensor as it was before it was packed."""
    module = name.removesuffix(".weight")
    if f"{module}.bitmask" not in places:
        found: Tensor = places[name].get_tensor(name)
        return found
    parts = {p: places[f"{module}.{p}"].get_tensor(f"{module}.{p}") for p in _PACKED}
    unpack: Any = sparse_24().Sparse24BitMaskTensor.from_compressed_data(**parts)
    dense: Tensor = unpack.decompress()
    return dense


def _places(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Return tensor name -> opened file that holds it."""
    places: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        places |= dict.fromkeys(file.keys(), file)
    return places
