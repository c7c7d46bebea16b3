"""Every family: exactly the zeros that were asked for, and nothing else touched."""

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.sparsity import measure_sparsity, parameter_zeros, sparsify
from lit_moe.testing import FAMILIES, example_inputs, tiny_moe
from tests.sparsity.oracle import expert_parameters, state_of


def check(family, method):
    model = tiny_moe(family)
    before, experts = state_of(model), expert_parameters(model)
    masks = sparsify(model, [example_inputs(model)], method=method, pattern="1:4").masks
    for layer, matrices in measure_sparsity(model).items():
        assert set(matrices.values()) == {0.25}, layer
    after = model.state_dict()
    for name, tensor in before.items():
        if name not in experts or "bias" in name:
            assert torch.equal(after[name], tensor), name
        elif method != "sparsegpt":
            stays = after[name] != 0
            assert torch.equal(after[name][stays], tensor[stays]), name
    adapter = adapter_for(model.config)
    for site in find_sites(model):
        weights = adapter.expert_weights(model, site)
        for name, keep in masks.keep(site.name).items():
            assert torch.equal(weights[name] != 0, keep)
            assert keep.unflatten(2, (-1, 4)).sum(-1).unique().tolist() == [3]
    return model, masks


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gets_exactly_its_zeros_and_keeps_the_rest(family):
    model, masks = check(family, "moe_pruner")
    for name, zeros in parameter_zeros(model, masks).items():
        assert torch.equal(model.get_parameter(name) == 0, zeros), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_so_does_every_other_method(family, method):
    check(family, method)
