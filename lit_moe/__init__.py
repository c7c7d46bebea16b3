"""Train and compress sparse Mixture-of-Experts models with PyTorch Lightning.

Without a trainer, in five lines::

    stats = lit_moe.observe(model, batches)
    scores = lit_moe.score(stats, "reap")
    plan = lit_moe.select(scores, keep_ratio=0.5)
    lit_moe.shrink(model, plan)
    lit_moe.export(model, path)

and ``lit_moe.refit(model, teacher, batches)`` before the export, to repair without gradients.

Public names are imported on first use, so that ``import lit_moe`` and ``lit-moe --help`` are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lit_moe.registration import register_when_needed

if TYPE_CHECKING:
    from lit_moe.adapters import find_sites as find_sites
    from lit_moe.checkpoints import load as load
    from lit_moe.criteria import score as score
    from lit_moe.export import export as export
    from lit_moe.masking import masked as masked
    from lit_moe.models import sharing_copy as sharing_copy
    from lit_moe.module import MoEModule as MoEModule
    from lit_moe.plan import KeepPlan as KeepPlan
    from lit_moe.refit import refit as refit
    from lit_moe.selection import select as select
    from lit_moe.stats import observe as observe
    from lit_moe.surgery import shrink as shrink

__version__ = "0.1.0"

_HOMES = {
    "KeepPlan": "lit_moe.plan",
    "MoEModule": "lit_moe.module",
    "find_sites": "lit_moe.adapters",
    "load": "lit_moe.checkpoints",
    "masked": "lit_moe.masking",
    "observe": "lit_moe.stats",
    "score": "lit_moe.criteria",
    "select": "lit_moe.selection",
    "sharing_copy": "lit_moe.models",
    "shrink": "lit_moe.surgery",
}
_CALLABLE = ("export", "refit")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _CALLABLE:
        return import_module(f"lit_moe.{name}")  # a package that can be called
    raise AttributeError(f"module 'lit_moe' has no attribute {name!r}")


register_when_needed()


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_CALLABLE])
