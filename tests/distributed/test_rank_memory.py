"""What ``inspect --ranks`` says is what two ranks really hold, tensor by tensor."""

import warnings
from collections.abc import Iterable
from typing import Any

import lightning as L
import pytest
from torch import Tensor

from lit_moe.adapters import find_sites
from lit_moe.callbacks import OneShotPruning
from lit_moe.data import TextDataModule
from lit_moe.inspection import RankRequest, inspect_model
from lit_moe.inspection.rank_needs import rank_needs
from lit_moe.models import build_model
from lit_moe.module import LossWeights, MoEModule
from lit_moe.sharding import MoEDeepSpeed
from lit_moe.testing import run_distributed

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}
CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (1, 2, 3)]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind the tensors, memory that several share once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


class Scales(L.Callback):
    """Weighs what the rank holds after the first of the two backwards of the second step."""

    def __init__(self) -> None:
        self.weighed: dict[str, int] = {}

    def on_after_backward(self, trainer, pl_module):
        """After a backward. The optimizer's state is there from the first step on."""
        if trainer.fit_loop.epoch_loop.batch_idx != 2:
            return
        own = list(pl_module.model.parameters())
        self.weighed = {
            "parameters": storage_bytes(map(values_of, own)),
            "teacher": storage_bytes(map(values_of, pl_module.teacher.parameters())),
            "gradients": storage_bytes(gradients(trainer.model.optimizer, own)),
            "optimizer state": storage_bytes(states(trainer.model.optimizer, own)),
        }


def values_of(parameter: Tensor) -> Tensor:
    """The shard that this rank keeps, or the whole parameter where there are no shards."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter)
    return shard.detach()


def gradients(optimizer, own) -> list[Tensor]:
    if hasattr(optimizer, "grad_partitions_flat_buffer"):  # stage 3
        return [optimizer.grad_partitions_flat_buffer]
    groups = (*optimizer.averaged_gradients.values(), *optimizer.all_grad_tensors.values())
    accumulated = [gradient for group in groups for gradient in group or ()]
    return [g for g in (*accumulated, *(p.grad for p in own)) if g is not None]


def states(optimizer, own) -> list[Tensor]:
    """Masters that are not the parameters themselves, and the moments."""
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    masters = masters or optimizer.single_partition_of_fp32_groups
    shards = {values_of(p).untyped_storage().data_ptr() for p in own}
    found = [m.detach() for m in masters if m.untyped_storage().data_ptr() not in shards]
    for state in optimizer.optimizer.state.values():
        found += [state["exp_avg"], state["exp_avg_sq"]]
    return found


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_two_ranks_hold_what_was_said(stage, precision, checkpoint, pages, tmp_path):
    def work(rank):
        warnings.simplefilter("ignore")  # those of deepspeed are not ours to mend
        strategy = MoEDeepSpeed(stage=stage)
        assert strategy.config is not None
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        scales = Scales()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            precision=PRECISIONS[precision],
            max_steps=2,
            accumulate_grad_batches=2,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=str(tmp_path),
            callbacks=[OneShotPruning("reap", keep_ratio=0.5), scales],
        )
        module = MoEModule(str(checkpoint), loss=LossWeights(0.5, 0.5))
        data = TextDataModule(
            calibration_files=[pages],
            train_files=[pages],
            test_files=[pages],
            sequence_length=32,
            batch_size=4,
            calibration_tokens=256,
        )
        trainer.fit(module, data)
        return scales.weighed

    model = build_model(str(checkpoint))
    request = RankRequest(2, stage=stage, precision=precision, teacher=True)
    layers = inspect_model(checkpoint).layers
    said = rank_needs(model, find_sites(model), layers, request, persistent=0).pruned.lasting
    for weighed in run_distributed(work, group=False):
        for part, held in said.items():
            # Groups of parameters are padded to a multiple of the ranks and of 4 bytes.
            assert weighed[part] == pytest.approx(held.device, rel=0.01), part
