"""All kinds of plans, told apart by the format that they are stored in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_moe import merge_plan, plan
from lit_moe.errors import PlanError
from lit_moe.merge_plan import MergePlan
from lit_moe.plan import KeepPlan

Plan = KeepPlan | MergePlan

_KINDS: dict[str, type[KeepPlan] | type[MergePlan]] = {
    plan.FORMAT: KeepPlan,
    merge_plan.FORMAT: MergePlan,
}


def plan_from_dict(data: Mapping[str, Any]) -> Plan:
    """Return the plan that ``to_dict`` of its class gave.

    Raises:
        PlanError: if ``data`` is no plan, or of a format that this version does not know.
    """
    found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
    if found not in _KINDS:
        raise PlanError(f"not a plan: expected a format of {sorted(_KINDS)}, found {found!r}")
    return _KINDS[str(found)].from_dict(data)


def load_plan(path: str | Path) -> Plan:
    """Read a plan of any kind, as its ``save`` wrote it.

    Raises:
        PlanError: if the file is missing or unreadable, or holds no plan.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return MergePlan.load(path)
    try:
        return plan_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise PlanError(f"plan file {path} does not exist") from error
    except json.JSONDecodeError as error:
        raise PlanError(f"plan file {path} is not JSON: {error}") from error


def only_drops(found: Plan | None, *, purpose: str) -> KeepPlan | None:
    """Return a plan under which every expert that is there is one that was there before.

    Args:
        found: any plan, None if the model is whole.
        purpose: what needs it, for the message.

    Raises:
        PlanError: if experts were merged.
    """
    if not isinstance(found, MergePlan):
        return found
    kept = found.as_keep_plan()
    if kept is None:
        raise PlanError(
            f"{purpose} needs experts that are what they were, but this model's were merged: "
            f"{_example(found)}"
        )
    return kept


def _example(found: MergePlan) -> str:
    layer = next(iter(found))
    groups = found.members(layer)
    largest = max(groups, key=len)
    return f"expert {groups.index(largest)} of {layer} is made of {list(largest)}"
