"""Makes transformers' Auto classes know lit-moe's own models, without importing anything before.

``import lit_moe`` stays light, and so does ``transformers.AutoConfig``: names are written into
transformers' tables when those are imported, and the classes behind them are imported when asked
for, under a module name of the kind that transformers gives its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_MODEL_TYPE, _CONFIG = "lit_vmoe", "VMoEConfig"
_OURS = f"transformers.models.{_MODEL_TYPE}"
_HOMES = {
    _CONFIG: "lit_moe.vmoe.configuration",
    "VMoEForImageClassification": "lit_moe.vmoe.modeling",
    "VMoEModel": "lit_moe.vmoe.modeling",
}
_TABLES = {
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING": "VMoEForImageClassification",
    "MODEL_MAPPING": "VMoEModel",
}


def register_when_needed() -> None:
    """Tell what of transformers is imported already, and the rest as soon as it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, tell in _TELL.items():
        if name in sys.modules:
            tell(sys.modules[name])


def _tell_configs(module: Any) -> None:
    module.CONFIG_MAPPING_NAMES[_MODEL_TYPE] = _CONFIG


def _tell_models(module: Any) -> None:
    for table, class_name in _TABLES.items():
        getattr(module, f"{table}_NAMES")[_MODEL_TYPE] = class_name
        getattr(module, table)._reverse_config_mapping[_CONFIG] = _MODEL_TYPE


_TELL: dict[str, Callable[[ModuleType], None]] = {_CONFIGS: _tell_configs, _MODELS: _tell_models}


class _Finder(MetaPathFinder):
    """Finds our module, and lets transformers' two be told when they have been executed."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        if fullname == _OURS:
            return ModuleSpec(fullname, _OnDemand())
        if fullname not in _TELL or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, _TELL[fullname])
        return spec


class _OnDemand(Loader):
    """Makes a module whose classes are imported when asked for."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        def get(name: str) -> Any:
            if name not in _HOMES:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(importlib.import_module(_HOMES[name]), name)

        vars(module)["__getattr__"] = get


class _Followed(Loader):
    def __init__(self, loader: Loader, follow: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._follow = follow

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._follow(module)
