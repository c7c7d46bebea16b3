"""Watches how the experts are used while a model trains: scalars, heatmaps, the plan as text.

L layers, E experts, N logged points in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.module import MoEModule
from lit_moe.plans import Plan

_PIXELS = 12


class ExpertMonitor(Callback):
    """Logs expert load to TensorBoard every ``every_n_steps`` training steps.

    Scalars per layer: ``load_cv`` (standard deviation over mean of the tokens per expert, 0 =
    even), ``unrouted`` (share of experts without a token), ``entropy`` (of the load, 1 = even).
    Images: the load of each layer over time (rows experts, columns time) and the map of kept
    experts. Text: the plan. Load is counted over all tokens since the last log, padding included,
    summed over ranks.

    Args:
        every_n_steps: optimizer steps between two logs.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self._counts: dict[str, Tensor] = {}
        self._history: dict[str, list[np.ndarray]] = {}
        self._rows: dict[str, list[int]] = {}
        self._first: dict[str, list[Any]] = {}
        self._handles: list[Any] = []
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When training begins, also after a resume. Attaches the counters and logs the plan."""
        self._last_step = trainer.global_step
        self._history.clear()
        self._attach(pl_module)
        self._first = {name: _members(pl_module, name, len(c)) for name, c in self._counts.items()}
        self._rows = {name: list(range(len(c))) for name, c in self._counts.items()}
        writer = _writer(trainer)
        if writer is not None and pl_module.plan is not None:
            _show_plan(writer, pl_module.plan, trainer.global_step)

    def on_model_rebuilt(self, trainer: Trainer, module: MoEModule) -> None:
        """When experts were cut out in the middle of training. Counts those that are left."""
        self._detach()
        self._attach(module)
        for name, counts in self._counts.items():
            left = _members(module, name, len(counts))
            self._rows[name] = [self._first[name].index(expert) for expert in left]
        writer = _writer(trainer)
        if writer is not None and module.plan is not None:
            _show_plan(writer, module.plan, trainer.global_step)

    def _attach(self, module: MoEModule) -> None:
        model = module.built_model
        adapter = adapter_for(model.config)
        for site in find_sites(model):
            self._counts[site.name] = torch.zeros(site.num_experts, dtype=torch.float64)
            count = self._counter(site, model)
            if adapter.tap_kind(site) == "custom":
                self._handles.append(adapter.attach_slots(model, site, _ids_of(count)))
            else:
                experts = model.get_submodule(site.experts)
                hook = experts.register_forward_pre_hook(_index_of(count), with_kwargs=True)
                self._handles.append(hook)

    def on_train_batch_end(self, trainer: Trainer, pl_module: MoEModule, *_: Any) -> None:  # type: ignore[override]
        """After each batch. Every ``every_n_steps`` steps reduces, logs and forgets the counts."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._last_step:
            return  # also between two steps, while gradients accumulate
        self._last_step = step
        for name, counts in self._counts.items():
            total = trainer.strategy.reduce(counts.clone().to(pl_module.device), reduce_op="sum")
            load = torch.as_tensor(total).cpu()
            counts.zero_()
            if load.sum() == 0:
                continue
            column = np.zeros(len(self._first[name]))
            column[self._rows[name]] = (load / load.max()).numpy()
            self._history.setdefault(name, []).append(column)
            measures = {f"experts/{name}/{k}": v for k, v in load_measures(load).items()}
            for logger in trainer.loggers:
                logger.log_metrics(measures, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When training ends. Draws the load of each layer over time and detaches."""
        writer = _writer(trainer)
        if writer is not None:
            for name, columns in self._history.items():
                image = enlarge(np.stack(columns, axis=1))
                tag = f"experts/load/{name}"
                writer.add_image(tag, image, trainer.global_step, dataformats="HW")
        self._detach()

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """When training breaks. Detaches."""
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _counter(self, site: MoESite, model: nn.Module) -> Callable[[Tensor], None]:
        counts = self._counts[site.name]

        def count(expert_ids: Tensor) -> None:
            if not model.training:
                return  # validation is not training load
            ids = expert_ids.detach().reshape(-1).cpu()
            counts.add_(torch.bincount(ids[ids < len(counts)], minlength=len(counts)))

        return count


def _members(module: MoEModule, name: str, num_experts: int) -> list[Any]:
    """Return which experts of the loaded model those of a layer are or were made of."""
    plan = module.plan
    if plan is None or name not in list(plan):
        return [(expert,) for expert in range(num_experts)]
    return list(plan.members(name))


def _show_plan(writer: SummaryWriter, plan: Plan, step: int) -> None:
    text = "\n".join(f"    {name}: {_named(plan.members(name))}" for name in plan)
    writer.add_text("experts/plan", text, step)
    writer.add_image("experts/kept", kept_map(plan), step, dataformats="HW")


def load_measures(load_E: Tensor) -> dict[str, float]:
    """Return ``load_cv``, ``unrouted`` and ``entropy`` of the tokens per expert."""
    share = load_E / load_E.sum()
    logs = share.clamp(min=1e-30).log()
    return {
        "load_cv": float(load_E.std(unbiased=False) / load_E.mean()),
        "unrouted": float((load_E == 0).double().mean()),
        "entropy": float(-(share * logs).sum() / math.log(max(len(load_E), 2))),
    }


def kept_map(plan: Any) -> np.ndarray:
    """Return an image of the plan: rows layers, columns experts, 1 where one stays or is merged."""
    image = np.zeros((len(list(plan)), max(plan.num_experts.values())))
    for row, name in enumerate(plan):
        image[row, : plan.num_experts[name]] = 0.3
        for members in plan.members(name):
            image[row, list(members)] = 1.0
    return enlarge(image)


def _named(members: Sequence[Sequence[int]]) -> str:
    """Return ``[1, 3]`` for experts that stay, ``[0+2, 1+3]`` for merged ones.

    >>> _named([(0, 2), (1,)])
    '[0+2, 1]'
    """
    return f"[{', '.join('+'.join(map(str, ids)) for ids in members)}]"


def enlarge(image: np.ndarray) -> np.ndarray:
    """Return the image with each value as a square of pixels, so that it can be seen."""
    return np.kron(image, np.ones((_PIXELS, _PIXELS)))


def _index_of(count: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        count(args[1] if len(args) > 1 else kwargs["top_k_index"])

    return hook


def _ids_of(count: Callable[[Tensor], None]) -> Callable[..., None]:
    return lambda expert_ids, *_: count(expert_ids)


def _writer(trainer: Trainer) -> SummaryWriter | None:
    """Return the TensorBoard writer on rank 0, if the run has one."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            return logger.experiment
    return None
