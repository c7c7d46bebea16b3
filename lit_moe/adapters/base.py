"""What lit-moe can ask about an MoE family, answered for the shape that most families share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_moe.adapters import legality, slicing, weights
from lit_moe.adapters.config_keys import (
    GROUP_KEYS,
    SHARED_KEYS,
    TOP_K_GROUP_KEYS,
    TOP_K_KEYS,
    ConfigKey,
    sibling,
)
from lit_moe.adapters.discovery import Discovery, discover, discover_ints
from lit_moe.adapters.pairing import pair
from lit_moe.adapters.router_mask import RouterHandle
from lit_moe.adapters.site import MoESite
from lit_moe.adapters.taps import Handle, OnSlots, WrappedExperts
from lit_moe.errors import NotAnMoEError, UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class Traits:
    """What a family's code says that no diff can: one row of the table of families.

    Attributes:
        routing: how logits become probabilities.
        renormalised: whether the chosen weights are divided by their sum, or the name of the
            config flag that says so.
        group_score: how a group of experts is scored when routing is group-limited; None for a
            family without groups.
    """

    routing: Literal["softmax", "sigmoid", "custom"] = "softmax"
    renormalised: bool | str | None = True
    group_score: legality.GroupScore = None


class MoEAdapter:
    """A family whose experts are stacked tensors beside a router (61 of 74 families).

    Subclasses override what differs. All methods take the model at hand, so that a model that
    was shrunk before is described as it now is.

    Args:
        traits: the family's row.
    """

    top_k_is_fixed = False
    """Whether the code ignores the number of active experts in the config."""
    needs_two_slots = False
    """Whether the experts' code fails when a token uses a single expert."""

    def __init__(self, traits: Traits) -> None:
        self.traits = traits

    def sites(self, model: PreTrainedModel) -> tuple[MoESite, ...]:
        """Return the MoE layers in module order.

        Raises:
            NotAnMoEError: if no tensor depends on an expert count of the config.
            UnsupportedModelError: if experts are there but not in a shape this adapter knows.
        """
        found = [site for d in self.discoveries(model) for site in self.pair(model, d)]
        if not found:
            raise NotAnMoEError(f"{_name(model)} has no MoE layer: it is a dense model")
        order = {name: index for index, (name, _) in enumerate(model.named_modules())}
        return tuple(
            self.describe(model, site) for site in sorted(found, key=lambda s: order[s.name])
        )

    def discoveries(self, model: PreTrainedModel) -> tuple[Discovery, ...]:
        """Return what each expert count of the config changes."""
        return discover(model)

    def pair(self, model: PreTrainedModel, discovery: Discovery) -> tuple[MoESite, ...]:
        """Return the MoE layers behind one expert count, without routing facts."""
        if discovery.added:
            raise UnsupportedModelError(
                f"{_name(model)} keeps each expert as modules of its own "
                f"({discovery.added[0]!r}), a layout lit-moe does not know for this family"
            )
        return pair(model, discovery)

    def describe(self, model: PreTrainedModel, site: MoESite) -> MoESite:
        """Return the site with its routing facts filled in."""
        groups, top_k_groups = self.groups(model, site)
        return dataclasses.replace(
            site,
            top_k=self.top_k(model.config, site),
            num_groups=groups,
            top_k_groups=top_k_groups,
            routing=self.traits.routing,
            renormalised=self.renormalised(model.config, site),
            num_shared=self.num_shared(model, site),
            registered=weights.is_decorated(model.get_submodule(site.experts)),
        )

    def top_k(self, config: PreTrainedConfig, site: MoESite) -> int:
        """Return the experts that a token uses."""
        found = sibling(config, ConfigKey.parse(site.config_key), TOP_K_KEYS)
        if found is None:
            raise UnsupportedModelError(f"config of {site.name} does not say how many experts act")
        return found[1]

    def groups(self, model: PreTrainedModel, site: MoESite) -> tuple[int, int]:
        """Return groups and groups per token; ``(1, 1)`` when groups do not limit anything."""
        key = ConfigKey.parse(site.config_key)
        groups = sibling(model.config, key, GROUP_KEYS)
        chosen = sibling(model.config, key, TOP_K_GROUP_KEYS)
        if groups is None or chosen is None or chosen[1] >= groups[1]:
            return 1, 1
        return groups[1], chosen[1]

    def renormalised(self, config: PreTrainedConfig, site: MoESite) -> bool | None:
        """Return whether the chosen weights are divided by their sum."""
        flag = self.traits.renormalised
        if not isinstance(flag, str):
            return flag
        owner = ConfigKey.parse(site.config_key).owner(config)
        return bool(getattr(owner, flag, True))

    def num_shared(self, model: PreTrainedModel, site: MoESite) -> int:
        """Return the experts of the block that every token uses."""
        block = model.get_submodule(site.name)
        if not any("shared" in n and m is not None for n, m in block.named_children()):
            return 0
        found = sibling(model.config, ConfigKey.parse(site.config_key), SHARED_KEYS)
        return found[1] if found and found[1] > 0 else 1

    def legal_counts(self, site: MoESite) -> tuple[int, ...]:
        """Return the ascending numbers of experts the router can work with."""
        return legality.legal_counts(site, self.traits.group_score)

    def check_keep(self, site: MoESite, keep_ids: Sequence[int]) -> None:
        """Refuse experts that the router could not work with.

        Raises:
            PlanError: naming the numbers and the nearest legal one.
        """
        legality.check_keep(site, keep_ids, self.traits.group_score)

    def check_counts(
        self, config: PreTrainedConfig, sites: Sequence[MoESite], counts: Mapping[str, int]
    ) -> None:
        """Refuse counts that a config cannot express, before anything is touched.

        Raises:
            PlanError: if two MoE layers that read the same number are given different ones.
        """
        slicing.update_config(copy.deepcopy(config), counts, None, sites)

    def slice_(self, model: PreTrainedModel, site: MoESite, keep: Sequence[int]) -> None:
        """Cut tensors and integers of one MoE layer, in place, down to ``keep``."""
        for axis in site.axes:
            slicing.cut_axis(model, axis, keep)
        for discovery in self.discoveries(model):
            if str(discovery.key) == site.config_key:
                slicing.set_ints(model, discovery.ints, site.name, len(keep))

    def drop_(self, model: PreTrainedModel, site: MoESite, keep: Sequence[int]) -> None:
        """Let the other experts go: cut them, where a family does nothing else with their rows."""
        self.slice_(model, site, keep)

    def finish_(
        self, model: PreTrainedModel, sites: Sequence[MoESite], counts: Mapping[str, int]
    ) -> None:
        """Bring configs and integers outside the MoE layers in line, once all layers are cut."""
        for discovery in self.discoveries(model):
            mine = {s.name: counts[s.name] for s in sites if s.config_key == str(discovery.key)}
            slicing.set_outer_ints(model, discovery.ints, mine)
            if slicing.must_relax(model.config, discovery.key, mine.values()):
                for names in (GROUP_KEYS, TOP_K_GROUP_KEYS):
                    self._set_ints_of(model, discovery.key, names, 1)
        for config in slicing.configs_of(model):
            self.update_config(config, counts, sites=sites)

    def _set_ints_of(
        self, model: PreTrainedModel, beside: ConfigKey, names: tuple[str, ...], value: int
    ) -> None:
        found = sibling(model.config, beside, names)
        if found:
            slicing.set_ints(model, discover_ints(model, found[0]), "", value)

    def update_config(
        self,
        config: PreTrainedConfig,
        counts: Mapping[str, int],
        top_k: int | None = None,
        *,
        sites: Sequence[MoESite] | None = None,
    ) -> None:
        """Write expert counts into a config, in place.

        Equal counts go to the plain key, unequal ones to ``per_layer_config``.

        Args:
            config: top-level config of the model.
            counts: MoE layer name -> experts, for all layers.
            top_k: new number of active experts, None to leave it.
            sites: needed only where a model counts experts in several places of its config.

        Raises:
            PlanError: if two MoE layers that read the same number are given different ones.
        """
        slicing.update_config(config, counts, top_k, sites)

    def set_top_k(self, model: PreTrainedModel, top_k: int) -> None:
        """Change the number of active experts everywhere, in memory and in the config.

        Raises:
            PlanError: if the family's code fixes the number, or too few experts can be reached.
        """
        sites = self.sites(model)
        for site in sites:
            legality.check_top_k(site, top_k, fixed=self.top_k_is_fixed)
        for key in sorted({site.config_key for site in sites}):
            self._set_ints_of(model, ConfigKey.parse(key), TOP_K_KEYS, top_k)
        for config in slicing.configs_of(model):
            slicing.write_top_k(config, top_k, sites)

    def mask_(self, model: PreTrainedModel, site: MoESite, keep: Sequence[int]) -> Handle:
        """Hide the other experts from the router until the handle is removed."""
        return RouterHandle(model, site, keep)

    def expert_weights(self, model: PreTrainedModel, site: MoESite) -> dict[str, Tensor]:
        """Return the experts' matrices as views, whatever their layout in memory.

        Returns:
            ``up (E, I, H)``, ``down (E, H, I)`` and, where the family has them, ``gate (E, I,
            H)``, ``gate_bias (E, I)``, ``up_bias (E, I)``, ``down_bias (E, H)``.
        """
        return weights.canonical(model.get_submodule(site.experts), site.num_experts)

    def set_expert_weights_(
        self, model: PreTrainedModel, site: MoESite, values: Mapping[str, Tensor]
    ) -> None:
        """Write some of the tensors that :meth:`expert_weights` names, in place; dtypes stay."""
        views = self.expert_weights(model, site)
        with torch.no_grad():
            for name, value in values.items():
                views[name].copy_(value)

    def router_weight(self, model: PreTrainedModel, site: MoESite) -> Tensor:
        """Return the router's rows for the routed experts, shape ``(E, H)``."""
        matrix = site.rows("router")[0]
        return model.get_parameter(matrix.name)[: site.num_experts]

    def router_logits(self, router_output: object) -> Tensor:
        """Return the logits from what the router module returned, shape ``(..., E + tail)``."""
        logits = router_output[0] if isinstance(router_output, tuple) else router_output
        assert isinstance(logits, Tensor)
        return logits

    def router_probabilities(
        self, site: MoESite, router_output: object, router_module: nn.Module
    ) -> Tensor:
        """Return the router's probabilities of the routed experts.

        Args:
            site: the MoE layer.
            router_output: what the router's forward returned.
            router_module: the router.

        Returns:
            Shape ``(T, E)``, float32. Softmax families: rows sum to 1 over routed and null experts.
        """
        del router_module
        logits = self.router_logits(router_output).float()
        logits = logits.reshape(-1, logits.shape[-1])
        scores = logits.sigmoid() if site.routing == "sigmoid" else torch.softmax(logits, -1)
        return scores[:, : site.num_experts]

    def tap_kind(self, site: MoESite) -> Literal["contract", "custom"]:
        """Return whether the experts dispatch through transformers' registry of implementations."""
        return "contract" if site.registered else "custom"

    def tokens_given(self, model: PreTrainedModel, site: MoESite) -> Tensor | None:
        """Return which tokens of the batch the experts are being given, None for all in order.

        To be asked while the experts run.
        """
        del model, site
        return None

    def attach_slots(self, model: PreTrainedModel, site: MoESite, on_slots: OnSlots) -> Handle:
        """Observe experts that do not dispatch through the registry, at the price of a forward.

        Logits stay what they are, up to the order in which an expert sum is added up.

        Args:
            model: the model.
            site: the MoE layer.
            on_slots: called once per forward with ``expert_ids (S,)``, ``gates (S,)``, raw
                ``outputs (S, H)`` and ``token_ids (S,)``.
        """
        return WrappedExperts(
            model.get_submodule(site.experts),
            on_slots,
            is_real=lambda ids, gates: self.is_real_slot(site, ids, gates),
            null_slot=self.needs_two_slots,
        )

    def is_real_slot(self, site: MoESite, expert_ids: Tensor, gates: Tensor) -> Tensor:
        """Return which slots a routed expert serves, shape ``(S,)``."""
        del gates
        return expert_ids < site.num_experts


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"
