"""The schema of report.json, as dataclasses: every field is a key of the same name."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

import lit_moe
from lit_moe.evaluate import Quality, TaskQuality
from lit_moe.evaluate.images import ImageQuality
from lit_moe.grouping.report import MergeReport
from lit_moe.plan import KeepPlan
from lit_moe.refit.report import RefitReport
from lit_moe.report.coding import from_plain, to_plain
from lit_moe.search.report import SearchReport
from lit_moe.sparsity.report import SparsityReport

PACKAGES = ("torch", "transformers", "lightning", "deepspeed", "numpy")
"""Packages whose versions a report names, if they are installed."""


@dataclass
class Change:
    """A number before pruning and at the end; None where it was not measured."""

    before: int | None = None
    after: int | None = None


@dataclass
class LayerExperts:
    """Routed experts of one layer.

    Attributes:
        before: how many there were.
        kept: ids that stayed, ascending, in the numbering of the unpruned model.
    """

    before: int
    kept: list[int]


@dataclass
class Calibration:
    """How the experts were observed.

    Attributes:
        tokens: observed, padding excluded; 0 for criteria that look at weights only.
        predicted: tokens among them that gradients are of, with labels those that have one; None
            without a pass of gradients.
    """

    tokens: int = 0
    predicted: int | None = None


@dataclass
class Export:
    """The exported folder.

    Attributes:
        path: of the folder.
        max_abs_logit_difference: between the model in memory and the reloaded folder; None if it
            was not verified.
        layout: ``plain``, ``per_layer_config`` or ``padded``.
    """

    path: str
    max_abs_logit_difference: float | None = None
    layout: str = "plain"


@dataclass
class RoundReport:
    """One round of dropping.

    Attributes:
        round: from 1.
        step: of training at which it was.
        tokens_before: that were trained on before it, on all ranks.
        experts: routed experts of all layers that stayed.
        load_cv: standard deviation over mean of the tokens per expert just before it, mean over
            layers; None if nothing was observed.
    """

    round: int
    step: int
    tokens_before: int
    experts: int
    load_cv: float | None = None


@dataclass
class RunReport:
    """Everything a run knows about what it did; grows while the run goes on.

    Attributes:
        lit_moe: version of lit-moe.
        source: folder or hub id that the model came from.
        family: model type, for instance ``mixtral``.
        seed: of the run.
        status: ``finished`` once every part of the run is through; ``interrupted`` by an error or
            the keyboard; a killed run stays ``running``.
        versions: package -> version, with ``python``.
        seconds: phase -> wall-clock time, in the order of the phases.
        calibration: how the experts were observed.
        criterion: what scored them, None if nothing was pruned.
        parameters: of the whole model.
        active_parameters: without the routed experts that one token is not sent to.
        bytes: of parameters and buffers in memory.
        experts: layer -> experts before and kept.
        rounds: of dropping, if experts went in rounds.
        unrouted: layer -> experts that saw no token during calibration; only layers with some.
        protected: layer -> experts that were kept whatever their score; only layers with some.
        shared_experts: what happened to experts that every token uses.
        refit: what the closed-form refit did, None if there was none.
        sparsity: zeros among the weights of experts, None if none were asked for.
        merging: which experts were merged, None if none were asked for.
        search: how an evolutionary search went, None if there was none.
        quality: stage (``before``, ``pruned``, ``thinned`` where weights went after experts,
            ``refitted``, ``recovered``) -> quality, in order.
        tasks: stage -> ``0-shot``, ``5-shot``, ... -> right answers; empty without a task.
        images: stage -> how well images are classified; empty for language models.
        export: the exported folder, None if there is none.
        warnings: sentences that a reader of the numbers must know.
    """

    lit_moe: str
    source: str
    family: str
    seed: int | None = None
    status: Literal["running", "finished", "interrupted"] = "running"
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    criterion: str | None = None
    parameters: Change = field(default_factory=Change)
    active_parameters: Change = field(default_factory=Change)
    bytes: Change = field(default_factory=Change)
    experts: dict[str, LayerExperts] = field(default_factory=dict)
    rounds: list[RoundReport] = field(default_factory=list)
    unrouted: dict[str, list[int]] = field(default_factory=dict)
    protected: dict[str, list[int]] = field(default_factory=dict)
    shared_experts: str = "not scored, not removed"
    refit: RefitReport | None = None
    sparsity: SparsityReport | None = None
    merging: MergeReport | None = None
    search: SearchReport | None = None
    quality: dict[str, Quality] = field(default_factory=dict)
    tasks: dict[str, dict[str, TaskQuality]] = field(default_factory=dict)
    images: dict[str, ImageQuality] = field(default_factory=dict)
    export: Export | None = None
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, *, source: str, family: str, seed: int | None) -> RunReport:
        """Return the report of a run that begins now, with the versions of this environment."""
        return cls(
            lit_moe=lit_moe.__version__,
            source=source,
            family=family,
            seed=seed,
            versions=installed_versions(),
        )

    def record_plan(self, plan: KeepPlan) -> None:
        """Fill in ``experts``."""
        self.experts = {k: LayerExperts(plan.num_experts[k], list(plan.kept[k])) for k in plan}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values. Numbers that JSON lacks become ``"inf"``, ``"-inf"``, ``"nan"``."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunReport:
        """Inverse of :meth:`to_dict`.

        Raises:
            LitMoEError: if a key is missing or unknown, or a value is of the wrong kind.
        """
        return from_plain(cls, data, "report")


def installed_versions() -> dict[str, str]:
    """Return package -> version for the packages that matter to a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
