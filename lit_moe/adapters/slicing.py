"""Cutting tensors, integers and configs of one model. The only lines that change a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_moe.adapters.config_keys import (
    GROUP_KEYS,
    TOP_K_GROUP_KEYS,
    TOP_K_KEYS,
    ConfigKey,
    expert_keys,
    set_per_layer,
    sibling,
    walk,
)
from lit_moe.adapters.discovery import IntAttribute
from lit_moe.adapters.pairing import layer_index
from lit_moe.adapters.site import ExpertAxis, MoESite
from lit_moe.errors import PlanError


def cut_axis(model: nn.Module, axis: ExpertAxis, keep: Sequence[int]) -> None:
    """Keep the rows of ``keep`` and of the tail, in place; dtype, device, requires_grad stay."""
    path, _, name = axis.name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, name)
    with torch.no_grad():
        new = old.detach().index_select(axis.dim, kept_rows(axis, keep, old.device))
    replace_tensor(owner, name, new)


def kept_rows(axis: ExpertAxis, keep: Sequence[int], device: torch.device) -> Tensor:
    """Return the ascending row numbers that stay."""
    experts = torch.tensor(list(keep), device=device)
    within = torch.arange(axis.rows_per_expert, device=device)
    rows = (experts[:, None] * axis.rows_per_expert + within).flatten()
    first_tail = axis.real * axis.rows_per_expert
    return torch.cat([rows, torch.arange(first_tail, first_tail + axis.tail, device=device)])


def replace_tensor(owner: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` in the place of a parameter or buffer and keep what was attached to it."""
    old = getattr(owner, name)
    if name in owner._buffers:
        owner._buffers[name] = value
        return
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    setattr(owner, name, new)


def set_ints(model: nn.Module, ints: Sequence[IntAttribute], scope: str, count: int) -> None:
    """Set the integers that follow a count, in all modules at or below ``scope``."""
    for number in ints:
        if _inside(number.module, scope):
            setattr(model.get_submodule(number.module), number.name, number.value(count))


def set_outer_ints(
    model: nn.Module, ints: Sequence[IntAttribute], counts: Mapping[str, int]
) -> None:
    """Set integers outside the MoE layers, such as the one the auxiliary loss reads.

    One that stands above layers with different counts has no right value and is left alone: the
    auxiliary loss of transformers cannot handle unequal layers in any case.
    """
    for number in ints:
        if any(_inside(number.module, site) for site in counts):
            continue
        below = {n for site, n in counts.items() if _inside(site, number.module)}
        if len(below) == 1:
            setattr(model.get_submodule(number.module), number.name, number.value(*below))


def _inside(path: str, scope: str) -> bool:
    return not scope or path == scope or path.startswith(f"{scope}.")


def configs_of(model: PreTrainedModel) -> tuple[PreTrainedConfig, ...]:
    """Return every distinct config object that a module of the model reads."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found.setdefault(id(config), config)
    known = {id(part) for _, part in walk(model.config)}
    return (model.config, *(c for i, c in found.items() if i not in known))


def update_config(
    config: PreTrainedConfig,
    counts: Mapping[str, int],
    top_k: int | None,
    sites: Sequence[MoESite] | None,
) -> None:
    """Write expert counts per layer (and top-k) into one config; see the adapter's method."""
    for key, per_layer in _by_key(config, counts, sites).items():
        if must_relax(config, key, per_layer.values()):
            for names in (GROUP_KEYS, TOP_K_GROUP_KEYS):
                _write(config, key, names, 1)
        set_per_layer(config, key, per_layer, max(per_layer.values()))
        if top_k is not None:
            _write(config, key, TOP_K_KEYS, top_k)


def must_relax(config: PreTrainedConfig, key: ConfigKey, counts: Iterable[int]) -> bool:
    """Whether a grouping that limits nothing (all groups may be used) stands in the way."""
    groups, chosen = sibling(config, key, GROUP_KEYS), sibling(config, key, TOP_K_GROUP_KEYS)
    if not groups or not chosen or not 1 < groups[1] <= chosen[1]:
        return False
    return any(count % groups[1] or count < 2 * groups[1] for count in counts)


def write_top_k(config: PreTrainedConfig, top_k: int, sites: Sequence[MoESite]) -> None:
    """Write the number of active experts beside every expert count."""
    for key in _present(config, {site.config_key for site in sites}):
        _write(config, key, TOP_K_KEYS, top_k)


def _by_key(
    config: PreTrainedConfig, counts: Mapping[str, int], sites: Sequence[MoESite] | None
) -> dict[ConfigKey, dict[int, int]]:
    """Return config key -> layer index -> number of experts."""
    if sites is None:
        keys = expert_keys(config)
        assert len(keys) == 1, f"sites needed: the config counts experts in {keys}"
        return {keys[0]: _per_layer(counts)}
    names = {key: [s.name for s in sites if s.config_key == key] for key in _keys_of(sites)}
    found = {}
    for text, layers in names.items():
        for key in _present(config, {text}):
            found[key] = _per_layer({name: counts[name] for name in layers})
    return found


def _keys_of(sites: Sequence[MoESite]) -> Iterator[str]:
    yield from dict.fromkeys(site.config_key for site in sites)


def _present(config: PreTrainedConfig, keys: set[str]) -> Iterator[ConfigKey]:
    """Yield the keys as seen from ``config``, which may be a sub-config of the model's."""
    mine = {str(key) for key in expert_keys(config)}
    for text in sorted(keys):
        parts = text.split(".")
        tails = [".".join(parts[i:]) for i in range(len(parts))]
        found = next((tail for tail in tails if tail in mine), None)
        if found:
            yield ConfigKey.parse(found)


def _per_layer(counts: Mapping[str, int]) -> dict[int, int]:
    """Return layer index -> count.

    Raises:
        PlanError: if MoE layers of one decoder layer read the same number but differ.
    """
    found: dict[int, int] = {}
    for name, count in counts.items():
        layer = layer_index(name)
        if found.setdefault(layer, count) != count:
            raise PlanError(
                f"MoE layers with index {layer} share one expert count in the config, but the plan "
                f"keeps {found[layer]} and {count} experts; keep the same number in {name!r}"
            )
    return found


def _write(config: PreTrainedConfig, key: ConfigKey, names: tuple[str, ...], value: int) -> None:
    found = sibling(config, key, names)
    if found:
        found[0].set(config, value)
