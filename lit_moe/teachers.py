"""Where a run's teacher comes from, and what it says when it may not stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from rich.progress import track
from torch import Tensor, nn
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
from lit_moe.sharding.partitions import is_partitioned, stream_whole

Batch = Mapping[str, Tensor]
_SAMPLED = 16
_NEEDS = {
    True: "give a teacher with the same outputs",
    False: "loss.experts and loss.router compare layers of one architecture, loss.distillation "
    "needs only the same vocabulary",
}
_CHUNKS, _CHUNK_BYTES = 64, 4096


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
    """Yield the batches that this rank will train on, those of data in another order all once."""
    loader: Any = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
    per_epoch = _limited(trainer.limit_train_batches, len(loader))
    is_known = hasattr(loader.sampler, "set_epoch")
    steps = trainer.max_steps * trainer.accumulate_grad_batches
    left = steps if steps > 0 else per_epoch * max(trainer.max_epochs or 1, 1)
    if not is_known:
        per_epoch, left = len(loader), len(loader)
    epoch = 0
    with torch.random.fork_rng(devices=[]):
        while left > 0:
            if is_known:
                loader.sampler.set_epoch(epoch)
            for batch, _ in zip(loader, range(min(per_epoch, left)), strict=False):
                yield batch
            left, epoch = left - per_epoch, epoch + 1


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


def fingerprint(model: PreTrainedModel) -> str:
    """Return a text that tells models with other weights apart: some values of each. Collective."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in stream_whole(model):
        flat = tensor.reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLED)][: 2 * _SAMPLED]
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def folder_fingerprint(teacher: TeacherConfig) -> str:
    """Return a text that tells checkpoints apart, from parts of their files."""
    found = hashlib.blake2b(teacher.dtype.encode(), digest_size=16)
    folder = Path(resolve_model(teacher.path)).expanduser()
    if not folder.is_dir():
        found.update(f"{teacher.path} {read_config(teacher.path)._commit_hash}".encode())
        return found.hexdigest()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(_CHUNK_BYTES, size // _CHUNKS)):
                stream.seek(start)
                found.update(stream.read(_CHUNK_BYTES))
    return found.hexdigest()


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Return a text that tells vocabularies apart; '' for no tokenizer."""
    if tokenizer is None:
        return ""
    words = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda word: word[1]))
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


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


def _limited(limit: float | None, num_batches: int) -> int:
    if limit is None:
        return num_batches
    if isinstance(limit, int):
        return min(limit, num_batches)
    return int(num_batches * limit)


# It is in every checkpoint, as a hyper-parameter; loading by weights_only=True must know it.
torch.serialization.add_safe_globals([TeacherConfig])
