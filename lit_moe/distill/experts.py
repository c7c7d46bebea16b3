"""Expert-wise distillation: each expert of the student learns what its original would have said.

T tokens, H hidden, E experts of the student, R rows (token and expert).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.distill.comparison import Differences, Wanted, joined, not_among
from lit_moe.distill.dispatch import (
    OnRows,
    Pairs,
    Rows,
    check_dispatch,
    dispatched,
    run_rows,
)
from lit_moe.distill.pairing import LayerPairing
from lit_moe.distill.step import Step
from lit_moe.distill.terms import Term
from lit_moe.distill.weights import Alignment
from lit_moe.errors import LitMoEError


class ExpertDistillation(Term):
    """Sum over layers and experts of the mean squared difference to the teacher's expert.

    MoE-Pruner (arXiv 2410.12013), section 3.3: ``L = L_CE + lambda * sum_j sum_i MSE(E_ij(teacher),
    E_ij(student))`` with outputs before routing weights, MSE the mean over tokens and hidden
    dimensions, and lambda ``L_CE / sum`` at the first step. The paper leaves open on which tokens
    experts are compared and whether lambda follows later losses: here ``alignment`` decides, and
    lambda stays. Experts that got no token on any rank are left out of the sum and counted.
    The student's own logits come from its own routing whatever the alignment.

    Args:
        weight: of the term.
        factor: lambda; None measures it at the first step.
        alignment: see :class:`~lit_moe.distill.weights.LossWeights`.
    """

    name = "experts"
    needs_teacher = True

    def __init__(
        self, weight: float, *, factor: float | None = None, alignment: Alignment = "forced"
    ) -> None:
        super().__init__(weight)
        self.alignment = alignment
        self.runs_teacher = alignment != "own"
        self.is_measured = factor is not None
        self.factor = 1.0 if factor is None else factor

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a family whose experts cannot be handed any token."""
        check_dispatch(model)

    @contextmanager
    def watching_teacher(self, step: Step) -> Iterator[None]:
        """Keep what the teacher's experts say of the tokens to compare."""
        assert step.teacher is not None
        self._wanted: dict[str, list[Wanted]] = {}
        with ExitStack() as stack:
            for layer in step.pairing.layers:
                calls = self._wanted[layer.name] = []
                mask_T = step.token_mask.of(layer.student)
                keep = _keeping(layer, mask_T, calls)
                asked = _everything(layer) if self.alignment == "dense" else None
                stack.enter_context(dispatched(step.teacher, layer.teacher, asked, keep))
            yield

    @contextmanager
    def watching_student(self, step: Step) -> Iterator[None]:
        """Compare the student's experts."""
        assert step.teacher is not None
        self._layers: dict[str, Differences] = {}
        with ExitStack() as stack:
            for layer in step.pairing.layers:
                differences = self._layers[layer.name] = Differences(layer)
                stack.enter_context(self._comparing(step, layer, differences))
            yield
        self._wanted = {}

    def _comparing(self, step: Step, layer: LayerPairing, differences: Differences) -> Any:
        if self.alignment == "own":
            wanted_of = _answers_to_own(step, layer)
            return dispatched(
                step.student,
                layer.student,
                None,
                lambda rows: differences.add(rows, wanted_of(rows[0])),
            )
        calls = iter(self._wanted[layer.name])
        now: list[Wanted] = []

        def asked(chosen: Pairs) -> tuple[Tensor, Tensor]:
            now[:] = [next(calls).to(chosen.token_ids.device)]
            return not_among(chosen, now[0], layer.student.num_experts)

        return dispatched(
            step.student, layer.student, asked, lambda rows: differences.add(rows, now.pop())
        )

    def value(self, step: Step) -> Tensor:
        """Return the sum over layers and experts. Collective.

        Raises:
            LitMoEError: if lambda is to be measured and comes out infinite, NaN or 0.
        """
        layers = {name: d for name, d in self._layers.items() if d.has_run}
        counts_LE = step.ranks.sum(
            torch.nn.utils.rnn.pad_sequence([d.counts_E for d in layers.values()], True)
        )
        self._values = {
            name: d.loss(counts_E[: len(d.counts_E)], step.ranks)
            for (name, d), counts_E in zip(layers.items(), counts_LE, strict=True)
        }
        sizes = sum(len(d.layer.student_ids) for d in layers.values())
        self._num_skipped = sizes - int((counts_LE > 0).sum())
        value = torch.stack(list(self._values.values())).sum()
        if not self.is_measured:
            self._measure(step, value.detach())
        return value

    def _measure(self, step: Step, value: Tensor) -> None:
        both = torch.stack([step.values["next_token"].detach().float(), value.float()])
        text, experts = step.ranks.sum(both).tolist()
        ratio = text / experts if experts else math.inf
        if not 0 < ratio < math.inf:
            raise LitMoEError(
                f"loss.experts_lambda cannot be measured at the first step: next-token loss "
                f"{text / step.ranks.size:.4g} over difference of experts "
                f"{experts / step.ranks.size:.4g} is not a number above 0 (do all experts that "
                "are left still equal the teacher's?); prune weights before, or set "
                "loss.experts_lambda"
            )
        self.factor, self.is_measured = ratio, True

    def details(self) -> dict[str, Tensor | float]:
        """Return the value of each layer, lambda, and how many experts had no token."""
        layers = {f"experts/{name}": value.detach() for name, value in self._values.items()}
        return {
            **layers,
            "experts_lambda": self.factor,
            "experts_skipped": float(self._num_skipped),
        }

    def state(self) -> dict[str, Any]:
        """Return lambda."""
        return {"lambda": self.factor} if self.is_measured else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over lambda."""
        if "lambda" in state:
            self.factor, self.is_measured = float(state["lambda"]), True


def _everything(layer: LayerPairing) -> Callable[[Pairs], tuple[Tensor, Tensor]]:
    """Ask the teacher for every expert that the student kept, on every token."""

    def asked(chosen: Pairs) -> tuple[Tensor, Tensor]:
        device = chosen.token_ids.device
        kept = torch.tensor(layer.teacher_ids, device=device)
        tokens = torch.arange(chosen.num_tokens, device=device).repeat_interleave(len(kept))
        ids = kept.repeat(chosen.num_tokens)
        all_pairs = Wanted(ids, tokens, torch.ones_like(ids, dtype=torch.bool), ids)
        return not_among(chosen, all_pairs, layer.teacher.num_experts)

    return asked


def _keeping(layer: LayerPairing, mask_T: Tensor | None, calls: list[Wanted]) -> OnRows:
    def keep(rows: Sequence[Rows]) -> None:
        calls.append(joined([_in_student(layer, mask_T, some) for some in rows]))

    return keep


def _in_student(layer: LayerPairing, mask_T: Tensor | None, rows: Rows) -> Wanted:
    """Number the teacher's rows as the student does."""
    pairs = rows.pairs
    number = _translation(layer.teacher_ids, layer.student_ids, layer.teacher.num_experts, pairs)
    ids = number[pairs.expert_ids.clamp(max=layer.teacher.num_experts - 1)]
    valid = pairs.real & (ids >= 0)
    if mask_T is not None:
        valid = valid & mask_T.to(valid.device)[pairs.token_ids]
    return Wanted(ids, pairs.token_ids, valid, rows.outputs)


def _answers_to_own(step: Step, layer: LayerPairing) -> Callable[[Rows], Wanted]:
    """Run the teacher's experts on what the student's were given."""
    assert step.teacher is not None
    teacher = step.teacher
    adapter, experts = adapter_for(teacher.config), teacher.get_submodule(layer.teacher.experts)
    mask_T = step.token_mask.of(layer.student)

    @torch.no_grad()
    def answers(rows: Rows) -> Wanted:
        pairs, size = rows.pairs, layer.student.num_experts
        number = _translation(layer.student_ids, layer.teacher_ids, size, pairs)
        ids = number[pairs.expert_ids.clamp(max=size - 1)]
        valid = pairs.real & (ids >= 0)
        if mask_T is not None:
            valid = valid & mask_T[pairs.token_ids]
        inputs_RH = rows.hidden.detach().index_select(0, pairs.token_ids)
        inputs_RH = inputs_RH.to(teacher.device, teacher.dtype)
        asked = ids.clamp(min=0).to(teacher.device)
        outputs = run_rows(adapter, experts, inputs_RH, asked, inputs_RH.dtype)
        return Wanted(pairs.expert_ids, pairs.token_ids, valid, outputs.to(valid.device))

    return answers


def _translation(
    source: tuple[int, ...], target: tuple[int, ...], size: int, pairs: Pairs
) -> Tensor:
    """Return the table from ids of ``source`` to those of ``target``, -1 elsewhere."""
    table = torch.full((size,), -1, device=pairs.expert_ids.device)
    table[list(source)] = torch.tensor(target, device=table.device)
    return table
