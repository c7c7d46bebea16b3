"""Which expert of the student stems from which expert of the teacher."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, find_sites
from lit_moe.errors import LitMoEError
from lit_moe.plan import KeepPlan
from lit_moe.plans import Plan, only_drops


@dataclass(frozen=True)
class LayerPairing:
    """One MoE layer of both models.

    Attributes:
        student: the layer in the student.
        teacher: the layer in the teacher.
        student_ids: experts of the student, ascending.
        teacher_ids: the expert of the teacher that each of them was, in the same order.
    """

    student: MoESite
    teacher: MoESite
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.student.name


@dataclass(frozen=True)
class Pairing:
    """All MoE layers of both models, in module order."""

    layers: tuple[LayerPairing, ...]

    @classmethod
    def of(cls, student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan | None) -> Pairing:
        """Pair experts by their original ids.

        Args:
            student: maybe shrunk by ``plan``; or whole, with the dropped experts hidden.
            teacher: the model that the plan was made for.
            plan: None if no expert was dropped.

        Raises:
            LitMoEError: if the two have other layers, or expert counts that no plan explains, or
                experts were merged.
        """
        kept = only_drops(plan, purpose="comparing experts or routers with the teacher's")
        mine, theirs = find_sites(student), {site.name: site for site in find_sites(teacher)}
        absent = [site.name for site in mine if site.name not in theirs]
        if absent or len(mine) != len(theirs):
            raise LitMoEError(
                f"the student has {len(mine)} MoE layers and the teacher {len(theirs)} (of other "
                f"names: {absent[:3]}); experts can be compared only between a model and what it "
                "was before"
            )
        return cls(tuple(_paired(site, theirs[site.name], kept) for site in mine))


def _paired(student: MoESite, teacher: MoESite, plan: KeepPlan | None) -> LayerPairing:
    everyone = tuple(range(teacher.num_experts))
    kept = everyone if plan is None else plan.kept.get(student.name, everyone)
    if student.num_experts == len(kept):
        return LayerPairing(student, teacher, tuple(range(len(kept))), tuple(kept))
    if student.num_experts == teacher.num_experts:  # dropped experts are hidden, not cut out
        return LayerPairing(student, teacher, tuple(kept), tuple(kept))
    raise LitMoEError(
        f"{student.name} has {student.num_experts} experts in the student and "
        f"{teacher.num_experts} in the teacher, and no plan of this run says which of them are "
        f"left{'' if plan is None else f' (it keeps {len(kept)})'}; start from the whole model and "
        "drop experts in the same run"
    )
