"""Forwards of one model on fixed batches that begin where the model first differs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import find_sites
from lit_moe.distill.losses import next_token_nll
from lit_moe.distill.step import targets_of
from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.inference import evaluating
from lit_moe.prefix.chain import Link, find_chain
from lit_moe.prefix.standing import cloned, recording, standing_in
from lit_moe.prefix.store import Prefix, Snapshot, SnapshotStore
from lit_moe.selection.budget import parse_bytes
from lit_moe.stats.observe import model_inputs

Changes = Mapping[str, Hashable]
_CHECKED = 32
_BROKEN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model raises when a layer that was skipped left out more than its output."""


class PrefixCache:
    """Logits and losses of a model that changes a little from call to call.

    In all methods ``changes`` says how the live model now differs from what it was when the cache
    was made: a name inside a layer (``model.layers.3.mlp``) -> a tag. Two forwards share the
    layers in front of the first one whose tags differ. ``remember`` names further places where
    hidden states are to be kept, for candidates to come that share this one's changes up to there;
    those in front of the first change are kept in any case.

    Args:
        model: any supported MoE model; run in evaluation mode, on its own device.
        batches: dictionaries with ``input_ids`` (B, S), optionally ``attention_mask``, ``labels``,
            decoder inputs; kept on the model's device.
        budget: bytes of hidden states, as a number or like ``"1GiB"``; what does not fit is
            computed again. A batch takes ``2 x B x S x hidden`` numbers per place.

    Raises:
        CalibrationError: if there is no batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        budget: int | str = "1GiB",
    ) -> None:
        self._model = model
        self._batches = [{k: v.to(model.device) for k, v in b.items()} for b in batches]
        if not self._batches:
            raise CalibrationError("there is no batch to keep hidden states of; give at least one")
        self._store = SnapshotStore(parse_bytes(budget))
        self.layers_run = 0
        """Layers that were computed so far, over all batches."""
        with evaluating(model):
            self._chain, self._places = self._examine(self._start_of(self._inputs(0)))

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order in which they run; empty if they do not run in one."""
        return tuple(link.name for link in self._chain)

    @property
    def places(self) -> tuple[str, ...]:
        """Layers at which a forward can begin with bit-equal results."""
        return tuple(self._chain[place].name for place in sorted(self._places))

    @property
    def num_bytes(self) -> int:
        """Bytes of hidden states that are kept now."""
        return self._store.num_bytes

    def logits(
        self,
        index: int,
        changes: Changes | None = None,
        *,
        remember: Collection[str] = (),
        last: int | None = None,
    ) -> Tensor:
        """Return the logits of one batch, as the model now is, shape ``(B, S, V)``.

        Args:
            index: of the batch.
            changes: see the class.
            remember: see the class.
            last: of so many places at the end alone, ``(B, last, V)``; None for all.

        Raises:
            LitMoEError: if a name of ``changes`` or ``remember`` is in no layer.
        """
        tags = self._tags(changes or {})
        wanted = {self._place_of(name) for name in remember}
        wanted.add(next((place for place, tag in enumerate(tags) if tag), len(tags)))
        with evaluating(self._model):
            logits: Tensor = self._forward(index, tags, wanted, ends_of(self._model, last)).logits
        return logits if last is None else logits[:, -last:]

    def losses(
        self,
        changes: Changes | None = None,
        *,
        remember: Collection[str] = (),
        batches: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return nats and predicted tokens of each row, shape ``(rows,)``, float64, on the CPU.

        Args:
            changes: see the class.
            remember: see the class.
            batches: indices; None for all.
        """
        nats, tokens = [], []
        for index in range(len(self)) if batches is None else batches:
            logits_BSV = self.logits(index, changes, remember=remember)
            targets = targets_of(_predicted(self._batches[index]))
            nll = next_token_nll(logits_BSV, targets.ids, targets.counted)
            nats.append(nll.double().sum(dim=1).cpu())
            tokens.append(targets.counted[:, 1:].double().sum(dim=1).cpu())
        return torch.cat(nats), torch.cat(tokens)

    def loss(self, changes: Changes | None = None, *, remember: Collection[str] = ()) -> float:
        """Return the mean nats per predicted token over all batches."""
        nats, tokens = self.losses(changes, remember=remember)
        return float(nats.sum() / tokens.sum().clamp(min=1))

    def clear(self) -> None:
        """Forget all hidden states: for a model that is no longer what it was."""
        self._store.clear()

    def _forward(
        self, index: int, tags: Prefix, wanted: Collection[int], ends: Mapping[str, int]
    ) -> Any:
        """Run one batch from the furthest place that is known."""
        known = ((p, self._store.get(index, tags[:p])) for p in sorted(self._places, reverse=True))
        place, snapshot = next(((p, s) for p, s in known if s is not None), (0, None))
        wanted = {p for p in wanted if p in self._places and (p > place or snapshot is None)}
        output, taken = self._run(self._inputs(index) | dict(ends), place, snapshot, wanted)
        for at, new in taken.items():
            self._store.put(index, tags[:at], new)
        self.layers_run += len(self._chain) - place
        return output

    def _run(
        self, inputs: dict[str, Any], place: int, snapshot: Snapshot | None, wanted: set[int]
    ) -> tuple[Any, dict[int, Snapshot]]:
        """Run the model from a place on; return its output and snapshots of the wanted places."""
        recorder = _Recorder(self._chain, snapshot, wanted)
        skipped = {} if snapshot is None else _stand_ins(self._chain, place, snapshot)
        with standing_in(self._model, skipped), recording(self._model, recorder.hooks()):
            output = self._model(**inputs, **self._options())
        return output, recorder.snapshots()

    def _examine(self, inputs: dict[str, Tensor]) -> tuple[tuple[Link, ...], frozenset[int]]:
        """Return the chain, and the places in it where a forward can begin."""
        sites, options = find_sites(self._model), self._options()
        self._chain = find_chain(self._model, sites, lambda: self._model(**inputs, **options))
        plain, taken = self._run(inputs, 0, None, set(range(len(self._chain))))
        # Overwrite what modules may remember of this text; last places first, so that it stays so.
        self._model(**{k: _disturbed(k, v) for k, v in inputs.items()}, **options)
        useful = ((p, s) for p, s in sorted(taken.items(), reverse=True) if s.stacks or s.heads)
        exact = (p for p, s in useful if self._is_exact(inputs, p, s, plain.logits))
        return self._chain, frozenset(exact)

    def _is_exact(
        self, inputs: dict[str, Tensor], place: int, snapshot: Snapshot, plain: Tensor
    ) -> bool:
        try:
            output, _ = self._run(inputs, place, snapshot, set())
        except _BROKEN:
            return False
        return torch.equal(output.logits, plain)

    def _inputs(self, index: int) -> dict[str, Tensor]:
        return model_inputs(self._batches[index], self._model.device)

    def _options(self) -> dict[str, Any]:
        takes_it = "use_cache" in inspect.signature(self._model.forward).parameters
        return {"use_cache": False} if takes_it else {}

    def _start_of(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the first row, cut to its first tokens (pixels stay whole)."""
        return {k: v[:1] if k == "pixel_values" else v[:1, :_CHECKED] for k, v in inputs.items()}

    def _tags(self, changes: Changes) -> Prefix:
        """Return one tag per layer: what was changed in it, empty where nothing was."""
        tags: list[tuple[Any, ...]] = [()] * max(1, len(self._chain))
        for name in sorted(changes):
            place = self._place_of(name)
            tags[place] = (*tags[place], (name, changes[name]))
        return tuple(tags)

    def _place_of(self, name: str) -> int:
        for place, link in enumerate(self._chain):
            if f"{name}.".startswith(f"{link.name}."):
                return place
        if not self._chain:
            return 0  # nothing is ever skipped
        raise LitMoEError(
            f"{name!r} is in none of the {len(self._chain)} layers that run in a row "
            f"({self._chain[0].name!r} to {self._chain[-1].name!r}); name a module inside of one"
        )


class _Recorder:
    """Takes snapshots during one forward."""

    def __init__(self, chain: Sequence[Link], start: Snapshot | None, wanted: set[int]) -> None:
        self._chain, self._wanted = chain, wanted
        self._stacks: dict[str, Any] = {} if start is None else dict(start.stacks)
        self._before: dict[int, dict[str, Any]] = {0: {}}
        self._heads: dict[str, Any] = {}

    def hooks(self) -> dict[str, Callable[[Any], None]]:
        """Return what is to be called with the output of which module."""
        last = max(self._wanted, default=-1)
        ends = {link.stack: place for place, link in enumerate(self._chain)}
        found: dict[str, Callable[[Any], None]] = {}
        for place, link in enumerate(self._chain[: last + 1]):
            if place + 1 in self._wanted or place == ends[link.stack]:
                found[link.name] = self._layer_taker(place)
            if place in self._wanted:
                found.update({head: self._head_taker(head) for head in link.heads})
        return found

    def snapshots(self) -> dict[int, Snapshot]:
        """Return place -> snapshot, of places that the forward came by."""
        return {
            place: Snapshot(
                self._before[place], {h: self._heads[h] for h in self._chain[place].heads}
            )
            for place in sorted(self._wanted & self._before.keys())
            if all(head in self._heads for head in self._chain[place].heads)
        }

    def _layer_taker(self, place: int) -> Callable[[Any], None]:
        def take(output: Any) -> None:
            self._stacks[self._chain[place].stack] = cloned(output)
            self._before[place + 1] = dict(self._stacks)

        return take

    def _head_taker(self, head: str) -> Callable[[Any], None]:
        def take(output: Any) -> None:
            self._heads[head] = cloned(output)

        return take


def _stand_ins(chain: Sequence[Link], place: int, snapshot: Snapshot) -> dict[str, Any]:
    """Return module -> what it returns in a forward that begins at ``place``.

    What a skipped layer returns is read only by the next one of its stack, which is skipped too
    unless it is the last: all of a stack may return the output of the last.
    """
    layers = {link.name: snapshot.stacks[link.stack] for link in chain[:place]}
    return {**layers, **snapshot.heads}


def ends_of(model: PreTrainedModel, last: int | None) -> dict[str, int]:
    """Return what tells a model to make logits of the last places alone, if it can."""
    can = last is not None and "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": last} if can and last is not None else {}


def _predicted(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of a batch is predicted: of the decoder, where there is one."""
    prefix = "decoder_" if "decoder_input_ids" in batch else ""
    ids = batch[f"{prefix}input_ids"]
    mask = batch.get(f"{prefix}attention_mask")
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    return {**found, "labels": batch["labels"]} if "labels" in batch else found


def _disturbed(name: str, value: Tensor) -> Tensor:
    """Return other text of the same shape."""
    return value.flip(-1) if name.endswith("input_ids") else value
