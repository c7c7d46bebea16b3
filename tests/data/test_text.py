import json

import datasets
import pytest
import torch

from lit_moe.assets import model_folder
from lit_moe.data import TextDataModule
from lit_moe.data.blocks import Blocks
from lit_moe.errors import LitMoEError
from lit_moe.testing import tiny_moe

SENTENCE = "In the beginning was the word, and the word was packed into blocks.\n"


def module_with(files, **options):
    defaults = {"sequence_length": 16, "batch_size": 2, "calibration_tokens": 64}
    return TextDataModule(calibration_files=files, **{**defaults, **options})


@pytest.fixture
def text_sources(tmp_path):
    """The same three documents as .txt, .jsonl, .parquet and as a datasets folder."""
    documents = [SENTENCE * n for n in (3, 5, 7)]
    (tmp_path / "a.txt").write_text("".join(documents))
    lines = [json.dumps({"text": document}) for document in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = datasets.Dataset.from_dict({"text": documents})
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "folder")
    return {
        "txt": [str(tmp_path / "a.txt")],
        "jsonl": [str(tmp_path / "a.jsonl")],
        "parquet": [str(tmp_path / "a.parquet")],
        "folder": [str(tmp_path / "folder")],
    }


def test_four_kinds_of_source_give_the_same_blocks(text_sources):
    blocks = {
        kind: module_with(files, tokenizer=str(model_folder())).blocks("calibration").input_ids
        for kind, files in text_sources.items()
    }
    assert torch.equal(blocks["jsonl"], blocks["parquet"])
    assert torch.equal(blocks["jsonl"], blocks["folder"])
    # One .txt file is one document: no end-of-text between the three.
    assert torch.equal(blocks["txt"][0], blocks["jsonl"][0])


def test_blocks_spell_the_text_and_count_its_bytes(text_sources):
    data = module_with(text_sources["txt"], calibration_tokens=10_000)
    blocks = data.blocks("calibration")
    text = data.tokenizer.decode(blocks.input_ids[0])
    assert (SENTENCE * 2).startswith(text)
    predicted = data.tokenizer.decode(blocks.input_ids[0, 1:])
    assert int(blocks.num_bytes[0]) == len(predicted.encode())


def test_the_four_splits_of_the_embedded_text_share_no_block():
    data = TextDataModule(sequence_length=128, calibration_tokens=100_000)
    seen: set[tuple[int, ...]] = set()
    for split in ("calibration", "validation", "test"):
        rows = {tuple(row) for row in data.blocks(split).input_ids.tolist()}
        assert not rows & seen
        seen |= rows
        assert len(data.blocks(split).domains) == 6


def test_calibration_takes_turns_between_domains():
    blocks = TextDataModule(sequence_length=64, calibration_tokens=64 * 12).blocks("calibration")
    assert torch.bincount(blocks.domain).tolist() == [2] * 6


def test_ranks_share_the_calibration_blocks_without_overlap(text_sources):
    data = module_with(text_sources["jsonl"])
    shares = [
        torch.cat([b["input_ids"] for b in data.calibration_dataloader(rank=r, world_size=2)])
        for r in range(2)
    ]
    together = sorted(torch.cat(shares).tolist())
    assert together == sorted(data.blocks("calibration").input_ids.tolist())


def test_balanced_sampling_makes_a_small_domain_as_frequent_as_a_large_one():
    domain = torch.tensor([0] * 90 + [1] * 10)
    blocks = Blocks(torch.zeros(100, 4).long(), domain, torch.zeros(100), ("large", "small"))
    data = TextDataModule(sequence_length=4, calibration_tokens=4, balance_domains=True)
    drawn = domain[list(data._sampler(blocks))]
    assert 0.3 < float(drawn.double().mean()) < 0.7


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("", "is empty"), ("too short", r"\d+ tokens, less than one block")],
)
def test_missing_empty_and_short_calibration_text(tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(LitMoEError, match=message):
        module_with([str(file)]).blocks("calibration")


def test_a_wrong_column_names_the_right_ones(text_sources):
    with pytest.raises(LitMoEError, match=r"no column 'body'; it has \['text'\]"):
        module_with(text_sources["jsonl"], text_column="body").blocks("calibration")


def test_damaged_json_names_the_file(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    with pytest.raises(LitMoEError, match=r"bad\.jsonl could not be read"):
        module_with([str(tmp_path / "bad.jsonl")]).blocks("calibration")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "sequence_length=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"calibration_tokens": 3}, "calibration_tokens=3"),
    ],
)
def test_numbers_that_cannot_work_are_refused_at_construction(options, message):
    with pytest.raises(LitMoEError, match=message):
        module_with(None, **options)


def test_fewer_training_blocks_than_one_batch_is_refused(text_sources):
    data = TextDataModule(train_files=text_sources["txt"], sequence_length=128, batch_size=64)
    with pytest.raises(LitMoEError, match="less than one batch of 64"):
        data.train_dataloader()


def test_a_folder_without_a_tokenizer_is_said_to_have_none(tmp_path):
    tiny_moe("mixtral", vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(LitMoEError, match="has no tokenizer"):
        module_with(None, tokenizer=str(tmp_path)).blocks("calibration")


def test_text_that_is_no_utf8_names_the_file(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Stra\xdfe ".encode("latin-1") * 100)
    with pytest.raises(LitMoEError, match=r"latin\.txt could not be read.*utf-8"):
        module_with([str(tmp_path / "latin.txt")]).blocks("calibration")
