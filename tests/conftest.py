"""Small real ingredients: a tiny checkpoint with a tokenizer, a few pages of text, a trainer."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# lightning still calls what jsonargparse has renamed
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from lit_moe.assets import model_folder, text_file
from lit_moe.data import TextDataModule
from lit_moe.testing import tiny_moe


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny random Mixtral (8 experts, top-2) with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_moe("mixtral", vocab_size=1024).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """Parquet file with one page of each domain."""
    folder = tmp_path_factory.mktemp("pages")
    rows = pq.read_table(text_file("validation")).to_pylist()
    first = {row["domain"]: row["text"][:600] for row in reversed(rows)}
    table = pa.table({"domain": list(first), "text": list(first.values())})
    pq.write_table(table, folder / "pages.parquet")
    return str(folder / "pages.parquet")


@pytest.fixture
def make_data(pages):
    """Return a function that makes a data module of a few blocks; keywords override."""

    def make(**options):
        defaults = {
            "calibration_files": [pages],
            "train_files": [pages],
            "validation_files": [pages],
            "test_files": [pages],
            "sequence_length": 32,
            "batch_size": 8,
            "calibration_tokens": 256,
        }
        return TextDataModule(**{**defaults, **options})

    return make


@pytest.fixture
def make_trainer(tmp_path):
    """Return a function that makes a quiet CPU trainer writing below ``tmp_path``."""

    def make(*callbacks, **options):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 0,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "default_root_dir": str(tmp_path / "run"),
        }
        return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make
