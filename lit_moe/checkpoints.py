"""Checkpoint folders: read the config, check the weight files, load the model.

Every error here is one sentence about the folder, raised before anything expensive happens.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from lit_moe.errors import LitMoEError, UnsupportedModelError
from lit_moe.heterogeneous import global_values_readable, per_layer_counts
from lit_moe.mixed_routing import mixed_when_built
from lit_moe.progress import late_progress_bars

REMOTE_CODE_FILE = "modeling_lit_moe.py"
"""Name of the modelling file that a non-uniform export carries for people without lit-moe."""

PACKED_FORMAT = "sparse-24-bitmask"
"""How compressed-tensors calls packed 2:4 weights; see :mod:`lit_moe.export.compressed`."""

_HEADER_LENGTH_BYTES = 8
_LONGEST_QUOTE = 200
_AUTO_CLASSES = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForImageTextToText,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForImageClassification,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModel,
)


def read_config(
    name_or_path: str | Path, *, trust_remote_code: bool | None = None
) -> PreTrainedConfig:
    """Return the config of a local folder or of a hub id, without touching weights.

    Raises:
        LitMoEError: if the folder is missing, has no config.json or a damaged one, or the hub does
            not give the model.
        UnsupportedModelError: if transformers does not know the model type.
    """
    folder = Path(name_or_path).expanduser()
    if folder.exists() or _looks_like_path(str(name_or_path)):
        _check_config_file(folder)
        name_or_path = folder
    try:
        with global_values_readable():  # some configs check their own expert count
            return AutoConfig.from_pretrained(
                os.fspath(name_or_path), trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise _explained(name_or_path, error) from error


def check_weights(folder: str | Path) -> None:
    """Check that all weight files of a local folder are there and complete, by headers only.

    Raises:
        LitMoEError: naming the first file that is missing, truncated or no safetensors file.
    """
    folder = Path(folder)
    for file in _weight_files(folder):
        if not file.is_file():
            raise LitMoEError(f"{folder} lists the weight file {file.name}, which is not there")
        if file.suffix == ".safetensors":
            _check_safetensors(file)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the transformers class that ``config`` was saved from.

    Raises:
        UnsupportedModelError: if the config names no class that transformers has.
    """
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type):
            return found
    for auto in _AUTO_CLASSES:
        if (found := _class_in(auto, config)) is not None:
            return found
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} has no model class for "
        f"architectures={config.architectures} of model type {config.model_type!r}"
    )


def auto_class(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> Any:
    """Return the Auto class whose ``from_pretrained`` gives ``cls`` for ``config``.

    Falls back to ``cls`` itself if no Auto class does.
    """
    for auto in _AUTO_CLASSES:
        if _class_in(auto, config) is cls:
            return auto
    return cls


def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint, also one whose layers differ in their experts or whose routers mix.

    For uniform checkpoints this is plain ``from_pretrained`` of the saved architecture.

    Args:
        path: local folder or hub id.
        **kwargs: passed on to ``from_pretrained``; ``dtype`` defaults to that of the checkpoint.

    Returns:
        The model in eval mode.

    Raises:
        LitMoEError: if the folder has no usable config or its weight files are damaged.
    """
    config = kwargs.pop("config", None) or read_config(
        path, trust_remote_code=kwargs.get("trust_remote_code")
    )
    if is_packed(config):
        raise LitMoEError(
            f"{path} holds packed 2:4 weights ({PACKED_FORMAT}), which transformers does not read; "
            "lit_moe.export.load_compressed does, and lit_moe.export writes it as a plain folder"
        )
    if Path(path).is_dir():
        check_weights(path)
    _forget_remote_copy(config)
    cls = model_class(config)
    kwargs.setdefault("dtype", "auto")
    with per_layer_counts(config, cls), mixed_when_built(config, cls), late_progress_bars():
        return cls.from_pretrained(path, config=config, **kwargs)


def is_packed(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint stores 2:4 weights without their zeros."""
    entry = getattr(config, "quantization_config", None) or {}
    sparsity = entry.get("sparsity_config") if isinstance(entry, dict) else None
    return (sparsity or {}).get("format") == PACKED_FORMAT


def _class_in(auto: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    found = auto._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _forget_remote_copy(config: PreTrainedConfig) -> None:
    """Drop the reference to our remote code: the stock class is built here instead."""
    auto_map = getattr(config, "auto_map", None) or {}
    ours = REMOTE_CODE_FILE.removesuffix(".py") + "."
    kept = {k: v for k, v in auto_map.items() if not str(v).startswith(ours)}
    if kept:
        config.auto_map = kept
    elif auto_map:
        del config.auto_map


def _looks_like_path(name: str) -> bool:
    """Whether ``name`` cannot be a hub id, which is ``name`` or ``owner/name``."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def made_by(folder: Path) -> str:
    """Return how to make a folder of the kind ``runs/vision/pretrain/model``, if a config does."""
    parts = folder.parts
    if len(parts) < 3 or parts[0] != "runs":
        return ""
    config = Path("configs", *parts[1:3]).with_suffix(".yaml")
    beside = Path(__file__).parents[1] / config  # of a checkout, seen from another folder
    for path in (config, beside):
        if path.is_file():
            return f"; this makes it: lightning fit --config {path}"
    return ""


def _check_config_file(folder: Path) -> None:
    if not folder.exists():
        raise LitMoEError(f"model folder {folder} does not exist{made_by(folder)}")
    if not folder.is_dir():
        raise LitMoEError(f"{folder} is a file; a model is a folder with {CONFIG_NAME}")
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise LitMoEError(f"folder {folder} holds no {CONFIG_NAME}, so it is not a model folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LitMoEError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise LitMoEError(f"{file} has no `model_type`, so the family of the model is unknown")


def _explained(name_or_path: str | Path, error: Exception) -> LitMoEError:
    said = " ".join(str(error).split())
    said = said if len(said) <= _LONGEST_QUOTE else f"{said[:_LONGEST_QUOTE]}..."
    if isinstance(name_or_path, str):
        return LitMoEError(
            f"{name_or_path!r} is no folder here, and the Hugging Face hub did not give it: {said}"
        )
    if "model type" in str(error):
        return UnsupportedModelError(
            f"{name_or_path}: transformers {transformers.__version__} does not know its model "
            f"type; {said}"
        )
    return LitMoEError(f"the config of {name_or_path} cannot be read: {said}")


def _weight_files(folder: Path) -> list[Path]:
    for index_name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (index := folder / index_name).is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
                raise LitMoEError(f"{index} is damaged: {error!r}") from error
            return [folder / name for name in sorted(set(names))]
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return [folder / name]
    raise LitMoEError(f"folder {folder} holds no weights: expected {SAFE_WEIGHTS_NAME}")


def _check_safetensors(file: Path) -> None:
    """Compare the size that the header promises with the size of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(_HEADER_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _HEADER_LENGTH_BYTES else None
        if length is None or _HEADER_LENGTH_BYTES + length > size:
            raise LitMoEError(f"{file} is truncated: {size} bytes do not even hold its header")
        header = _parsed_header(file, stream.read(length))
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    expected = _HEADER_LENGTH_BYTES + length + max(ends, default=0)
    if size != expected:
        kind = "truncated" if size < expected else "longer than its header says"
        raise LitMoEError(f"{file} is {kind}: it has {size} bytes, its header asks for {expected}")


def _parsed_header(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LitMoEError(f"{file} is no safetensors file: its header is not JSON") from error
