"""``python -m tests.benchmarks.vision [PART ...] [SEED ...]``: experts dropped from classifiers.

Parts are ``vmoe`` (10 of 40 classes), ``hard`` (fine-tuned on all 40), ``e3`` (an ensemble of two),
``speed``, and ``table``, which only writes what is there. Each seed trains its own model, once,
into the cache folder; cells that were measured before are read from
``$LIT_MOE_CACHE/bench/vision.jsonl``.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning import Callback, Trainer

import lit_moe
from lit_moe.adapters import find_sites
from lit_moe.criteria import get_criterion
from lit_moe.data import ImageDataModule, SplitFractions
from lit_moe.module import MoEModule, OptimizerConfig
from lit_moe.plan import KeepPlan
from tests.benchmarks import vision_speed
from tests.benchmarks.models import ROOT, cache_folder
from tests.benchmarks.refit_store import Store

SEEDS = (0, 1, 2, 3, 4)
RECOVERY_STEPS = 60
RANDOM_DRAWS = 5
CRITERIA: dict[str, dict[str, Any]] = {
    "router_change": {},
    "router_change inverse": {"inverse": True},
    "router_change absolute": {"measure": "absolute"},
    "router_change difference": {"measure": "difference"},
    "importance": {},
    "frequency": {},
}
RECOVERED = ("router_change", "router_change inverse", "importance", "random 0")


@dataclass(frozen=True)
class Setting:
    """What is trained: fields beside those of the config, and the turns of the task's digits."""

    architecture: dict[str, Any]
    turns: tuple[int, ...] = (0,)


SETTINGS = {
    "vmoe": Setting({}),
    "hard": Setting({}, (0, 90, 180, 270)),
    "e3": Setting({"num_members": 2}),
}


def main() -> None:
    """Measure the parts and seeds named, or all."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    store = Store(cache_folder().parent / "bench" / "vision.jsonl")
    words = sys.argv[1:]
    seeds = [int(word) for word in words if word.isdigit()] or SEEDS
    for part in [word for word in words if not word.isdigit()] or [*SETTINGS, "speed"]:
        print(f"== {part}", flush=True)
        if part == "speed":
            vision_speed.speed(store)
        for seed in seeds if part in SETTINGS else ():
            measure(store, part, seed)
    text = table(store)
    (Path(__file__).parent / "results" / "vision.md").write_text(text + "\n")
    print(text)


def measure(store: Store, name: str, seed: int) -> None:
    setting = SETTINGS[name]
    before, after = folders(name, seed)
    task = digits(setting.turns, seed)
    if not after.is_dir():
        trained(_pretraining(setting, before, seed), task, after, seed, steps=300)
    model = lit_moe.load(after)
    store.measure(lambda: accuracy(model, task), name, "whole", seed=seed)
    for criterion, dropped, scores in rankings(model, before, task):
        plan = lit_moe.select(scores, keep_ratio=1 - dropped / 8, sites=find_sites(model))
        cell = {"seed": seed, "criterion": criterion, "dropped": dropped}
        store.measure(partial(after_cut, after, plan, task), name, "dropped", **cell)
        if criterion in RECOVERED:
            work = partial(after_cut, after, plan, task, seed, RECOVERY_STEPS)
            store.measure(work, name, "recovered", **cell)


def rankings(model: Any, before: Path, task: ImageDataModule) -> Iterator[tuple[str, int, Any]]:
    """Yield criterion, experts to drop, and scores."""
    observation = lit_moe.observe(model, task.calibration_dataloader())
    for name, options in CRITERIA.items():
        short = name.split()[0]
        ancestor = {"ancestor": str(before)} if short == "router_change" else {}
        criterion = get_criterion(short, **ancestor, **options)
        scores = lit_moe.score(observation, criterion, model=model)
        for dropped in (2, 4, 6):
            yield name, dropped, scores
    for draw in range(RANDOM_DRAWS):
        scores = lit_moe.score(model, "random", seed=draw)
        for dropped in (2, 4, 6):
            yield f"random {draw}", dropped, scores


def after_cut(
    folder: Path, plan: KeepPlan, task: ImageDataModule, seed: int = 0, steps: int = 0
) -> dict[str, Any]:
    if not steps:
        model = lit_moe.load(folder)
        lit_moe.shrink(model, plan)
        return accuracy(model, task)
    with tempfile.TemporaryDirectory() as target:
        out = Path(target) / "model"
        trained(str(folder), task, out, seed, steps=steps, plan=plan)
        return accuracy(lit_moe.load(out), task)


def accuracy(model: Any, task: ImageDataModule) -> dict[str, Any]:
    return {"accuracy": task.evaluate_images(model).accuracy}


def digits(turns: tuple[int, ...], seed: int) -> ImageDataModule:
    fractions = SplitFractions(calibration=0.1, validation=0.0, test=0.278)
    return ImageDataModule(turns=turns, fractions=fractions, seed=seed)


def folders(name: str, seed: int) -> tuple[Path, Path]:
    """Return where the pre-trained and the fine-tuned model lie; ``hard`` has vmoe's ancestor."""
    before = "vmoe" if name == "hard" else name
    base = cache_folder()
    return base / f"digits_{before}-seed{seed}", base / f"digits_{name}_tuned-seed{seed}"


class Cut(Callback):
    """Applies a plan before the strategy wraps the model."""

    def __init__(self, plan: KeepPlan | None) -> None:
        self.plan = plan

    def on_model_built(self, _: Trainer, module: MoEModule) -> None:
        if self.plan is not None:
            lit_moe.shrink(module.built_model, self.plan)


def _pretraining(setting: Setting, target: Path, seed: int) -> str:
    if not target.is_dir():
        config = yaml.safe_load((ROOT / "configs/vision/pretrain_digits.yaml").read_text())
        fields = config["model"]["init_args"]
        module = {
            "architecture": {**fields["architecture"], **setting.architecture},
            "num_labels": fields["num_labels"],
            "optimizer": OptimizerConfig(**fields["optimizer"]),
        }
        superset = digits((0, 90, 180, 270), seed)
        fit(module, superset, target, seed, steps=config["trainer"]["max_steps"], clip=1.0)
    return str(target)


def trained(
    folder: str, task: ImageDataModule, target: Path, seed: int, *, steps: int, plan: Any = None
) -> None:
    """Fine-tune by the recipe of configs/vision/finetune_digits.yaml."""
    config = yaml.safe_load((ROOT / "configs/vision/finetune_digits.yaml").read_text())
    fields = config["model"]["init_args"]["optimizer"] | {"warmup_steps": steps // 10}
    module = {"model_name_or_path": folder, "optimizer": OptimizerConfig(**fields)}
    fit(module, task, target, seed, steps=steps, clip=10.0, plan=plan)


def fit(
    fields: dict[str, Any],
    task: ImageDataModule,
    target: Path,
    seed: int,
    *,
    steps: int,
    clip: float,
    plan: KeepPlan | None = None,
) -> None:
    L.seed_everything(seed, verbose=False)
    module = MoEModule(**fields)
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=root,
            callbacks=[Cut(plan)],
        )
        trainer.fit(module, digits(task.turns, seed))
    unfinished = target.with_name(f".{target.name}.partial")
    module.built_model.save_pretrained(unfinished)
    unfinished.rename(target)


def table(store: Store) -> str:
    """Return accuracies as a Markdown table: mean [smallest, largest] over seeds."""
    found: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for name, part, settings, result in store.cells():
        if "accuracy" in result:
            criterion = settings.get("criterion", "-").split(" 0")[0]
            row = (name, criterion.rstrip(" 1234"), part)
            cells = found.setdefault(row, {})
            cells.setdefault(settings.get("dropped", 0), []).append(result["accuracy"])
    lines = ["| model | criterion | | 0 | 2 of 8 | 4 of 8 | 6 of 8 |", "| --- " * 7 + "|"]
    for (name, criterion, part), cells in sorted(found.items()):
        shown = [_spread(cells.get(n, [])) for n in (0, 2, 4, 6)]
        lines.append(f"| {name} | {criterion} | {part} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *vision_speed.lines(store)])


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    return f"{mean:.3f} [{min(values):.3f}, {max(values):.3f}] ({len(values)})"


if __name__ == "__main__":
    main()
