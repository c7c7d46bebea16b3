"""Rows of mixed text for learned coefficients."""

from typing import Any

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.criteria.replay import capture_calls
from lit_moe.errors import LitMoEError
from lit_moe.grouping import LearnOptions, MergeOptions, decide
from lit_moe.grouping.merged_layer import MergedLayer
from lit_moe.grouping.mixed_text import Pair, mixed, pairs_of
from lit_moe.merge_plan import MergePlan
from lit_moe.testing import run_distributed, tiny_moe
from tests.grouping.models import counts_of, text_for

OPTIONS: dict[str, Any] = {"per_row": 2, "mixing": 0.5, "judged": 4}


def rows_of(model, num):
    batch = text_for(model, rows=num, batches=1)[0]
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(num)]


def embedded(model, row):
    return model.get_input_embeddings()(row["input_ids"])


@torch.no_grad()
def test_the_model_sees_the_mixture_of_two_embeddings_and_then_itself_again():
    model = tiny_moe("mixtral")
    one, other = rows_of(model, 2)
    site = find_sites(model)[0]
    for share in (0.0, 0.25, 1.0):
        found = capture_calls(model, [site], mixed(model, [Pair(one, other, share)]))
        (call,) = found[site.name]
        mean = share * embedded(model, one) + (1 - share) * embedded(model, other)
        seen: dict[str, torch.Tensor] = {}
        hook = model.get_submodule(site.name).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.update(hidden=args[0])
        )
        model.base_model(inputs_embeds=mean)
        hook.remove()
        torch.testing.assert_close(call.args[0], seen["hidden"], rtol=1e-5, atol=1e-6)
    assert not model.get_input_embeddings()._forward_hooks


def test_padding_of_either_row_is_padding():
    model = tiny_moe("mixtral")
    one, other = rows_of(model, 2)
    one["attention_mask"][:, 9:] = 0
    other["attention_mask"][:, 7:] = 0
    assert Pair(one, other, 0.5).row["attention_mask"].tolist() == [[1] * 7 + [0] * 5]
    assert int(one["attention_mask"].sum()) == 9


def test_pairs_are_of_fitted_rows_and_the_same_each_time():
    rows = rows_of(tiny_moe("mixtral"), 8)
    pairs, again = (pairs_of(rows, **OPTIONS) for _ in range(2))
    assert len(pairs) == 2 * 6
    judged = [id(rows[i]) for i in (3, 7)]
    for pair in pairs:
        assert pair.first is not pair.second
        assert id(pair.first) not in judged
        assert id(pair.second) not in judged
        assert 0 <= pair.share <= 1
    assert [p.share for p in pairs] == [p.share for p in again]
    assert len({id(p.second) for p in pairs}) > 3


def test_rows_of_different_lengths_are_not_mixed():
    rows = rows_of(tiny_moe("mixtral"), 3)
    short = [{k: v[:, : 12 - i] for k, v in row.items()} for i, row in enumerate(rows)]
    with pytest.raises(LitMoEError, match="none of the 3 fitted calibration rows have one length"):
        pairs_of(short, **OPTIONS)
    one_more = [*short, rows[2], rows[0]]  # the fourth is judged
    pairs = pairs_of(one_more, **OPTIONS)
    assert [(id(p.first), id(p.second)) for p in pairs] == 2 * [
        (id(short[0]), id(rows[0])),
        (id(rows[0]), id(short[0])),
    ]


def test_mixed_rows_are_fitted_and_never_judged(monkeypatch):
    model = tiny_moe("mixtral")
    held = []
    original = MergedLayer.__init__

    def look(self, *args):
        original(self, *args)
        held.append({kind: len(rows) for kind, rows in self._rows.items()})

    monkeypatch.setattr(MergedLayer, "__init__", look)
    options = MergeOptions(
        "weights", coefficients="learned", learn=LearnOptions(epochs=2, mixed_rows=2)
    )
    plan = decide(model, counts_of(model, 4), text_for(model, rows=8), options).plan
    assert held == [{"fitted": 6, "mixed": 12, "judged": 2}] * 2
    for map_NE in plan.experts.values():
        torch.testing.assert_close(map_NE.sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "fields", [{"mixed_rows": -1}, {"mixed_rows": 0.5}, {"mixing": 0.0}, {"mixing": float("nan")}]
)
def test_mixtures_that_mean_nothing_are_refused(fields):
    with pytest.raises(LitMoEError, match="must be a whole number from 0 and mixing"):
        LearnOptions(**fields)


@pytest.mark.distributed
def test_two_ranks_mix_as_one():
    model = tiny_moe("mixtral")
    batches = text_for(model, rows=8, batches=2)
    learn = LearnOptions(epochs=5, mixed_rows=1)
    options = MergeOptions("weights", coefficients="learned", learn=learn)
    one = decide(model, counts_of(model, 4), batches, options).plan

    def work(rank):
        rows = {k: torch.cat([b[k] for b in batches])[rank::2] for k in batches[0]}
        return decide(tiny_moe("mixtral"), counts_of(model, 4), [rows], options).plan.to_dict()

    first, second = run_distributed(work)
    assert first == second
    for layer, map_NE in MergePlan.from_dict(first).experts.items():
        torch.testing.assert_close(map_NE, one.experts[layer], rtol=1e-4, atol=1e-5)
