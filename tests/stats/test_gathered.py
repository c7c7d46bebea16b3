"""What a pass gathers on request, against plain loops over tokens."""

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.stats import GATHERABLE, observe
from lit_moe.stats.collected import Collected
from lit_moe.stats.slots import Slots
from lit_moe.stats.tap import TokenMask, tapped
from lit_moe.testing import FAMILIES, example_inputs, run_distributed, tiny_moe

FIELDS = [
    *("pair_count", "vocabulary_overlap", "output_sum", "output_square_sum"),
    *("direction_sum", "outlier_count"),
]


class Record:
    """Keeps every slot, as a tap must not."""

    def __init__(self):
        self.slots: dict[str, list[tuple[Slots, torch.Tensor | None]]] = {}

    def update(self, layer, slots, mask_T, token_ids):
        mine = slots if mask_T is None else slots.sorted_by_expert(mask_T[slots.token_ids])
        self.slots.setdefault(layer, []).append((mine, token_ids))

    def add_probabilities(self, layer, probability_TE, mask_T, token_ids):
        pass


@torch.no_grad()
def by_loops(model, batches):
    """Layer -> what LayerStats should hold, expert by expert, from the slots themselves."""
    record, mask, sites = Record(), TokenMask(), find_sites(model)
    with tapped(model, sites, record, mask):
        for batch in batches:
            mask.set(batch)
            model.base_model(**batch)
    return {s.name: expected(record.slots[s.name], s) for s in sites if s.name in record.slots}


def expected(calls, site):
    outputs: list[list[torch.Tensor]] = [[] for _ in range(site.num_experts)]
    tokens: list[set[tuple[int, int]]] = [set() for _ in range(site.num_experts)]
    words: list[set[int]] = [set() for _ in range(site.num_experts)]
    for call, (slots, ids) in enumerate(calls):
        for expert, token, row in zip(
            slots.expert_ids.tolist(), slots.token_ids.tolist(), slots.outputs, strict=True
        ):
            if expert < site.num_experts:
                outputs[expert].append(row.double())
                tokens[expert].add((call, token))
                words[expert].add(int(ids[token]))
    hidden = calls[0][0].outputs.shape[1]
    rows = [torch.stack(o) if o else torch.zeros(0, hidden).double() for o in outputs]
    centred = [r - r.mean(1, keepdim=True) for r in rows]
    deviation = [c.square().mean(1, keepdim=True).sqrt() for c in centred]
    return {
        "pair_count": table(tokens),
        "vocabulary_overlap": table(words),
        "output_sum": torch.stack([r.sum(0) for r in rows]),
        "output_square_sum": torch.stack([r.square().sum(0) for r in rows]),
        "direction_sum": torch.stack([(r / r.norm(dim=1, keepdim=True)).sum(0) for r in rows]),
        "outlier_count": torch.stack(
            [(c.abs() > 3 * d).sum().double() for c, d in zip(centred, deviation, strict=True)]
        ),
    }


def table(sets):
    return torch.tensor([[float(len(a & b)) for b in sets] for a in sets], dtype=torch.float64)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_pass_equals_loops_over_all_slots(family):
    model = tiny_moe(family)
    batches = [example_inputs(model, seed=1), example_inputs(model, seed=2, length=7)]
    if family == "diffusion_gemma":
        batches = batches[:1]  # its canvas has one length
    observed = observe(model, batches, gather=GATHERABLE)
    for name, fields in by_loops(model, batches).items():
        for field, value in fields.items():
            torch.testing.assert_close(
                getattr(observed.layers[name], field),
                value,
                rtol=1e-5,
                atol=1e-5,
                msg=f"{name}.{field}",
            )
        assert (observed.layers[name].vocabulary_size or 0) > 63


def test_padding_is_gathered_nowhere():
    model = tiny_moe("mixtral")
    inputs = example_inputs(model)
    padded = {key: value.clone() for key, value in inputs.items()}
    padded["attention_mask"][:, -4:] = 0
    short = {key: value[:, :-4] for key, value in inputs.items()}
    left, right = (observe(model, [b], gather=GATHERABLE) for b in (padded, short))
    for name, stats in right.layers.items():
        for field in FIELDS:
            torch.testing.assert_close(
                getattr(left.layers[name], field), getattr(stats, field), rtol=1e-5, atol=1e-5
            )


def test_only_what_is_asked_for_is_gathered():
    model = tiny_moe("mixtral")
    batch = example_inputs(model)
    nothing = observe(model, [batch]).layers
    pairs = observe(model, [batch], gather=["pairs"]).layers
    for name in nothing:
        assert all(getattr(nothing[name], field) is None for field in FIELDS)
        assert [f for f in FIELDS if getattr(pairs[name], f) is not None] == ["pair_count"]
        counts = pairs[name].pair_count
        assert counts is not None
        assert torch.equal(counts.diagonal(), nothing[name].count)


def test_gathering_leaves_logits_bit_identical():
    model = tiny_moe("olmoe")
    inputs = example_inputs(model)
    before = model(**inputs).logits
    observe(model, [inputs], gather=GATHERABLE)
    assert torch.equal(model(**inputs).logits, before)


def test_sums_do_not_depend_on_the_experts_implementation():
    model = tiny_moe("mixtral")
    inputs = example_inputs(model, batch=4)
    reference = observe(model, [inputs], gather=GATHERABLE)
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        other = observe(model, [inputs], gather=GATHERABLE)
        for name, stats in reference.layers.items():
            for field in FIELDS:
                torch.testing.assert_close(
                    getattr(other.layers[name], field), getattr(stats, field), rtol=1e-5, atol=1e-5
                )


def test_memory_of_the_vocabulary_does_not_grow_with_the_text():
    model = tiny_moe("mixtral")
    once = observe(model, [example_inputs(model)], gather=["vocabulary"])
    twice = observe(model, [example_inputs(model)] * 3, gather=["vocabulary"])
    for name, stats in once.layers.items():
        first, last = stats.vocabulary_overlap, twice.layers[name].vocabulary_overlap
        assert first is not None
        assert last is not None
        assert torch.equal(first, last)


def test_vocabulary_without_ids_is_refused():
    model = tiny_moe("mixtral")
    layers = find_sites(model)
    sums = Collected(model, layers, ["vocabulary"])
    with pytest.raises(CalibrationError, match=r"0 ids for 5 tokens; give batches with input_ids"):
        sums.add_probabilities(layers[0].name, torch.ones(5, 8), None, None)


def test_batches_without_anything_to_read_are_refused():
    model = tiny_moe("mixtral")
    embedded = torch.randn(2, 8, model.config.hidden_size)
    with pytest.raises(CalibrationError, match=r"MixtralForCausalLM reads input_ids, .* only \[\]"):
        observe(model, [{"inputs_embeds": embedded}])


def test_an_unknown_kind_is_refused():
    with pytest.raises(LitMoEError, match="cannot gather 'pair'; there are pairs, vocabulary, out"):
        observe(tiny_moe("mixtral"), [], gather=["pair"])  # type: ignore[list-item]


@pytest.mark.distributed
def test_two_ranks_with_half_the_rows_gather_what_one_rank_does():
    model = tiny_moe("mixtral")
    batch = example_inputs(model, batch=4)
    alone = observe(model, [batch], gather=GATHERABLE)

    def share(rank):
        half = {key: value[rank::2] for key, value in batch.items()}
        return observe(model, [half], gather=GATHERABLE).layers

    for layers in run_distributed(share):
        for name, stats in alone.layers.items():
            for field in FIELDS:
                torch.testing.assert_close(
                    getattr(layers[name], field), getattr(stats, field), rtol=1e-6, atol=1e-6
                )
