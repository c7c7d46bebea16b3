"""The embedded default: a small trained MoE, its tokenizer, text of six domains, capitals.

Sources and licences are in ``NOTICE`` in this folder.
"""

from __future__ import annotations

import pkgutil
from importlib.resources import files
from pathlib import Path
from typing import Literal

EMBEDDED = "embedded"
"""The name that stands for the embedded model wherever a model folder is expected."""

# Named as text: what makes these folders imports torch and lies in a room above this one.
_MADE_ON_FIRST_USE = {
    "smollm2": "lit_moe.models.smollm2:smollm2_folder",
    "smollm2_split": "lit_moe.models.smollm2:smollm2_split_folder",
}

Split = Literal["calibration", "train", "validation", "test"]

_FOLDER = Path(str(files("lit_moe.assets")))


def model_folder() -> Path:
    """Folder of the embedded model: a plain Hugging Face checkpoint with its tokenizer."""
    return _FOLDER / "tiny_moe"


def text_file(split: Split) -> Path:
    """Parquet file with columns ``domain`` and ``text``; the splits share no document."""
    return _FOLDER / "text" / f"{split}.parquet"


def capitals_file() -> Path:
    """JSONL file with ``country`` and ``capital``, one capital for each country."""
    return _FOLDER / "capitals.jsonl"


def resolve_model(name_or_path: str) -> str:
    """Return the folder for a name of ours and every other name as it is.

    ``embedded`` comes with the package; ``smollm2`` and ``smollm2_split`` are made in a cache
    folder on first use, in about a minute.

    Raises:
        LitMoEError: if such a folder is not there yet and a package that it is made from is
            missing.
    """
    if name_or_path == EMBEDDED:
        return str(model_folder())
    if name_or_path in _MADE_ON_FIRST_USE:
        return str(pkgutil.resolve_name(_MADE_ON_FIRST_USE[name_or_path])())
    return name_or_path
