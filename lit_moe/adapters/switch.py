"""Switch Transformers: experts are modules of their own, one per token, with a capacity."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.discovery import Discovery
from lit_moe.adapters.pairing import axis_kind, bind, layer_index, named_tensors, parent
from lit_moe.adapters.site import MoESite
from lit_moe.adapters.taps import Handle, Handles, OnSlots, on_forward

_MATRICES = {"up": "wi.weight", "down": "wo.weight"}
EXPERT = re.compile(r"(.+)\.expert_\d+\.")


class SwitchAdapter(MoEAdapter):
    """A ``ModuleDict`` of ``expert_0 ...`` in encoder and decoder; routing is always top-1.

    Layers with the same index in encoder and decoder read one number of the config, so they must
    keep the same number of experts.
    """

    top_k_is_fixed = True

    def pair(self, model: PreTrainedModel, discovery: Discovery) -> tuple[MoESite, ...]:
        """Return one layer per ``ModuleDict`` of experts, see the base class."""
        found = (EXPERT.match(name) for name in discovery.added)
        paths = dict.fromkeys(match.group(1) for match in found if match)
        return tuple(self._site(model, path, discovery) for path in paths)

    def top_k(self, config: PreTrainedConfig, site: MoESite) -> int:
        """Return 1, see the base class."""
        del config, site
        return 1

    def slice_(self, model: PreTrainedModel, site: MoESite, keep: Sequence[int]) -> None:
        """Cut the router and renumber the modules that stay, see the base class."""
        super().slice_(model, site, keep)
        experts = _experts(model, site)
        kept = [experts[f"expert_{old}"] for old in keep]
        experts.clear()
        experts.update({f"expert_{new}": module for new, module in enumerate(kept)})

    def expert_weights(self, model: PreTrainedModel, site: MoESite) -> dict[str, Tensor]:
        """Return stacked copies (not views), see the base class."""
        experts = [_experts(model, site)[f"expert_{e}"] for e in range(site.num_experts)]
        return {
            name: torch.stack([expert.get_parameter(own) for expert in experts])
            for name, own in _MATRICES.items()
        }

    def set_expert_weights_(
        self, model: PreTrainedModel, site: MoESite, values: Mapping[str, Tensor]
    ) -> None:
        """Write into the module of each expert, see the base class."""
        experts = _experts(model, site)
        with torch.no_grad():
            for name, stacked in values.items():
                for e, value in enumerate(stacked):
                    experts[f"expert_{e}"].get_parameter(_MATRICES[name]).copy_(value)

    def router_logits(self, router_output: object) -> Tensor:
        """Return the last output, see the base class."""
        assert isinstance(router_output, tuple)
        logits: Tensor = router_output[-1]
        return logits

    def attach_slots(self, model: PreTrainedModel, site: MoESite, on_slots: OnSlots) -> Handle:
        """Observe each expert module; tokens beyond the capacity have no slot."""
        outputs: list[Tensor] = []

        def collect(_: Any, output: Tensor) -> None:
            outputs.append(output)

        def report(args: tuple[Tensor, ...], output: Tensor) -> None:
            _, selected_T1E, gates_T1 = args
            # The experts ran in this order: by expert, then by token.
            ids, tokens = selected_T1E[:, 0].T.nonzero(as_tuple=True)
            empty = output.new_zeros(0, output.shape[-1])
            on_slots(ids, gates_T1[tokens, 0], torch.cat([empty, *outputs]), tokens)
            outputs.clear()

        experts = _experts(model, site)
        hooks = [on_forward(expert, collect) for expert in experts.values()]
        return Handles([*hooks, on_forward(experts, report)])

    def _site(self, model: PreTrainedModel, path: str, discovery: Discovery) -> MoESite:
        block, tensors = parent(path), named_tensors(model)
        axes = [a for a in discovery.axes if a.name.startswith(f"{block}.")]
        bound = tuple(bind(axis, axis_kind(axis), tensors) for axis in axes)
        return MoESite(
            name=block,
            layer=layer_index(block),
            experts=path,
            router=f"{block}.router",
            num_experts=bound[0].real,
            top_k=1,
            axes=bound,
            config_key=str(discovery.key),
        )


def _experts(model: PreTrainedModel, site: MoESite) -> nn.ModuleDict:
    experts = model.get_submodule(site.experts)
    assert isinstance(experts, nn.ModuleDict)
    return experts
