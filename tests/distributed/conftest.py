"""A tiny checkpoint, and enough text for several epochs of a few steps."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers.models.mixtral.modeling_mixtral  # noqa: F401 - before processes are forked
from transformers import AutoTokenizer

from lit_moe.assets import model_folder, text_file
from lit_moe.testing import tiny_moe
from tests.distributed.runs import Setup
from tests.distributed.two_hosts import joined_namespaces


@pytest.fixture(scope="session")
def chapters(tmp_path_factory):
    """Parquet file with some pages of each domain."""
    folder = tmp_path_factory.mktemp("chapters")
    rows = pq.read_table(text_file("validation")).to_pylist()
    first = {row["domain"]: row["text"][:1500] for row in reversed(rows)}
    pq.write_table(
        pa.table({"domain": list(first), "text": list(first.values())}), folder / "text.parquet"
    )
    return str(folder / "text.parquet")


@pytest.fixture
def setup(checkpoint, chapters, tmp_path):
    return Setup(checkpoint, chapters, tmp_path)


@pytest.fixture(scope="session")
def restless(tmp_path_factory):
    """Folder of a tiny Mixtral with dropout, which draws random numbers in each step."""
    folder = tmp_path_factory.mktemp("restless")
    tiny_moe("mixtral", vocab_size=1024, attention_dropout=0.2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hosts():
    """Names of two namespaces with a cable between them."""
    with joined_namespaces() as names:
        yield names
