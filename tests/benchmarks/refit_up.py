"""A trial: refit the up projections of the experts too, by least squares without gradients.

With the gates as they are an expert's output is linear in its up projection as it is in its down
projection: ``y = W_down (a(x) * W_up x)`` with ``a = act(W_gate x)``. So after the down projections
(Cholesky) the up projections are solved for what is left over, by conjugate gradients on the
tokens, preconditioned by the inverse of ``(W_down^T W_down * sum a a^T) (x) sum x x^T`` of each
expert; the iterate that is best on held-out rows is taken. One round is down, up; rounds repeat.

Written for Mixtral's layout and in memory, to learn what it would bring; not a part of the library.
``python -m tests.benchmarks.refit_up [tokens]`` writes ``results/refit_up.md``.

T tokens, E experts, I expert width, H hidden, S_e tokens of one expert.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.__main__ import RESULTS
from tests.benchmarks.refit_bench import Batches, Bench
from tests.benchmarks.refit_more_tokens import drawn
from tests.benchmarks.timing import markdown

RIDGES = tuple(10 ** (-5 + exponent / 2) for exponent in range(11))
STEPS, PATIENCE, DAMPING = 12, 4, 1e-2
CELLS = ((0.5, 0), (0.5, 1), (0.5, 2), (0.75, 0), (0.75, 1), (0.75, 2))
"""Fraction of experts kept, and rounds with up projections; 0 is down projections once."""


@dataclass
class Rows:
    """What one layer is fitted on.

    Attributes:
        inputs: of the student's experts, shape ``(T, H)``.
        gates: routing weights, shape ``(T, K)``.
        ids: chosen experts, shape ``(T, K)``.
        wanted: what the experts together should give, shape ``(T, H)``.
        weight: of each token, shape ``(T,)``.
        is_held: whether a token is not fitted on, shape ``(T,)``.
    """

    inputs: Tensor
    gates: Tensor
    ids: Tensor
    wanted: Tensor
    weight: Tensor
    is_held: Tensor

    def of_experts(self, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield expert, its tokens ``(S_e,)`` and their routing weights ``(S_e, 1)``."""
        for expert in range(count):
            tokens, place = (self.ids == expert).nonzero(as_tuple=True)
            yield expert, tokens, self.gates[tokens, place][:, None]

    def energy(self, left_TH: Tensor, *, held: bool) -> float:
        """Return the weighted square of what is left over."""
        counts_T = self.weight * (self.is_held == held)
        return float(left_TH.square().sum(1) @ counts_T)


@dataclass
class Slots:
    """One expert's tokens: features of its down and slopes of its up projection."""

    tokens: Tensor
    features: Tensor
    slopes: Tensor


@dataclass
class Trial:
    """Refits a copy of the student of a Mixtral model, layer by layer along the stream."""

    bench: Bench
    batches: Batches
    rounds: int

    def run(self, student: Any) -> Any:
        teacher = self.bench.model
        ids = torch.cat([batch["input_ids"] for batch in self.batches])
        is_held_R = torch.zeros(len(ids), dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        is_held_R[torch.randperm(len(ids), generator=generator)[: len(ids) // 8]] = True
        is_held_T = is_held_R.repeat_interleave(ids.shape[1])
        stream = teacher.model.embed_tokens(ids).float()
        ours, place = (
            stream.clone(),
            teacher.model.rotary_emb(torch.zeros(1, 1, 1), torch.arange(ids.shape[1])[None]),
        )
        for theirs, layer in zip(teacher.model.layers, student.model.layers, strict=True):
            stream = theirs_of(theirs, stream, place)
            middle = ours + attention(layer, ours, place)
            rows = self._rows(layer, middle, stream, is_held_T)
            for _ in range(max(self.rounds, 1)):
                self._down(layer.mlp.experts, rows)
                if self.rounds:
                    self._up(layer.mlp.experts, rows)
            given_TH, _ = forward(layer.mlp.experts, rows)
            ours = middle + given_TH.view_as(middle)
        return student

    def _rows(self, layer: Any, middle: Tensor, stream: Tensor, is_held_T: Tensor) -> Rows:
        inputs_TH = layer.post_attention_layernorm(middle).flatten(0, 1)
        wanted_TH = (stream - middle).flatten(0, 1)
        size_T = stream.flatten(0, 1).square().mean(1)
        weight_T = 1 / size_T.clamp(min=1e-2 * float(size_T.mean()))
        return Rows(inputs_TH, *routing(layer.mlp, inputs_TH), wanted_TH, weight_T, is_held_T)

    def _down(self, experts: Any, rows: Rows) -> None:
        """Add the joint ridge solution, its penalty chosen on held-out tokens."""
        given_TH, slots = forward(experts, rows)
        left_TH = rows.wanted - given_TH
        num, hidden, width = experts.down_proj.shape
        matrix, cross = torch.zeros(num * width, num * width), torch.zeros(num * width, hidden)
        for start in range(0, len(left_TH), 8192):
            block = torch.zeros(len(left_TH[start : start + 8192]), num * width)
            for expert, one in enumerate(slots):
                mine = (one.tokens >= start) & (one.tokens < start + len(block))
                columns = slice(expert * width, (expert + 1) * width)
                block[one.tokens[mine] - start, columns] = one.features[mine]
            part = slice(start, start + len(block))
            block *= (rows.weight * ~rows.is_held)[part].sqrt()[:, None]
            matrix += block.T @ block
            root_T = (rows.weight * ~rows.is_held)[part].sqrt()
            cross += block.T @ (left_TH[part] * root_T[:, None])
        values, vectors = torch.linalg.eigh(matrix.double())
        turned, unit = vectors.T @ cross.double(), float(matrix.diagonal().mean())
        best = (rows.energy(left_TH, held=True), None)
        for ridge in RIDGES:
            weights = values.clamp(min=0) + ridge * unit
            update = (vectors @ (turned / weights[:, None])).float().view(num, width, hidden)
            change_TH = torch.zeros_like(left_TH)
            for expert, one in enumerate(slots):
                change_TH.index_add_(0, one.tokens, one.features @ update[expert])
            energy = rows.energy(left_TH - change_TH, held=True)
            if energy < best[0]:
                best = (energy, update)
        if best[1] is not None:
            experts.down_proj += best[1].transpose(1, 2)

    def _up(self, experts: Any, rows: Rows) -> None:
        """Add the best of the first iterates of preconditioned conjugate gradients."""
        given_TH, slots = forward(experts, rows)
        problem, left_TH = UpProblem(experts.down_proj, rows, slots), rows.wanted - given_TH
        pulled = problem.pull(left_TH)
        direction = problem.scaled(pulled)
        update, rho = torch.zeros_like(direction), float((pulled * direction).sum())
        before = rows.energy(left_TH, held=True)
        best: tuple[float, int, Tensor | None] = (before, 0, None)
        for step in range(1, STEPS + 1):
            change_TH = problem.added(direction)
            length = rho / rows.energy(change_TH, held=False)
            update, left_TH = update + length * direction, left_TH - length * change_TH
            energy = rows.energy(left_TH, held=True)
            if energy < best[0]:
                best = (energy, step, update)
            elif step - best[1] >= PATIENCE:
                break
            pulled = problem.pull(left_TH)
            aligned = problem.scaled(pulled)
            following = float((pulled * aligned).sum())
            direction, rho = aligned + following / rho * direction, following
        if best[2] is not None:
            experts.gate_up_proj[:, experts.down_proj.shape[2] :] += best[2]


class UpProblem:
    """The operator of the up projections of one layer, its adjoint and a preconditioner."""

    def __init__(self, down: Tensor, rows: Rows, slots: list[Slots]) -> None:
        self._down, self._rows, self._slots = down, rows, slots
        self._fit_T = rows.weight * ~rows.is_held
        self._factors = [
            _preconditioner(one, rows.inputs, self._fit_T, down[e]) for e, one in enumerate(slots)
        ]

    def added(self, update_EIH: Tensor) -> Tensor:
        """Return what an update adds to each token, shape ``(T, H)``."""
        total_TH = torch.zeros_like(self._rows.wanted)
        for e, one in enumerate(self._slots):
            moved = (self._rows.inputs[one.tokens] @ update_EIH[e].T) * one.slopes
            total_TH.index_add_(0, one.tokens, moved @ self._down[e].T)
        return total_TH

    def pull(self, left_TH: Tensor) -> Tensor:
        """Return the adjoint of what is left over on fitted tokens, shape ``(E, I, H)``."""
        weighted_TH = left_TH * self._fit_T[:, None]
        return torch.stack(
            [
                ((weighted_TH[one.tokens] @ self._down[e]) * one.slopes).T
                @ self._rows.inputs[one.tokens]
                for e, one in enumerate(self._slots)
            ]
        )

    def scaled(self, pulled: Tensor) -> Tensor:
        """Return the preconditioner applied, shape as given."""
        return torch.stack(
            [left @ g @ right for (left, right), g in zip(self._factors, pulled, strict=True)]
        )


def _preconditioner(
    one: Slots, inputs_TH: Tensor, fit_T: Tensor, down_HI: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the two factors of an approximate inverse of one expert's normal matrix."""
    weight, inputs = fit_T[one.tokens], inputs_TH[one.tokens]
    count = max(float((weight > 0).sum()), 1.0)
    outer = (inputs * weight[:, None]).T @ inputs / count
    slopes = one.slopes * (weight > 0)[:, None]
    inner = (slopes.T @ slopes / count) * (down_HI.T @ down_HI)
    return _inverse(inner) / count, _inverse(outer)


def _inverse(matrix: Tensor) -> Tensor:
    damped = matrix.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-30)
    return torch.linalg.inv(damped).float()


def attention(layer: Any, stream: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
    """Return what a layer's attention adds to the stream, a few rows at a time."""
    return torch.cat(
        [
            layer.self_attn(
                layer.input_layernorm(rows), position_embeddings=place, attention_mask=None
            )[0]
            for rows in stream.split(64)
        ]
    )


def theirs_of(layer: Any, stream: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
    """Return the teacher's stream behind one of its layers."""
    middle = stream + attention(layer, stream, place)
    return middle + layer.mlp(layer.post_attention_layernorm(middle))


def routing(block: Any, inputs_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Return gates and ids ``(T, K)`` as Mixtral's router gives them."""
    chances_TE = F.softmax(inputs_TH @ block.gate.weight.T, dim=-1)
    gates_TK, ids_TK = chances_TE.topk(block.gate.top_k, dim=-1)
    return gates_TK / gates_TK.sum(-1, keepdim=True), ids_TK


def forward(experts: Any, rows: Rows) -> tuple[Tensor, list[Slots]]:
    """Return what the experts give together, and the slots of each."""
    total_TH, slots = torch.zeros_like(rows.wanted), []
    width = experts.down_proj.shape[2]
    for expert, tokens, gates in rows.of_experts(len(experts.down_proj)):
        projected = rows.inputs[tokens] @ experts.gate_up_proj[expert].T
        slopes = F.silu(projected[:, :width]) * gates
        features = slopes * projected[:, width:]
        total_TH.index_add_(0, tokens, features @ experts.down_proj[expert].T)
        slots.append(Slots(tokens, features, slopes))
    return total_TH, slots


@torch.no_grad()
def main() -> None:
    num_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
    bench, rows = Bench("embedded"), []
    batches, whole = drawn(num_tokens, 1), bench.whole()["perplexity"]
    for keep, rounds in CELLS:
        student = copy.deepcopy(bench.dropped("reap", keep))
        dropped = bench.quality(student)["perplexity"]
        start = time.process_time()
        Trial(bench, batches, rounds).run(student)
        seconds = time.process_time() - start
        after = bench.quality(student)["perplexity"]
        what = f"down, up, {rounds} times" if rounds else "down"
        closed = f"{100 * (dropped - after) / (dropped - whole):.0f} %"
        rows.append([f"{keep:.0%}", what, f"{after:.2f}", closed, f"{seconds:.0f} s"])
        print(rows[-1], flush=True)
    header = ["kept", "refitted", "perplexity", "gap closed", "CPU"]
    note = f"Embedded model, plans by reap, {num_tokens:,} tokens of training text, one draw."
    (RESULTS / "refit_up.md").write_text(f"{markdown(header, rows)}\n\n{note}\n")


if __name__ == "__main__":
    main()
