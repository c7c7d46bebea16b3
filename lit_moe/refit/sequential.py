"""Refits layer by layer: each on what the refitted layers before it really give.

Teacher and student advance together through :class:`Lockstep`; every layer of either is executed
once per batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.errors import CalibrationError
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
        while (met := _next_point(teacher, student, answers)) is not None:
            name, wanted, given = met
            if name in self._targets:
                answers = self._refit_layer(name, wanted, given, on_layer)
            else:
                self._refit_router(name, wanted, given, on_layer)
                answers = [None] * len(student)

    def _refit_layer(
        self, name: str, wanted: list[Any], given: list[Any], on_layer: OnLayer
    ) -> list[Tensor | None]:
        """Return the outputs of the layer after its refit, None for each where it was left."""
        target = self._targets[name]
        problem = self._problem(target)
        for index in range(len(given)):
            problem.add(*self._piece(index, target, wanted[index], given[index]))
            wanted[index] = None  # as large as the batch, and not needed any more
        update, record = self._solve(name, problem)
        answers: list[Tensor | None] = [None] * len(given)
        if update is not None:
            answers = self._corrected(target, problem, update, given)
        problem.pieces.clear()
        on_layer(name, record)
        return answers

    def _refit_router(
        self, name: str, wanted: list[Any], given: list[Any], on_layer: OnLayer
    ) -> None:
        target = self._targets[name.removeprefix(_ROUTER)]
        problem = RouterProblem(self._student, self._teacher, target.site)
        done = self._progress.load(name)
        if done is not None:
            if done[0] is not None:
                problem.apply_(done[0], given[0])
            on_layer(name, done[1])
            return
        if not problem.matched:
            reason = "its rows are not rows of the teacher's router"
            on_layer(name, LayerRefit(target="router logits", reason=reason))
            return
        for index, (output, args) in enumerate(zip(wanted, given, strict=True)):
            num_tokens = args[0].numel() // args[0].shape[-1]
            problem.add(args, output, *self._rows.weights(index, target.site, num_tokens))
        update, record = problem.solve(given[0])
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


def _next_point(
    teacher: Lockstep, student: Lockstep, answers: list[Tensor | None]
) -> tuple[str, list[Any], list[Any]] | None:
    """Let all batches run to their next point; return its name and what both models have there."""
    names: set[str | None] = set()
    wanted: list[Any] = []
    given: list[Any] = []
    for index, answer in enumerate(answers):
        for lockstep, reply, payloads in ((teacher, None, wanted), (student, answer, given)):
            event = lockstep.advance(index, reply)
            names.add(None if event is None else event[0])
            payloads.append(None if event is None else event[1])
        answers[index] = None
    if len(names) > 1:
        raise CalibrationError(
            f"teacher and student meet different layers at the same time: {sorted(map(str, names))}"
        )
    (name,) = names
    return None if name is None else (name, wanted, given)
