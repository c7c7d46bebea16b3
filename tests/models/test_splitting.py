import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.masking import masked
from lit_moe.models import split_dense
from lit_moe.models.neurons import balanced_clusters, fit_router
from lit_moe.surgery import shrink
from lit_moe.testing import random_plan, tiny_moe

VOCAB, NEURONS = 96, 48


def tiny_llama(**overrides):
    settings = {
        "hidden_size": 32,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


def text(length=24, seed=0):
    ids = torch.randint(VOCAB, (8, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def split(model, **options):
    return split_dense(model, text(), **{"num_experts": 8, "num_shared": 4, "top_k": 4, **options})


def logits(model, seed=1):
    with torch.no_grad():
        return model(**text(seed=seed)[0]).logits


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 16},
        {"hidden_act": "gelu", "rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ],
)
def test_with_all_experts_active_the_logits_are_the_dense_ones(overrides):
    dense = tiny_llama(**overrides)
    sparse = split(dense, top_k=8)
    # The gates are 1 +- 1e-4; without any routed expert the logits would be far away.
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=0, atol=2e-3)
    assert (logits(split(dense, top_k=1)) - logits(dense)).abs().max() > 0.1


def test_with_gates_of_exactly_one_the_logits_differ_by_rounding_only():
    dense = tiny_llama()
    sparse = split(dense, top_k=8)
    for layer in sparse.model.layers:
        layer.mlp.gate.weight.data.zero_()
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=1e-5, atol=1e-5)


def test_every_neuron_is_in_exactly_one_place_with_all_its_parts():
    dense = tiny_llama()
    for old, new in zip(dense.model.layers, split(dense).model.layers, strict=True):
        shared, experts = new.mlp.shared_experts, new.mlp.experts
        gate_EWD, up_EWD = experts.gate_up_proj.chunk(2, dim=1)
        assert gate_EWD.shape == (8, 4, 32)
        columns = [
            torch.cat([shared.gate_proj.weight, gate_EWD.flatten(0, 1)]),
            torch.cat([shared.up_proj.weight, up_EWD.flatten(0, 1)]),
            torch.cat([shared.down_proj.weight.T, experts.down_proj.transpose(1, 2).flatten(0, 1)]),
        ]
        found = torch.cat(columns, dim=1)
        mlp = old.mlp
        expected = torch.cat(
            [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], dim=1
        )
        order, wanted = found[:, 0].argsort(), expected[:, 0].argsort()
        assert torch.equal(found[order], expected[wanted])


def test_the_shared_expert_holds_the_neurons_that_add_most():
    dense = tiny_llama()
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.down_proj.weight[:, 5:21] *= 100
    for old, new in zip(dense.model.layers, split(dense).model.layers, strict=True):
        strong = old.mlp.down_proj.weight[:, 5:21]
        assert torch.equal(new.mlp.shared_experts.down_proj.weight, strong)


def test_clusters_are_balanced_and_find_neurons_that_are_active_together():
    generator = torch.Generator().manual_seed(0)
    kind_N = torch.arange(24) % 3
    profile = 5.0 * torch.nn.functional.one_hot(kind_N, 3) + 0.1 * torch.rand(
        24, 3, generator=generator
    )
    cluster_N = balanced_clusters(profile, 3, generator=generator)
    assert cluster_N.bincount().tolist() == [8, 8, 8]
    for kind in range(3):
        assert len(set(cluster_N[kind_N == kind].tolist())) == 1


def test_a_full_cluster_takes_no_more_even_if_all_rows_are_alike():
    same = torch.ones(12, 5)
    cluster_N = balanced_clusters(same, 4, generator=torch.Generator().manual_seed(0))
    assert cluster_N.bincount().tolist() == [3, 3, 3, 3]


def test_the_router_chooses_the_expert_with_the_largest_linear_output():
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(500, 6, generator=generator) + 1
    true_DE = torch.randn(6, 5, generator=generator)
    norm_TE = x_TD @ true_DE + torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0]) + 10
    rows_ED, bias_E = fit_router(x_TD, norm_TE)
    score_TE = (x_TD @ rows_ED.T).sigmoid()
    chosen_T = (score_TE + bias_E).argmax(dim=1)
    assert (chosen_T == norm_TE.argmax(dim=1)).float().mean() > 0.95
    deviation = (2 * score_TE - 1).square().mean().sqrt()
    assert deviation.item() == pytest.approx(1e-4, rel=0.05)


def test_the_choice_of_experts_is_better_than_a_random_one():
    dense = tiny_llama()
    chosen = split(dense)
    shuffled = split(dense)
    for layer in shuffled.model.layers:
        gate = layer.mlp.gate
        gate.weight.data = gate.weight.data.roll(3, dims=0)
        gate.e_score_correction_bias = gate.e_score_correction_bias.roll(3)
    error = (logits(chosen, seed=0) - logits(dense, seed=0)).square().mean()
    assert error < 0.9 * (logits(shuffled, seed=0) - logits(dense, seed=0)).square().mean()


def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state_and_the_model_alone():
    dense = tiny_llama()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    state = torch.get_rng_state()
    first, second, other = split(dense), split(dense), split(dense, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    others = other.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert any(not torch.equal(value, others[name]) for name, value in first.state_dict().items())


def test_padding_is_no_calibration_text():
    dense = tiny_llama()
    (batch,) = text()
    padded = {key: torch.nn.functional.pad(value, (0, 7), value=0) for key, value in batch.items()}
    plain = split_dense(dense, [batch], num_experts=8, num_shared=4, top_k=8)
    again = split_dense(dense, [padded], num_experts=8, num_shared=4, top_k=8)
    for one, two in zip(plain.model.layers, again.model.layers, strict=True):
        assert torch.equal(one.mlp.experts.down_proj, two.mlp.experts.down_proj)


def test_saved_it_is_an_ordinary_folder_with_equal_logits(tmp_path):
    sparse = split(tiny_llama())
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "Glm4MoeForCausalLM"
    assert torch.equal(logits(loaded), logits(sparse))


def test_its_experts_can_be_masked_and_removed():
    sparse = split(tiny_llama())
    plan = random_plan(sparse, ratio=0.5)
    with masked(sparse, plan):
        expected = logits(sparse)
    report = shrink(sparse, plan)
    assert all(counts == (8, 4) for counts in report.layers.values())
    torch.testing.assert_close(logits(sparse), expected, rtol=0, atol=1e-5)


def test_bfloat16_keeps_its_dtype_and_selection_biases_in_float32():
    # 16 neurons per expert: torch's grouped matmul wants rows of a multiple of 16 bytes.
    sparse = split(tiny_llama(intermediate_size=192).bfloat16())
    gate = sparse.model.layers[0].mlp.gate
    assert sparse.dtype == torch.bfloat16
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert logits(sparse).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 7}, r"7 experts and 4 shared.*must divide 48 \(their sum could be 12\)"),
        ({"num_experts": 60}, r"\(use fewer\)"),
        ({"num_experts": 1, "num_shared": 1, "top_k": 1}, "at least 2 experts"),
        ({"num_shared": 0}, "1 shared one"),
        ({"top_k": 9}, "top_k lies between 1 and num_experts"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, message):
    with pytest.raises(LitMoEError, match=message):
        split(tiny_llama(), **options)


def test_other_models_are_refused():
    with pytest.raises(LitMoEError, match="MixtralForCausalLM cannot be split"):
        split(tiny_moe("mixtral"))
    with pytest.raises(LitMoEError, match="attention_bias=True, mlp_bias=False"):
        split(tiny_llama(attention_bias=True))


def test_text_that_says_nothing_is_refused():
    dense = tiny_llama()
    (batch,) = text()
    nothing = {**batch, "attention_mask": torch.zeros_like(batch["input_ids"])}
    for batches in ([], [nothing]):
        with pytest.raises(CalibrationError, match="no calibration text"):
            split_dense(dense, batches, num_experts=8, num_shared=4, top_k=4)
    with torch.no_grad():
        dense.model.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="layer 0's MLP is not finite"):
        split(dense)
