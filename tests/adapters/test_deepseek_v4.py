"""The table of the hash layers: which kept expert stands in for a dropped one."""

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.deepseek_v4 import substitute
from lit_moe.errors import PlanError
from lit_moe.masking import masked
from lit_moe.surgery import shrink
from lit_moe.testing import random_plan, tiny_moe

# Expert 0 is most like 1, then 2; expert 3 is most like 2, then 1.
ROUTER = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])


def test_a_dropped_expert_is_replaced_by_the_most_similar_kept_one():
    table = torch.tensor([[0, 2], [3, 1]])
    assert substitute(table, ROUTER, [1, 2]).tolist() == [[1, 2], [2, 1]]


def test_a_token_never_names_an_expert_twice():
    table = torch.tensor([[0, 1], [3, 0], [1, 2]])
    assert substitute(table, ROUTER, [1, 2]).tolist() == [[2, 1], [2, 1], [1, 2]]


def test_length_of_router_rows_does_not_matter():
    table = torch.tensor([[0, 2]])
    scaled = ROUTER * torch.tensor([[1.0], [0.01], [100.0], [1.0]])
    assert substitute(table, scaled, [1, 2]).tolist() == [[1, 2]]


def test_the_shrunken_table_names_new_ids_of_the_same_experts():
    model = tiny_moe("deepseek_v4")
    site = find_sites(model)[0]
    name, plan = f"{site.router}.tid2eid", random_plan(model)
    original = model.get_buffer(name).clone()
    with masked(model, plan):
        substituted = model.get_buffer(name).clone()
    assert torch.equal(model.get_buffer(name), original)
    shrink(model, plan)
    kept = torch.tensor(plan.kept[site.name])
    assert torch.equal(kept[model.get_buffer(name)], substituted)
    stays = torch.isin(original, kept)
    assert torch.equal(substituted[stays], original[stays])
    assert all(len(set(row)) == len(row) for row in substituted.tolist())


def test_fewer_active_experts_shorten_the_table_and_more_are_refused():
    model = tiny_moe("deepseek_v4")
    adapter = adapter_for(model.config)
    with pytest.raises(PlanError, match="names 2 experts per token, not top_k=3"):
        adapter.set_top_k(model, 3)
    adapter.set_top_k(model, 1)
    assert model.get_buffer("model.layers.0.mlp.gate.tid2eid").shape == (64, 1)
