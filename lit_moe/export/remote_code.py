"""The modelling file of an export that is no stock model, for people without lit-moe."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import (
    AmbiguousGlobalPerLayerAttributeError,
)

import lit_moe
from lit_moe.adapters.discovery import build_on_meta
from lit_moe.checkpoints import REMOTE_CODE_FILE, auto_class
from lit_moe.errors import ExportError
from lit_moe.heterogeneous import per_layer_counts
from lit_moe.mixed_routing import mixed_when_built

_FUTURE = "from __future__ import annotations\n"  # only at the beginning of a file


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the transformers class that ``model`` is, or that its remote-code class extends.

    Raises:
        ExportError: if there is none, so that the folder could not be loaded elsewhere.
    """
    for candidate in type(model).__mro__:
        if getattr(transformers, candidate.__name__, None) is candidate:
            return candidate
    raise ExportError(
        f"{type(model).__name__} is not a class of transformers; a model whose layers keep "
        f"different numbers of experts can be exported only for those"
    )


def check_loadable(model: PreTrainedModel) -> None:
    """Refuse a model that the loader would build with other counts than it has.

    Raises:
        ExportError: if the stock class does not build its layers one by one from a config.
    """
    stock = stock_class(model)
    built = built_anew(model).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in built or built[name].shape != tensor.shape:
            raise ExportError(
                f"{stock.__name__} cannot be loaded with layers that differ in their experts: "
                f"it builds {name} from the config of the whole model; keep the same number in all"
            )


def built_anew(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model without memory that is built from the config of ``model`` as a loader would.

    The class of one that came with our modelling file is the stock class.
    """
    cls = stock_class(model) if _is_ours(model) else type(model)
    with per_layer_counts(model.config, cls), mixed_when_built(model.config, cls):
        return build_on_meta(cls, model.config)


def forget_remote_code(model: PreTrainedModel, config: dict[str, Any], folder: Path) -> None:
    """Make the export of a model that was loaded by such a file one of the stock class again.

    Args:
        model: what is exported.
        config: content of its config.json, changed in place.
        folder: where transformers has put a copy of the file.
    """
    if not _is_ours(model):
        return
    config["architectures"] = [stock_class(model).__name__]
    config.pop("auto_map", None)
    (folder / REMOTE_CODE_FILE).unlink(missing_ok=True)


def loads_without_help(folder: Path) -> bool:
    """Whether transformers alone reads the config.json; some configs check their own count."""
    try:
        AutoConfig.from_pretrained(folder)
    except AmbiguousGlobalPerLayerAttributeError:
        return False
    return True


def write_remote_code(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Write the modelling file into ``folder``.

    Returns:
        The ``auto_map`` entry of config.json that points to it.
    """
    stock = stock_class(model)
    class_name = f"PerLayer{stock.__name__}"
    package = resources.files("lit_moe")
    loader = package.joinpath("heterogeneous.py").read_text(encoding="utf-8")
    mixing = package.joinpath("mixed_routing.py").read_text(encoding="utf-8")
    loader += f"\n\n{mixing.partition(_FUTURE)[2].lstrip()}"
    template = package.joinpath("export", "modeling.tmpl").read_text(encoding="utf-8")
    tail = Template(template).substitute(
        version=lit_moe.__version__,
        architecture=stock.__name__,
        class_name=class_name,
    )
    (folder / REMOTE_CODE_FILE).write_text(loader + tail, encoding="utf-8")
    module = Path(REMOTE_CODE_FILE).stem
    return {auto_class(model.config, stock).__name__: f"{module}.{class_name}"}


def _is_ours(model: PreTrainedModel) -> bool:
    return type(model).__module__.endswith(f".{Path(REMOTE_CODE_FILE).stem}")
