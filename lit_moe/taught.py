"""A module whose loss may ask a teacher, or what one has said before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.distill.fingerprints import (
    fingerprint,
    folder_fingerprint,
    vocabulary_fingerprint,
)
from lit_moe.distill.logits_cache import CacheKey
from lit_moe.distill.recovery import RecoveryLoss
from lit_moe.distill.weights import LossWeights
from lit_moe.errors import LitMoEError
from lit_moe.models import frozen_copy
from lit_moe.plans import Plan
from lit_moe.resumable import ResumableModule
from lit_moe.sharding.partitions import is_partitioned, loading_partitioned
from lit_moe.teachers import (
    TeacherConfig,
    build_teacher,
    check_asked,
    check_pairs,
    check_teacher,
    complete_cache,
    opened_cache,
    origin_of,
    training_batches,
)


class TaughtModule(ResumableModule, ABC):
    """A module with a recovery loss and its teacher, which no checkpoint holds.

    Args:
        loss: weights of the terms.
        teacher: who is asked; None for the model as it was loaded.
    """

    trust_remote_code: bool
    model_name_or_path: str
    architecture: dict[str, Any] | None

    def __init__(self, loss: LossWeights, teacher: TeacherConfig | None) -> None:
        super().__init__()
        self.loss_weights = loss
        self.recovery = RecoveryLoss(loss)
        self.teacher_config = teacher
        self.teacher: PreTrainedModel | None = None
        self.origin: Plan | None = None

    @abstractmethod
    def build(self) -> PreTrainedModel:
        """Return the model as it is loaded."""

    def add_teacher(self, model: PreTrainedModel) -> None:
        """Build the teacher, unless there is none or only its cached logits are asked for."""
        config, weights = self.teacher_config, self.loss_weights
        layers = weights.experts > 0 or weights.router > 0
        if config is not None:
            check_asked(weights)
            check_teacher(config, model.config, self.data_tokenizer, layers=layers)
        if not self.recovery.needs_teacher:
            return
        is_pinned = config is not None and config.device is not None
        with loading_partitioned(None if is_pinned else self.loading_config):
            if config is None:
                teacher = frozen_copy(model, rebuild=self.build)
            else:
                teacher = build_teacher(config, trust_remote_code=self.trust_remote_code)
        if config is not None and layers:
            self.origin = None if self.architecture else origin_of(self.model_name_or_path)
            check_pairs(model, teacher, self.origin)
        if is_pinned:
            vars(self)["teacher"] = teacher  # no submodule: it stays where it is
        else:
            self.teacher = teacher

    def open_cache(self, model: PreTrainedModel) -> None:
        """While the model is whole, complete what the loss will read of its teacher. Collective."""
        weights = self.loss_weights
        if weights.cache is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        assert weights.top_k is not None
        key = CacheKey(
            self._fingerprint(model),
            vocabulary_fingerprint(self.data_tokenizer),
            model.config.get_text_config().vocab_size,
            weights.top_k,
        )
        cache = opened_cache(self.trainer, weights.cache, key)
        complete_cache(
            cache,
            lambda: training_batches(self.trainer),
            lambda: self._temporary_teacher(model),
            total=self.sum_over_ranks,
            progress=self.trainer.is_global_zero,
        )
        self.recovery.read_logits_from(cache)

    def _fingerprint(self, model: PreTrainedModel) -> str:
        """Return what tells the teacher from others; one rank alone reads its files. Collective."""
        config = self.teacher_config
        if config is None:
            return fingerprint(model)
        found, refused = "", None
        if self.trainer.is_global_zero:
            try:
                found = folder_fingerprint(config.path, config.dtype)
            except (OSError, LitMoEError) as error:
                refused = str(error)
        found, refused = self.trainer.strategy.broadcast((found, refused))
        if refused is not None:
            raise LitMoEError(f"the files of the teacher {config.path} cannot be read: {refused}")
        return found

    def _temporary_teacher(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return who is asked for logits before training, where it can run."""
        config, teacher = self.teacher_config, self.teacher
        if config is None:
            teacher = model
        elif teacher is None:
            with loading_partitioned(None if config.device else self.loading_config):
                teacher = build_teacher(config, trust_remote_code=self.trust_remote_code)
        if not is_partitioned(teacher) and (config is None or config.device is None):
            torch.nn.Module.to(teacher, self.trainer.strategy.root_device)
        return teacher

    @property
    def data_tokenizer(self) -> Any:
        """The tokenizer of the data; None if there is none."""
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        return getattr(data, "tokenizer", None)

    @property
    def loading_config(self) -> dict[str, Any] | None:
        """DeepSpeed's configuration if the strategy loads models straight into partitions."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return getattr(strategy, "loading_config", None)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks. Collective."""
        mine = tensor.detach().clone().to(self.trainer.strategy.root_device)
        total = self.trainer.strategy.reduce(mine, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total
