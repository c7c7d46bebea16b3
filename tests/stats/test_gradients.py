"""The gradient pass against plain autograd."""

import copy

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import CalibrationError, UnsupportedModelError
from lit_moe.stats import observe_gradients
from lit_moe.stats.matrices import MATRICES
from lit_moe.testing import example_inputs, run_distributed, tiny_moe

# Fused, transposed and interleaved, ungated, 2-D, own dispatch, modules, null experts, biases.
LAYOUTS = ["mixtral", "gpt_oss", "nemotron_h", "dbrx", "llama4", "jetmoe", "switch_transformers"]
LAYOUTS += ["longcat_flash", "deepseek_v3", "gemma4", "zaya"]


def plain_gradients(model, batches):
    """Layer -> canonical matrices of the gradient of the mean loss over all predicted tokens."""
    twin = copy.deepcopy(model)
    total, count = torch.zeros(()), 0
    for batch in batches:
        ids = batch.get("decoder_input_ids", batch["input_ids"])
        mask = batch["attention_mask"] if ids is batch["input_ids"] else torch.ones_like(ids)
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        logits = twin(**batch).logits[:, :-1]
        total = total + cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count += int((labels >= 0).sum())
    return gradients_of(twin, total / count), count


def gradients_of(twin, loss):
    """Layer -> canonical matrices of the gradient of a loss; the model is used up."""
    loss.backward()
    for parameter in twin.parameters():
        empty = torch.zeros_like(parameter)
        parameter.data = empty if parameter.grad is None else parameter.grad
    adapter = adapter_for(twin.config)
    return {s.name: adapter.expert_weights(twin, s) for s in find_sites(twin)}


def flat(weights, expert):
    parts = [weights[key][expert].reshape(-1) for key in MATRICES if key in weights]
    return torch.cat(parts).detach().double()


def labelled_loss(model, batch):
    """The mean loss as transformers itself takes it from labels, and how many there are."""
    is_decoder = "decoder_input_ids" not in batch
    num = int((batch["labels"][:, 1:] if is_decoder else batch["labels"]).ge(0).sum())
    return model(**batch, output_router_logits=False).loss, num


def with_labels(model, batch, counted):
    """A batch that wants so many tokens at the end of each row, padding not among them."""
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    labels = ids.clone() if ids is batch["input_ids"] else ids.roll(-1, dims=1)
    for row, num in zip(labels, counted, strict=True):
        row[: len(row) - num] = -100
    return {**batch, "labels": labels}


def assert_gram(stats, weights):
    rows = [flat(weights, e) for e in range(stats.num_experts)]
    gram = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
    torch.testing.assert_close(stats.gram, gram, rtol=1e-3, atol=1e-4 * float(gram.max()))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
def test_labels_say_which_tokens_the_loss_is_on(family):
    model = tiny_moe(family)
    batches = [
        with_labels(model, example_inputs(model, seed=1), (1, 3)),
        with_labels(model, example_inputs(model, batch=3, length=7, seed=2), (0, 5, 2)),
    ]
    seen = observe_gradients(model, batches)
    twin = copy.deepcopy(model).eval()
    losses = [labelled_loss(twin, batch) for batch in batches]
    assert seen.predicted == sum(num for _, num in losses) == 11
    gradients = gradients_of(twin, sum(loss * num for loss, num in losses) / 11)
    for name, stats in seen.layers.items():
        assert_gram(stats, gradients[name])
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    everything = observe_gradients(model, unlabelled)
    assert everything.predicted > seen.predicted
    assert everything.tokens == seen.tokens
    assert any(
        not torch.allclose(stats.gram, everything.layers[name].gram, rtol=0.1)
        for name, stats in seen.layers.items()
    )


def test_labels_of_padding_do_not_count():
    model = tiny_moe("mixtral")
    batch = with_labels(model, example_inputs(model), (4, 4))
    batch["attention_mask"][:, -2:] = 0
    seen = observe_gradients(model, [batch])
    assert seen.predicted == 4
    assert seen.tokens == int(batch["attention_mask"].sum())
    batch["labels"][:, -2:] = -100
    for name, stats in observe_gradients(model, [batch]).layers.items():
        assert torch.equal(stats.gram, seen.layers[name].gram)


def test_labels_of_every_token_are_no_labels():
    model = tiny_moe("mixtral")
    batch = example_inputs(model)
    plain = observe_gradients(model, [batch])
    labelled = observe_gradients(model, [{**batch, "labels": batch["input_ids"]}])
    assert labelled.predicted == plain.predicted
    for name, stats in plain.layers.items():
        assert torch.equal(labelled.layers[name].gram, stats.gram)
        assert torch.equal(labelled.layers[name].deviation, stats.deviation)


@pytest.mark.parametrize("family", LAYOUTS)
def test_numbers_are_those_of_plain_autograd(family):
    model = tiny_moe(family)
    batches = [example_inputs(model, seed=1), example_inputs(model, batch=3, length=7, seed=2)]
    if "decoder_input_ids" not in batches[0]:
        batches[0]["attention_mask"][0, -3:] = 0
    seen = observe_gradients(model, batches)
    gradients, count = plain_gradients(model, batches)
    assert seen.predicted == count
    assert list(seen.layers) == [site.name for site in find_sites(model)]
    for name, stats in seen.layers.items():
        weights = gradients[name]
        assert_gram(stats, weights)
        for e in range(stats.num_experts):
            columns = torch.cat(
                [
                    *(weights[k][e].T for k in ("gate", "up") if k in weights),
                    weights["down"][e],
                ],
                dim=1,
            ).detach()
            deviation = columns.double().std(dim=1, unbiased=False)
            largest = max(float(deviation.max()), 1e-12)
            torch.testing.assert_close(
                stats.deviation[e], deviation, rtol=1e-3, atol=1e-3 * largest
            )


def test_an_outlier_is_an_entry_far_from_its_row():
    model = tiny_moe("mixtral")
    batch = example_inputs(model)
    seen = observe_gradients(model, [batch])
    gradients, _ = plain_gradients(model, [batch])
    for name, stats in seen.layers.items():
        weights = gradients[name]
        for e in range(stats.num_experts):
            rows = torch.cat([weights["gate"][e], weights["up"][e], weights["down"][e].T]).double()
            distance = (rows - rows.mean(1, keepdim=True)).abs()
            limit = 3 * rows.std(1, unbiased=False, keepdim=True)
            sure = int((distance > 1.001 * limit).sum())
            possible = int((distance > 0.999 * limit).sum())
            assert sure <= int(stats.outlier_count[e]) <= possible


def test_gradients_do_not_depend_on_the_batch_size():
    model = tiny_moe("mixtral")
    whole = example_inputs(model, batch=6)
    rows = [{key: value[i : i + 2] for key, value in whole.items()} for i in range(0, 6, 2)]
    together, apart = observe_gradients(model, [whole]), observe_gradients(model, rows)
    for name, stats in together.layers.items():
        torch.testing.assert_close(apart.layers[name].gram, stats.gram, rtol=1e-4, atol=1e-9)
        similar = cosine_similarity(apart.layers[name].deviation, stats.deviation)
        torch.testing.assert_close(similar, torch.ones_like(similar), rtol=0, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model = tiny_moe("mixtral").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: (p.requires_grad, p.grad, p.clone()) for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    observe_gradients(model, [example_inputs(model)])
    assert model.training
    for name, parameter in model.named_parameters():
        flag, gradient, value = before[name]
        assert parameter.requires_grad is flag
        assert parameter.grad is gradient
        assert torch.equal(parameter, value)
        assert id(parameter) == identities[name]
        assert not parameter._post_accumulate_grad_hooks


def test_gradients_of_half_precision_add_up_in_single():
    model = tiny_moe("mixtral")
    torch.nn.Module.to(model, torch.bfloat16)
    batch = example_inputs(model)
    once = observe_gradients(model, [batch])
    often = observe_gradients(model, [batch] * 40)
    for name, stats in once.layers.items():
        torch.testing.assert_close(often.layers[name].gram, stats.gram, rtol=1e-3, atol=1e-9)


def test_at_no_time_do_parameters_hold_gradients_beside_the_sums():
    model = tiny_moe("mixtral")
    held = []

    def look(*_):
        held.append(sum(p.grad is not None for p in model.parameters()))

    model.register_forward_pre_hook(look)
    observe_gradients(model, [example_inputs(model)] * 3)
    assert held == [0, 0, 0]


def test_no_grad_is_lifted_and_inference_mode_is_refused():
    model = tiny_moe("mixtral")
    batch = example_inputs(model)
    with torch.no_grad():
        inside = observe_gradients(model, [batch])
    assert all(float(stats.gram.trace()) > 0 for stats in inside.layers.values())
    with (
        torch.inference_mode(),
        pytest.raises(CalibrationError, match=r"inference_mode\(\); leave"),
    ):
        observe_gradients(model, [batch])


def test_a_model_without_vocabulary_logits_is_refused():
    model = tiny_moe("openai_privacy_filter")
    with pytest.raises(
        UnsupportedModelError, match=r"no logits over its vocabulary \(33 classes\)"
    ):
        observe_gradients(model, [example_inputs(model)])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no token to predict"),
        ([{"input_ids": torch.tensor([[3]])}], "no token to predict"),
        (
            [{"pixel_values": torch.ones(1)}],
            r"only \['pixel_values'\]; give batches with input_ids",
        ),
        (
            [{"input_ids": torch.ones(2, 3).long(), "labels": torch.full((2, 3), -100)}],
            "no token to predict .* labels that are not all -100",
        ),
        (
            [{"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2).long()}],
            r"labels of shape \(2,\) do not fit input_ids of shape \(2, 3\)",
        ),
    ],
)
def test_batches_without_labels_are_refused(batches, message):
    with pytest.raises(CalibrationError, match=message):
        observe_gradients(tiny_moe("mixtral"), batches)


def test_gradients_that_are_no_numbers_name_the_layer():
    model = tiny_moe("mixtral")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"layer 'model.layers.0.mlp' became NaN"):
        observe_gradients(model, [example_inputs(model)])


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_two_ranks_with_uneven_shares_see_what_one_rank_does(family):
    model = tiny_moe(family)
    batch = example_inputs(model, batch=4)
    alone = observe_gradients(model, [batch])

    def share(rank):
        rows = slice(0, 1) if rank == 0 else slice(1, 4)
        return observe_gradients(model, [{key: value[rows] for key, value in batch.items()}])

    for seen in run_distributed(share):
        assert (seen.tokens, seen.predicted) == (alone.tokens, alone.predicted)
        for name, stats in alone.layers.items():
            torch.testing.assert_close(seen.layers[name].gram, stats.gram, rtol=1e-4, atol=1e-9)


@pytest.mark.distributed
@pytest.mark.parametrize("counted", [(1, 0, 6, 2), (0, 2, 0, 5)], ids=["uneven", "none"])
def test_two_ranks_weigh_by_labelled_tokens(counted):
    model = tiny_moe("mixtral")
    batch = with_labels(model, example_inputs(model, batch=4), counted)
    alone = observe_gradients(model, [batch])

    def share(rank):
        rows = slice(0, 1) if rank == 0 else slice(1, 4)
        return observe_gradients(model, [{key: value[rows] for key, value in batch.items()}])

    for seen in run_distributed(share):
        assert seen.predicted == alone.predicted == sum(counted)
        assert seen.tokens == alone.tokens
        assert seen.unrouted == alone.unrouted
        for name, stats in alone.layers.items():
            torch.testing.assert_close(seen.layers[name].gram, stats.gram, rtol=1e-4, atol=1e-9)
