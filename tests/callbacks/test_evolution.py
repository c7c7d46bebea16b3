import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import lit_moe
from lit_moe import MoEModule
from lit_moe.adapters import count_experts, find_sites
from lit_moe.assets import text_file
from lit_moe.callbacks import EvolutionarySearch, ExportModel, OneShotPruning, ReportWriter
from lit_moe.callbacks.evolution_view import best_maps
from lit_moe.errors import LitMoEError, PlanError
from lit_moe.plan import KeepPlan
from lit_moe.plans import load_plan
from lit_moe.search import Agreement, Effort, Genome, Racing, Rates, SearchSpace, one_hot
from lit_moe.search.samples import SampleSizes
from lit_moe.testing import run_distributed
from tests.data.conftest import write as write
from tests.data.questions import data_of, numbered

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
EFFORT: dict[str, Any] = {"initial": 4, "discrete": 10, "total": 20, "children": 2, "rerank": 2}


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """One file of other text for each split."""
    folder = tmp_path_factory.mktemp("texts")
    found = {}
    for split in ("calibration", "validation", "test"):
        rows = pq.read_table(text_file(split)).to_pylist()
        first = {row["domain"]: row["text"][:400] for row in reversed(rows)}
        table = pa.table({"domain": list(first), "text": list(first.values())})
        pq.write_table(table, folder / f"{split}.parquet")
        found[f"{split}_files"] = [str(folder / f"{split}.parquet")]
    return found


@pytest.fixture
def make_texts(make_data, texts):
    return lambda **options: make_data(**{**texts, **options})


def searching(keep_ratio=0.5, *, space=None, effort=None, **options):
    chosen = space or SearchSpace(keep_ratio=keep_ratio, groups="per_layer")
    samples = SampleSizes(search=8, dev=6, test=6, batch_size=8)
    return EvolutionarySearch(
        chosen, effort=Effort(**{**EFFORT, **(effort or {})}), samples=samples, **options
    )


def fit(trainer, checkpoint, data, **options):
    module = MoEModule(str(checkpoint))
    trainer.fit(module, datamodule=data, **options)
    return module


def report_of(trainer):
    return json.loads((Path(trainer.log_dir) / "report.json").read_text())


def history_of(path):
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def quiet(**options):
    return ReportWriter(**{"measure_quality": False, "figures": False, **options})


def test_half_of_the_experts_are_chosen_merged_applied_and_exported(
    checkpoint, make_texts, make_trainer, tmp_path
):
    baselines = ["frequency", "random", "dynamic_skipping"]
    callback = searching(baselines=baselines)
    trainer = make_trainer(callback, ExportModel("model"), quiet(measure_quality=True))
    module = fit(trainer, checkpoint, make_texts())
    assert count_experts(find_sites(module.built_model)) == dict.fromkeys(LAYERS, 4)
    report = report_of(trainer)
    search = report["search"]
    assert search["evaluations"] == 20
    assert search["samples"] == {"search": 8, "dev": 6, "test": 6}
    assert list(search["stages"]) == ["before", "pruned", "merged", "applied"]
    assert list(search["baselines"]) == baselines
    for points in [*search["stages"].values(), *search["baselines"].values()]:
        assert set(points) == {"search", "dev", "test"}
    for split in ("search", "dev", "test"):
        applied, merged = (search["stages"][s][split]["fitness"] for s in ("applied", "merged"))
        assert applied == pytest.approx(merged, rel=1e-6)
    assert 1.3 < search["active_experts"] < 1.7
    assert next(iter(report["quality"])) == "before"
    assert report["parameters"]["after"] < report["parameters"]["before"]
    assert report["export"]["max_abs_logit_difference"] == 0.0
    folder = Path(trainer.log_dir)
    assert load_plan(folder / "plan.json") == module.plan
    text = (folder / "report.md").read_text()
    assert "## Evolutionary search" in text
    assert "| dynamic_skipping |" in text
    lines = history_of(tmp_path / "run" / "search.jsonl")
    assert sum(line.get("split") == "search" for line in lines) == 20
    best = [line["fitness"] for line in lines[1:] if line["split"] == "search"]
    assert search["stages"]["merged"]["search"]["fitness"] <= max(best) + 1e-9


def test_it_can_be_watched(checkpoint, make_texts, make_trainer):
    trainer = make_trainer(searching(), quiet())
    fit(trainer, checkpoint, make_texts())
    events = EventAccumulator(trainer.log_dir, size_guidance={"images": 0}).Reload()
    points = events.Scalars("search/best")
    assert [point.step for point in points] == [4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert [p.value for p in points] == sorted(p.value for p in points)
    medians = events.Scalars("search/median")
    assert all(m.value <= p.value for m, p in zip(medians, points, strict=True))
    assert all(point.value > 0 for point in events.Scalars("search/evaluations_per_second"))
    images = [len(events.Images(f"search/{name}")) for name in ("experts", "routers")]
    assert images == [len({point.value for point in points})] * 2


def test_dropping_alone_makes_a_plain_model(checkpoint, make_texts, make_trainer):
    trainer = make_trainer(
        searching(effort={"total": 10}), ExportModel("model"), quiet(), max_steps=2
    )
    module = fit(trainer, checkpoint, make_texts())
    assert isinstance(module.plan, KeepPlan)
    assert trainer.global_step == 2
    report = report_of(trainer)
    assert {len(layer["kept"]) for layer in report["experts"].values()} == {4}
    assert "evolutionary search, NegativeLoss" in report["criterion"]
    exported = AutoModelForCausalLM.from_pretrained(Path(trainer.log_dir) / "model")
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, module.built_model.state_dict()[name])


def test_merging_alone_begins_with_the_model_itself_and_is_never_worse_on_its_samples(
    checkpoint, make_texts, make_trainer
):
    space = SearchSpace(keep_ratio=1.0, groups=1)
    writer = quiet()
    trainer = make_trainer(searching(space=space, effort={"rerank": 0}), writer)
    module = fit(trainer, checkpoint, make_texts())
    assert count_experts(find_sites(module.built_model)) == dict.fromkeys(LAYERS, 8)
    assert writer.report.search is not None
    stages = writer.report.search.stages
    assert list(stages) == ["before", "merged", "applied"]
    assert stages["merged"]["search"].fitness >= stages["before"]["search"].fitness


def test_fewer_active_experts_are_searched_for_with_all_experts_there(
    checkpoint, make_texts, make_trainer
):
    space = SearchSpace(keep_ratio=1.0, groups=1, top_k=1)
    writer = quiet()
    callback = searching(space=space, effort={"rerank": 0}, baselines=["dynamic_skipping"])
    trainer = make_trainer(callback, ExportModel("model"), writer)
    module = fit(trainer, checkpoint, make_texts())
    assert {site.top_k for site in find_sites(module.built_model)} == {1}
    assert module.built_model.config.num_experts_per_tok == 1
    assert writer.report.search is not None
    stages = writer.report.search.stages
    assert stages["merged"]["search"].fitness >= stages["untouched"]["search"].fitness
    assert stages["untouched"]["search"].fitness != stages["before"]["search"].fitness
    assert stages["applied"]["test"].fitness == pytest.approx(stages["merged"]["test"].fitness)
    assert writer.report.export is not None
    assert writer.report.export.max_abs_logit_difference == 0.0


def test_counts_differ_between_layers_under_one_budget(checkpoint, make_texts, make_trainer):
    space = SearchSpace(keep_ratio=0.5, groups="per_layer", non_uniform=True, floor=2)
    writer = quiet()
    effort = {"initial": 10, "discrete": 30, "total": 30}
    trainer = make_trainer(searching(space=space, effort=effort), writer)
    module = fit(trainer, checkpoint, make_texts())
    counts = count_experts(find_sites(module.built_model))
    assert sum(counts.values()) == 8
    lines = history_of(trainer.default_root_dir + "/search.jsonl")[1:]
    seen = {tuple(len(ids) for ids in line["kept"]) for line in lines}
    assert len(seen) > 1
    assert all(sum(sizes) == 8 and min(sizes) >= 2 for sizes in seen)


def test_routers_are_projected_so_that_plain_transformers_loads_the_model(
    checkpoint, make_texts, make_trainer
):
    writer = quiet()
    effort = {"discrete": 4, "total": 30, "rerank": 0}
    callback = searching(project=True, effort=effort, rates=Rates(noise=0.2))
    trainer = make_trainer(callback, ExportModel("model"), writer)
    module = fit(trainer, checkpoint, make_texts())
    assert writer.report.search is not None
    assert set(writer.report.search.projection) == set(LAYERS)
    assert all(0 <= share <= 1 for share in writer.report.search.projection.values())
    exported = AutoModelForCausalLM.from_pretrained(Path(trainer.log_dir) / "model")
    ids = torch.arange(3, 40)[None]
    module.built_model.eval()
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, module.built_model.cpu()(ids).logits)


def test_the_same_command_again_goes_on_with_its_history(checkpoint, make_texts, make_trainer):
    writers = [quiet(), quiet()]
    histories = []
    for writer in writers:
        trainer = make_trainer(searching(), writer)
        fit(trainer, checkpoint, make_texts())
        histories.append(history_of(trainer.default_root_dir + "/search.jsonl"))
    assert histories[0] == histories[1]
    first, second = (writer.report.search for writer in writers)
    assert first is not None
    assert second is not None
    assert (first.on_record, second.on_record) == (0, len(histories[0]) - 1)
    assert first.stages == second.stages
    with pytest.raises(LitMoEError, match="history of another search"):
        fit(make_trainer(searching(rates=Rates(noise=0.1)), quiet()), checkpoint, make_texts())


def test_a_search_that_was_broken_off_ends_like_one_that_was_not(
    checkpoint, make_texts, make_trainer, tmp_path, monkeypatch
):
    whole = make_trainer(searching(), quiet(), default_root_dir=str(tmp_path / "whole"))
    expected = fit(whole, checkpoint, make_texts()).plan
    scorer = lit_moe.search.scoring.SplitScorer
    original, calls = scorer.score, []

    def breaking(self, genome, samples=None, **options):
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return original(self, genome, samples, **options)

    broken = {"default_root_dir": str(tmp_path / "broken")}
    with monkeypatch.context() as patch:
        patch.setattr(scorer, "score", breaking)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(make_trainer(searching(), quiet(), **broken), checkpoint, make_texts())
    assert len(history_of(tmp_path / "broken" / "search.jsonl")) == 1 + 12
    again = fit(make_trainer(searching(), quiet(), **broken), checkpoint, make_texts())
    assert again.plan == expected
    paths = [tmp_path / name / "search.jsonl" for name in ("broken", "whole")]
    assert history_of(paths[0]) == history_of(paths[1])


@pytest.mark.distributed
@pytest.mark.parametrize(
    "racing", [Racing(first=4, audit_every=2), pytest.param(None, marks=pytest.mark.slow)]
)
def test_two_ranks_make_the_same_history_and_the_same_model(
    checkpoint, make_texts, make_trainer, tmp_path, racing
):
    def rank(world_size):
        def work(_):
            folder = str(tmp_path / str(world_size) / str(racing is None))
            trainer = make_trainer(
                searching(racing=racing, effort={"children": 4}),
                quiet(),
                devices=world_size,
                strategy="auto" if world_size == 1 else "ddp",
                default_root_dir=folder,
                logger=False,
            )
            module = fit(trainer, checkpoint, make_texts())
            assert module.plan is not None
            return module.plan.to_dict(), history_of(f"{folder}/search.jsonl")

        return work

    (alone,) = run_distributed(rank(1), 1, group=False)
    both = run_distributed(rank(2), 2, group=False)
    assert both[0] == both[1] == alone


def test_a_warm_start_takes_files_and_criteria(checkpoint, make_texts, make_trainer, tmp_path):
    plan = KeepPlan(dict.fromkeys(LAYERS, (0, 3, 5, 6)), dict.fromkeys(LAYERS, 8))
    plan.save(tmp_path / "some.json")
    callback = searching(warm_start=[str(tmp_path / "some.json"), "frequency"])
    trainer = make_trainer(callback, quiet())
    fit(trainer, checkpoint, make_texts())
    first, second, third = history_of(trainer.default_root_dir + "/search.jsonl")[1:4]
    assert first["kept"] == [[0, 3, 5, 6]] * 2
    assert (first["how"], second["how"], third["how"]) == ("start", "start", "random")


def test_questions_are_searched_on_and_scored(checkpoint, make_trainer, write):
    train = write("train", *numbered(range(40)))
    data = data_of(train, tokenizer=str(checkpoint))
    writer = quiet()
    callback = EvolutionarySearch(
        SearchSpace(keep_ratio=0.5, groups=1),
        fitness=lit_moe.search.AnswerTokens(),
        effort=Effort(**EFFORT),
    )
    with pytest.warns(UserWarning, match="the fitness was 0 for each"):
        fit(make_trainer(callback, writer), checkpoint, data)
    search = writer.report.search
    assert search is not None
    assert search.samples == {"search": 8, "dev": 4, "test": 12}
    assert any("goes by the finer fitness" in note for note in search.notes)


def test_agreement_needs_no_labels(checkpoint, make_texts, make_trainer):
    writer = quiet()
    fit(make_trainer(searching(fitness=Agreement()), writer), checkpoint, make_texts())
    search = writer.report.search
    assert search is not None
    assert search.fitness == "Agreement(acceptance, 32)"
    assert search.stages["before"]["test"].fitness == pytest.approx(100.0, abs=1e-3)
    assert search.stages["merged"]["test"].fitness < 99


def test_training_goes_on_from_a_checkpoint_with_the_plan_of_the_search(
    checkpoint, make_texts, make_trainer
):
    def run(steps, **options):
        trainer = make_trainer(searching(), quiet(), max_steps=steps)
        module = fit(trainer, checkpoint, make_texts(), **options)
        return trainer, module

    trainer, first = run(2)
    path = trainer.default_root_dir + "/last.ckpt"
    trainer.save_checkpoint(path)
    again = make_trainer(searching(), quiet(), max_steps=3)
    module = MoEModule(str(checkpoint))
    module.resume_from = path
    again.fit(module, datamodule=make_texts(), ckpt_path=path)
    assert again.global_step == 3
    assert module.plan == first.plan
    other = make_trainer(searching(0.25), quiet(), max_steps=3)
    module = MoEModule(str(checkpoint))
    module.resume_from = path
    with pytest.raises(PlanError, match="has 8 routed experts, this run searches for 4"):
        other.fit(module, datamodule=make_texts(), ckpt_path=path)


def test_requests_that_cannot_be_met_are_refused_before_anything_runs(
    checkpoint, make_texts, make_data, make_trainer
):
    space = SearchSpace
    cases = [
        (
            searching(space=space(keep_experts=1, groups=1)),
            make_texts(),
            "keep 1 of 8 .* router picks 2",
        ),
        (searching(space=space(keep_ratio=0.5, groups=3)), make_texts(), "has 2 MoE layers"),
        (
            searching(space=space(keep_ratio=0.5, groups=["layers.1"])),
            make_texts(),
            "leave out model.layers.0.mlp",
        ),
        (searching(), make_data(), "share a sample"),
        (searching(space=space(keep_ratio=0.5, groups=1, top_k=5)), make_texts(), "router picks 5"),
        (
            searching(space=space(keep_ratio=1.0, groups=1), warm_start=["reap"]),
            make_texts(),
            "nothing that 'reap' could choose",
        ),
        (
            searching(space=space(keep_ratio=1.0, groups=1), baselines=["reap"]),
            make_texts(),
            "nothing that 'reap' could choose",
        ),
        (searching(baselines=["reep"]), make_texts(), "reep"),
        (searching(baselines=["gone.json"]), make_texts(), "gone.json does not exist"),
        (
            searching(space=space(keep_ratio=0.5, groups=1, non_uniform=True, floor=6)),
            make_texts(),
            "space.floor=6 is more than the 4",
        ),
    ]
    for callback, data, said in cases:
        writer = quiet()
        with pytest.raises(LitMoEError, match=said):
            fit(make_trainer(callback, writer), checkpoint, data)
        assert writer.report.seconds == {}
    both = make_trainer(searching(), OneShotPruning(keep_ratio=0.5), quiet())
    with pytest.raises(LitMoEError, match="EvolutionarySearch and OneShotPruning are both given"):
        fit(both, checkpoint, make_texts())
    with pytest.raises(LitMoEError, match=r"samples.dev=0 leaves the split empty"):
        SampleSizes(dev=0)


def test_maps_are_drawn_with_nothing_in_grey():
    genome = Genome((one_hot((0, 2), 4), one_hot((1,), 4)))
    image = best_maps(genome)["experts"]
    values = image[::12, ::12]
    assert values.shape == (4, 4)
    assert values[0].tolist() == [1.0, 0.5, 0.5, 0.5]
    assert np.unique(image).tolist() == [0.5, 1.0]
