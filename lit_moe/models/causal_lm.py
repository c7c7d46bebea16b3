"""Hugging Face models, loaded or made from an architecture given in YAML."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from lit_moe.assets import resolve_model
from lit_moe.checkpoints import load, read_config
from lit_moe.errors import LitMoEError
from lit_moe.sharding.partitions import (
    copy_partitions,
    is_partitioned,
    loads_partitioned,
    whole_shape,
)

_VERSIONS = "shared_versions"
DType = Literal["auto", "float32", "bfloat16", "float16"]


def build_model(
    name_or_path: str,
    *,
    architecture: dict[str, Any] | None = None,
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    num_labels: int | None = None,
) -> PreTrainedModel:
    """Return a model in evaluation mode, on the CPU.

    Args:
        name_or_path: folder, hub id, or ``embedded``; also a folder that lit-moe exported with
            different numbers of experts per layer.
        architecture: fields of a transformers config with ``model_type``; then weights are random
            (under torch's current seed) and ``name_or_path`` only names the tokenizer. Built
            straight into partitions they are other random weights than a whole model's, the same
            on any number of ranks.
        dtype: of the weights; ``auto`` takes the checkpoint's own.
        trust_remote_code: run model code that comes with the checkpoint.
        num_labels: of a classifier; if the checkpoint has another number, the classifier is made
            anew, at random.

    Raises:
        LitMoEError: if ``architecture`` lacks a known ``model_type`` or has a misspelt field,
            or the folder is missing or damaged.
    """
    if architecture is not None:
        labels = {} if num_labels is None else {"num_labels": num_labels}
        return _from_architecture({**architecture, **labels}, dtype).eval()
    source = resolve_model(name_or_path)
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if num_labels is not None:
        config = read_config(source, trust_remote_code=trust_remote_code or None)
        config.num_labels = num_labels
        options |= {"config": config, "ignore_mismatched_sizes": True}
    return load(source, dtype=dtype, **options).eval()


def checkpoint_dtype(name_or_path: str) -> str | None:
    """Return the dtype that a checkpoint says it is stored in, for instance ``bfloat16``."""
    config = read_config(resolve_model(name_or_path))
    dtype = config.dtype or getattr(config.get_text_config(), "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def frozen_copy(
    model: PreTrainedModel, *, rebuild: Callable[[], PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Return a copy in evaluation mode whose parameters take no gradient.

    Args:
        model: whole, or partitioned over ranks; then the copy is too.
        rebuild: builds the same model again, for a partitioned one, which cannot be copied as a
            whole.
    """
    if not is_partitioned(model):
        return copy.deepcopy(model).eval().requires_grad_(False)
    assert rebuild is not None, "a partitioned model is copied by building it again"
    twin = rebuild()
    copy_partitions(model, twin)
    return twin.eval().requires_grad_(False)


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen copy in evaluation mode whose tensors are the model's own.

    Cutting experts out of the model puts new tensors into it, so the copy stays whole, and only
    what was cut exists twice. Writing into the model's tensors in place would change the copy too:
    :func:`check_unwritten` tells.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    shared = copy.deepcopy(model, memo).eval()
    vars(shared)[_VERSIONS] = {name: p._version for name, p in shared.named_parameters()}
    return shared


def check_unwritten(shared: PreTrainedModel) -> None:
    """Refuse a sharing copy that is no longer what it was; any other model passes.

    Raises:
        LitMoEError: naming the first parameter that was written in place since the copy was made.
    """
    versions: dict[str, int] = vars(shared).get(_VERSIONS, {})
    for name, parameter in shared.named_parameters():
        if parameter._version != versions.get(name, parameter._version):
            raise LitMoEError(
                f"{name} was written in place after a sharing copy was made, which changed the "
                "copy too; put a new tensor in its place (parameter.data = ...) instead, or keep a "
                "deep copy as the teacher"
            )


def check_vocabulary(model: PreTrainedModel, tokenizer_size: int, tokenizer_name: str) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Args:
        model: any language model.
        tokenizer_size: number of ids that the tokenizer can give.
        tokenizer_name: named in the message.

    Raises:
        LitMoEError: with both sizes.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = whole_shape(embeddings.weight)[0]
    if tokenizer_size > rows:
        raise LitMoEError(
            f"tokenizer {tokenizer_name!r} has {tokenizer_size} ids, but "
            f"{type(model).__name__} has embeddings for only {rows}: give the model's own "
            "tokenizer (data.init_args.tokenizer)"
        )


def _from_architecture(architecture: dict[str, Any], dtype: DType) -> PreTrainedModel:
    fields = dict(architecture)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise LitMoEError(f"architecture needs a model_type; it has only {sorted(fields)}")
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise LitMoEError(f"architecture cannot be built: {error}") from error
    chosen = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    images = type(config) in AutoModelForImageClassification._model_mapping
    auto = AutoModelForImageClassification if images else AutoModelForCausalLM
    model_class = auto._model_mapping.get(type(config), None)
    module = inspect.getmodule(model_class)
    _check_fields(fields, config, "" if module is None else inspect.getsource(module))
    if not loads_partitioned():
        return auto.from_config(config, dtype=chosen)
    with torch.random.fork_rng():  # only the first rank draws; all shall go on alike
        return auto.from_config(config, dtype=chosen)


def _check_fields(fields: Mapping[str, Any], config: PreTrainedConfig, source: str) -> None:
    """Refuse misspelt fields, which transformers would only hang on to the config, unread.

    Fields of other words pass: a config.json from elsewhere may have some that nobody reads.

    Args:
        fields: as they were given.
        config: made of them.
        source: of the model, which may read a field that its config does not declare.
    """
    kind = type(config)
    declared = {field.name for field in dataclasses.fields(kind)} | set(config.attribute_map)
    for name, value in fields.items():
        own = getattr(config, name, None)
        if isinstance(value, Mapping) and isinstance(own, PreTrainedConfig):
            _check_fields(value, own, source)
        known = name in declared or hasattr(kind, name) or f'"{name}"' in source
        if known or name not in vars(config):  # older names are taken out when they are read
            continue
        meant = _nearest(name, declared | {"num_labels"})
        if meant is not None:
            raise LitMoEError(
                f"architecture has a field {name!r}, which {kind.__name__} does not know; the "
                f"nearest that it knows is {meant!r}"
            )


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the field that a misspelt one was meant to be; None if it is another word.

    >>> _nearest("num_expert", ["num_experts", "hidden_size"])
    'num_experts'
    >>> _nearest("moe_hidden_size", ["num_experts", "hidden_size"])
    """
    spelt = [n for n in sorted(known) if not name.endswith(f"_{n}")]
    found = difflib.get_close_matches(name, spelt, n=1, cutoff=0.8)
    return found[0] if found else None
