"""Re-fits router rows: the smaller model's tokens are sent where the teacher would send them.

The inputs of a router change when layers before it were changed. Ridge regression of what the
teacher's logits for the experts that stayed differ by, on the student's router inputs, turns the
rows towards the teacher's choices. Shapes and the kind of routing stay.

T tokens, E experts of the student, N of the teacher, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.adapters.site import MoESite
from lit_moe.refit.collective import all_sum, from_first, on_all_ranks
from lit_moe.refit.report import LayerRefit
from lit_moe.refit.ridge import SingularGramError, choose_penalty, penalised

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


class RouterProblem:
    """The least-squares problem of one router.

    Args:
        student: the smaller model; its router is changed by :meth:`solve`.
        teacher: the model that the experts come from.
        site: of the student.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, site: MoESite) -> None:
        self._site = site
        self._router = student.get_submodule(site.router)
        self._adapter = adapter_for(student.config)
        self._rows = self._adapter.router_weight(student, site)
        theirs = teacher.get_submodule(site.router).state_dict()
        name = site.rows("router")[0].name.removeprefix(f"{site.router}.")
        self._ids = matching_rows(self._rows, theirs[name]) if name in theirs else None
        self._pieces: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @property
    def matched(self) -> bool:
        """Whether every row of the student is a row of the teacher."""
        return self._ids is not None

    def add(
        self, args: Sequence[object], teacher_output: object, fit: Tensor, held: Tensor
    ) -> None:
        """Add one batch: the student's router inputs and what the teacher's router gave."""
        assert self._ids is not None
        inputs_TH, ours_TE = self._look(args)
        theirs_TN = self._adapter.router_logits(teacher_output).float()
        theirs_TE = theirs_TN.reshape(len(ours_TE), -1)[:, self._ids]
        missing = self._centred(theirs_TE) - self._centred(ours_TE)
        self._pieces.append((inputs_TH, missing, fit, held))

    def solve(self, args: Sequence[object]) -> tuple[Tensor | None, LayerRefit]:
        """Collective: change the rows if held-out tokens agree; return the update ``(E, H)``.

        Args:
            args: inputs of one batch, on which the change is checked to do what it should.
        """
        record = LayerRefit(solver="joint", target="router logits")
        matrix, cross, unit = self._moments()
        record.held_out_before = self._held(None)
        tried: dict[float, tuple[Tensor, float]] = {}

        def loss(lam: float) -> float:
            try:
                solution = penalised(matrix, lam, unit).solve(cross)
            except SingularGramError:
                return math.inf
            solution = from_first(solution)
            tried[lam] = (solution, self._held(solution))
            return tried[lam][1]

        record.lam = choose_penalty(loss)
        if record.lam not in tried:
            record.lam, record.reason = None, "its inputs give a singular system"
            return None, record
        update_HE, record.held_out_after = tried[record.lam]
        if not record.held_out_after < record.held_out_before:
            record.reason = "the logits of held-out tokens did not come closer to the teacher's"
            return None, record
        record.kept = self.apply_(update_HE.T, args)
        record.reason = "" if record.kept else "its logits are not linear in its rows"
        return (update_HE.T.contiguous() if record.kept else None), record

    def apply_(self, update_EH: Tensor, args: Sequence[object]) -> bool:
        """Add an update to the rows; take it back, and return False, if logits do not follow."""
        inputs_TH, before_TE = self._look(args)
        own = self._rows.detach().clone()
        with torch.no_grad():
            self._rows.add_(update_EH.to(self._rows))
        expected = inputs_TH @ (self._rows - own).float().T
        change = self._look(args)[1] - before_TE
        error = float((change - expected).norm() / expected.norm().clamp(min=1e-30))
        if not on_all_ranks(error <= _TOLERANCE.get(own.dtype, 5e-2)):
            with torch.no_grad():
                self._rows.copy_(own)
            return False
        return True

    def _look(self, args: Sequence[object]) -> tuple[Tensor, Tensor]:
        """Return router inputs ``(T, H)`` and logits ``(T, E)``, float32."""
        hidden = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())
        logits = self._adapter.router_logits(self._router.forward(*args)).float()
        inputs_TH = hidden.reshape(-1, hidden.shape[-1]).float()
        return inputs_TH, logits.reshape(len(inputs_TH), -1)[:, : self._site.num_experts]

    def _centred(self, logits_TE: Tensor) -> Tensor:
        """Softmax does not see what all logits of a token have in common."""
        if self._site.routing == "sigmoid":
            return logits_TE
        return logits_TE - logits_TE.mean(1, keepdim=True)

    def _moments(self) -> tuple[Tensor, Tensor, float]:
        hidden, experts = self._pieces[0][0].shape[1], self._pieces[0][1].shape[1]
        both = self._rows.new_zeros(hidden, hidden + experts, dtype=torch.float64)
        for inputs, missing, fit, _ in self._pieces:
            both += inputs.T.double() @ (torch.cat([inputs, missing], 1) * fit[:, None]).double()
        both = all_sum(both)
        matrix, cross = both[:, :hidden].contiguous(), both[:, hidden:].contiguous()
        return matrix, cross, float(matrix.diagonal().mean())

    def _held(self, update_HE: Tensor | None) -> float:
        total = torch.zeros(2, dtype=torch.float64)
        for inputs, missing, _, held in self._pieces:
            left = missing if update_HE is None else missing - inputs @ update_HE.to(inputs.dtype)
            total += torch.stack(
                [left.square().mean(1).double() @ held.double(), held.double().sum()]
            )
        total = all_sum(total)
        return float(total[0] / total[1].clamp(min=1e-30))


def matching_rows(ours_EH: Tensor, theirs_NH: Tensor) -> list[int] | None:
    """Return for each row the index of the equal one among others; None if one has no match.

    >>> matching_rows(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [2.0], [3.0]]))
    [2, 0]
    """
    if ours_EH.shape[1:] != theirs_NH.shape[1:]:
        return None
    equal_EN = (ours_EH[:, None] == theirs_NH[None].to(ours_EH)).flatten(2).all(2)
    if not bool(equal_EN.any(1).all()):
        return None
    return equal_EN.int().argmax(1).tolist()
