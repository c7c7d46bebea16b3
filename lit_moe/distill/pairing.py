"""Which expert of the student stems from which expert of the teacher."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, find_sites
from lit_moe.errors import LitMoEError
from lit_moe.plan import KeepPlan
from lit_moe.plans import Plan, only_drops
from lit_moe.sharding.partitions import whole_shape


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
    def of(
        cls,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        plan: Plan | None,
        origin: Plan | None = None,
    ) -> Pairing:
        """Pair experts by their original ids.

        Args:
            student: maybe shrunk by ``plan``; or whole, with the dropped experts hidden.
            teacher: the model that the student was made from.
            plan: what was dropped from the student as it was loaded; None if nothing was.
            origin: which experts of the teacher that loaded student had; None if all.

        Raises:
            LitMoEError: if the two have other layers, or expert counts that no plan explains, or
                experts were merged.
        """
        kept, had = (
            only_drops(p, purpose="comparing experts or routers with the teacher's")
            for p in (plan, origin)
        )
        mine, theirs = find_sites(student), {site.name: site for site in find_sites(teacher)}
        absent = [site.name for site in mine if site.name not in theirs]
        if absent or len(mine) != len(theirs):
            raise LitMoEError(
                f"the student has {len(mine)} MoE layers and the teacher {len(theirs)} (of other "
                f"names: {absent[:3]}); experts can be compared only between a model and what it "
                "was before"
            )
        return cls(tuple(_paired(site, theirs[site.name], kept, had) for site in mine))


class PairingMemory:
    """The pairing of the last step, which holds until experts are cut or a plan changes.

    Looking for the MoE layers takes as long as some percent of a step of a small model.
    """

    def __init__(self) -> None:
        self._asked: tuple[object, ...] = ()
        self._pairing = Pairing(())

    def of(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        plan: Plan | None,
        origin: Plan | None = None,
    ) -> Pairing:
        """Return :meth:`Pairing.of` these."""
        asked = (id(student), id(teacher), plan, origin)
        layers = self._pairing.layers
        if asked != self._asked or not all(_is_as_large(student, x.student) for x in layers):
            self._pairing, self._asked = Pairing.of(student, teacher, plan, origin), asked
        return self._pairing


def _is_as_large(model: PreTrainedModel, site: MoESite) -> bool:
    """Whether the tensors of a layer still are those of so many experts."""
    for axis in site.axes:
        size = whole_shape(model.get_parameter_or_buffer(axis.name))[axis.dim]
        if axis.kind != "id_table" and size != axis.real * axis.rows_per_expert + axis.tail:
            return False
    return True


def _paired(
    student: MoESite, teacher: MoESite, plan: KeepPlan | None, origin: KeepPlan | None
) -> LayerPairing:
    had = _ids(origin, student.name, teacher.num_experts)
    kept = _ids(plan, student.name, len(had))
    if max(had, default=0) < teacher.num_experts and max(kept, default=0) < len(had):
        originals = tuple(had[expert] for expert in kept)
        if student.num_experts == len(kept):
            return LayerPairing(student, teacher, tuple(range(len(kept))), originals)
        if student.num_experts == len(had):  # dropped experts are hidden, not cut out
            return LayerPairing(student, teacher, kept, originals)
    known = [f"keeps {len(p.kept[student.name])}" for p in (plan, origin) if p is not None]
    raise LitMoEError(
        f"{student.name} has {student.num_experts} experts in the student and "
        f"{teacher.num_experts} in the teacher, and no plan of this run or in the student's folder "
        f"says which of them are left{f' (it {known[0]})' if known else ''}; start from the whole "
        "model and drop experts in the same run, or from a folder that lit-moe exported"
    )


def _ids(plan: KeepPlan | None, layer: str, num_experts: int) -> tuple[int, ...]:
    everyone = tuple(range(num_experts))
    return everyone if plan is None else tuple(plan.kept.get(layer, everyone))
