from itertools import combinations

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.grouping import available
from lit_moe.grouping.inputs import count_inputs, expert_inputs, outputs_of
from lit_moe.grouping.likeness import (
    OutputSums,
    kernel_alignment,
    linear_cka,
    observe_outputs,
)
from lit_moe.grouping.memory import Blocks
from lit_moe.grouping.similarity import LayerEvidence, get_similarity
from lit_moe.stats import observe
from lit_moe.testing import tiny_moe
from tests.grouping.models import copies, text_for


def random_outputs(num_experts=5, tokens=40, hidden=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_experts, tokens, hidden, generator=generator)


def cka_of(outputs_ETH):
    return linear_cka(kernel_alignment(outputs_ETH))


def evidence_of(model, layer=0):
    """Return what every similarity needs to know of one layer, and its text."""
    site, batches = find_sites(model)[layer], text_for(model)
    adapter = adapter_for(model.config)
    hidden = expert_inputs(model, [site], batches, max_tokens=10**6)[site.name]
    sums = observe_outputs(hidden, lambda x: outputs_of(model, site, x), num_experts=8)
    stats = observe(model, batches, gather=["pairs"]).layers[site.name]
    weights = {k: v.detach() for k, v in adapter.expert_weights(model, site).items()}
    return LayerEvidence(weights, adapter.router_weight(model, site).detach(), sums, stats)


def test_cka_is_symmetric_and_between_0_and_1():
    cka = cka_of(random_outputs())
    assert torch.equal(cka, cka.T)
    assert torch.equal(cka.diagonal(), torch.ones(5, dtype=torch.float64))
    off = cka[~torch.eye(5, dtype=torch.bool)]
    assert off.min() >= 0
    assert 0.01 < off.max() < 0.9


def test_cka_is_blind_to_rotation_scale_and_offset():
    outputs = random_outputs()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    changed = outputs.clone()
    changed[1] = 300 * outputs[1] @ rotation
    changed[2] = 1e-3 * outputs[2] + 7e-3
    torch.testing.assert_close(cka_of(changed), cka_of(outputs), rtol=0, atol=2e-5)
    changed[3] = outputs[0] @ rotation
    assert float(cka_of(changed)[0, 3]) > 1 - 1e-5


def test_alignments_are_unbiased_estimates_of_hsic():
    """By the definition, and because the mean over all samples of the tokens changes nothing."""
    outputs = random_outputs(3, 7, 4)
    one = 1 - torch.eye(7, dtype=torch.float64)
    kernels = [one * (x.double() @ x.double().T) for x in outputs]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for i, one_TT in enumerate(kernels):
        for j, other_TT in enumerate(kernels):
            crossed = (one_TT @ other_TT).sum()
            sums = one_TT.sum() * other_TT.sum() / (6 * 5)
            expected[i, j] = (one_TT * other_TT).sum() + sums - 2 / 5 * crossed
    found = kernel_alignment(outputs, rows=3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    samples = [kernel_alignment(outputs[:, list(ids)]) for ids in combinations(range(7), 5)]
    mean = torch.stack(samples).mean(0)
    torch.testing.assert_close(mean / (5 * 2), found / (7 * 4), rtol=1e-4, atol=1e-4)


def test_cka_of_short_windows_comes_close_to_that_of_the_features():
    """The biased estimate between as few tokens would not."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 1536, 12, generator=generator)
    outputs = common + 1.5 * torch.randn(4, 1536, 12, generator=generator)
    centred = (outputs - outputs.mean(dim=1, keepdim=True)).double()
    features = torch.einsum("ith,jtg->ijhg", centred, centred).square().sum(dim=(2, 3))
    exact = linear_cka(features)
    windows = outputs.split(64, dim=1)
    off = ~torch.eye(4, dtype=torch.bool)
    found = linear_cka(torch.stack([kernel_alignment(window) for window in windows]).sum(0))
    assert (found - exact)[off].abs().max() < 0.03
    biased = torch.zeros(4, 4, dtype=torch.float64)
    for window in windows:
        kernels = (window - window.mean(dim=1, keepdim=True)).double()
        flat = (kernels @ kernels.transpose(1, 2)).flatten(1)
        biased += flat @ flat.T
    assert (linear_cka(biased) - exact)[off].min() > 0.06


def test_an_expert_that_says_the_same_to_every_token_is_like_itself_only():
    outputs = random_outputs(3)
    outputs[1] = 2.5
    assert cka_of(outputs)[1].tolist() == [0, 1, 0]


def test_windows_add_up_and_are_the_same_however_many_are_held():
    outputs = random_outputs(4, 300, 8)
    hidden = torch.arange(300.0)[:, None].expand(300, 8)
    held = []

    def outputs_at(window):
        held.append(len(window))
        return outputs[:, window[:, 0].long()]

    whole = observe_outputs(hidden, outputs_at, num_experts=4)
    split = observe_outputs(hidden, outputs_at, num_experts=4, blocks=Blocks(tokens=128, rows=7))
    assert held == [300, 100, 100, 100]
    assert int(whole.tokens) == int(split.tokens) == 300
    torch.testing.assert_close(split.cosine, whole.cosine, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.output, whole.output)
    parts = sum(kernel_alignment(outputs[:, i : i + 100]) for i in range(0, 300, 100))
    torch.testing.assert_close(split.alignment, parts, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(whole.alignment, parts, rtol=1e-5, atol=1e-2)
    observe_outputs(hidden, outputs_at, num_experts=4, blocks=Blocks(tokens=20))
    assert held[4:] == [20] * 15


def test_three_tokens_are_too_few_for_cka():
    with pytest.raises(CalibrationError, match="at least 4 tokens, there are 3"):
        observe_outputs(torch.zeros(3, 8), lambda _: random_outputs(4, 3, 8), num_experts=4)


def test_mean_cosines_and_mean_outputs_by_hand():
    outputs = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[3.0, 4.0], [0.0, 2.0]]])
    sums = OutputSums.zeros(2, 2, outputs.device)
    sums.add_(outputs, kernels=False)
    assert sums.mean_cosine.tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert sums.mean_output.tolist() == [[2.0, 2.0], [1.5, 3.0]]


def test_outputs_are_those_of_every_expert_whatever_the_router_says():
    model = tiny_moe("mixtral")
    site = find_sites(model)[0]
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    weights = adapter_for(model.config).expert_weights(model, site)
    with torch.no_grad():
        found = outputs_of(model, site, hidden)
        for expert in range(8):
            gate, up = (hidden @ weights[name][expert].T for name in ("gate", "up"))
            expected = (torch.nn.functional.silu(gate) * up) @ weights["down"][expert].T
            torch.testing.assert_close(found[expert], expected, rtol=1e-4, atol=1e-5)


def test_inputs_are_the_first_rows_without_padding():
    model = tiny_moe("mixtral")
    site = find_sites(model)[0]
    batch = text_for(model, rows=4, batches=1)[0]
    batch["attention_mask"][1, 5:] = 0
    whole = expert_inputs(model, [site], [batch], max_tokens=10**6)[site.name]
    assert whole.shape == (12 + 5 + 12 + 12, 32)
    first = expert_inputs(model, [site], [batch, batch], max_tokens=13)[site.name]
    torch.testing.assert_close(first, whole[:17])


def test_a_share_of_each_row_is_drawn_always_the_same():
    model = tiny_moe("mixtral")
    site = find_sites(model)[1]
    batches = text_for(model, rows=4)
    whole = expert_inputs(model, [site], batches, max_tokens=10**6)[site.name]
    part = expert_inputs(model, [site], batches, max_tokens=10**6, share=0.4)[site.name]
    again = expert_inputs(model, [site], batches, max_tokens=10**6, share=0.4)[site.name]
    assert torch.equal(part, again)
    assert part.shape == (4 * 5, 32)
    assert count_inputs(batches, max_tokens=10**6, share=0.4) == 4 * 5
    places = [(whole == token).all(dim=1).nonzero().flatten()[0].item() for token in part]
    assert places == sorted(places)
    rows = [[p % 12 for p in places if p // 12 == row] for row in range(4)]
    assert [len(set(row)) for row in rows] == [5] * 4
    assert len({tuple(row) for row in rows}) > 1


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe"])
def test_every_similarity_is_symmetric_and_ranks_copies_first(name, family):
    evidence = evidence_of(copies(family))
    similarity = get_similarity(name).of(evidence)
    assert similarity.shape == (8, 8)
    assert similarity.dtype == torch.float64
    torch.testing.assert_close(similarity, similarity.T, rtol=0, atol=1e-9)
    apart = similarity.clone().fill_diagonal_(-float("inf"))
    if name == "coactivation":  # two of equal score are chosen in the order of their ids
        assert float(apart[1, 4]) > 0.3
        return
    for one, other in ((1, 4), (3, 6)):
        assert int(apart[one].argmax()) == other
        assert int(apart[other].argmax()) == one


def test_the_distance_of_weights_is_their_mean_squared_difference():
    evidence = evidence_of(tiny_moe("mixtral"))
    weights = [evidence.weights[k] for k in ("gate", "up", "down")]
    flat = torch.cat([w.reshape(8, -1) for w in weights], dim=1).double()
    expected = -(flat[:, None] - flat[None]).square().mean(dim=2)
    found = get_similarity("weights").of(evidence)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_the_surrogate_is_down_times_gate_by_up(family):
    evidence = evidence_of(tiny_moe(family))
    weights = {k: v.double() for k, v in evidence.weights.items()}
    inner = weights["up"] * weights["gate"] if "gate" in weights else weights["up"]
    matrices = weights["down"] @ inner
    expected = -(matrices[:, None] - matrices[None]).square().mean(dim=(2, 3))
    found = get_similarity("surrogate").of(evidence)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_coactivation_is_the_overlap_of_the_tokens():
    evidence = evidence_of(tiny_moe("mixtral"))
    stats = evidence.stats
    assert stats is not None
    assert stats.pair_count is not None
    both = stats.pair_count[2, 5]
    expected = both / (stats.count[2] + stats.count[5] - both)
    assert get_similarity("coactivation").of(evidence)[2, 5] == expected


def test_what_is_missing_is_named():
    evidence = evidence_of(tiny_moe("mixtral"))
    bare = LayerEvidence(evidence.weights, evidence.router)
    with pytest.raises(LitMoEError, match="'cka' needs the outputs of all experts"):
        get_similarity("cka").of(bare)
    with pytest.raises(LitMoEError, match="needs an observation that gathers pairs"):
        get_similarity("coactivation").of(bare)
    with pytest.raises(LitMoEError, match="similarity='cca' is unknown; there are cka, coact"):
        get_similarity("cca")
