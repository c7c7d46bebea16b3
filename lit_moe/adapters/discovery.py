"""What in a model depends on the number of experts, found by building it twice.

Two copies on the meta device (no memory, no weights), one with more experts, differ exactly in
the tensors and the integers that count experts. Names are never consulted here.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging as hf_logging

from lit_moe.adapters.config_keys import (
    GROUP_KEYS,
    ConfigKey,
    expert_keys,
    homogeneous,
    sibling,
)


@dataclass(frozen=True)
class TensorAxis:
    """A dimension of size ``experts * rows + tail``."""

    name: str
    dim: int
    ndim: int
    rows: int
    tail: int


@dataclass(frozen=True)
class IntAttribute:
    """An integer of a module that is linear in a config value: ``base + slope * (n - at)``."""

    module: str
    name: str
    base: int
    at: int
    slope: Fraction

    def value(self, n: int) -> int:
        """Return the integer for ``n`` experts (or ``n`` active experts)."""
        return int(self.base + self.slope * (n - self.at))


@dataclass(frozen=True)
class Discovery:
    """Everything that changes with one expert count of the config.

    Attributes:
        key: the config key that was changed.
        num_experts: its value.
        axes: dimensions of parameters and buffers.
        ints: integers that modules remember.
        added: parameters that exist only with more experts (experts kept as separate modules).
    """

    key: ConfigKey
    num_experts: int
    axes: tuple[TensorAxis, ...]
    ints: tuple[IntAttribute, ...]
    added: tuple[str, ...]


class Blueprint:
    """Model class and config, hashable: equal when the same model would be built."""

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        self.model_class = model_class
        self.config = config
        text = json.dumps(config.to_dict(), sort_keys=True, default=str)
        self._identity = (model_class.__module__, model_class.__qualname__, id(model_class), text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blueprint) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


def discover(model: PreTrainedModel) -> tuple[Discovery, ...]:
    """Return one discovery per expert count of the model's config that changes something."""
    return _discover(Blueprint(type(model), homogeneous(model.config)))


def discover_ints(model: PreTrainedModel, key: ConfigKey) -> tuple[IntAttribute, ...]:
    """Return the module integers that follow another number of the config, such as top-k."""
    return _discover_ints(Blueprint(type(model), homogeneous(model.config)), key)


@functools.lru_cache(maxsize=32)
def _discover(blueprint: Blueprint) -> tuple[Discovery, ...]:
    found = (_diff(blueprint, key) for key in expert_keys(blueprint.config))
    return tuple(d for d in found if d.axes or d.added)


@functools.lru_cache(maxsize=32)
def _discover_ints(blueprint: Blueprint, key: ConfigKey) -> tuple[IntAttribute, ...]:
    base, bumped = _pair(blueprint, key, 1)
    return _int_attributes(base, bumped, at=key.get(blueprint.config), step=1)


def _diff(blueprint: Blueprint, key: ConfigKey) -> Discovery:
    config = blueprint.config
    num_experts = key.get(config)
    groups = sibling(config, key, GROUP_KEYS)
    step = groups[1] if groups else 1
    base, bumped = _pair(blueprint, key, step)
    shapes, more = _shapes(base), _shapes(bumped)
    axes = [
        TensorAxis(
            name, dim, len(shape), (new - old) // step, old - num_experts * (new - old) // step
        )
        for name, shape in shapes.items()
        for dim, (old, new) in enumerate(zip(shape, more[name], strict=True))
        if old != new
    ]
    ints = _int_attributes(base, bumped, at=num_experts, step=step)
    added = tuple(name for name in more if name not in shapes)
    return Discovery(key, num_experts, tuple(axes), ints, added)


def _pair(blueprint: Blueprint, key: ConfigKey, step: int) -> tuple[nn.Module, nn.Module]:
    """Build the model as it is and with ``step`` more of what ``key`` counts."""
    model_class, config = blueprint.model_class, blueprint.config
    bumped = copy.deepcopy(config)
    key.set(bumped, key.get(config) + step)
    return build_on_meta(model_class, config), build_on_meta(model_class, bumped)


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model without memory behind its tensors, in the way from_pretrained makes one."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with torch.device("meta"), init.no_init_weights(), init.meta_device_safe_creation_ops():
            return model_class._from_config(copy.deepcopy(config))
    finally:
        hf_logging.set_verbosity(verbosity)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.shape for name, tensor in tensors}


def _int_attributes(
    base: nn.Module, bumped: nn.Module, *, at: int, step: int
) -> tuple[IntAttribute, ...]:
    others = dict(bumped.named_modules())
    return tuple(
        IntAttribute(path, name, old, at, Fraction(new - old, step))
        for path, module in base.named_modules()
        if path in others
        for name, old, new in _changed_ints(vars(module), vars(others[path]))
    )


def _changed_ints(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    return [
        (name, value, new[name])
        for name, value in old.items()
        if type(value) is int and type(new.get(name)) is int and new[name] != value
    ]
