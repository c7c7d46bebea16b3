"""DiffusionGemma: encoder and decoder layers share one set of experts and routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedModel

from lit_moe.adapters import slicing
from lit_moe.adapters.discovery import Discovery
from lit_moe.adapters.gemma4 import Gemma4Adapter
from lit_moe.adapters.site import MoESite
from lit_moe.adapters.taps import Handle, Handles
from lit_moe.errors import UnsupportedModelError

DECODER, ENCODER = "decoder.layers.", "encoder.language_model.layers."


class DiffusionGemmaAdapter(Gemma4Adapter):
    """A decoder layer stands for itself and its encoder twin, whose tensors are the same objects.

    Only what the decoder routes is observed.
    """

    def pair(self, model: PreTrainedModel, discovery: Discovery) -> tuple[MoESite, ...]:
        """Return the decoder's MoE layers, see the base class.

        Raises:
            UnsupportedModelError: if encoder and decoder do not share their weights.
        """
        sites = tuple(site for site in super().pair(model, discovery) if DECODER in site.name)
        for name in (axis.name for site in sites for axis in site.axes):
            if model.get_parameter(name) is not model.get_parameter(_twin(name)):
                raise UnsupportedModelError(f"{name} is not shared with the encoder's layer")
        return sites

    def slice_(self, model: PreTrainedModel, site: MoESite, keep: Sequence[int]) -> None:
        """Cut the decoder layer and give the twin the same tensors, see the base class."""
        super().slice_(model, site, keep)
        for axis in site.axes:
            path, _, name = axis.name.rpartition(".")
            setattr(model.get_submodule(_twin(path)), name, model.get_parameter(axis.name))
        for discovery in self.discoveries(model):
            slicing.set_ints(model, discovery.ints, _twin(site.name), len(keep))

    def mask_(self, model: PreTrainedModel, site: MoESite, keep: Sequence[int]) -> Handle:
        """Mask both routers, see the base class."""
        # The twin's router holds the very tensors that the site names.
        twin = dataclasses.replace(site, router=_twin(site.router))
        return Handles(
            [super(DiffusionGemmaAdapter, self).mask_(model, s, keep) for s in (site, twin)]
        )


def _twin(path: str) -> str:
    return path.replace(DECODER, ENCODER)
