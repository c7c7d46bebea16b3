"""Features of the down projections, seen without disturbing the model."""

import pytest
import torch
from torch.nn import functional as F

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import UnsupportedModelError
from lit_moe.stats.features import FeatureSlots, check_linear, features_of
from lit_moe.stats.grams import gated_features
from lit_moe.testing import FAMILIES, example_inputs, tiny_moe

NONLINEAR, UNSEEN = "something nonlinear follows", "not run as a module of its own"
REFUSED = {
    "muse_spark": {"model.language_model.layers.1.mlp": NONLINEAR},
    "jetmoe": {f"model.layers.{i}.self_attention.experts": UNSEEN for i in range(2)},
    # Text leaves the experts for images idle.
    "ernie4_5_vl_moe": {"model.language_model.layers.1.mlp.vision_moe": UNSEEN},
}


@torch.no_grad()
def look(model, site, inputs):
    """Run once and return the expert ids, token ids and gated features of one layer."""
    seen: list[FeatureSlots] = []
    with features_of(model, adapter_for(model.config), site, seen.append):
        model.base_model(**inputs)
    (slots,) = seen
    return gated_features(slots, bias=False)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_experts_are_linear_in_their_features_and_looking_changes_nothing(family):
    model = tiny_moe(family)
    inputs = example_inputs(model, length=6)
    before, state = model(**inputs).logits, {k: v.clone() for k, v in model.state_dict().items()}
    adapter, refused = adapter_for(model.config), {}
    for site in find_sites(model):
        try:
            check_linear(model, adapter, site, lambda: model.base_model(**inputs))
        except UnsupportedModelError as error:
            refused[site.name] = str(error)
    expected = REFUSED.get(family, {})
    assert set(refused) == set(expected)
    for name, why in expected.items():
        assert refused[name].startswith(f"{name} of {type(model).__name__} cannot be refitted")
        assert why in refused[name]
    assert torch.equal(model(**inputs).logits, before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_features_of_a_gated_expert_are_what_the_formula_says():
    model = tiny_moe("mixtral")
    site, inputs = find_sites(model)[0], example_inputs(model)
    weights = adapter_for(model.config).expert_weights(model, site)
    caught = []
    block = model.get_submodule(site.name)
    hook = block.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    expert_ids, token_ids, features = look(model, site, inputs)
    hook.remove()
    hidden_TH = caught[0].reshape(-1, 32)
    router = model.get_parameter(f"{site.router}.weight")
    gates_TK, index_TK = torch.softmax(hidden_TH @ router.T, dim=1).topk(site.top_k, dim=1)
    gates_TK = gates_TK / gates_TK.sum(dim=1, keepdim=True)
    assert len(expert_ids) == index_TK.numel()
    assert expert_ids.tolist() == sorted(expert_ids.tolist())
    for expert, token, psi in zip(expert_ids, token_ids, features, strict=True):
        x = hidden_TH[token]
        phi = F.silu(weights["gate"][expert] @ x) * (weights["up"][expert] @ x)
        gate = gates_TK[token][index_TK[token] == expert]
        torch.testing.assert_close(psi, gate * phi, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_features_do_not_depend_on_the_experts_implementation(family, implementation):
    model = tiny_moe(family)
    site, inputs = find_sites(model)[0], example_inputs(model)
    reference = look(model, site, inputs)
    model.set_experts_implementation(implementation)
    other = look(model, site, inputs)
    for mine, theirs in zip(other[:2], reference[:2], strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(other[2], reference[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [28, 32, 36, 80])
def test_experts_wider_than_the_hidden_size_are_asked_in_parts(width):
    model = tiny_moe("mixtral", intermediate_size=width)
    site, inputs = find_sites(model)[0], example_inputs(model)
    _, _, reference = look(model, site, inputs)
    model.set_experts_implementation("eager")
    _, _, asked = look(model, site, inputs)
    assert asked.shape[1] == width
    torch.testing.assert_close(asked, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h", "dbrx", "llama4"])
def test_an_error_while_looking_leaves_weights_and_modules_as_they_were(family):
    model = tiny_moe(family)
    site, inputs = find_sites(model)[0], example_inputs(model)
    before = model(**inputs).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = set(vars(model.get_submodule(site.experts)))

    def complain(_):
        raise OSError("no more memory")

    with (
        pytest.raises(OSError, match="no more memory"),
        torch.no_grad(),
        features_of(model, adapter_for(model.config), site, complain),
    ):
        model.base_model(**inputs)
    assert set(vars(model.get_submodule(site.experts))) == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, before)
