"""DeepSpeed ZeRO as a lightning strategy: stock on CUDA, and on CPU over gloo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed import default_pg_timeout
from torch.utils.hooks import RemovableHandle

from lit_moe.errors import LitMoEError
from lit_moe.resuming import CheckpointHeader, precision_in, read_header
from lit_moe.sharding.checkpoints import check_sharded, written_together
from lit_moe.sharding.environment import DeepSpeedLauncherEnvironment
from lit_moe.sharding.frozen import load_untrained, without_teacher
from lit_moe.sharding.leaves import let_inputs_take_gradients
from lit_moe.sharding.memory import share_master_weights
from lit_moe.sharding.partitions import mark_managed, mark_released
from lit_moe.sharding.rendezvous import have_patience, meet
from lit_moe.sharding.universal import keep_groups_apart, make_universal, universal_folder
from lit_moe.sharding.weights import load_weights

if TYPE_CHECKING:
    from lit_moe.module import MoEModule


class MoEDeepSpeed(DeepSpeedStrategy):
    """ZeRO stages 1 to 3 for MoE models, on GPUs and, for trying it out, on CPU processes.

    What differs from lightning's strategy: it runs on CPU (gloo, no compiler needed); the model is
    never built inside ``deepspeed.zero.Init``, where random weights silently become NaN and
    pruning would see empty tensors; processes of the ``deepspeed`` launcher find each other on
    several machines; checkpoints appear only when they are complete.

    Args:
        stage: 1 shards the optimizer's state, 2 gradients too, 3 parameters too.
        shard_on_load: with stage 3, read a checkpoint straight into the partitions, so that no
            rank ever holds the whole model; calibration and pruning then work layer by layer.
            False builds the whole model on each rank, prunes it, and then partitions what is left.
        config: a DeepSpeed JSON file, or its content; then fields of this class that concern ZeRO
            do not count.
        patience: seconds that processes wait for each other at the start; a machine that cannot be
            reached is reported after them.
        timeout: of every wait for other ranks (in YAML ``6:00:00``: hours, minutes, seconds); what
            only the first rank does (writing and checking an export, converting a checkpoint) must
            be done in this time. Who waits longer ends the run with a sentence that names it.
        **options: everything that lightning's ``DeepSpeedStrategy`` takes: ``offload_optimizer``,
            ``offload_parameters``, ``overlap_comm``, ...

    Raises:
        LitMoEError: for a stage that does not exist, or ``shard_on_load`` without stage 3.
    """

    def __init__(
        self,
        stage: int = 2,
        shard_on_load: bool = False,
        config: str | dict[str, Any] | None = None,
        patience: float = 300.0,
        timeout: timedelta = timedelta(hours=2),
        **options: Any,
    ) -> None:
        if stage not in (1, 2, 3):
            raise LitMoEError(f"stage={stage} is no ZeRO stage; there are 1, 2 and 3")
        try:
            super().__init__(stage=stage, config=config, timeout=timeout, **options)
        except (MisconfigurationException, json.JSONDecodeError) as error:
            raise LitMoEError(f"config={config!r} cannot be taken: {error}") from error
        self.shard_on_load = shard_on_load
        self.patience = patience
        self._block_hooks: list[RemovableHandle] = []
        if shard_on_load and not self.zero_stage_3:
            raise LitMoEError(
                "shard_on_load=true spreads parameters over ranks, which only stage 3 does; "
                f"the configuration asks for stage {self.stage}"
            )
        if self.stage not in (1, 2, 3):
            raise LitMoEError(
                f"the DeepSpeed configuration asks for zero_optimization.stage {self.stage}; there "
                "are 1, 2 and 3 here, and strategy: ddp for none"
            )
        _check_optimizer(self._content)
        if self._offloads_optimizer:
            # torch's AdamW then runs on the host; DeepSpeed would insist on compiling its own.
            self._content.setdefault("zero_force_ds_cpu_optimizer", False)

    @property
    def stage(self) -> int:
        """The ZeRO stage in force."""
        return int(self._content.get("zero_optimization", {}).get("stage", 0))

    @property
    def loading_config(self) -> dict[str, Any] | None:
        """What models are to be loaded under; None for whole models."""
        if not self.shard_on_load:
            return None
        self._init_config_if_needed()
        return self._content

    @property
    def root_device(self) -> torch.device:
        """The device of this rank; DeepSpeed asks even a CPU for its index."""
        return torch.device("cpu", 0) if self._on_cpu else super().root_device

    def setup_environment(self) -> None:
        """Join the process group, on CPU too."""
        if not self._on_cpu:
            super().setup_environment()
            return
        _forget_compiled_collectives()
        super(DeepSpeedStrategy, self).setup_environment()  # all but the check for CUDA

    def setup_distributed(self) -> None:
        """Join the process group, on CPU too."""
        if not self._on_cpu:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _init_deepspeed_distributed(self) -> None:
        self._set_node_environment_variables()
        meet(
            self._get_process_group_backend(),
            rank=self.global_rank,
            world_size=self.world_size,
            patience=timedelta(seconds=self.patience),
            timeout=self._patience_later,
        )
        super()._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """The model is built whole, or by ``from_pretrained`` into partitions: never in here."""
        self._init_config_if_needed()
        yield

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a folder with a share of each rank, which appears only when it is complete.

        The frozen teacher is left out: the model's source gives it again.

        Raises:
            LitMoEError: if writing failed; an older checkpoint of that name is still there.
        """
        target = Path(self.broadcast(filepath))
        first = self.is_global_zero
        together = written_together(target, is_first_rank=first, barrier=self.barrier)
        with without_teacher(self._module), together as folder:
            super().save_checkpoint(checkpoint, str(folder), storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the share of this rank.

        Raises:
            LitMoEError: if a share is missing, or was written for other ranks.
            PlanError: if the model was pruned by another plan than the checkpoint's.
        """
        header = read_header(checkpoint_path)
        check_sharded(header)
        module = self._module
        module.check_plan(header.plan)
        if module.trainer.state.fn != TrainerFn.FITTING:
            return load_weights(module, header)
        if not self._is_written_alike(header):
            return self._load_universal(header)
        with without_teacher(module):
            return super().load_checkpoint(checkpoint_path, weights_only)

    def _is_written_alike(self, header: CheckpointHeader) -> bool:
        written = (header.world_size, header.stage, header.precision)
        return written == (self.world_size, self.stage, precision_in(self._content))

    def _load_universal(self, header: CheckpointHeader) -> dict[str, Any]:
        rank_zero_info(
            f"{header.path} was written by {header.world_size} ranks under ZeRO stage "
            f"{header.stage} in {header.precision}; it is converted for {self.world_size} ranks "
            f"under stage {self.stage} in {precision_in(self._content)}"
        )
        if self.is_global_zero:
            make_universal(header)
        self.barrier("universal checkpoint")
        engine = self.deepspeed_engine
        optimizer = engine.optimizer.optimizer
        options = [dict(group) for group in optimizer.param_groups]
        engine._config.load_universal_checkpoint = True
        strict = self._module.strict_loading
        self._module.strict_loading = False  # parameters come from files of their own
        state = super().load_checkpoint(universal_folder(header))
        self._module.strict_loading = strict
        engine._config.load_universal_checkpoint = False
        keep_groups_apart(optimizer, options)
        load_untrained(self._module, header)
        self.barrier("universal checkpoint is read")
        if self.is_global_zero:
            shutil.rmtree(universal_folder(header), ignore_errors=True)
        return state

    def _configure_launcher(self) -> None:
        is_default = type(self.cluster_environment) is LightningEnvironment
        if is_default and DeepSpeedLauncherEnvironment.detect():
            self.cluster_environment = DeepSpeedLauncherEnvironment()
        super()._configure_launcher()

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        self._await_all_models()
        super()._initialize_deepspeed_train(model)
        have_patience(self._patience_later)
        share_master_weights(self.deepspeed_engine.optimizer)
        if self.zero_stage_3:
            self._block_hooks = let_inputs_take_gradients(model)  # in front of the engine's own
        mark_managed(model)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        self._await_all_models()
        super()._initialize_deepspeed_inference(model)
        have_patience(self._patience_later)
        mark_managed(model)

    def _await_all_models(self) -> None:
        """See at once if a rank has ended: DeepSpeed makes groups, which wait for it very long."""
        self.barrier("all models are built")

    def release_model(self) -> None:
        """Take the model out of the engine: no further step, but its experts can be removed.

        Parameters stay where they are; partitioned ones are gathered layer by layer to run.
        """
        if isinstance(self.model, nn.Module) and self.model is not self.lightning_module:
            self.deepspeed_engine.destroy()
            while self._block_hooks:
                self._block_hooks.pop().remove()
            self.model = self.lightning_module
            mark_released(self._module)

    def wrap_again(self) -> None:
        """Give a released model, whose parameters may be others now, a new engine. Collective.

        Optimizer and schedule begin anew; weights that were trained in bf16 lose the digits that
        only their float32 masters had.
        """
        self.init_deepspeed()

    @property
    def _patience_later(self) -> timedelta:
        return self._timeout or default_pg_timeout

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    def _offloads_optimizer(self) -> bool:
        return "offload_optimizer" in self._content.get("zero_optimization", {})

    @property
    def _content(self) -> dict[str, Any]:
        """The configuration, which lightning has read if it was a file."""
        assert isinstance(self.config, dict)
        return self.config

    @property
    def _module(self) -> MoEModule:
        return cast("MoEModule", self.lightning_module)


def _check_optimizer(config: Mapping[str, Any]) -> None:
    """Refuse what would take the module's optimizer away, or have DeepSpeed refuse it."""
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise LitMoEError(
                f"the DeepSpeed configuration has a section {name!r}, but optimizer and schedule "
                "are the model's (model.init_args.optimizer); take the section out"
            )
    if config.get("zero_force_ds_cpu_optimizer") is True:
        raise LitMoEError(
            "the DeepSpeed configuration sets zero_force_ds_cpu_optimizer: true, but the optimizer "
            "is torch's AdamW or SGD, which DeepSpeed then refuses; leave the field out"
        )


def _forget_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling collectives for CPU inference, which training never uses."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def register_short_names() -> None:
    """Let ``strategy: zero1``, ``zero2``, ``zero3``, ``zero3_offload`` name this strategy.

    Its own dotted name, which lightning lowers before it looks, stands for stage 2.
    """
    name = f"lit_moe.sharding.{MoEDeepSpeed.__name__}".lower()
    StrategyRegistry.register(name, MoEDeepSpeed, description="DeepSpeed ZeRO", override=True)
    for stage in (1, 2, 3):
        StrategyRegistry.register(
            f"zero{stage}",
            MoEDeepSpeed,
            description=f"DeepSpeed ZeRO stage {stage}",
            override=True,
            stage=stage,
        )
    StrategyRegistry.register(
        "zero3_offload",
        MoEDeepSpeed,
        description="DeepSpeed ZeRO stage 3, optimizer and parameters on the host",
        override=True,
        stage=3,
        offload_optimizer=True,
        offload_parameters=True,
    )
