"""Refits layer by layer: each on what the refitted layers before it really give.

Teacher and student advance together through :class:`Lockstep`; every layer of either is executed
once per batch.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.errors import CalibrationError
from lit_moe.heap import give_back_memory
from lit_moe.refit.job import OnLayer, RefitJob, Target
from lit_moe.refit.layer import LayerProblem
from lit_moe.refit.lockstep import Lockstep
from lit_moe.refit.report import LayerRefit
from lit_moe.refit.routers import RouterProblem
from lit_moe.refit.weights import DownProjections
from lit_moe.stats.features import FeatureSlots, features_of
from lit_moe.stats.grams import Piece, gated_features, relative_weights
from lit_moe.stats.layers import first_tensor, with_first_tensor

_ROUTER = "router of "


class SequentialRefit:
    """One run over all layers of a job."""

    def __init__(self, job: RefitJob) -> None:
        self._job = job
        self._teacher, self._student, self._rows = job.teacher, job.student, job.rows
        self._options, self._progress = job.options, job.progress
        self._targets = {target.site.name: target for target in job.targets}
        self._slots: dict[int, FeatureSlots] = {}
        modules = dict(job.teacher.named_modules())
        wanted = job.targets if job.options.router else ()
        self._routed = [target for target in wanted if target.site.router in modules]

    def run(self, on_layer: OnLayer) -> None:
        """Refit all layers; ``on_layer(name, record)`` after each."""
        if self._options.router and len(self._routed) < len(self._targets):
            reason = "the teacher has no router there"
            on_layer("routers", LayerRefit(target="router logits", reason=reason))
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
            meetings = _meetings(teacher, student, answers)
            first = next(meetings)
            met = itertools.chain([first], meetings)
            if first.name is None:
                collections.deque(met, maxlen=0)  # the others end too
                return
            if first.name in self._targets:
                answers = self._refit_layer(first.name, met, on_layer)
            else:
                self._refit_router(first.name, met, on_layer)
                answers = [None] * len(student)

    def _refit_layer(
        self, name: str, met: Iterable[_Meeting], on_layer: OnLayer
    ) -> list[Tensor | None]:
        """Return the outputs of the layer after its refit, None for each where it was left."""
        target = self._targets[name]
        problem = self._problem(target)
        outputs: list[Tensor] = []
        for meeting in met:
            problem.add(*self._piece(len(outputs), target, meeting.wanted, meeting.given))
            outputs.append(meeting.given)
            give_back_memory()
        update, record = self._solve(name, problem)
        answers: list[Tensor | None] = [None] * len(outputs)
        if update is not None:
            answers = self._corrected(target, problem, update, outputs)
        problem.pieces.clear()
        give_back_memory()
        on_layer(name, record)
        return answers

    def _refit_router(self, name: str, met: Iterable[_Meeting], on_layer: OnLayer) -> None:
        target = self._targets[name.removeprefix(_ROUTER)]
        problem = RouterProblem(self._student, self._teacher, target.site)
        done = self._progress.load(name)
        inputs: Any = None  # of the first batch: they say on which device the router is
        for index, meeting in enumerate(met):
            inputs = meeting.given if inputs is None else inputs
            if done is None and problem.matched:
                num_tokens = meeting.given[0].numel() // meeting.given[0].shape[-1]
                weights = self._rows.weights(index, target.site, num_tokens)
                problem.add(meeting.given, meeting.wanted, *weights)
        if done is not None:
            update, record = done
            if update is not None:
                problem.apply_(update, inputs)
        elif not problem.matched:
            reason = "its rows are not rows of the teacher's router"
            record = LayerRefit(target="router logits", reason=reason)
        else:
            update, record = problem.solve(inputs)
            self._progress.save(name, update, record)
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
        hidden = down.size.hidden  # a few blocks return their output flattened
        wanted_TH, given_TH = (x.reshape(-1, hidden).float() for x in (wanted, given))
        fit, held = self._rows.weights(index, target.site, len(given_TH))
        if self._options.token_weights == "relative":
            weight = relative_weights(wanted_TH)
            fit, held = fit * weight, held * weight
        residual = (wanted_TH - given_TH) / target.scale
        return Piece(expert_ids, token_ids, features, residual, fit, held), wanted_TH / target.scale

    def _solve(self, name: str, problem: LayerProblem) -> tuple[Tensor | None, LayerRefit]:
        target = self._targets[name]
        done = self._progress.load(name)
        if done is None:
            update, record = problem.solve()
            update = None if update is None else update.float()  # as it is kept on disk
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
            added = piece.predict(update) * target.scale
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

        with contextlib.ExitStack() as stack:
            for name, target in self._targets.items():
                module = model.get_submodule(target.module)
                stack.callback(module.register_forward_hook(hook_for(name)).remove)
            for target in self._routed:
                stack.callback(self._hold_router(model, lockstep, target).remove)
            yield

    def _hold_router(
        self, model: PreTrainedModel, lockstep: Lockstep, target: Target
    ) -> RemovableHandle:
        """Hold the student before a router, the teacher behind it."""
        name, router = _ROUTER + target.site.name, model.get_submodule(target.site.router)
        if model is self._student:
            return router.register_forward_pre_hook(lambda _, args: lockstep.hold(name, args))
        return router.register_forward_hook(lambda _, __, output: lockstep.hold(name, output))

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


@dataclass(frozen=True)
class _Meeting:
    """One batch at a point that both models have reached.

    Attributes:
        name: of the point; None at the end.
        wanted: what the teacher has there.
        given: what the student has there.
    """

    name: str | None
    wanted: Any
    given: Any


def _meetings(
    teacher: Lockstep, student: Lockstep, answers: list[Tensor | None]
) -> Iterator[_Meeting]:
    """Let one batch after the other run to its next point; ``answers`` are emptied on the way."""
    names: set[str | None] = set()
    for index, answer in enumerate(answers):
        answers[index] = None  # as large as the batch, and the forward's own now
        events = teacher.advance(index), student.advance(index, answer)
        del answer
        names.update(None if event is None else event[0] for event in events)
        if len(names) > 1:
            raise CalibrationError(
                "teacher and student meet different layers at the same time: "
                f"{sorted(map(str, names))}"
            )
        wanted, given = (None if event is None else event[1] for event in events)
        yield _Meeting(next(iter(names)), wanted, given)
