"""The refit as one call: what stays of a model learns, in closed form, to do what it did before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig

from lit_moe.adapters import find_sites
from lit_moe.errors import LitMoEError
from lit_moe.inference import body_inputs, evaluating
from lit_moe.models import check_unwritten
from lit_moe.refit.collective import agreed, all_sum_of
from lit_moe.refit.job import OnLayer as OnLayer
from lit_moe.refit.job import RefitJob, Target
from lit_moe.refit.judge import held_out_loss
from lit_moe.refit.memory import LayerSize, SolverChoice, choose_solver
from lit_moe.refit.options import RefitOptions
from lit_moe.refit.parallel import ParallelRefit
from lit_moe.refit.progress import Progress, signature_of
from lit_moe.refit.relatives import check_relatives, find_targets
from lit_moe.refit.report import LayerRefit, RefitReport
from lit_moe.refit.rows import Rows
from lit_moe.refit.sequential import SequentialRefit
from lit_moe.refit.weights import DownProjections, Snapshot, own_down_projections
from lit_moe.vmoe.configuration import num_tokens


@torch.no_grad()
def refit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    options: RefitOptions | None = None,
    *,
    progress_folder: str | Path | None = None,
    on_layer: OnLayer | None = None,
) -> RefitReport:
    """Re-fit the down projections of the student's experts, in place, without gradients.

    Layer by layer, ridge regression on the features of the experts that stayed makes the smaller
    block write into the residual stream what the teacher's block wrote. Shapes, routers and file
    format do not change. With a process group every rank must call this with its own rows, dealt in
    turn; all get the same weights.

    Args:
        student: a smaller model: experts dropped or merged, weights zeroed, fewer experts active.
        teacher: the model it was made from, or an earlier ancestor with the same layers; may share
            tensors with the student, except for its experts.
        batches: dictionaries with ``input_ids`` (B, S) and optionally ``attention_mask``, decoder
            inputs, or ``pixel_values``; some ten thousand tokens, more for wide experts.
        options: see :class:`RefitOptions`.
        progress_folder: where solved layers are kept until the end, so that the same call goes on
            after a kill; also for what exceeds the memory budget.
        on_layer: called after each layer with its name and record.

    Raises:
        LitMoEError: if the models are no relatives, the memory budget is too small, or a given
            ``lam`` leaves a system singular.
        UnsupportedModelError: if nothing in the student can be refitted.
        CalibrationError: if there are too few rows.
    """
    if isinstance(options, Mapping):
        raise LitMoEError("options must be lit_moe.refit.RefitOptions(...), not a dictionary")
    options = options or RefitOptions()
    if student is teacher:
        raise LitMoEError(
            "student and teacher are the same model, so there is nothing to correct; keep a copy "
            "from before pruning (lit_moe.sharing_copy) or load the teacher from its folder"
        )
    check_unwritten(teacher)
    rank, world_size = _rank(), _world_size()
    rows = Rows(
        list(batches),
        options.held_out,
        student.device,
        inputs=body_inputs(student),
        rank=rank,
        world_size=world_size,
    )
    sites = find_sites(student)
    check_relatives(teacher, student, sites)
    targets, skipped = find_targets(teacher, student, sites, rows.batches[0], options)
    choice = _choice(student, targets, options)
    own_down_projections(student, teacher, [target.site for target in targets])
    report = RefitReport(options.mode, solver=f"{choice.name}: {choice.reason}", skipped=skipped)
    counts = rows.count_tokens(_tokens_per_image(student))
    report.tokens, report.held_out_tokens = (all_sum_of(n) for n in counts)
    progress = _progress(student, teacher, rows, options, progress_folder)
    folder = None if progress_folder is None else Path(progress_folder)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    job = RefitJob(student, teacher, targets, rows, options, choice, progress, folder)
    return _judged(job, report, on_layer)


def _judged(job: RefitJob, report: RefitReport, on_layer: OnLayer | None) -> RefitReport:
    """Run; take everything back if held-out rows got worse, or if anything breaks."""

    def note(name: str, record: LayerRefit) -> None:
        report.layers[name] = record
        if on_layer is not None:
            on_layer(name, record)

    sites = [target.site for target in job.targets]
    before = Snapshot(job.student, sites, job.options, job.folder)
    held = job.rows.held_batches()
    report.loss_before = held_out_loss(job.student, job.teacher, held)
    try:
        with evaluating(job.student), evaluating(job.teacher):
            kind = SequentialRefit if job.options.mode == "sequential" else ParallelRefit
            kind(job).run(note)
        report.loss_after = held_out_loss(job.student, job.teacher, held)
    except BaseException:
        before.restore_()
        raise
    if not report.loss_after <= report.loss_before:
        before.restore_()
        report.kept = False
    job.progress.clear()
    return report


def _choice(
    student: PreTrainedModel, targets: Sequence[Target], options: RefitOptions
) -> SolverChoice:
    sizes = [DownProjections(student, t.site, options).size for t in targets]
    largest = LayerSize(*(max(getattr(s, n) for s in sizes) for n in vars(sizes[0])))
    return choose_solver(
        largest, options, at_once=len(targets) if options.mode == "parallel" else 1
    )


def check_budget(student: PreTrainedModel, options: RefitOptions) -> None:
    """Refuse a memory budget that could not hold one token's experts, however many will stay.

    Raises:
        LitMoEError: naming the number that is needed at least.
    """
    sites = find_sites(student)
    sizes = [
        replace(DownProjections(student, site, options).size, num_experts=site.top_k)
        for site in sites
    ]
    largest = max(sizes, key=lambda size: size.num_experts * size.width)
    choose_solver(largest, options, at_once=len(sites) if options.mode == "parallel" else 1)


def _progress(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Rows,
    options: RefitOptions,
    folder: str | Path | None,
) -> Progress:
    if folder is None:
        return Progress(None, "")
    signature = agreed(signature_of(student, teacher, rows.batches, options))
    return Progress(Path(folder), signature, writes=_rank() == 0)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _tokens_per_image(model: PreTrainedModel) -> int:
    return num_tokens(model.config) if isinstance(model.config, ViTConfig) else 1
