"""This rank's share of the calibration data, whichever callback asks."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_moe.errors import LitMoEError


def calibration_share(trainer: Trainer) -> DataLoader[dict[str, Tensor]]:
    """Return batches of every ``world_size``-th calibration row.

    Raises:
        LitMoEError: if the run's datamodule has none.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "calibration_dataloader"):
        raise LitMoEError(
            f"calibration text is needed, but {type(data).__name__} has no method "
            "calibration_dataloader(rank, world_size); use lit_moe.data.TextDataModule or add it"
        )
    return data.calibration_dataloader(rank=trainer.global_rank, world_size=trainer.world_size)
