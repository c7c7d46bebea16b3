"""The upcycled benchmark model begins as the dense one: only training sets experts apart."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.testing import example_inputs
from tests.benchmarks.upcycling import SIZES, upcycled
from tests.grouping.models import logits_of


def test_copies_of_a_dense_mlp_compute_what_it_does():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=1, num_experts_per_tok=1)
    dense = MixtralForCausalLM(config).eval()
    model = upcycled(dense, seed=3).eval()
    sites = find_sites(model)
    assert [(site.num_experts, site.top_k) for site in sites] == [(8, 2)] * 4
    for site in sites:
        for stacked in adapter_for(model.config).expert_weights(model, site).values():
            assert torch.equal(stacked, stacked[:1].expand_as(stacked))
        rows = adapter_for(model.config).router_weight(model, site)
        assert len(rows.unique(dim=0)) == 8
    inputs = example_inputs(model)
    torch.testing.assert_close(
        logits_of(model, inputs), logits_of(dense, inputs), rtol=1e-4, atol=1e-5
    )
