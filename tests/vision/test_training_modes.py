"""What any transformers model can: checkpointed gradients, autocast, copies, recorded outputs."""

import copy
import io

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.testing.vision import VARIANTS, example_images, tiny_vmoe

every_variant = pytest.mark.parametrize("variant", VARIANTS)
LABELS = torch.tensor([0, 1, 2])


def gradients(model):
    torch.manual_seed(0)
    loss = model(**example_images(model), labels=LABELS).loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@every_variant
def test_checkpointed_gradients_are_the_same(variant):
    model = tiny_vmoe(variant).train()
    twin = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    entered = []
    model.get_submodule("vit.layers.1.mlp.router").register_forward_hook(
        lambda *_: entered.append(1)
    )
    loss, found = gradients(model)
    expected, wanted = gradients(twin)
    assert len(entered) == 2, "the layer was not run again"
    assert torch.equal(loss, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


@every_variant
def test_a_model_in_the_middle_of_training_is_copied_and_stored(variant):
    model = tiny_vmoe(variant).train()
    model(**example_images(model))
    twin, file = copy.deepcopy(model).eval(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False).eval()
    with torch.no_grad():
        expected = model.eval()(**example_images(model)).logits
        for other in (twin, again):
            assert torch.equal(other(**example_images(model)).logits, expected)


@torch.no_grad()
@every_variant
def test_routers_choose_in_full_precision_under_autocast(variant):
    model, taken = tiny_vmoe(variant), []
    router = model.get_submodule(find_sites(model)[0].router)
    router.register_forward_hook(lambda _, inputs, output: taken.append((inputs[0], output[0])))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**example_images(model)).logits
    assert logits.isfinite().all()
    hidden, routed = taken[0]
    seen = (routed > -torch.inf).all(dim=-1)
    flat = hidden.reshape(-1, hidden.shape[-1]).float() @ router.weight.T
    member = routed > -torch.inf
    assert routed.dtype == torch.float32
    assert seen.all() or variant.startswith("ensemble")
    assert torch.equal(routed[member], flat[member])


@torch.no_grad()
def test_hidden_states_and_attentions_are_returned_when_asked_for():
    model = tiny_vmoe()
    model.set_attn_implementation("eager")
    images = example_images(model)
    output = model(**images, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in output.hidden_states] == [(3, 17, 32)] * 5
    assert [a.shape for a in output.attentions] == [(3, 4, 17, 17)] * 4
    plain = model(**images)
    assert torch.equal(plain.logits, output.logits)
    assert plain.hidden_states is None
    (logits,) = model(**images, return_dict=False)
    assert torch.equal(logits, plain.logits)
