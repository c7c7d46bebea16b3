"""Where a transformers config stores its expert counts, and how to read and write them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from lit_moe.errors import PlanError

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
GROUP_KEYS = ("n_group", "num_expert_group")
TOP_K_GROUP_KEYS = ("topk_group",)
SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


@dataclass(frozen=True)
class ConfigKey:
    """An integer of a (nested) config.

    Attributes:
        path: names of the sub-configs to go through, empty for the config itself.
        name: the name under which config.json stores the number (never an alias of it).
    """

    path: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        return ".".join((*self.path, self.name))

    @classmethod
    def parse(cls, text: str) -> ConfigKey:
        """Inverse of ``str``."""
        *path, name = text.split(".")
        return cls(tuple(path), name)

    def owner(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the sub-config that holds the number."""
        for part in self.path:
            config = getattr(config, part)
        return config

    def get(self, config: PreTrainedConfig) -> int:
        """Return the number that holds for every layer without an override of its own."""
        return int(read(self.owner(config), self.name))

    def set(self, config: PreTrainedConfig, value: int) -> None:
        """Store the number."""
        setattr(self.owner(config), self.name, value)


def read(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """Return ``config.name`` also where layers differ (transformers refuses the plain access)."""
    return config._getattr_without_heterogeneous_validation(name, default)


def first_int(config: PreTrainedConfig, names: tuple[str, ...]) -> tuple[str, int] | None:
    """Return canonical name and value of the first of ``names`` that holds an integer."""
    for name in names:
        value = read(config, name)
        if isinstance(value, int) and not isinstance(value, bool):
            return config.attribute_map.get(name, name), value
    return None


def walk(
    config: PreTrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """Yield the config and all its sub-configs with their paths."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from walk(value, (*path, name))


def expert_keys(config: PreTrainedConfig) -> tuple[ConfigKey, ...]:
    """Return the keys that hold an expert count of at least 2, or what the family says."""
    keys = []
    for path, part in walk(config):
        found = first_int(part, EXPERT_KEYS)
        if found and found[1] >= getattr(part, "fewest_experts", 2):
            keys.append(ConfigKey(path, found[0]))
    return tuple(keys)


def sibling(
    config: PreTrainedConfig, key: ConfigKey, names: tuple[str, ...]
) -> tuple[ConfigKey, int] | None:
    """Return key and value of the first integer of ``names`` beside ``key``."""
    found = first_int(key.owner(config), names)
    return (ConfigKey(key.path, found[0]), found[1]) if found else None


def homogeneous(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy without our per-layer expert counts, which transformers cannot build."""
    config = copy.deepcopy(config)
    for key in expert_keys(config):
        owner = key.owner(config)
        if key.name in (owner.per_layer_attributes or ()):
            owner.per_layer_config = _others(owner, key.name)
    return config


def set_per_layer(
    config: PreTrainedConfig, key: ConfigKey, counts: Mapping[int, int], default: int
) -> None:
    """Store unequal counts in ``per_layer_config``, transformers' own key for them.

    Args:
        config: top-level config, changed in place.
        key: where the count lives.
        counts: layer index -> number of experts.
        default: number for layers that are not named.

    Raises:
        PlanError: if the counts differ and the config does not know layers.
    """
    owner = key.owner(config)
    unequal = {layer: count for layer, count in counts.items() if count != default}
    if unequal and not hasattr(owner, "num_hidden_layers"):
        raise PlanError(
            f"configs of {config.model_type} cannot express a different number of experts per "
            f"layer; keep the same number everywhere, not {sorted(set(counts.values()))}"
        )
    if key.name in (owner.per_layer_attributes or ()):
        owner.per_layer_config = _others(owner, key.name)
    setattr(owner, key.name, default)
    if not unequal:
        return
    layers = _others(owner, key.name) or {}
    for layer, count in unequal.items():
        layers.setdefault(layer, {})[key.name] = count
    owner.allow_global_per_layer_attribute_access = True
    owner.per_layer_config = layers


def _others(owner: PreTrainedConfig, name: str) -> dict[int | str, dict[str, Any]] | None:
    """Return what differs per layer besides ``name``; None for a config that needs no such key."""
    if not owner.is_heterogeneous:
        return None
    layers = copy.deepcopy(owner._heterogeneity_spec.per_layer_overrides)
    stripped = {i: {k: v for k, v in o.items() if k != name} for i, o in layers.items()}
    found = {i: o for i, o in stripped.items() if o}
    # Gemma 4 fills a missing key with defaults of its own: an empty one must stay.
    return found if found or type(owner)().is_heterogeneous else None
