"""DeepSpeed for MoE models: the strategy, its launcher, and its checkpoints."""

from lit_moe.sharding.environment import (
    DeepSpeedLauncherEnvironment as DeepSpeedLauncherEnvironment,
)
from lit_moe.sharding.requeue import Requeue as Requeue
from lit_moe.sharding.requeue import add_requeue as add_requeue
from lit_moe.sharding.strategy import MoEDeepSpeed as MoEDeepSpeed
from lit_moe.sharding.strategy import register_short_names as register_short_names
