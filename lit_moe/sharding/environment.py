"""The processes that the ``deepspeed`` launcher starts, as lightning needs to see them."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments.lightning import LightningEnvironment


class DeepSpeedLauncherEnvironment(LightningEnvironment):
    """Ranks as the ``deepspeed`` launcher numbers them.

    The launcher tells each process its global rank and its node by ``RANK`` and ``CROSS_RANK``.
    Lightning's own environment looks for ``NODE_RANK``, finds none, and takes each machine for the
    first: two machines then wait for each other for ever.
    """

    @staticmethod
    def detect() -> bool:
        """Whether this process was started by the ``deepspeed`` launcher."""
        theirs = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE")
        return all(name in os.environ for name in theirs) and "NODE_RANK" not in os.environ

    @property
    def creates_processes_externally(self) -> bool:
        """The launcher has started all processes."""
        return True

    @property
    def main_address(self) -> str:
        """Address of the first machine."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Port on it."""
        return int(os.environ.get("MASTER_PORT", "29500"))

    def world_size(self) -> int:
        """Number of processes on all machines."""
        return int(os.environ["WORLD_SIZE"])

    def set_world_size(self, size: int) -> None:
        """The launcher has decided; lightning's own count must agree with it."""

    def global_rank(self) -> int:
        """Number of this process among all."""
        return int(os.environ["RANK"])

    def set_global_rank(self, rank: int) -> None:
        """The launcher has decided."""

    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return int(os.environ["LOCAL_RANK"])

    def node_rank(self) -> int:
        """Number of this machine."""
        return int(os.environ["CROSS_RANK"])

    def teardown(self) -> None:
        """Leave the launcher's variables: ranks are still counted afterwards."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Refuse a trainer that counts other processes than the launcher started.

        Raises:
            ValueError: naming both counts.
        """
        asked, started = num_devices * num_nodes, self.world_size()
        if asked != started:
            raise ValueError(
                f"the deepspeed launcher started {started} processes on "
                f"{os.environ['CROSS_SIZE']} nodes, but trainer.devices={num_devices} and "
                f"trainer.num_nodes={num_nodes} ask for {asked}: make the two agree"
            )
