"""The embedded default: a small trained MoE, its tokenizer, and text of six domains.

Sources and licences are in ``NOTICE`` in this folder.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

EMBEDDED = "embedded"
"""The name that stands for the embedded model wherever a model folder is expected."""

Split = Literal["calibration", "train", "validation", "test"]

_FOLDER = Path(str(files("lit_moe.assets")))


def model_folder() -> Path:
    """Folder of the embedded model: a plain Hugging Face checkpoint with its tokenizer."""
    return _FOLDER / "tiny_moe"


def text_file(split: Split) -> Path:
    """Parquet file with columns ``domain`` and ``text``; the splits share no document."""
    return _FOLDER / "text" / f"{split}.parquet"


def resolve_model(name_or_path: str) -> str:
    """Return the folder for ``embedded`` and every other name as it is."""
    return str(model_folder()) if name_or_path == EMBEDDED else name_or_path
