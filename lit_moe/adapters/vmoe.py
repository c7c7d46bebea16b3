"""V-MoE: dropped experts may leave their router rows behind; experts may choose tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lit_moe.adapters import legality
from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.config_keys import ConfigKey, set_per_layer
from lit_moe.adapters.pairing import layer_index
from lit_moe.adapters.router_mask import HookedMask
from lit_moe.adapters.site import ExpertAxis, MoESite
from lit_moe.adapters.slicing import configs_of, replace_tensor
from lit_moe.adapters.taps import Handle
from lit_moe.sharding.partitions import whole_shape

_NULL_KEY = ConfigKey((), "num_null_experts")


class VMoEAdapter(MoEAdapter):
    """Under ``dropped_experts: zero`` the router keeps its rows; what they choose becomes 0."""

    def describe(self, model: PreTrainedModel, site: MoESite) -> MoESite:
        """Return the site, see the base class."""
        site = dataclasses.replace(super().describe(model, site), one_per_group=True)
        if not _chooses_tokens(model.config):
            return site
        return dataclasses.replace(site, routing="custom", renormalised=None, top_k=1)

    def groups(self, model: PreTrainedModel, site: MoESite) -> tuple[int, int]:
        """Return the members of the ensemble, each of which uses its own experts only."""
        del site
        return model.config.n_group, 1

    def legal_counts(self, site: MoESite) -> tuple[int, ...]:
        """Return all counts that members can share; tokens may also choose rows of no expert."""
        return super().legal_counts(_reachable(site))

    def check_keep(self, site: MoESite, keep_ids: Sequence[int]) -> None:
        """Refuse experts that members cannot share equally, see the base class."""
        legality.check_keep(_reachable(site), keep_ids, self.traits.group_score)

    def drop_(self, model: PreTrainedModel, site: MoESite, keep: Sequence[int]) -> None:
        """Cut experts; their router rows go behind those of the others, or are cut too."""
        if not _keeps_rows(model.config):
            self.slice_(model, site, keep)
            return
        (rows,) = site.rows("router")
        others = tuple(axis for axis in site.axes if axis is not rows)
        self.slice_(model, dataclasses.replace(site, axes=others), keep)
        path, _, name = rows.name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, name)
        order = torch.tensor(_kept_first(rows, keep, site.num_groups), device=old.device)
        replace_tensor(owner, name, old.detach().index_select(0, order))

    def finish_(
        self, model: PreTrainedModel, sites: Sequence[MoESite], counts: Mapping[str, int]
    ) -> None:
        """Also count the rows without expert, see the base class."""
        super().finish_(model, sites, counts)
        null = {
            layer_index(site.name): whole_shape(self._rows(model, site))[0] - counts[site.name]
            for site in sites
        }
        for config in configs_of(model):
            set_per_layer(config, _NULL_KEY, null, max(null.values()))

    def mask_(self, model: PreTrainedModel, site: MoESite, keep: Sequence[int]) -> Handle:
        """Hide experts as :meth:`drop_` would drop them."""
        if not _keeps_rows(model.config) and not _chooses_tokens(model.config):
            return super().mask_(model, site, keep)
        hidden = sorted(set(range(site.num_experts)) - set(keep))
        return HookedMask(model.get_submodule(site.router), functools.partial(_hide, hidden))

    def tokens_given(self, model: PreTrainedModel, site: MoESite) -> Tensor | None:
        """Return the tokens of the slots that found room, see the base class."""
        tokens = getattr(model.get_submodule(site.name), "slot_tokens", None)
        return tokens if isinstance(tokens, Tensor) else None

    def _rows(self, model: PreTrainedModel, site: MoESite) -> Tensor:
        return model.get_parameter(site.rows("router")[0].name)


def _chooses_tokens(config: PreTrainedConfig) -> bool:
    return config.router_type == "expert_choice"


def _keeps_rows(config: PreTrainedConfig) -> bool:
    return config.dropped_experts == "zero" and not _chooses_tokens(config)


def _reachable(site: MoESite) -> MoESite:
    """Return the site as the rules of legality see it: a router with fewer rows chooses fewer."""
    return dataclasses.replace(site, top_k=1)


def _kept_first(rows: ExpertAxis, keep: Sequence[int], num_members: int) -> list[int]:
    """Return the old rows in their new order: those that stay, then by member those that do not."""
    dropped = [e for e in range(rows.real) if e not in set(keep)]
    order = list(keep)
    for member in range(num_members):
        order += _block(range(rows.real, rows.real + rows.tail), member, num_members)
        order += [e for e in dropped if e * num_members // rows.real == member]
    return order


def _block(ids: range, member: int, num_members: int) -> list[int]:
    size = len(ids) // num_members
    return list(ids[member * size : (member + 1) * size])


def _hide(hidden: list[int], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Let slots of hidden experts lead to a row that does not exist.

    Their gates stay: among tokens that compete for room, the largest gate is a token's priority.
    """
    logits_TR, gates_TK, rows_TK, *others = output
    away = torch.isin(rows_TK, torch.tensor(hidden, device=rows_TK.device))
    return (logits_TR, gates_TK, rows_TK.masked_fill(away, logits_TR.shape[-1]), *others)
