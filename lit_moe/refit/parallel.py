"""Refits every layer on the teacher's own inputs, all from one pass of the teacher.

While the teacher runs, each of its blocks hands its input to the student's block of the same name.
Errors of earlier layers are not corrected by later ones, and nothing waits for a solve.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lit_moe.adapters import adapter_for
from lit_moe.inference import run_body
from lit_moe.refit.job import OnLayer, RefitJob, Target
from lit_moe.refit.layer import LayerProblem
from lit_moe.refit.report import LayerRefit
from lit_moe.refit.weights import DownProjections
from lit_moe.stats.features import FeatureSlots, features_of
from lit_moe.stats.grams import Piece, gated_features, relative_weights
from lit_moe.stats.layers import first_tensor, layer_of


class ParallelRefit:
    """One run over all layers of a job, whose targets are of kind ``block``."""

    def __init__(self, job: RefitJob) -> None:
        self._teacher, self._student, self._targets = job.teacher, job.student, job.targets
        self._rows, self._options, self._progress = job.rows, job.options, job.progress
        self._adapter = adapter_for(job.student.config)
        self._problems = {
            target.site.name: LayerProblem(
                DownProjections(job.student, target.site, job.options).weights,
                job.choice,
                job.options,
                keep_all=False,
                folder=job.folder,
                at_once=len(job.targets),
            )
            for target in job.targets
        }
        self._index = 0

    def run(self, on_layer: OnLayer) -> None:
        """Refit all layers; ``on_layer(name, record)`` after each."""
        done = {t.site.name: self._progress.load(t.site.name) for t in self._targets}
        missing = [target for target in self._targets if done[target.site.name] is None]
        with self._collecting(missing):
            for index, batch in enumerate(self._rows.batches if missing else ()):
                self._index = index
                run_body(self._teacher, batch)
        for target in self._targets:
            name = target.site.name
            update, record = done[name] or self._solve(target)
            if update is not None:
                DownProjections(self._student, target.site, self._options).add_(update)
            on_layer(name, record)

    def _solve(self, target: Target) -> tuple[Tensor | None, LayerRefit]:
        problem = self._problems.pop(target.site.name)
        update, record = problem.solve()
        update = None if update is None else update.float()  # as it is kept on disk
        problem.pieces.clear()
        record.target = target.kind
        self._progress.save(target.site.name, update, record)
        return update, record

    @contextlib.contextmanager
    def _collecting(self, targets: Sequence[Target]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for target in targets:
                collector = _Collector(self, target)
                layer = layer_of(self._teacher, target.site) or target.site.name
                for name, hook in (
                    (target.module, collector.on_target),
                    (target.site.name, collector.on_block),
                    (layer, collector.on_layer),
                ):
                    module = self._teacher.get_submodule(name)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def add(
        self, target: Target, slots: FeatureSlots, wanted: Tensor, given: Tensor, stream: Tensor
    ) -> None:
        """Add one batch of one layer; the stream behind the layer gives the tokens' weights."""
        down = DownProjections(self._student, target.site, self._options)
        expert_ids, token_ids, features = gated_features(slots, bias=down.has_bias)
        hidden = down.size.hidden  # a few blocks return their output flattened
        wanted_TH, given_TH = (x.reshape(-1, hidden).float() for x in (wanted, given))
        fit, held = self._rows.weights(self._index, target.site, len(wanted_TH))
        if self._options.token_weights == "relative":
            # Some families carry several streams per token.
            weight = relative_weights(stream.reshape(len(wanted_TH), -1))
            fit, held = fit * weight, held * weight
        residual_TH = (wanted_TH - given_TH) / target.scale
        piece = Piece(expert_ids, token_ids, features, residual_TH, fit, held)
        self._problems[target.site.name].add(piece, wanted_TH / target.scale)

    def student_block(self, target: Target, args: Any, kwargs: Any) -> tuple[Tensor, FeatureSlots]:
        """Run the student's block on the teacher's input; return what is compared."""
        slots: list[FeatureSlots] = []
        outputs: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            outputs.append(first_tensor(output))

        hook = self._student.get_submodule(target.module).register_forward_hook(keep)
        try:
            with features_of(self._student, self._adapter, target.site, slots.append):
                self._student.get_submodule(target.site.name)(*args, **kwargs)
        finally:
            hook.remove()
        return outputs[0], slots[0]


class _Collector:
    """Forward hooks of one of the teacher's layers, which end in this order."""

    def __init__(self, owner: ParallelRefit, target: Target) -> None:
        self._owner, self._target = owner, target
        self._wanted: Tensor | None = None
        self._seen: tuple[FeatureSlots, Tensor, Tensor] | None = None

    def on_target(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        """Keep what is compared."""
        self._wanted = first_tensor(output)

    def on_block(self, _: nn.Module, args: Any, kwargs: Any, ___: Any) -> None:
        """Let the student's block do the same work."""
        assert self._wanted is not None
        given, slots = self._owner.student_block(self._target, args, kwargs)
        self._seen = (slots, self._wanted, given)

    def on_layer(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        """Hand over both, with the stream."""
        assert self._seen is not None
        self._owner.add(self._target, *self._seen, first_tensor(output))
        self._seen = self._wanted = None
