"""Who gets room, by hand on six tokens; who chooses whom."""

import pytest
import torch
from torch.nn import functional as F

from lit_moe.testing.vision import example_images, tiny_vmoe
from lit_moe.vmoe.configuration import VMoEConfig
from lit_moe.vmoe.modeling import VMoEBlock, averaged
from lit_moe.vmoe.routing import (
    capacity_of,
    choose_tokens,
    importance_loss,
    load_loss,
    only_own_rows,
    owners,
    within_capacity,
)

# Six tokens, two choices each among three rows.
ROWS = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0], [0, 1], [2, 0]])
GATES = torch.tensor([0.5, 0.9, 0.6, 0.8, 0.7, 0.4])


def test_without_priority_early_tokens_and_first_choices_win():
    # Capacity 2. Row 0: first choices of tokens 0 and 1. Row 1: that of 3, then second of 0.
    # Row 2: that of 5, then second of 2.
    expected = [[1, 1], [1, 0], [0, 1], [1, 0], [0, 0], [1, 0]]
    assert within_capacity(ROWS, None, 2).int().tolist() == expected


def test_with_priority_tokens_with_large_gates_win():
    # Order 1, 3, 4, 2, 0, 5. Row 0: tokens 1 and 4. Row 1: 3 first, then second choice of 1.
    # Row 2: 5 by its first choice, then 2.
    expected = [[0, 0], [1, 1], [0, 1], [1, 0], [1, 0], [1, 0]]
    assert within_capacity(ROWS, GATES, 2).int().tolist() == expected


def test_second_choices_come_behind_all_first_ones_whatever_their_priority():
    rows = torch.tensor([[0, 1], [1, 0]])
    fits = within_capacity(rows, torch.tensor([0.99, 0.1]), 1)
    assert fits.tolist() == [[True, False], [True, False]]


def test_capacity_is_an_equal_share_times_the_factor():
    assert capacity_of(12, 3, 1.0) == 4
    assert capacity_of(12, 3, 1.05) == 4
    assert capacity_of(12, 8, 0.1) == 1


def test_a_token_without_room_is_zero_and_others_are_not_renormalised():
    config = VMoEConfig(hidden_size=4, intermediate_size=3, num_experts=2, num_experts_per_tok=1)
    config.eval_capacity_factor, config.num_hidden_layers = 0.5, 2
    config._experts_implementation = "eager"
    block = VMoEBlock(config, 1).eval()
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(1, 6, 4)
    hidden[0] = hidden[0, :1] * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:, None]
    with torch.no_grad():
        out = block(hidden)[0]
        probabilities = torch.softmax(hidden[0] @ block.router.weight.T, dim=-1)
    expert = int(probabilities[0].argmax())
    # Six slots, two rows, factor one half: room for 2, all six want the same expert. The gates
    # grow with the scale of the token, so the last two have priority.
    assert out[:4].abs().max() == 0
    experts = block.experts
    inner = F.gelu(hidden[0, 4:] @ experts.up_proj[expert].T + experts.up_proj_bias[expert])
    outer = inner @ experts.down_proj[expert].T + experts.down_proj_bias[expert]
    torch.testing.assert_close(out[4:], outer * probabilities[4:, expert, None])


def test_experts_choose_tokens_of_each_image_and_know_nothing_of_each_other():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    gates, rows, tokens = choose_tokens(logits, 2)
    fewer = choose_tokens(logits[:, :, [0, 2]], 2)
    assert gates.shape == rows.shape == tokens.shape == (12,)
    torch.testing.assert_close(gates[rows == 2], fewer[0][fewer[1] == 1], rtol=0, atol=0)
    assert tokens[rows == 2].tolist() == fewer[2][fewer[1] == 1].tolist()
    for row in range(3):
        mine = rows == row
        assert gates[mine].sum().item() == pytest.approx(2.0)
        for image in range(2):
            best = logits[image, :, row].topk(2).indices + 5 * image
            assert set(best.tolist()) <= set(tokens[mine].tolist())


def test_rows_of_an_ensemble_belong_to_members_in_blocks():
    assert owners(6, 4, 2, torch.device("cpu")).tolist() == [0, 0, 1, 1, 0, 1]
    logits = only_own_rows(torch.zeros(4, 6), 4, 2)
    assert (logits[0] == 0).tolist() == [True, True, False, False, True, False]
    assert (logits[3] == 0).tolist() == [False, False, True, True, False, True]


def test_members_average_probabilities():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    mean = (torch.softmax(logits[0], 0) + torch.softmax(logits[1], 0)) / 2
    torch.testing.assert_close(averaged(logits, 2).exp()[0], mean)


def test_an_ensemble_of_equal_members_is_one_of_them():
    one, two = tiny_vmoe("no_limit"), tiny_vmoe("no_limit", num_experts=16, num_members=2)
    state = one.state_dict()
    for name in two.state_dict():
        if state[name].shape != two.state_dict()[name].shape:
            state[name] = torch.cat([state[name], state[name]])
    two.load_state_dict(state)
    images = example_images(one)
    with torch.no_grad():
        alone, averaged_logits = one(**images).logits, two(**images).logits
    torch.testing.assert_close(alone.softmax(-1), averaged_logits.softmax(-1))


def test_auxiliary_losses_are_0_for_equal_rows_and_grow_with_imbalance():
    equal = torch.eye(4) * 3
    skewed = torch.eye(4) * 3 + torch.tensor([5.0, 0, 0, 0])
    assert importance_loss(equal).item() == pytest.approx(0, abs=1e-9)
    assert importance_loss(skewed) > 0.5
    assert load_loss(equal, equal, 1, 0.1).item() == pytest.approx(0, abs=1e-9)
    assert load_loss(skewed, skewed, 1, 0.1) > 0.5


def test_training_adds_the_losses_and_forgets_them():
    model = tiny_vmoe(importance_loss=0.0, load_loss=0.0, router_noise=0.0).train()
    labels = torch.tensor([0, 1, 2])
    plain = model(**example_images(model), labels=labels).loss
    twin = tiny_vmoe(importance_loss=1.0, load_loss=0.0, router_noise=0.0).train()
    assert twin(**example_images(twin), labels=labels).loss > plain
    assert all(getattr(module, "aux_loss", None) is None for module in twin.modules())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 9}, "images of 9 x 9 pixels cannot be cut into patches of 2 x 2"),
        ({"moe_layers": [7]}, "must name some of the layers 0 to 3"),
        ({"num_members": 2, "router_type": "expert_choice"}, "only router_type token_choice"),
    ],
)
def test_what_cannot_be_built_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        tiny_vmoe(**fields)
