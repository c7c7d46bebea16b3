"""Experts without tokens, requests that cannot be met, and runs that break."""

from functools import partial

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.sparsity import SparsityOptions, measure_sparsity, sparsify, weight_masks
from lit_moe.sparsity.relay import Relay
from lit_moe.testing import example_inputs, tiny_moe
from tests.sparsity.oracle import state_of

LAYER = "model.layers.0.mlp"
METHODS = ["wanda", "moe_pruner", "sparsegpt"]


def with_idle_experts(idle=(1, 6)):
    """A model whose first layer never routes to some experts."""
    model = tiny_moe("deepseek_v3", first_k_dense_replace=0, n_group=1, topk_group=1)
    site = find_sites(model)[0]
    model.get_buffer(f"{site.router}.e_score_correction_bias")[list(idle)] = -100.0
    return model, [example_inputs(model, length=24)]


@pytest.mark.parametrize("earlier", ["pruned", "dense"])
@pytest.mark.parametrize("method", METHODS)
def test_experts_without_tokens_are_pruned_by_size(method, earlier):
    model, batches = with_idle_experts()
    by_size = weight_masks(model, method="magnitude", ratio=0.5).keep(LAYER)
    thinning = sparsify(model, batches, method=method, ratio=0.5, earlier=earlier)
    assert thinning.unrouted[LAYER] == [1, 6]
    for name, keep in thinning.masks.keep(LAYER).items():
        assert torch.equal(keep[[1, 6]], by_size[name][[1, 6]])
        assert not torch.equal(keep[0], by_size[name][0])
        assert (~keep).sum(2).unique().tolist() == [keep.shape[2] // 2]


@pytest.mark.parametrize("method", METHODS)
def test_experts_without_tokens_can_keep_all_their_weights(method):
    model, batches = with_idle_experts()
    own = adapter_for(model.config).expert_weights(model, find_sites(model)[0])["up"][1].clone()
    masks = sparsify(model, batches, method=method, pattern="2:4", unrouted="keep").masks
    assert all(bool(keep[[1, 6]].all()) for keep in masks.keep(LAYER).values())
    now = adapter_for(model.config).expert_weights(model, find_sites(model)[0])["up"][1]
    assert torch.equal(now, own)
    assert measure_sparsity(model)[LAYER]["up"] == pytest.approx(0.5 * 6 / 8)


def test_experts_without_tokens_can_be_an_error():
    model, batches = with_idle_experts()
    message = rf"experts \[1, 6\] of {LAYER} saw no calibration token; .* unrouted: magnitude"
    with pytest.raises(CalibrationError, match=message):
        sparsify(model, batches, pattern="2:4", unrouted="error")


def test_layers_that_no_batch_reaches_follow_the_rule_too():
    model = tiny_moe("ernie4_5_vl_moe")  # text leaves the experts for images idle
    thinning = sparsify(model, [example_inputs(model)], pattern="2:4")
    idle = [layer for layer, experts in thinning.unrouted.items() if len(experts) == 8]
    assert idle == ["model.language_model.layers.1.mlp.vision_moe"]
    assert {f for matrices in measure_sparsity(model).values() for f in matrices.values()} == {0.5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "wandb", "ratio": 0.5}, "method='wandb' is unknown; known: magnitude, wanda"),
        ({"unrouted": "drop", "ratio": 0.5}, "unrouted='drop' is unknown; known: magnitude, keep"),
        ({"earlier": "later", "ratio": 0.5}, "earlier='later' is unknown; known: pruned, dense"),
        ({"patern": "2:4"}, "there is no option 'patern'; known: method, pattern"),
        ({}, "give one of them"),
        ({"pattern": "4:4"}, "N must be at least 1 and below M"),
        ({"pattern": "3:7"}, r"whose length 7 divides, but the gate projections of .*0.mlp has 32"),
        (
            {"pattern": "16:32"},
            r"but the down .*0.mlp has 24 inputs; groups of 2, 3, 4, 6, 8, 12, 24",
        ),
        ({"ratio": 0.01}, r"ratio=0.01 of the 32 inputs .* is 0 weights; give .* 0.0312 to 0.969"),
        ({"ratio": 0.99}, r"ratio=0.99 of the 32 inputs of the gate .* is 32 weights"),
        ({"method": "wanda", "ratio": 0.5}, "method='wanda' needs calibration batches"),
    ],
)
def test_requests_that_cannot_be_met_say_what_would_work(fields, message):
    model = tiny_moe("mixtral")
    before = state_of(model)
    for ask in (weight_masks, sparsify):
        with pytest.raises(LitMoEError, match=message):
            ask(model, None, **fields)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_options_and_single_fields_go_together():
    model = tiny_moe("mixtral")
    options = SparsityOptions("magnitude", ratio=0.25)
    assert weight_masks(model, options=options).sparsity()[LAYER]["up"] == 0.25
    masks = weight_masks(model, options=options, pattern="3:4", ratio=None)
    assert masks.sparsity()[LAYER]["up"] == 0.75


@pytest.mark.parametrize("earlier", ["pruned", "dense"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_no_text_is_refused(method, earlier):
    with pytest.raises(CalibrationError, match="there is no calibration batch"):
        weight_masks(tiny_moe("mixtral"), [], method=method, ratio=0.5, earlier=earlier)


@pytest.mark.parametrize("earlier", ["pruned", "dense"])
def test_activations_that_are_no_numbers_name_their_layer(earlier):
    model = tiny_moe("mixtral")
    with torch.no_grad():
        model.get_parameter("model.layers.1.input_layernorm.weight")[0] = torch.inf
    with pytest.raises(CalibrationError, match=r"experts of layer 'model.layers.1.mlp' became NaN"):
        weight_masks(model, [example_inputs(model)], pattern="2:4", earlier=earlier)


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_a_run_that_breaks_leaves_no_hook_and_no_stranger_in_the_model(family):
    model = tiny_moe(family)
    parameters, mode = dict(model.named_parameters()), model.training
    batches = [example_inputs(model, seed=s) for s in range(3)]

    def complain(_):
        raise OSError("no more memory")

    with pytest.raises(OSError, match="no more memory"):
        sparsify(model, batches, pattern="2:4", on_layer=complain)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.training is mode
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "_apply_gate" not in vars(module)


def relay_of(num, run):
    """A relay whose runners call ``run(relay, index)``."""
    made: list[Relay] = []
    made.append(Relay([partial(_start, made, run, index) for index in range(num)]))
    return made[0]


def _start(made, run, index):
    run(made[0], index)


def test_a_relay_lets_nobody_pass_before_all_are_there():
    events: list[tuple[str, object]] = []

    def run(relay, index):
        for point in ("first", "second"):
            events.append((point, index))
            relay.meet(point, partial(events.append, (point, "work")))

    relay_of(3, run).run()
    rounds = [[(p, 0), (p, 1), (p, 2), (p, "work")] for p in ("first", "second")]
    assert events == rounds[0] + rounds[1]


@pytest.mark.parametrize("points", [(["a"], ["b"]), (["a", "b"], ["a"]), (["a"], ["a", "b"])])
def test_a_relay_refuses_runners_on_different_ways(points):
    def run(relay, index):
        for point in points[index]:
            relay.meet(point, list)

    with pytest.raises(CalibrationError, match="meet different layers at the same time"):
        relay_of(2, run).run()


@pytest.mark.parametrize("who", [0, 1])
def test_a_relay_ends_for_all_when_one_fails(who):
    passed: list[int] = []

    def run(relay, index):
        if index == who:
            raise KeyError("lost")
        relay.meet("point", list)
        passed.append(index)

    with pytest.raises(KeyError, match="lost"):
        relay_of(2, run).run()
    assert not passed
