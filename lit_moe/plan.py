"""The plan: what a pruning method decided, as a small frozen value.

Everything before a plan only reads the model; everything after it never sees a statistic. A plan
is compared, saved, broadcast, replayed from a file, and put into checkpoints and reports.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_moe.errors import PlanError

FORMAT = "lit-moe/keep-plan/1"


@dataclass(frozen=True)
class KeepPlan:
    """Which experts stay.

    Attributes:
        kept: MoE layer name -> ascending expert ids in the numbering of the unpruned model.
        num_experts: MoE layer name -> number of routed experts before pruning.
        family: model type that the plan was made for, for instance ``mixtral``; None if unknown.
            Like ``source`` it says where a decision comes from, not what it is: equal decisions
            are equal plans.
        source: folder or hub id of that model; None if unknown.

    Raises:
        PlanError: if an id is out of range, repeated or out of order, a layer keeps nothing, or
            the two mappings name different layers.
    """

    kept: Mapping[str, tuple[int, ...]]
    num_experts: Mapping[str, int]
    family: str | None = field(default=None, compare=False)
    source: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", {k: tuple(v) for k, v in self.kept.items()})
        object.__setattr__(self, "num_experts", dict(self.num_experts))
        if set(self.kept) != set(self.num_experts):
            odd = sorted(set(self.kept) ^ set(self.num_experts))
            raise PlanError(f"plan names layers {odd} in only one of `kept` and `num_experts`")
        for layer, ids in self.kept.items():
            _check_ids(layer, ids, self.num_experts[layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    @classmethod
    def identity(cls, num_experts: Mapping[str, int]) -> KeepPlan:
        """Return the plan that keeps every expert."""
        return cls({k: tuple(range(n)) for k, n in num_experts.items()}, num_experts)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is dropped."""
        return all(len(ids) == self.num_experts[layer] for layer, ids in self.kept.items())

    @property
    def is_uniform(self) -> bool:
        """Whether all layers keep the same number of experts."""
        return len({len(ids) for ids in self.kept.values()}) <= 1

    @property
    def counts(self) -> dict[str, int]:
        """Layer name -> number of experts kept."""
        return {layer: len(ids) for layer, ids in self.kept.items()}

    @property
    def keep_ratio(self) -> float:
        """Kept experts over all experts, in (0, 1]."""
        return sum(self.counts.values()) / sum(self.num_experts.values())

    def dropped(self, layer: str) -> tuple[int, ...]:
        """Return the ascending ids of the experts of ``layer`` that go."""
        stay = set(self.kept[layer])
        return tuple(e for e in range(self.num_experts[layer]) if e not in stay)

    def members(self, layer: str) -> tuple[tuple[int, ...], ...]:
        """Return for each expert that stays the ids of the old ones it is made of: its own."""
        return tuple((expert,) for expert in self.kept[layer])

    def made_for(self, *, family: str | None, source: str | None = None) -> KeepPlan:
        """Return the same decision with the model that it was made for."""
        return replace(self, family=family, source=source)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, as stored in JSON and in checkpoints."""
        layers = {
            layer: {"num_experts": self.num_experts[layer], "kept": list(ids)}
            for layer, ids in self.kept.items()
        }
        model = {"family": self.family, "source": self.source}
        return {"format": FORMAT, "model": model, "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KeepPlan:
        """Inverse of :meth:`to_dict`; also of plans that do not name their model.

        Raises:
            PlanError: if ``data`` is not a keep plan of this format.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(f"not a keep plan: expected format {FORMAT!r}, found {found!r}")
        try:
            layers = data["layers"]
            kept = {k: tuple(int(e) for e in v["kept"]) for k, v in layers.items()}
            num_experts = {k: int(v["num_experts"]) for k, v in layers.items()}
            model = data.get("model") or {}
            names = {key: _optional_text(model.get(key)) for key in ("family", "source")}
            return cls(kept, num_experts, **names)
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"keep plan is damaged: {error!r} is missing or malformed") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> KeepPlan:
        """Read a plan written by :meth:`save`.

        Raises:
            PlanError: if the file is missing, is not JSON, or holds no keep plan.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise PlanError(f"plan file {path} does not exist") from error
        except json.JSONDecodeError as error:
            raise PlanError(f"plan file {path} is not JSON: {error}") from error

    def check_fits(self, num_experts: Mapping[str, int], *, family: str | None = None) -> None:
        """Refuse a plan made for another model.

        Args:
            num_experts: layer name -> expert count of the model at hand.
            family: its model type; compared only where the plan knows its own.

        Raises:
            PlanError: naming both families, or the first layer that differs.
        """
        if self.family and family and self.family != family:
            raise PlanError(
                f"plan was made for another model: its family is {self.family!r}, this model is "
                f"{family!r}; replay it on a {self.family} model, or leave the plan out to "
                "calibrate this one"
            )
        for layer in sorted(set(self.num_experts) | set(num_experts)):
            mine, theirs = self.num_experts.get(layer), num_experts.get(layer)
            if mine != theirs:
                raise PlanError(
                    f"plan was made for another model: layer {layer!r} has "
                    f"{_count(mine)} in the plan and {_count(theirs)} in the model"
                )


def _optional_text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} (a name or null is expected)")
    return value


def _count(num: int | None) -> str:
    return "no entry" if num is None else f"{num} experts"


def _check_ids(layer: str, ids: tuple[int, ...], num_experts: int) -> None:
    if not ids:
        raise PlanError(f"plan keeps no expert in layer {layer!r}; at least 1 must stay")
    if list(ids) != sorted(set(ids)):
        raise PlanError(f"kept experts of layer {layer!r} must ascend without repeats: {ids}")
    if ids[0] < 0 or ids[-1] >= num_experts:
        raise PlanError(f"layer {layer!r} has experts 0 to {num_experts - 1}, plan keeps {ids}")
