"""Whether two models are related closely enough for one to teach the other's layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError, UnsupportedModelError
from lit_moe.inference import evaluating, run_body
from lit_moe.plan import KeepPlan
from lit_moe.refit.collective import from_first_object
from lit_moe.refit.job import Target
from lit_moe.refit.options import RefitOptions
from lit_moe.refit.outlets import find_outlet
from lit_moe.refit.streams import find_stream
from lit_moe.stats.features import check_linear
from lit_moe.stats.layers import layer_of

_PROBED = 16


@torch.no_grad()
def check_relatives(
    teacher: PreTrainedModel, student: PreTrainedModel, sites: Sequence[MoESite]
) -> None:
    """Refuse a teacher whose layers do not correspond to the student's.

    The teacher need not be an MoE: a dense model with layers of the same names will do.

    Raises:
        LitMoEError: naming the first thing that differs.
    """
    _check_not_swapped(teacher, sites)
    check_sizes(teacher.config, student.config)
    ours, theirs = (_embedding(model) for model in (student, teacher))
    if ours is not None and theirs is not None and ours.shape != theirs.shape:
        raise LitMoEError(
            f"teacher and student are no relatives: embeddings of shape {tuple(theirs.shape)} and "
            f"{tuple(ours.shape)}; give the model that the student was made from"
        )
    names = dict(teacher.named_modules())
    for site in sites:
        for name in (site.name, layer_of(student, site) or site.name):
            if name not in names:
                raise LitMoEError(
                    f"teacher and student are no relatives: the teacher "
                    f"({teacher.config.model_type}) has no module {name!r}; give the model that "
                    "the student was made from"
                )
    if ours is not None and theirs is not None:
        _check_not_strangers(ours, theirs)


def check_sizes(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Refuse a teacher of other sizes by its config, before its weights are read.

    Raises:
        LitMoEError: naming the first size that differs.
    """
    ours, theirs = student.get_text_config(), teacher.get_text_config()
    for name in ("hidden_size", "vocab_size", "image_size", "patch_size", "num_channels"):
        pair = getattr(theirs, name, None), getattr(ours, name, None)
        if None not in pair and pair[0] != pair[1]:
            raise LitMoEError(
                f"teacher and student are no relatives: {name} is {pair[0]} in the teacher "
                f"({teacher.model_type}) and {pair[1]} in the student; give the model that the "
                "student was made from"
            )


def check_expert_ids(teacher: KeepPlan, student: KeepPlan) -> None:
    """Refuse a teacher without all of the student's experts, by the plans that made both.

    Layers whose plans count experts of different models are not compared.

    Raises:
        LitMoEError: naming the first layer where an expert is missing.
    """
    for layer, ids in student.kept.items():
        if teacher.num_experts.get(layer) != student.num_experts[layer]:
            continue
        missing = sorted(set(ids) - set(teacher.kept[layer]))
        if missing:
            raise LitMoEError(
                f"teacher and student are no relatives: by their folders' plans the student has "
                f"experts {list(ids)} of {layer} and the teacher {list(teacher.kept[layer])}, "
                f"without {missing}; give the model that the student was made from"
            )


def _check_not_swapped(teacher: PreTrainedModel, sites: Sequence[MoESite]) -> None:
    """Refuse a teacher with fewer experts than the student; a dense teacher has none to count."""
    try:
        theirs = {site.name: site.num_experts for site in find_sites(teacher)}
    except LitMoEError:
        return
    for site in sites:
        if theirs.get(site.name, site.num_experts) < site.num_experts:
            raise LitMoEError(
                f"the teacher has {theirs[site.name]} experts in {site.name} and the student "
                f"{site.num_experts}: are the two swapped? refit(student, teacher, batches) "
                "changes the first"
            )


def is_unchanged(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Whether a student still is what :func:`lit_moe.models.sharing_copy` copied."""
    if student.config.to_dict() != teacher.config.to_dict():
        return False
    theirs = dict(teacher.named_parameters())
    return all(
        name in theirs and (theirs[name] is p or torch.equal(theirs[name], p))
        for name, p in student.named_parameters()
    )


def _check_not_strangers(ours: Tensor, theirs: Tensor) -> None:
    """Refuse a teacher of the right size whose embeddings point elsewhere."""
    likeness = torch.nn.functional.cosine_similarity(
        ours[:1024].flatten().double(), theirs[:1024].flatten().double(), dim=0
    )
    if float(likeness) < 0.5:
        raise LitMoEError(
            "teacher and student are no relatives: their sizes agree, but the cosine between their "
            f"embeddings is {float(likeness):.2f}; give the model that the student was made from"
        )


def find_targets(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    sites: Sequence[MoESite],
    batch: dict[str, Tensor],
    options: RefitOptions,
) -> tuple[list[Target], dict[str, str]]:
    """Collective: return where each layer is compared, in order, and why others are left out.

    Rank 0 decides. Probes the student on a few tokens: are experts' outputs linear in their
    features, where does their sum show, and what does it do to the stream?

    Raises:
        UnsupportedModelError: if no layer can be refitted.
    """
    targets, skipped = from_first_object(_probe(teacher, student, sites, batch, options))
    if not targets:
        raise UnsupportedModelError("; ".join(skipped.values()))
    return targets, skipped


def _probe(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    sites: Sequence[MoESite],
    batch: dict[str, Tensor],
    options: RefitOptions,
) -> tuple[list[Target], dict[str, str]]:
    adapter = adapter_for(student.config)
    few = _few(batch)
    targets: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    with evaluating(student), evaluating(teacher):
        for site in sites:
            try:
                check_linear(student, adapter, site, lambda: run_body(student, few))
                outlet = find_outlet(student, adapter, site, lambda: run_body(student, few))
            except UnsupportedModelError as error:
                skipped[site.name] = str(error)
                continue
            wants_stream = options.target == "stream" and options.mode == "sequential"
            stream = find_stream(student, site, few) if wants_stream else None
            targets[site.name] = Target.of(site, outlet, stream)
        for name, reason in _uneven(teacher, student, targets, few).items():
            del targets[name]
            skipped[name] = reason
        order = _order(student, [target.module for target in targets.values()], few)
    return sorted(targets.values(), key=lambda target: order.index(target.module)), skipped


def _uneven(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    targets: dict[str, Target],
    few: dict[str, Tensor],
) -> dict[str, str]:
    """Return targets that do not run exactly once in both models."""
    modules = [target.module for target in targets.values()]
    runs = {model: _order(model, modules, few) for model in (student, teacher)}
    reasons = {}
    for name, target in targets.items():
        counts = [runs[model].count(target.module) for model in (student, teacher)]
        if counts != [1, 1]:
            reasons[name] = (
                f"{target.module} runs {counts[0]} times in the student and {counts[1]} times in "
                "the teacher on a calibration row, not once in each"
            )
    return reasons


def _order(model: PreTrainedModel, modules: Sequence[str], inputs: dict[str, Tensor]) -> list[str]:
    """Return those of the modules that run on ``inputs``, in the order in which they end."""
    there = dict(model.named_modules())
    order: list[str] = []

    def note(name: str) -> object:
        def hook(*_: object) -> None:
            order.append(name)

        return hook

    hooks = [
        there[name].register_forward_hook(note(name))
        for name in dict.fromkeys(modules)
        if name in there
    ]
    try:
        run_body(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _few(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the start of the first row (pixels stay whole); padding serves as well as text.

    Without text some images: all tokens of one may go where no expert is.
    """
    if set(batch) == {"pixel_values"}:
        return {"pixel_values": batch["pixel_values"][:_PROBED]}
    inputs = {k: v[:1] for k, v in batch.items() if not k.endswith("attention_mask")}
    return {k: v if k == "pixel_values" else v[:, :_PROBED] for k, v in inputs.items()}


def _embedding(model: PreTrainedModel) -> Tensor | None:
    try:
        module: nn.Module | None = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # vision models have none of this kind
        return None
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None
