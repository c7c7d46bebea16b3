"""DeepSpeed for MoE models, and the only room that imports it.

The strategy, its launcher and its checkpoints know Lightning too and are imported on first use;
``lit_moe.sharding.partitions`` does not, and serves the rooms of arithmetic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_moe.sharding.environment import (
        DeepSpeedLauncherEnvironment as DeepSpeedLauncherEnvironment,
    )
    from lit_moe.sharding.requeue import Requeue as Requeue
    from lit_moe.sharding.requeue import add_requeue as add_requeue
    from lit_moe.sharding.strategy import MoEDeepSpeed as MoEDeepSpeed
    from lit_moe.sharding.strategy import register_short_names as register_short_names

_HOMES = {
    "DeepSpeedLauncherEnvironment": "environment",
    "MoEDeepSpeed": "strategy",
    "Requeue": "requeue",
    "add_requeue": "requeue",
    "register_short_names": "strategy",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lit_moe.sharding.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lit_moe.sharding' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
