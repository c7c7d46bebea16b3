"""V-MoE and E3 checkpoints of the JAX code (google-research/vmoe) as ours.

Kernels there are stored (in, out), attention by head, images channels last, routers of an ensemble
by member. D hidden, E experts, I neurons, M members, S tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_moe.errors import LitMoEError
from lit_moe.vmoe.configuration import VMoEConfig, num_tokens
from lit_moe.vmoe.modeling import VMoEForImageClassification

Change = Callable[[Tensor], Tensor]


def _same(value: Tensor) -> Tensor:
    return value


def _transposed(value: Tensor) -> Tensor:
    return value.transpose(-1, -2)


def _to_heads(value: Tensor) -> Tensor:
    """From (D, heads, width) to (heads * width, D)."""
    return value.flatten(1).T


def _from_heads(value: Tensor) -> Tensor:
    """From (heads, width, D) to (D, heads * width)."""
    return value.flatten(0, 1).T


def _router(value: Tensor) -> Tensor:
    """From (D, E), or (D, M, E / M) of an ensemble, to (E, D)."""
    return value.flatten(1).T


def _channels_first(value: Tensor) -> Tensor:
    return value.permute(3, 2, 0, 1)


_POSITIONS = "Encoder/posembed_input/pos_embedding"
_TOP: dict[str, tuple[str, Change]] = {
    "cls": ("vit.embeddings.cls_token", _same),
    "embedding/kernel": ("vit.embeddings.patch_embeddings.projection.weight", _channels_first),
    "embedding/bias": ("vit.embeddings.patch_embeddings.projection.bias", _same),
    _POSITIONS: ("vit.embeddings.position_embeddings", _same),
    "Encoder/encoder_norm/scale": ("vit.layernorm.weight", _same),
    "Encoder/encoder_norm/bias": ("vit.layernorm.bias", _same),
    "pre_logits/kernel": ("pre_logits.weight", _transposed),
    "pre_logits/bias": ("pre_logits.bias", _same),
    "head/kernel": ("classifier.weight", _transposed),
    "head/bias": ("classifier.bias", _same),
}
_BLOCK: dict[str, tuple[str, Change]] = {
    "LayerNorm_0/scale": ("layernorm_before.weight", _same),
    "LayerNorm_0/bias": ("layernorm_before.bias", _same),
    "LayerNorm_1/scale": ("layernorm_after.weight", _same),
    "LayerNorm_1/bias": ("layernorm_after.bias", _same),
    "SelfAttention/out/kernel": ("attention.o_proj.weight", _from_heads),
    "SelfAttention/out/bias": ("attention.o_proj.bias", _same),
    "Mlp/Dense_0/kernel": ("mlp.fc1.weight", _transposed),
    "Mlp/Dense_0/bias": ("mlp.fc1.bias", _same),
    "Mlp/Dense_1/kernel": ("mlp.fc2.weight", _transposed),
    "Mlp/Dense_1/bias": ("mlp.fc2.bias", _same),
    "Moe/Router/dense/kernel": ("mlp.router.weight", _router),
    "Moe/Mlp/Dense_0/kernel": ("mlp.experts.up_proj", _transposed),
    "Moe/Mlp/Dense_0/bias": ("mlp.experts.up_proj_bias", _same),
    "Moe/Mlp/Dense_1/kernel": ("mlp.experts.down_proj", _transposed),
    "Moe/Mlp/Dense_1/bias": ("mlp.experts.down_proj_bias", _same),
}
for _long, _short in (("query", "q"), ("key", "k"), ("value", "v")):
    _BLOCK[f"SelfAttention/{_long}/kernel"] = (f"attention.{_short}_proj.weight", _to_heads)
    _BLOCK[f"SelfAttention/{_long}/bias"] = (f"attention.{_short}_proj.bias", Tensor.flatten)
_IN_BLOCK = re.compile(r"Encoder/encoderblock_(\d+)/(.+)")


def vmoe_from_npz(
    path: str | Path,
    *,
    num_experts_per_tok: int = 2,
    image_size: int | None = None,
    **fields: Any,
) -> VMoEForImageClassification:
    """Return the model in a JAX checkpoint; all sizes are read from the shapes.

    Args:
        path: npz file with names as ``Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel``, maybe behind
            a common prefix as ``params/``.
        num_experts_per_tok: experts per token (in an ensemble, per token and member), which the
            file does not say.
        image_size: pixels per side that the model shall take; position embeddings are scaled to it.
            None for the size that it was trained with.
        **fields: further fields of ``VMoEConfig``, such as ``eval_capacity_factor``, or
            ``num_members`` of an ensemble whose file keeps routers in one piece.

    Returns:
        A model in evaluation mode, fp32. Without a head in the file the classifier is random.

    Raises:
        LitMoEError: if the file cannot be read, is no V-MoE, or holds or lacks a tensor.
    """
    arrays = _read(Path(path))
    fields = {"num_experts_per_tok": num_experts_per_tok, **fields}
    config = _config_of(arrays, path, image_size, fields)
    arrays[_POSITIONS] = _zoomed(arrays[_POSITIONS], num_tokens(config) - 1)
    model = VMoEForImageClassification._from_config(config, dtype=torch.float32)
    state = model.state_dict()
    found = {}
    for name, array in arrays.items():
        own, change = _our_name(name)
        if own not in state:
            raise LitMoEError(
                f"{path} holds {name}, which a V-MoE of this code has no place for; known are "
                "checkpoints with a class token, no attention pooling and no query-key norm"
            )
        value = change(torch.from_numpy(np.array(array)).float())
        if value.shape != state[own].shape:
            raise LitMoEError(
                f"{path} holds {name} of shape {tuple(array.shape)}, but its other tensors ask for "
                f"{tuple(state[own].shape)} as {own}"
            )
        found[own] = value
    missing = sorted(state.keys() - found.keys() - {"classifier.weight", "classifier.bias"})
    if missing:
        raise LitMoEError(f"{path} lacks what becomes {missing[0]} and {len(missing) - 1} others")
    model.load_state_dict(found, strict=False)
    return model.eval()


def _our_name(name: str) -> tuple[str, Change]:
    found = _IN_BLOCK.fullmatch(name)
    if found is None:
        return _TOP.get(name, ("", _same))
    own, change = _BLOCK.get(found.group(2), ("", _same))
    return f"vit.layers.{found.group(1)}.{own}", change


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays by name, without a prefix that they share."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: _numbers(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise LitMoEError(f"{path} is no npz file that could be read: {error}") from error
    prefixes = {name.partition("Encoder/")[0] for name in arrays if "Encoder/" in name}
    if len(prefixes) != 1:
        raise LitMoEError(f"{path} is no V-MoE checkpoint: it has no one `Encoder/` of tensors")
    prefix = prefixes.pop()
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _numbers(array: np.ndarray) -> np.ndarray:
    """Return the array; bfloat16, which numpy stores as two unnamed bytes, as float32."""
    if array.dtype == np.dtype("V2"):
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"it holds {array.dtype}, no numbers")
    return array


def _config_of(
    arrays: Mapping[str, np.ndarray],
    path: str | Path,
    image_size: int | None,
    fields: Mapping[str, Any],
) -> VMoEConfig:
    routers = {int(n.split("_")[1].split("/")[0]): n for n in arrays if "Moe/Router/" in n}
    first = f"Encoder/encoderblock_{min(routers, default=0)}"
    query, up = f"{first}/SelfAttention/query/kernel", f"{first}/Moe/Mlp/Dense_0/kernel"
    needed = {"cls": 3, "embedding/kernel": 4, _POSITIONS: 3, query: 3, up: 3}
    for name, ndim in needed.items():
        if name not in arrays or not routers or arrays[name].ndim != ndim:
            what = f"{name} of {ndim} dimensions" if routers else "Moe/Router/dense/kernel"
            raise LitMoEError(f"{path} has no {what}, so it is no V-MoE that can be read here")
    blocks = {int(m.group(1)) for m in map(_IN_BLOCK.fullmatch, arrays) if m}
    patch, _, channels, hidden = arrays["embedding/kernel"].shape
    side = math.isqrt(arrays[_POSITIONS].shape[1] - 1)
    _, heads, _ = arrays[query].shape
    num_experts, _, width = arrays[up].shape
    dense = [v.shape[1] for k, v in arrays.items() if re.search(r"\d/Mlp/Dense_0/kernel", k)]
    head = {"head/bias": "num_labels", "pre_logits/bias": "representation_size"}
    widths = {own: arrays[name].shape[0] for name, own in head.items() if name in arrays}
    sizes = {
        "num_members": _members(arrays, routers.values(), fields, path),
        "hidden_size": hidden,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads,
        "intermediate_size": dense[0] if dense else width,
        "moe_intermediate_size": width,
        "image_size": side * patch if image_size is None else image_size,
        "patch_size": patch,
        "num_channels": channels,
        "num_experts": num_experts,
        "moe_layers": sorted(routers),
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
    try:
        return VMoEConfig(**{**sizes, **widths, **fields})
    except ValueError as error:
        raise LitMoEError(f"{path} cannot become a V-MoE: {error}") from error


def _members(
    arrays: Mapping[str, np.ndarray],
    routers: Iterable[str],
    fields: Mapping[str, Any],
    path: str | Path,
) -> int:
    """Return the members of the ensemble: routers of an E3 have a dimension for them."""
    found = {arrays[name].shape[1] for name in routers if arrays[name].ndim == 3}
    asked = fields.get("num_members", max(found, default=1))
    if found - {asked}:
        raise LitMoEError(
            f"{path} has routers of {max(found)} members, but num_members={asked} was asked for"
        )
    return int(asked)


def _zoomed(positions_1SD: np.ndarray, count: int) -> np.ndarray:
    """Scale position embeddings to another number of patches, bilinearly between the corners.

    The class token's own, the first, stays.
    """
    old = math.isqrt(positions_1SD.shape[1] - 1)
    new = math.isqrt(count)
    if new == old:
        return positions_1SD
    values = torch.from_numpy(np.array(positions_1SD)).float()
    grid = values[:, 1:].transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, (new, new), mode="bilinear", align_corners=True)
    return torch.cat([values[:, :1], grid.flatten(2).transpose(1, 2)], dim=1).numpy()
