"""How long ranks wait for each other: as long as the strategy says, in every group."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lit_moe.sharding import MoEDeepSpeed

pytestmark = pytest.mark.distributed


def waits(trainer, module):
    """Seconds that the collectives of each group may take."""
    groups = dist.distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]


@pytest.mark.parametrize(
    ("given", "seconds"), [({}, 7200), ({"timeout": timedelta(hours=5)}, 18000)]
)
def test_groups_of_deepspeed_wait_as_long_as_the_strategy_says(setup, given, seconds):
    options = {"strategy": lambda: MoEDeepSpeed(stage=2, **given), "max_steps": 1}
    for found in setup.fit("zero2", look=waits, **options):
        assert len(found) > 1
        assert set(found) == {seconds}
