"""Tiny models with experts that are known to be alike."""

from __future__ import annotations

import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.testing import example_inputs, tiny_moe


def copies(family="mixtral", pairs=((1, 4), (3, 6)), **overrides):
    """Return a tiny model in which the second expert of each pair is the first, router row too."""
    model = tiny_moe(family, **overrides)
    adapter = adapter_for(model.config)
    with torch.no_grad():
        for site in find_sites(model):
            weights = adapter.expert_weights(model, site)
            for one, other in pairs:
                for tensor in (*weights.values(), adapter.router_weight(model, site)):
                    tensor[other] = tensor[one]
            adapter.set_expert_weights_(model, site, weights)  # some families give copies
    return model


def shuffled(model, experts, seed=0):
    """Put the neurons of some experts into another order, in place."""
    adapter = adapter_for(model.config)
    generator = torch.Generator().manual_seed(seed)
    dims = {"gate": 0, "up": 0, "down": 1, "gate_bias": 0, "up_bias": 0}
    with torch.no_grad():
        for site in find_sites(model):
            weights = adapter.expert_weights(model, site)
            for expert in experts:
                order = torch.randperm(weights["up"].shape[1], generator=generator)
                for name, dim in dims.items():
                    if name in weights:
                        tensor = weights[name][expert]
                        tensor.copy_(tensor.index_select(dim, order))
            adapter.set_expert_weights_(model, site, weights)
    return model


def text_for(model, *, rows=16, length=12, batches=2, seed=0):
    """Return random token batches, ``rows`` rows in all."""
    return [
        example_inputs(model, batch=rows // batches, length=length, seed=10 * seed + i)
        for i in range(batches)
    ]


def counts_of(model, num):
    return dict.fromkeys((site.name for site in find_sites(model)), num)


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits
