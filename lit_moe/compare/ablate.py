"""``lit-moe ablate``: what each single expert of a model is worth, as a table, figure and JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_moe.adapters import find_sites
from lit_moe.assets import EMBEDDED, resolve_model
from lit_moe.checkpoints import read_config
from lit_moe.compare.ablation import AblationMap, ablation_map, check_ablation
from lit_moe.compare.cells import load_model, model_digest, settings_of
from lit_moe.compare.options import CompareOptions, TextOptions, default_tokenizer
from lit_moe.compare.present import write_ablation
from lit_moe.compare.store import CellStore
from lit_moe.compare.text import ComparedText
from lit_moe.models import DType
from lit_moe.selection import parse_bytes

STORE_NAME = "cells.jsonl"


@dataclass
class AblateOptions:
    """The loss without each single expert.

    Attributes:
        model: folder, hub id or ``embedded``.
        text: ``evaluation_files`` and ``evaluation_tokens`` are what the loss is measured on.
        budget: bytes of hidden states that may be kept; fewer cost time, not exactness.
        dtype: of the weights.
        output: folder for the results.
        when_changed: if the folder has results of other settings, ``refuse``, or keep them
            ``beside`` under another name.
        figures: draw a PNG figure.
    """

    model: str = EMBEDDED
    text: TextOptions = field(default_factory=TextOptions)
    budget: str = "1GiB"
    dtype: DType = "float32"
    output: str = "runs/ablate"
    when_changed: Literal["refuse", "beside"] = "refuse"
    figures: bool = True

    def __post_init__(self) -> None:
        parse_bytes(self.budget)
        read_config(resolve_model(self.model))


def ablate(options: AblateOptions, *, progress: bool = False) -> AblationMap:
    """Measure what is missing of the map, and write it into the output folder.

    The same call goes on where a killed one ended.

    Args:
        options: model and text.
        progress: show a bar.

    Raises:
        LitMoEError: for a request that cannot be met, before any single expert is left out.
    """
    request = CompareOptions(models=[options.model], text=options.text, dtype=options.dtype)
    text = ComparedText(options.text, default_tokenizer(request))
    settings = {**settings_of(request, text), "model": model_digest(options.model)}
    folder = Path(options.output)
    store = CellStore(folder / STORE_NAME, settings, when_other=options.when_changed)
    model = load_model(options.model, options.dtype, text)
    check_ablation(find_sites(model))
    found = ablation_map(
        model,
        text.evaluation()[0],
        budget=options.budget,
        known={(k["layer"], k["expert"]): v["loss"] for k, v in store.all("ablation")},
        on_loss=lambda layer, e, loss: store.put("ablation", {"loss": loss}, layer=layer, expert=e),
        progress=progress,
    )
    write_ablation(found, options.model, folder, figures=options.figures)
    return found
