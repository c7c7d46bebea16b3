"""Refits layer by layer: each on what the refitted layers before it really give.

Teacher and student advance together through :class:`Lockstep`; every layer of either is executed
once per batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.errors import CalibrationError
from lit_moe.refit.job import OnLayer, RefitJob, Target
from lit_moe.refit.layer import LayerProblem
from lit_moe.refit.lockstep import Lockstep
from lit_moe.refit.report import LayerRefit
from lit_moe.refit.streams import first_tensor, with_first_tensor
from lit_moe.refit.weights import DownProjections
from lit_moe.stats.features import FeatureSlots, features_of
from lit_moe.stats.grams import Piece, gated_features


class SequentialRefit:
    """One run over all layers of a job."""

    def __init__(self, job: RefitJob) -> None:
        self._job = job
        self._teacher, self._student, self._rows = job.teacher, job.student, job.rows
        self._options, self._progress = job.options, job.progress
        self._targets = {target.site.name: target for target in job.targets}
        self._slots: dict[int, FeatureSlots] = {}

    def run(self, on_layer: OnLayer) -> None:
        """Refit all layers; ``on_layer(name, record)`` after each."""
        teacher = Lockstep(self._teacher, self._rows.batches)
        student = Lockstep(self._student, self._rows.batches)
        try:
            # Hooks run in the order of their registration: see the features, then wait.
            with (
                self._observed(student),
                self._held(self._teacher, teacher),
                self._held(self._student, student),
            ):
                self._advance(teacher, student, on_layer)
        finally:
            teacher.close()
            student.close()

    def _advance(self, teacher: Lockstep, student: Lockstep, on_layer: OnLayer) -> None:
        answers: list[Tensor | None] = [None] * len(student)
        while True:
            problem: LayerProblem | None = None
            outputs: list[Tensor] = []
            name = ""
            for index, answer in enumerate(answers):
                wanted = teacher.advance(index)
                given = student.advance(index, answer)
                answers[index] = None
                if _names(wanted) != _names(given):
                    raise CalibrationError(
                        f"teacher and student do not meet the same layers: {_names(wanted)} and "
                        f"{_names(given)}"
                    )
                if wanted is None or given is None:
                    continue
                name = given[0]
                target = self._targets[name]
                problem = problem or self._problem(target)
                problem.add(*self._piece(index, target, wanted[1], given[1]))
                outputs.append(given[1])
            if problem is None:
                return
            update, record = self._solve(name, problem)
            if update is not None:
                answers = self._corrected(self._targets[name], problem, update, outputs)
            problem.pieces.clear()
            on_layer(name, record)

    def _problem(self, target: Target) -> LayerProblem:
        down = DownProjections(self._student, target.site, self._options)
        return LayerProblem(
            down.weights, self._job.choice, self._options, keep_all=True, folder=self._job.folder
        )

    def _piece(
        self, index: int, target: Target, wanted: Tensor, given: Tensor
    ) -> tuple[Piece, Tensor]:
        slots = self._slots.pop(index, None)
        if slots is None:
            raise CalibrationError(f"{target.site.name} ran without its experts being seen")
        down = DownProjections(self._student, target.site, self._options)
        expert_ids, token_ids, features = gated_features(slots, bias=down.has_bias)
        hidden = down.weights.size.hidden  # a few blocks return their output flattened
        wanted_TH, given_TH = (x.reshape(-1, hidden).float() for x in (wanted, given))
        fit, held = self._rows.weights(index, target.site, len(given_TH))
        if self._options.token_weights == "relative":
            weight = 1 / wanted_TH.square().mean(1).clamp(min=1e-12)
            fit, held = fit * weight, held * weight
        residual = (wanted_TH - given_TH) / target.scale
        return Piece(expert_ids, token_ids, features, residual, fit, held), wanted_TH / target.scale

    def _solve(self, name: str, problem: LayerProblem) -> tuple[Tensor | None, LayerRefit]:
        target = self._targets[name]
        done = self._progress.load(name)
        if done is None:
            update, record = problem.solve()
            record.target = target.kind
            self._progress.save(name, update, record)
        else:
            update, record = done
        if update is not None:
            DownProjections(self._student, target.site, self._options).add_(update)
        return update, record

    def _corrected(
        self, target: Target, problem: LayerProblem, update: Tensor, outputs: list[Tensor]
    ) -> list[Tensor | None]:
        """Return the outputs of the refitted layer, without running it again."""
        corrected: list[Tensor | None] = []
        for piece, output in zip(problem.pieces, outputs, strict=True):
            added = piece.predict(update.to(piece.features)) * target.scale
            corrected.append(output + added.reshape(output.shape).to(output.dtype))
        return corrected

    @contextlib.contextmanager
    def _held(self, model: PreTrainedModel, lockstep: Lockstep) -> Iterator[None]:
        """Hold the forwards of one model where its layers are compared."""

        def hook_for(name: str) -> Callable[[nn.Module, Any, Any], Any]:
            def hook(_: nn.Module, __: Any, output: Any) -> Any:
                answer = lockstep.hold(name, first_tensor(output))
                return None if answer is None else with_first_tensor(output, answer)

            return hook

        hooks = [
            model.get_submodule(target.module).register_forward_hook(hook_for(name))
            for name, target in self._targets.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _observed(self, student: Lockstep) -> Iterator[None]:
        """Keep the features of the layer that each student's forward is in."""
        adapter = adapter_for(self._student.config)

        def keep(slots: FeatureSlots) -> None:
            self._slots[student.index] = slots

        with contextlib.ExitStack() as stack:
            for target in self._targets.values():
                stack.enter_context(features_of(self._student, adapter, target.site, keep))
            yield


def _names(event: tuple[str, Any] | None) -> str | None:
    return None if event is None else event[0]
