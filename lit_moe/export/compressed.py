"""2:4 zeros without their places: the format ``sparse-24-bitmask`` of compressed-tensors.

Of each matrix of each expert, ``NAME.weight`` becomes ``NAME.compressed`` (the two of every four
weights that stay), ``NAME.bitmask`` (one bit per weight) and ``NAME.shape``: 9/16 of the bytes in
16 bits, 17/32 in 32. It saves disk and transport and no computation. compressed-tensors knew the
format up to 0.14, transformers up to 4, for families that keep experts as modules there (tried:
Mixtral in 4.57.1); vLLM dropped it in 0.19.1. transformers 5 with a later compressed-tensors makes
the experts up at random, and only says so in its loading report.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.checkpoints import PACKED_FORMAT
from lit_moe.errors import ExportError
from lit_moe.export.writing import Weights, stored_layout
from lit_moe.sharding.partitions import whole_shape

METHOD = "compressed-tensors"
Names = frozenset[str]
"""Of the stored matrices that are packed."""
_GROUP, _KEPT = 4, 2
_LINEAR = re.compile(r".*\.experts\.\d+\.\w+\.weight")
_MATRICES = ("gate", "up", "down")


def check_layers_alike(model: PreTrainedModel, layout: str) -> None:
    """Refuse a model that only a layout of its own can hold.

    Args:
        model: what is to be exported.
        layout: that it needs beside the packing.

    Raises:
        ExportError: for any but ``plain``.
    """
    if layout != "plain":
        raise ExportError(
            f"layout='compressed_2_4' needs layers that are alike and plain routers, but this "
            f"{type(model).__name__} needs layout {layout!r}; leave layout at 'auto'"
        )


def check_packable(model: PreTrainedModel) -> Names:
    """Return the stored names of the experts' matrices, or refuse the model by its shapes alone.

    Args:
        model: whole, or spread over ranks; its weights need no zeros yet.

    Raises:
        ExportError: if the family stores experts in one tensor, or 4 does not divide the inputs of
            a matrix.
    """
    layout = _experts_as_stored(model)
    odd = sorted(name for name in layout if not _LINEAR.fullmatch(name))
    if odd or not layout:
        said = f"{odd[0]!r} holds all experts of a layer" if odd else "it stores no expert tensors"
        raise ExportError(
            f"layout='compressed_2_4' packs one matrix per expert, but of {type(model).__name__} "
            f"({model.config.model_type}) {said}; leave layout at 'auto'"
        )
    for name, matrix in layout.items():
        if matrix.shape[-1] % _GROUP:
            raise ExportError(
                f"layout='compressed_2_4' packs groups of {_GROUP} inputs, but {name} has "
                f"{matrix.shape[-1]} inputs, which {_GROUP} does not divide; leave layout at 'auto'"
            )
    return frozenset(layout)


def check_compressible(model: PreTrainedModel) -> Names:
    """Return the stored names of the experts' matrices, or refuse the model.

    Args:
        model: whole.

    Raises:
        ExportError: as :func:`check_packable`, and if compressed-tensors is not there, or a group
            of four consecutive inputs has more than two weights that are not 0.
    """
    sparse_24()
    names = check_packable(model)
    _check_zeros(model)
    return names


def packed(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Return tensors with those of ``names`` packed, without memory where they have none.

    Args:
        tensors: by stored names.
        names: what :func:`check_compressible` gave.
    """
    library = sparse_24()
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in names:
            stored[name] = tensor
            continue
        device = "meta" if tensor.is_meta else "cpu"
        small = library.Sparse24BitMaskTensor.from_dense(tensor.detach())
        stored |= small.dict(name.removesuffix(".weight"), device=device)
    return stored


def config_entry(model: PreTrainedModel, weights: Weights, names: Names) -> dict[str, Any]:
    """Return the entry ``quantization_config`` of config.json.

    Args:
        model: what is exported.
        weights: of it.
        names: what :func:`check_compressible` gave.
    """
    layout = stored_layout(model, weights)
    zeros = sum(layout[name].numel() for name in names) * (_GROUP - _KEPT) / _GROUP
    modules = {re.escape(name.removesuffix(".weight")) for name in names}
    patterns = {re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", module) for module in modules}
    return {
        "quant_method": METHOD,
        "format": "dense",
        "sparsity_config": {
            "format": PACKED_FORMAT,
            "sparsity_structure": "2:4",
            "global_sparsity": zeros / sum(tensor.numel() for tensor in layout.values()),
            "targets": [f"re:{pattern}" for pattern in sorted(patterns)],
            "ignore": [],
        },
    }


def sparse_24() -> Any:
    """Return the module of compressed-tensors that packs and unpacks.

    Raises:
        ExportError: if it is not installed, or too new to know the format.
    """
    try:
        with warnings.catch_warnings():
            # Importing it loads torch's compiler, which uses what torch itself calls deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            from compressed_tensors.compressors.sparse_compressors import sparse_24_bitmask
    except ImportError as error:
        raise ExportError(
            "layout='compressed_2_4' needs compressed-tensors from 0.12.2 up to 0.13 (0.15 dropped "
            f"the format): pip install 'lit-moe[compressed]' ({error})"
        ) from error
    return sparse_24_bitmask


def _experts_as_stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Mark the experts' tensors by a dtype, and see what bears it as they are stored."""
    experts = {axis.name for site in find_sites(model) for axis in site.rows("expert")}
    stand_ins = {
        name: torch.empty(
            1, dtype=torch.float16 if name in experts else torch.float32, device="cpu"
        ).expand(whole_shape(tensor))
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.is_floating_point()
    }
    layout = stored_layout(model, Weights(stand_ins))
    return {n: t for n, t in layout.items() if t.dtype == torch.float16 and t.ndim > 1}


def _check_zeros(model: PreTrainedModel) -> None:
    adapter = adapter_for(model.config)
    for site in find_sites(model):
        weights = adapter.expert_weights(model, site)
        for matrix in (name for name in _MATRICES if name in weights):
            over, groups = _full_groups(weights[matrix])
            if over:
                raise ExportError(
                    f"layout='compressed_2_4' needs 2 zeros in every 4 inputs, but {over} of "
                    f"{groups} groups of the {matrix} projections of {site.name} have fewer; prune "
                    "with WeightPruning, pattern: '2:4', first, or leave layout at 'auto'"
                )


def _full_groups(weight_EOD: Tensor) -> tuple[int, int]:
    """Return how many groups of inputs hold too many weights, and how many there are."""
    over = groups = 0
    for weight_OD in weight_EOD:  # one expert at a time: no copy of a layer
        nonzero = weight_OD.unflatten(-1, (-1, _GROUP)).count_nonzero(dim=-1)
        over += int((nonzero > _KEPT).sum())
        groups += nonzero.numel()
    return over, groups
