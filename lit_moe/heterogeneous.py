"""Build transformers models whose layers differ in their number of experts.

transformers 5.23 reads, checks and writes the config key ``per_layer_config``, but builds every
layer from the global config and so fails. Inside :func:`per_layer_counts` each layer is built from
its own view of the config instead.

This file knows torch and transformers only: non-uniform exports carry a copy of it as their remote
code, so that people without lit-moe can load them.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity import HeterogeneousConfigMixin
from transformers.models.auto.modeling_auto import MODEL_MAPPING

_LAYER_INDEX_NAMES = ("layer_idx", "block_idx")
_NOISY_LOGGER = "transformers.integrations.heterogeneity.configuration_utils"
GLOBAL_VALUES_READABLE = "allow_global_per_layer_attribute_access"
"""Switch of a config: its count for all layers may be read although layers differ."""


def heterogeneous_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return ``config`` and its nested configs, only those whose layers count experts differently.

    Layers that differ in something else (gemma4's head size) transformers builds by itself.
    """
    nested = [getattr(config, name, None) for name in type(config).sub_configs]
    found = [c for c in nested if isinstance(c, PreTrainedConfig)]
    return [c for c in [config, *found] if any("expert" in k for k in c.per_layer_attributes or ())]


@contextmanager
def per_layer_counts(config: PreTrainedConfig, model_class: type[nn.Module]) -> Iterator[None]:
    """Within it, layers of ``model_class`` are built as ``config.per_layer_config`` says.

    Changes nothing when all layers of ``config`` have the same count. Patches the constructors of
    the layer classes for its duration only; not for several threads at once.

    Args:
        config: config of the model, possibly with a nested text config.
        model_class: stock class that is being built or loaded.
    """
    uneven = heterogeneous_configs(config)
    if not uneven:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(global_values_readable())
        for layer_class in _layer_classes(uneven, model_class):
            stack.enter_context(_patched(layer_class))
        yield


def _layer_classes(configs: list[PreTrainedConfig], model_class: type[nn.Module]) -> list[type]:
    """Classes built from a config and a layer index, in the modelling files concerned."""
    backbones = [MODEL_MAPPING.get(type(c), None) for c in configs]
    owners = [c for c in [*model_class.__mro__, *backbones] if isinstance(c, type)]
    names = {c.__module__ for c in owners if issubclass(c, nn.Module) and c is not nn.Module}
    found = [c for name in sorted(names) for c in vars(sys.modules[name]).values()]
    return list(dict.fromkeys(c for c in found if isinstance(c, type) and _takes_layer_index(c)))


def _takes_layer_index(candidate: type) -> bool:
    if not issubclass(candidate, nn.Module) or "__init__" not in vars(candidate):
        return False
    names = inspect.signature(vars(candidate)["__init__"]).parameters
    return "config" in names and any(name in names for name in _LAYER_INDEX_NAMES)


@contextmanager
def _patched(layer_class: type) -> Iterator[None]:
    original = vars(layer_class)["__init__"]
    layer_class.__init__ = _with_own_view(original)  # type: ignore[misc]
    try:
        yield
    finally:
        layer_class.__init__ = original  # type: ignore[misc]


def _with_own_view(init: Callable[..., None]) -> Callable[..., None]:
    """Return ``init`` that replaces an uneven config by the view of the layer being built."""
    signature = inspect.signature(init)
    index_name = next(n for n in _LAYER_INDEX_NAMES if n in signature.parameters)

    @functools.wraps(init)
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        shared, index = bound.arguments["config"], bound.arguments.get(index_name)
        if index is None or not getattr(shared, "is_heterogeneous", False):
            return init(self, *args, **kwargs)
        view = bound.arguments["config"] = shared.per_layer_config[index]
        init(*bound.args, **bound.kwargs)
        # Modules ask the shared config for the attention and experts implementation at run time.
        counts = shared.per_layer_attributes
        for module in self.modules():
            if getattr(module, "config", None) is view and not _asks_config_for(counts, module):
                module.config = shared
        return None

    return build


def _asks_config_for(names: set[str], module: nn.Module) -> bool:
    """Whether ``forward`` reads one of ``names`` from a config (zaya's router does)."""
    code = inspect.unwrap(type(module).forward).__code__
    return "config" in code.co_names and not names.isdisjoint(code.co_names)


@contextmanager
def global_values_readable() -> Iterator[None]:
    """Let code outside the layers read the global count, e.g. for an auxiliary loss.

    Set on the class: ``from_pretrained`` copies its config, and the copy must not keep the switch.
    """
    logger = logging.getLogger(_NOISY_LOGGER)
    level, switch = logger.level, vars(HeterogeneousConfigMixin)[GLOBAL_VALUES_READABLE]
    logger.setLevel(logging.ERROR)
    setattr(
        HeterogeneousConfigMixin, GLOBAL_VALUES_READABLE, property(lambda _: True, lambda *_: None)
    )
    try:
        yield
    finally:
        setattr(HeterogeneousConfigMixin, GLOBAL_VALUES_READABLE, switch)
        logger.setLevel(level)
