"""What an exported folder says about itself: plan, report, model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import lit_moe
from lit_moe.checkpoints import auto_class
from lit_moe.merge_plan import MergePlan
from lit_moe.mixed_routing import CONFIG_KEY
from lit_moe.plans import Plan

PLAN_FILE = "lit_moe_plan.json"
REPORT_FILE = "report.json"
CARD_FILE = "README.md"


def write_documents(
    folder: Path,
    model: PreTrainedModel,
    *,
    result: Mapping[str, Any],
    plan: Plan | None,
    report: Mapping[str, Any] | None,
) -> None:
    """Write plan, report and model card into ``folder``.

    Args:
        folder: of the export.
        model: what was exported.
        result: the section ``export`` of the report, known only now.
        plan: how the experts were chosen.
        report: of the run, see :mod:`lit_moe.report`.
    """
    if plan is not None:
        plan.save(folder / PLAN_FILE)
    known = {**(report or {}), "export": dict(result)}
    if report is not None:
        text = json.dumps(known, indent=2, ensure_ascii=False) + "\n"
        (folder / REPORT_FILE).write_text(text, encoding="utf-8")
    card = model_card(model, layout=result["layout"], plan=plan, report=known)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def model_card(
    model: PreTrainedModel,
    *,
    layout: str,
    plan: Plan | None,
    report: Mapping[str, Any],
) -> str:
    """Return the Markdown model card: what was removed from what, how, at what price, how to load.

    Says only what ``plan`` and ``report`` know.
    """
    source = str(report.get("source") or model.config.name_or_path or model.config.model_type)
    name = Path(source).name if _is_local(source) else source
    sections = [
        _front_matter(source),
        f"# {name}, smaller\n",
        _summary(name, model, plan, report),
        _refit(report.get("refit")),
        _facts(report),
        _quality(report.get("quality") or {}),
        _loading(model, layout),
        _likeness(model),
        _layers(plan),
    ]
    return "\n".join(section for section in sections if section)


def _is_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source).exists()


def _front_matter(source: str) -> str:
    lines = ["---", "library_name: transformers", "tags:", "- moe", "- pruned", "- lit-moe"]
    if not _is_local(source):
        lines.append(f"base_model: {source}")
    return "\n".join([*lines, "---\n"])


def _summary(
    name: str, model: PreTrainedModel, plan: Plan | None, report: Mapping[str, Any]
) -> str:
    made = f"Made from `{name}` (family `{model.config.model_type}`) with lit-moe"
    made += f" {lit_moe.__version__}"
    if plan is None or plan.is_identity:
        return f"{made}.\n"
    before, after = sum(plan.num_experts.values()), sum(plan.counts.values())
    if isinstance(plan, MergePlan):
        return f"{made} {_merged(plan, before, after)}\n"
    chosen = f" chosen by the criterion `{report['criterion']}`" if report.get("criterion") else ""
    return (
        f"{made} by removing whole experts: {after} of {before} routed experts "
        f"({plan.keep_ratio:.0%}) stay{chosen}. No other part was removed.\n"
    )


def _merged(plan: MergePlan, before: int, after: int) -> str:
    said = f"by merging: {after} experts were made of {before} routed ones ({plan.keep_ratio:.0%})."
    if plan.top_k is not None:
        said += f" A token uses {plan.top_k} of them."
    if plan.router_space == "probabilities":
        said += " Routers choose by mixed probabilities of the former experts."
    return said


def _refit(refit: Mapping[str, Any] | None) -> str:
    if not refit or not refit.get("kept"):
        return ""
    layers = [layer for layer in (refit.get("layers") or {}).values() if layer.get("lam")]
    return (
        f"The down projections of the experts in {len(layers)} layers were re-fitted in closed "
        f"form on {refit.get('tokens') or 0:,} tokens, towards {refit.get('teacher')}.\n"
    )


def _facts(report: Mapping[str, Any]) -> str:
    rows = []
    for key, label in (
        ("parameters", "parameters"),
        ("active_parameters", "active parameters per token"),
        ("bytes", "bytes"),
    ):
        numbers = report.get(key) or {}
        if numbers.get("before") and numbers.get("after"):
            rows.append(f"| {label} | {numbers['before']:,} | {numbers['after']:,} |")
    tokens = (report.get("calibration") or {}).get("tokens")
    seen = f"\nExperts were observed on {tokens:,} tokens.\n" if tokens else ""
    if not rows:
        return seen
    return "\n".join(["| | before | after |", "|---|---:|---:|", *rows, seen])


def _quality(stages: Mapping[str, Any]) -> str:
    rows = [
        f"| {stage} | {q['perplexity']:.4g} | {q['stderr']:.2g} | {q.get('tokens') or 0:,} |"
        for stage, q in stages.items()
        if isinstance(q.get("perplexity"), int | float) and isinstance(q.get("stderr"), int | float)
    ]
    if not rows:
        return ""
    head = "| stage | perplexity on held-out text | standard error | tokens |"
    return "\n".join(["## Quality\n", head, "|---|---:|---:|---:|", *rows, ""])


def _loading(model: PreTrainedModel, layout: str) -> str:
    cls = _auto_name(model)
    if layout == "compressed_2_4":
        return f"## Loading\n\n{_PACKED}"
    if layout not in ("per_layer_config", "mixed_routers"):
        code = f'from transformers import {cls}\n\nmodel = {cls}.from_pretrained("this folder")'
        return f"## Loading\n\n```python\n{code}\n```\n"
    return (
        f"## Loading\n\n{_PECULIARITIES[layout]}"
        "\nWith lit-moe:\n\n```python\nfrom lit_moe.export import load\n\n"
        'model = load("this folder")\n```\n\nWithout it, by the modelling code in this folder:\n\n'
        f"```python\nfrom transformers import {cls}\n\n"
        f'model = {cls}.from_pretrained("this folder", trust_remote_code=True)\n```\n'
    )


_PACKED = """Two of every four inputs of each expert are 0 and not stored (compressed-tensors,
`sparse-24-bitmask`). vLLM from 0.19.1 does not read this, and transformers 5 with
compressed-tensors 0.15 or newer gives random experts and a report of missing keys. With lit-moe
(`pip install 'lit-moe[compressed]'`) the model is dense again:

```python
from lit_moe.export import load_compressed

model = load_compressed("this folder")
```
"""
_PECULIARITIES = {
    "per_layer_config": "Layers keep different numbers of experts (config.json, "
    "`per_layer_config`).",
    "mixed_routers": f"Routers mix probabilities (config.json, `{CONFIG_KEY}`).",
}


def _likeness(model: PreTrainedModel) -> str:
    if not getattr(model.config, CONFIG_KEY, None):
        return ""
    return (
        "Loaded as a plain model of its family, its routers are a likeness: rows that stand for "
        "the mixed probabilities, and former rows that transformers reports as unexpected.\n"
    )


def _auto_name(model: PreTrainedModel) -> str:
    """Name of the Auto class that loads the model, or of its own class."""
    for candidate in type(model).__mro__:
        if (auto := auto_class(model.config, candidate)) is not candidate:
            return str(auto.__name__)
    return type(model).__name__


def _layers(plan: Plan | None) -> str:
    if plan is None or plan.is_identity:
        return ""
    counts = plan.counts
    rows = [f"| `{layer}` | {plan.num_experts[layer]} | {counts[layer]} |" for layer in plan]
    done = "after" if isinstance(plan, MergePlan) else "kept"
    head = ["## Experts per layer\n", f"| layer | before | {done} |", "|---|---:|---:|"]
    return "\n".join([*head, *rows, f"\nTheir ids are in `{PLAN_FILE}`.\n"])
