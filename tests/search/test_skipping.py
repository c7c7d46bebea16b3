import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.errors import LitMoEError
from lit_moe.search.skipping import skipping, skipping_thresholds
from lit_moe.testing import example_inputs, tiny_moe


def weights_seen(model, inputs):
    """Layer -> weights that its experts were called with, by a hook behind all others."""
    seen: dict = {}
    handles = [
        model.get_submodule(site.experts).register_forward_hook(
            lambda _, args, kwargs, __, name=site.name: seen.__setitem__(
                name, args[2] if len(args) > 2 else kwargs["top_k_weights"]
            ),
            with_kwargs=True,
        )
        for site in find_sites(model)
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return seen, logits


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_half_of_the_tokens_skip_their_second_expert(family):
    options = {} if family == "mixtral" else {"norm_topk_prob": False}
    model = tiny_moe(family, **options)
    inputs = example_inputs(model, batch=4)
    plain, logits = weights_seen(model, inputs)
    thresholds = skipping_thresholds(model, [inputs])
    first = next(iter(plain))  # behind it, hidden states are others
    ratio = plain[first].min(-1).values / plain[first].max(-1).values
    assert thresholds[first] == pytest.approx(float(ratio.median()))
    with skipping(model, thresholds) as skipped:
        fewer, _ = weights_seen(model, inputs)
    goes = ratio < thresholds[first]
    assert torch.equal((fewer[first] == 0).any(-1), goes)
    assert torch.equal(fewer[first][~goes], plain[first][~goes])
    largest = plain[first][goes].max(-1).values
    left = fewer[first][goes].max(-1).values
    expected = torch.ones_like(largest) if family == "mixtral" else largest
    torch.testing.assert_close(left, expected)
    assert 1.4 < skipped.active_experts < 1.65
    assert torch.equal(weights_seen(model, inputs)[1], logits)


def test_padding_does_not_move_the_threshold():
    model = tiny_moe("mixtral")
    inputs = example_inputs(model, batch=4)
    padded = {
        "input_ids": torch.cat([inputs["input_ids"], torch.full((4, 6), 5)], dim=1),
        "attention_mask": torch.cat(
            [inputs["attention_mask"], torch.zeros(4, 6, dtype=torch.long)], dim=1
        ),
    }
    expected = skipping_thresholds(model, [inputs])
    assert skipping_thresholds(model, [padded]) == pytest.approx(expected, rel=1e-5)


def test_a_threshold_of_nothing_skips_nothing():
    model = tiny_moe("mixtral")
    inputs = example_inputs(model)
    _, logits = weights_seen(model, inputs)
    with skipping(model, {site.name: 0.0 for site in find_sites(model)}) as skipped:
        assert torch.equal(weights_seen(model, inputs)[1], logits)
    assert skipped.active_experts == 2.0


def test_it_is_refused_where_it_is_not_defined():
    with pytest.raises(LitMoEError, match="defined for 2 experts per token"):
        skipping_thresholds(tiny_moe("mixtral", num_experts_per_tok=1), [])
    with pytest.raises(LitMoEError, match="needs calibration text"):
        skipping_thresholds(tiny_moe("mixtral"), [])
