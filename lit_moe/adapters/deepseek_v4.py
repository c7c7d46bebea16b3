"""DeepSeek-V4: the first MoE layers choose experts by a table from token id to expert ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.discovery import Discovery
from lit_moe.adapters.pairing import parent
from lit_moe.adapters.site import ExpertAxis, MoESite
from lit_moe.adapters.slicing import replace_tensor
from lit_moe.adapters.taps import Handle, Handles
from lit_moe.errors import PlanError

TABLE = "tid2eid"


class DeepseekV4Adapter(MoEAdapter):
    """Ids of dropped experts in the table are replaced by ids of kept ones.

    Rule: a dropped expert is replaced by the kept expert whose router row is most similar to its
    own (cosine), among those that the token does not use already.
    """

    def pair(self, model: PreTrainedModel, discovery: Discovery) -> tuple[MoESite, ...]:
        """Return the MoE layers with their id tables, see the base class."""
        return tuple(self._with_table(model, site) for site in super().pair(model, discovery))

    def slice_(self, model: PreTrainedModel, site: MoESite, keep: Sequence[int]) -> None:
        """Cut the layer and renumber its table, see the base class."""
        tables = {axis.name: self._substituted(model, site, axis, keep) for axis in _tables(site)}
        super().slice_(model, dataclasses.replace(site, axes=_without_tables(site)), keep)
        for name, table in tables.items():
            new_id = torch.zeros(site.num_experts, dtype=table.dtype, device=table.device)
            new_id[list(keep)] = torch.arange(len(keep), dtype=table.dtype, device=table.device)
            replace_tensor(model.get_submodule(parent(name)), TABLE, new_id[table])

    def set_top_k(self, model: PreTrainedModel, top_k: int) -> None:
        """Change the number of active experts, see the base class.

        Raises:
            PlanError: also if the tables do not name that many experts per token id.
        """
        tables = [axis.name for site in self.sites(model) for axis in _tables(site)]
        for name in tables:
            width = model.get_buffer(name).shape[1]
            if top_k > width:
                raise PlanError(f"{name} names {width} experts per token, not top_k={top_k}")
        super().set_top_k(model, top_k)
        for name in tables:
            table = model.get_buffer(name)[:, :top_k].clone()
            replace_tensor(model.get_submodule(parent(name)), TABLE, table)

    def mask_(self, model: PreTrainedModel, site: MoESite, keep: Sequence[int]) -> Handle:
        """Mask the logits and swap the table, see the base class."""
        swaps = [
            _Swap(model, a.name, self._substituted(model, site, a, keep)) for a in _tables(site)
        ]
        return Handles([super().mask_(model, site, keep), *swaps])

    def router_probabilities(
        self, site: MoESite, router_output: object, router_module: nn.Module
    ) -> Tensor:
        """Return ``sqrt(softplus(logits))`` over its sum, see the base class."""
        del site
        logits = self.router_logits(router_output).float()
        scores = router_module.get_submodule("score_fn")(logits)
        return scores / scores.sum(-1, keepdim=True)

    def _with_table(self, model: PreTrainedModel, site: MoESite) -> MoESite:
        if not hasattr(model.get_submodule(site.router), TABLE):
            return site
        axis = ExpertAxis(f"{site.router}.{TABLE}", 1, site.num_experts, kind="id_table")
        return dataclasses.replace(site, axes=(*site.axes, axis))

    def _substituted(
        self, model: PreTrainedModel, site: MoESite, axis: ExpertAxis, keep: Sequence[int]
    ) -> Tensor:
        """Return the table in the old numbering without dropped ids."""
        table = model.get_buffer(axis.name)
        return substitute(table, self.router_weight(model, site).detach(), keep)


def substitute(table_VK: Tensor, router_EH: Tensor, keep: Sequence[int]) -> Tensor:
    """Replace dropped expert ids by the most similar kept ones that a row does not hold yet.

    Args:
        table_VK: expert ids per token id (V rows), K distinct ids in a row.
        router_EH: router rows of the experts; similarity is their cosine.
        keep: ascending ids that stay.

    Returns:
        A table of the same shape and numbering.
    """
    kept = torch.tensor(list(keep), device=table_VK.device)
    rows = torch.nn.functional.normalize(router_EH.float(), dim=1)
    ranked_EN = kept[(rows @ rows[kept].T).argsort(dim=1, descending=True, stable=True)]
    is_kept = torch.zeros(len(router_EH), dtype=torch.bool, device=kept.device)
    is_kept[kept] = True
    table_VK = table_VK.clone()
    used_VK = torch.where(is_kept[table_VK], table_VK, -1)
    for slot in range(table_VK.shape[1]):
        old = table_VK[:, slot]
        candidates_VN = ranked_EN[old]
        free_VN = (candidates_VN[:, :, None] != used_VK[:, None, :]).all(dim=2)
        chosen = candidates_VN.gather(1, free_VN.int().argmax(dim=1, keepdim=True)).squeeze(1)
        table_VK[:, slot] = used_VK[:, slot] = torch.where(is_kept[old], old, chosen.to(old.dtype))
    return table_VK


class _Swap:
    """Puts another tensor in the place of a buffer until removed."""

    def __init__(self, model: nn.Module, name: str, value: Tensor) -> None:
        path, _, self._name = name.rpartition(".")
        self._owner = model.get_submodule(path)
        self._old = self._owner._buffers[self._name]
        self._owner._buffers[self._name] = value

    def remove(self) -> None:
        self._owner._buffers[self._name] = self._old


def _tables(site: MoESite) -> tuple[ExpertAxis, ...]:
    return site.rows("id_table")


def _without_tables(site: MoESite) -> tuple[ExpertAxis, ...]:
    return tuple(axis for axis in site.axes if axis.kind != "id_table")
