"""The tap against a slow oracle: all experts on all tokens, one token at a time where it counts."""

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import CalibrationError
from lit_moe.stats import observe
from lit_moe.stats.slots import Slots, raw_outputs, slots_of
from lit_moe.testing import FAMILIES, example_inputs, tiny_moe
from tests.stats.oracle import all_experts_statistics

ROUTED = ("count", "gate_sum", "norm_sum", "weighted_norm_sum", "squared_norm_sum", "max_abs")
PLAIN = ("mixtral", "olmoe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_pass_equals_the_all_experts_all_tokens_oracle(family):
    model = tiny_moe(family)
    inputs = example_inputs(model)
    observed = observe(model, [inputs])
    oracle = all_experts_statistics(model, inputs)
    adapter = adapter_for(model.config)
    for site in find_sites(model):
        if site.name not in oracle and adapter.tap_kind(site) == "contract":
            assert observed.layers[site.name].tokens == 0
    for name, expected in oracle.items():
        stats = observed.layers[name]
        assert stats.tokens == expected["tokens"], name
        for key in ROUTED:
            torch.testing.assert_close(
                getattr(stats, key), expected[key], rtol=2e-5, atol=1e-9, msg=f"{name}.{key}"
            )


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_statistics_do_not_depend_on_the_experts_implementation(family, implementation):
    model = tiny_moe(family)
    inputs = example_inputs(model)
    reference = observe(model, [inputs])
    model.set_experts_implementation(implementation)
    other = observe(model, [inputs])
    for name, stats in reference.layers.items():
        torch.testing.assert_close(other.layers[name].count, stats.count, rtol=0, atol=0)
        torch.testing.assert_close(
            other.layers[name].weighted_norm_sum, stats.weighted_norm_sum, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("family", PLAIN)
def test_observing_leaves_logits_bit_identical_and_nothing_attached(family):
    model = tiny_moe(family)
    inputs = example_inputs(model)
    before = model(**inputs).logits
    site = find_sites(model)[0]
    experts = model.get_submodule(site.experts)
    attributes = dict(experts.__dict__)
    observe(model, [inputs])
    assert torch.equal(model(**inputs).logits, before)
    assert {k: v for k, v in experts.__dict__.items() if k != "_forward_pre_hooks_with_kwargs"} == {
        k: v for k, v in attributes.items() if k != "_forward_pre_hooks_with_kwargs"
    }


def test_watched_slots_add_up_to_what_the_experts_return():
    model = tiny_moe("mixtral")
    experts = model.get_submodule(find_sites(model)[0].experts)
    hidden = torch.randn(7, model.config.hidden_size)
    index = torch.stack([torch.randperm(8)[:2] for _ in range(7)])
    weights = torch.rand(7, 2)
    seen: list[Slots] = []
    with slots_of(experts, seen.append):
        output = experts(hidden, index, weights)
    (slots,) = seen
    rebuilt = torch.zeros_like(output).index_add(
        0, slots.token_ids, slots.outputs * slots.gates[:, None]
    )
    torch.testing.assert_close(rebuilt, output, rtol=1e-5, atol=1e-6)
    alone = raw_outputs(experts.forward, hidden, index[:, 0], weights.dtype)
    assert alone.shape == hidden.shape


def test_padding_does_not_count():
    model = tiny_moe("mixtral")
    inputs = example_inputs(model)
    padded = {key: value.clone() for key, value in inputs.items()}
    padded["attention_mask"] = torch.ones_like(inputs["input_ids"])
    padded["attention_mask"][:, -4:] = 0
    short = {
        "input_ids": inputs["input_ids"][:, :-4],
        "attention_mask": padded["attention_mask"][:, :-4],
    }
    observed, expected = observe(model, [padded]), observe(model, [short])
    assert observed.tokens == expected.tokens == short["input_ids"].numel()
    for name, stats in expected.layers.items():
        torch.testing.assert_close(observed.layers[name].count, stats.count)
        torch.testing.assert_close(
            observed.layers[name].probability_sum, stats.probability_sum, rtol=1e-5, atol=1e-6
        )


def test_two_batches_add_up():
    model = tiny_moe("olmoe")
    first, second = example_inputs(model, seed=1), example_inputs(model, seed=2)
    both = observe(model, [first, second])
    parts = [observe(model, [batch]) for batch in (first, second)]
    for name, stats in both.layers.items():
        summed = sum(part.layers[name].norm_sum for part in parts)
        torch.testing.assert_close(stats.norm_sum, summed, rtol=1e-6, atol=0)


def test_nan_in_an_expert_is_refused_with_the_layer_named():
    model = tiny_moe("mixtral")
    site = find_sites(model)[1]
    weights = adapter_for(model.config).expert_weights(model, site)
    with torch.no_grad():
        weights["down"].fill_(float("nan"))
    with pytest.raises(CalibrationError, match=site.name.replace(".", r"\.")):
        observe(model, [example_inputs(model)])


def test_no_batch_is_refused():
    with pytest.raises(CalibrationError, match="no calibration batch"):
        observe(tiny_moe("mixtral"), [])
