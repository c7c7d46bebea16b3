"""Teacher's logits on disk: the same loss as live, written once, refused when they are others'."""

import json
import math
from typing import Any

import pytest
import torch

from lit_moe.distill.logits_cache import CacheKey, LogitsCache, blocks_of
from lit_moe.distill.losses import logits_distillation_loss
from lit_moe.distill.recovery import RecoveryLoss
from lit_moe.distill.step import Step
from lit_moe.distill.top_logits import TopLogits, top_logits, top_logits_loss
from lit_moe.distill.weights import LossWeights
from lit_moe.errors import LitMoEError
from lit_moe.models import frozen_copy
from lit_moe.testing import example_inputs, tiny_moe
from tests.distill.test_experts import changed

KEY = CacheKey("teacher", "words", 64, 5)
TOP_5: dict[str, Any] = {"next_token": 0.0, "distillation": 1.0, "temperature": 2.0, "top_k": 5}


def batch_of(seed, rows=3, length=6):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answers_to(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return top_logits(torch.randn(*batch["input_ids"].shape, 64, generator=generator), 5)


def filled(folder, *batches, key=KEY):
    cache = LogitsCache(folder, key)
    for batch in batches:
        cache.add(batch, answers_to(batch))
    cache.flush()
    return cache


def test_the_loss_of_two_likeliest_tokens_by_hand():
    teacher = TopLogits(torch.tensor([[[0.0, -math.log(3)]]]).half(), torch.tensor([[[2, 0]]]))
    student = torch.tensor([[[1.0, 0.0, 0.5]]])
    q = torch.softmax(student, -1)[0, 0]
    by_hand = 0.75 * (math.log(0.75) - q[2].log()) + 0.25 * (math.log(0.25) - q[0].log())
    found = top_logits_loss(student, teacher, torch.ones(1, 1), temperature=1.0)
    torch.testing.assert_close(found, by_hand, atol=1e-3, rtol=0)


def test_all_logits_give_the_loss_of_the_whole_distribution():
    torch.manual_seed(0)
    student, teacher, mask = torch.randn(2, 4, 9), 4 * torch.randn(2, 4, 9), torch.ones(2, 4)
    whole = logits_distillation_loss(student, teacher, mask, temperature=1.5)
    top = top_logits_loss(student, top_logits(teacher, 9), mask, temperature=1.5)
    torch.testing.assert_close(top, whole, rtol=2e-3, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_cached_and_live_top_logits_give_the_same_loss_and_gradient(tmp_path, padded):
    model = tiny_moe("mixtral")
    teacher, batch = frozen_copy(model), example_inputs(model)
    if padded:
        batch["attention_mask"][1, -5:] = 0
    live, student = RecoveryLoss(LossWeights(**TOP_5)), changed(model)
    first = live(Step(student, teacher, batch))
    first.total.backward()
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]

    cache = LogitsCache(tmp_path / "cache", KEY)
    cache.add(batch, top_logits(teacher(**batch).logits, 5))
    cache.flush()
    cached = RecoveryLoss(LossWeights(**TOP_5, cache="cache"))
    assert not cached.needs_teacher
    cached.read_logits_from(LogitsCache(tmp_path / "cache", KEY))
    student.zero_grad()
    second = cached(Step(student, None, batch))
    assert torch.equal(first.total, second.total)
    assert float(first.total.detach()) > 0
    second.total.backward()
    again = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(torch.equal(g, h) for g, h in zip(gradients, again, strict=True))


def test_blocks_are_found_in_any_order(tmp_path):
    one, two = batch_of(1), batch_of(2)
    filled(tmp_path / "cache", one, two)
    cache = LogitsCache(tmp_path / "cache", KEY)
    assert len(cache) == 6
    mixed = {k: torch.cat([two[k][2:], one[k][:1], two[k][:1]]) for k in one}
    found, first, second = cache.read(mixed), answers_to(one), answers_to(two)
    for name in ("values", "ids"):
        a, b = getattr(first, name), getattr(second, name)
        assert torch.equal(getattr(found, name), torch.cat([b[2:], a[:1], b[:1]]))


def test_padding_is_part_of_a_block():
    batch = batch_of(1, rows=1)
    padded = {**batch, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}
    assert blocks_of(batch) != blocks_of(padded)


def test_blocks_of_several_lengths_have_files_of_their_own(tmp_path):
    short, long = batch_of(1, length=4), batch_of(2, length=9)
    cache = filled(tmp_path / "cache", short, long)
    assert len(list(cache.folder.glob("*.safetensors"))) == 2
    assert cache.read(long).values.shape == (3, 9, 5)


def test_what_is_there_is_not_asked_for_again_and_not_written_twice(tmp_path):
    one, two = batch_of(1), batch_of(2)
    filled(tmp_path / "cache", one)
    cache = LogitsCache(tmp_path / "cache", KEY)
    assert not cache.lacks(one)
    assert cache.lacks(two)
    files = {path: path.stat().st_mtime_ns for path in cache.folder.glob("*.safetensors")}
    cache.add(one, answers_to(one))
    cache.flush()
    assert {p: p.stat().st_mtime_ns for p in cache.folder.glob("*.safetensors")} == files


def test_half_written_files_do_not_count(tmp_path):
    cache = filled(tmp_path / "cache", batch_of(1))
    (file,) = cache.folder.glob("*.safetensors")
    file.rename(file.with_suffix(".partial-1"))
    assert len(LogitsCache(tmp_path / "cache", KEY)) == 0


def test_files_that_others_add_are_seen(tmp_path):
    mine = LogitsCache(tmp_path / "cache", KEY)
    filled(tmp_path / "cache", batch_of(1))
    assert mine.lacks(batch_of(1))
    mine.refresh()
    assert not mine.lacks(batch_of(1))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (CacheKey("other", "words", 64, 5), "teacher 'teacher' and not 'other'"),
        (CacheKey("teacher", "mots", 64, 5), "tokenizer 'words' and not 'mots'"),
        (CacheKey("teacher", "words", 65, 6), "vocabulary 64 and not 65, top_k 5 and not 6"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, key, words):
    filled(tmp_path / "cache", batch_of(1))
    with pytest.raises(LitMoEError, match=words):
        LogitsCache(tmp_path / "cache", key)


def test_a_cut_file_is_refused(tmp_path):
    cache = filled(tmp_path / "cache", batch_of(1))
    (file,) = cache.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LitMoEError, match=rf"{file.name} is damaged .*delete it"):
        LogitsCache(tmp_path / "cache", KEY)


def test_a_damaged_key_and_a_folder_of_something_else_are_refused(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("dear")
    with pytest.raises(LitMoEError, match=r"no key\.json, so it is no cache"):
        LogitsCache(tmp_path / "letters", KEY)
    filled(tmp_path / "cache", batch_of(1))
    (tmp_path / "cache" / "key.json").write_text("{")
    with pytest.raises(LitMoEError, match=r"key\.json is damaged"):
        LogitsCache(tmp_path / "cache", KEY)
    (tmp_path / "cache" / "key.json").write_text(json.dumps([1]))
    with pytest.raises(LitMoEError, match="not of this run's teacher"):
        LogitsCache(tmp_path / "cache", KEY)


def test_other_text_is_refused_where_it_is_read(tmp_path):
    cache = filled(tmp_path / "cache", batch_of(1))
    with pytest.raises(LitMoEError, match=r"holds 3 blocks of text, but not one that is trained"):
        cache.read(batch_of(2))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cache": "x", "distillation": 1.0}, r"set loss\.top_k"),
        ({"cache": "x", "top_k": 4}, r"loss\.distillation is 0"),
        ({"top_k": 0}, "at least 1"),
    ],
)
def test_impossible_requests_are_refused(fields, words):
    with pytest.raises(LitMoEError, match=words):
        LossWeights(**fields)


def test_more_tokens_than_there_are_are_refused():
    with pytest.raises(LitMoEError, match="has only 64 tokens"):
        RecoveryLoss(LossWeights(distillation=1.0, top_k=65)).check(tiny_moe("mixtral"))
