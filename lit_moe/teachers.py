"""Where a run's teacher comes from, and what it says when it may not stay."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from lit_moe.assets import resolve_model
from lit_moe.checkpoints import read_config
from lit_moe.distill.logits_cache import CacheKey, LogitsCache
from lit_moe.distill.pairing import Pairing
from lit_moe.distill.top_logits import top_logits
from lit_moe.distill.weights import LossWeights
from lit_moe.errors import LitMoEError
from lit_moe.export.documents import PLAN_FILE
from lit_moe.inference import evaluating
from lit_moe.models import DType, build_model
from lit_moe.plans import Plan, load_plan
from lit_moe.sharding.partitions import is_partitioned

Batch = Mapping[str, Tensor]
_NEEDS = {
    True: "give a teacher with the same outputs",
    False: "loss.experts and loss.router compare layers of one architecture, loss.distillation "
    "needs only the same vocabulary",
}


@dataclass
class TeacherConfig:
    """A teacher that is not the model as it was loaded.

    Attributes:
        path: folder or hub id, or ``embedded``.
        dtype: of its weights; ``auto`` takes the checkpoint's own.
        device: where it stays, for instance ``cuda:1`` or ``cpu``; every rank then holds it whole.
            None: where the model is, spread over ranks if the strategy loads models in shares.
    """

    path: str
    dtype: DType = "auto"
    device: str | None = None


def build_teacher(teacher: TeacherConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return the teacher, frozen, in evaluation mode, on its device."""
    model = build_model(teacher.path, dtype=teacher.dtype, trust_remote_code=trust_remote_code)
    if teacher.device is not None:
        nn.Module.to(model, torch.device(teacher.device))
    return model.eval().requires_grad_(False)


def check_teacher(
    teacher: TeacherConfig, student: PreTrainedConfig, tokenizer: Any, *, layers: bool
) -> None:
    """Refuse a teacher of another kind by its config, before its weights are read.

    Args:
        teacher: of the run.
        student: config of the model.
        tokenizer: of the data; None if unknown.
        layers: whether experts or routers are compared, and not only logits.

    Raises:
        LitMoEError: naming the first thing that differs.
    """
    _check_device(teacher)
    config = read_config(resolve_model(teacher.path))
    ours, theirs = student.get_text_config(), config.get_text_config()
    outputs = "vocab_size" if hasattr(ours, "vocab_size") else "num_labels"
    if outputs == "num_labels":
        _check_pixels(teacher.path, config, student)
    for name in (outputs, *(("model_type", "hidden_size") if layers else ())):
        mine, found = getattr(ours, name, None), getattr(theirs, name, None)
        if mine != found:
            raise LitMoEError(
                f"the teacher {teacher.path} cannot teach this model: {name} is {found} in the "
                f"teacher and {mine} in the model; {_NEEDS[name == outputs]}"
            )
    theirs_vocabulary = _vocabulary_of(teacher.path)
    if tokenizer is not None and theirs_vocabulary is not None:
        _check_vocabulary(teacher.path, theirs_vocabulary, tokenizer.get_vocab())


def check_asked(weights: LossWeights) -> None:
    """Refuse a teacher that no term of the loss asks.

    Raises:
        LitMoEError: naming the terms that would.
    """
    if max(weights.distillation, weights.experts, weights.router) == 0:
        raise LitMoEError(
            "model.teacher is given, but no term of the loss asks it; set loss.distillation, "
            "loss.experts or loss.router, or leave the teacher out"
        )


def check_pairs(student: PreTrainedModel, teacher: PreTrainedModel, origin: Plan | None) -> None:
    """Refuse a teacher whose experts do not correspond to the student's.

    Raises:
        LitMoEError: with the names and numbers that differ.
    """
    if origin is not None:
        for layer in Pairing.of(student, teacher, None, origin).layers:
            made_for = origin.num_experts.get(layer.name, layer.teacher.num_experts)
            if made_for != layer.teacher.num_experts:
                raise LitMoEError(
                    f"the model's folder says that it was made from one with {made_for} experts in "
                    f"{layer.name}, but the teacher has {layer.teacher.num_experts}; give the "
                    "model that it was made from"
                )
        return
    Pairing.of(student, teacher, None)


def origin_of(name_or_path: str) -> Plan | None:
    """Return the plan that an exported folder was made by; None if there is none."""
    file = Path(resolve_model(name_or_path)).expanduser() / PLAN_FILE
    return load_plan(file) if file.is_file() else None


def training_batches(trainer: Trainer) -> Iterator[Batch]:
    """Yield batches with every block that this and other ranks may train on, shared out among them.

    Those of the coming steps in their order, where their number is known and no greater than that
    of the text; else all of the text once, also what an epoch leaves out: rounds of pruning may set
    ``trainer.max_steps`` later, and never above what it was. Each rank yields equally many.
    """
    data: Any = copy.copy(trainer.datamodule)  # type: ignore[attr-defined]
    loader: Any = data.train_dataloader()  # of a copy: the run's own has a position to resume at
    with torch.random.fork_rng(devices=[]):
        if not hasattr(loader.dataset, "__getitem__"):
            yield from loader
            return
        everything = _all_blocks(loader, trainer)
        steps = _batches_to_come(trainer, len(loader))
        if not hasattr(loader.sampler, "set_epoch") or not 0 <= steps <= len(everything):
            yield from everything
            return
        yield from _in_order_of_training(loader, trainer, steps)


def opened_cache(trainer: Trainer, folder: str, key: CacheKey) -> LogitsCache:
    """Return a cache that rank 0 has checked, or made. Collective.

    Raises:
        LitMoEError: on every rank, if it is of something else.
    """
    cache, refused = None, None
    if trainer.is_global_zero:
        try:
            cache = LogitsCache(folder, key)
        except LitMoEError as error:
            refused = str(error)
    refused = trainer.strategy.broadcast(refused)
    if refused is not None:
        raise LitMoEError(refused)
    return cache or LogitsCache(folder, key)


def complete_cache(
    cache: LogitsCache,
    batches: Callable[[], Iterable[Batch]],
    teacher: Callable[[], PreTrainedModel],
    *,
    total: Callable[[Tensor], Tensor],
    progress: bool = False,
) -> int:
    """Add what a cache lacks of some text, and return of how many batches of this rank. Collective.

    Args:
        cache: opened on this rank.
        batches: of this rank, the same each time.
        teacher: called only if some rank lacks something; whole, or in shares.
        total: adds a tensor up over all ranks.
        progress: show a bar.
    """
    lacking = sum(cache.lacks(batch) for batch in batches())
    if int(total(torch.tensor(float(lacking)))) == 0:
        return 0
    model, added = teacher(), 0
    together = is_partitioned(model)  # then all ranks must run it equally often
    with evaluating(model):
        for batch in track(batches(), "teacher's logits", disable=not progress):
            if cache.lacks(batch) or together:
                ids, mask = (batch[n].to(model.device) for n in ("input_ids", "attention_mask"))
                logits = model(input_ids=ids, attention_mask=mask).logits
                cache.add(batch, top_logits(logits, cache.key.top_k))
                added += 1
    cache.flush()
    total(torch.zeros(1))  # all have written before any reads
    cache.refresh()
    return added


def _check_device(teacher: TeacherConfig) -> None:
    if teacher.device is None:
        return
    try:
        torch.empty(0, device=teacher.device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise LitMoEError(
            f"teacher.device is {teacher.device!r}, which is not here ({said}); give cpu, or null "
            "for where the model is"
        ) from error


def _check_pixels(path: str, theirs: PreTrainedConfig, ours: PreTrainedConfig) -> None:
    for name in ("image_size", "num_channels"):
        mine, found = (_sides(getattr(config, name, None)) for config in (ours, theirs))
        if mine != found:
            raise LitMoEError(
                f"the teacher {path} cannot teach this model: {name} is {found} in the teacher and "
                f"{mine} in the model, but both are shown the same images; give a teacher of "
                "images of that size"
            )


def _sides(size: Any) -> Any:
    """Return one number for a square, whether it was given as one or as two."""
    sides = set(size) if isinstance(size, list | tuple) else {size}
    return sides.pop() if len(sides) == 1 else tuple(size)


def _vocabulary_of(name_or_path: str) -> dict[str, int] | None:
    try:
        found = AutoTokenizer.from_pretrained(resolve_model(name_or_path)).get_vocab()
    except (OSError, ValueError):
        return None  # a folder of weights alone
    return found if len(found) > 1 else None


def _check_vocabulary(path: str, theirs: dict[str, int], ours: dict[str, int]) -> None:
    if theirs == ours:
        return
    odd = sorted(word for word in theirs.keys() | ours if theirs.get(word) != ours.get(word))
    raise LitMoEError(
        f"the teacher {path} has another vocabulary than the data's tokenizer: {len(odd)} tokens "
        f"differ, for instance {odd[0]!r} is {theirs.get(odd[0])} and {ours.get(odd[0])}; its "
        "logits would mean other words"
    )


def _all_blocks(loader: Any, trainer: Trainer) -> DataLoader[Any]:
    """Return a loader of this rank's share of the text, filled up so that shares are equal."""
    share: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, trainer.world_size, trainer.global_rank, shuffle=False
    )
    return DataLoader(
        loader.dataset, loader.batch_size or 1, sampler=share, collate_fn=loader.collate_fn
    )


def _batches_to_come(trainer: Trainer, num_batches: int) -> int:
    """Return the most batches that this rank trains on; -1 for any number."""
    bounds = []
    if trainer.max_steps >= 0:
        bounds.append(trainer.max_steps * trainer.accumulate_grad_batches)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        per_epoch = _limited(trainer.limit_train_batches, num_batches)
        bounds.append(trainer.max_epochs * per_epoch)
    return min(bounds, default=-1)


def _in_order_of_training(loader: Any, trainer: Trainer, left: int) -> Iterator[Batch]:
    per_epoch = _limited(trainer.limit_train_batches, len(loader))
    for epoch in itertools.count():
        if min(left, per_epoch) <= 0:
            return
        loader.sampler.set_epoch(epoch)
        yield from itertools.islice(loader, min(per_epoch, left))
        left -= per_epoch


def _limited(limit: float | None, num_batches: int) -> int:
    if limit is None:
        return num_batches
    if isinstance(limit, int):
        return min(limit, num_batches)
    return int(num_batches * limit)


# It is in every checkpoint, as a hyper-parameter; loading by weights_only=True must know it.
torch.serialization.add_safe_globals([TeacherConfig])
