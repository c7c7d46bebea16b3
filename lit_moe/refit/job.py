"""Everything that one refit works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from lit_moe.adapters.site import MoESite
from lit_moe.refit.memory import SolverChoice
from lit_moe.refit.options import RefitOptions
from lit_moe.refit.outlets import Outlet
from lit_moe.refit.progress import Progress
from lit_moe.refit.report import LayerRefit
from lit_moe.refit.rows import Rows
from lit_moe.refit.streams import Stream

OnLayer = Callable[[str, LayerRefit], None]


@dataclass(frozen=True)
class Target:
    """Where one layer is compared with the teacher.

    Attributes:
        site: of the student.
        module: dotted name of the module whose outputs are compared, in both models.
        scale: what one unit of gated features times down projections adds there.
        kind: ``stream`` or ``block``.
    """

    site: MoESite
    module: str
    scale: float
    kind: str

    @classmethod
    def of(cls, site: MoESite, outlet: Outlet, stream: Stream | None) -> Target:
        """Return the stream as target; where there is none, what the experts add up to."""
        if stream is None or outlet.module != site.name:
            return cls(site, outlet.module, outlet.gain, "block")
        return cls(site, stream.module, stream.scale * outlet.gain, "stream")


@dataclass(frozen=True)
class RefitJob:
    """The parts of one refit.

    Attributes:
        student: the smaller model; its down projections are changed.
        teacher: any ancestor with the same hidden size and layer names.
        targets: layers to refit, in the order in which the student meets them.
        rows: calibration rows.
        options: what was asked.
        choice: solver for all layers.
        progress: solved layers of an earlier, broken run.
        folder: for features beyond the memory budget; None for the system's temporary folder.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    targets: Sequence[Target]
    rows: Rows
    options: RefitOptions
    choice: SolverChoice
    progress: Progress
    folder: Path | None = None
