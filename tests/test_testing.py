"""The shipped test equipment."""

import os

import pytest
import torch
import torch.distributed as dist

from lit_moe.testing import example_inputs, random_plan, run_distributed, tiny_moe


def test_processes_can_talk_and_results_come_back_by_rank():
    def work(rank):
        total = torch.tensor([float(rank + 1)])
        dist.all_reduce(total)
        return {"rank": rank, "total": total, "world": os.environ["WORLD_SIZE"]}

    results = run_distributed(work, 2)
    assert [r["rank"] for r in results] == [0, 1]
    assert [float(r["total"]) for r in results] == [3.0, 3.0]
    assert {r["world"] for r in results} == {"2"}


def test_gradients_work_in_the_processes_although_the_parent_used_them_before():
    def gradient(_rank=0):
        model = tiny_moe("mixtral").train()
        model(**example_inputs(model)).logits.square().mean().backward()
        return model.lm_head.weight.grad

    expected = gradient()
    assert all(torch.equal(found, expected) for found in run_distributed(gradient, 2))


def test_an_error_in_one_process_is_raised_with_its_traceback():
    def work(rank):
        if rank == 1:
            raise KeyError("the second one")
        return rank

    with pytest.raises(RuntimeError, match=r"rank 1: Traceback[\s\S]*the second one"):
        run_distributed(work, 2)


def test_tiny_models_repeat_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    one, same, other = tiny_moe("mixtral"), tiny_moe("mixtral"), tiny_moe("mixtral", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, one.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_overrides_reach_the_language_model_inside():
    model = tiny_moe("qwen3_vl_moe", num_experts=6, num_hidden_layers=1)
    assert model.config.text_config.num_hidden_layers == 1
    assert model.config.text_config.num_experts == 6


def test_random_plans_repeat_and_are_legal():
    model = tiny_moe("deepseek_v3")
    assert random_plan(model) == random_plan(model)
    assert random_plan(model) != random_plan(model, seed=1)
    assert random_plan(model, ratio=0.0).keep_ratio == 0.5  # two of each of the two groups of four
