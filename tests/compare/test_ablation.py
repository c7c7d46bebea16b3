import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_moe import cli
from lit_moe.adapters import adapter_for, find_sites
from lit_moe.compare import ablation_map, stand_outs
from lit_moe.compare.findings import collapsing
from lit_moe.compare.present import write_ablation
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import evaluate_perplexity
from lit_moe.masking import masked
from lit_moe.plan import KeepPlan
from lit_moe.testing import example_inputs, tiny_moe


def text_for(model):
    return [example_inputs(model, seed=seed) for seed in range(2)]


def naive_map(model, batches):
    """Return layer -> loss without each expert, by whole forwards."""
    rows = [
        {**b, "domain": torch.zeros(2, dtype=torch.long), "num_bytes": torch.ones(2)}
        for b in batches
    ]
    found = {}
    for site in find_sites(model):
        losses = []
        for expert in range(site.num_experts):
            keep = [e for e in range(site.num_experts) if e != expert]
            mask = adapter_for(model.config).mask_(model, site, keep)
            losses.append(math.log(evaluate_perplexity(model, rows, ("text",)).perplexity))
            mask.remove()
        found[site.name] = losses
    return found


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "jetmoe"])
def test_the_map_is_that_of_whole_forwards(family):
    model = tiny_moe(family)
    batches = text_for(model)
    found, expected = ablation_map(model, batches), naive_map(model, batches)
    assert list(found.losses) == list(expected)
    for layer, losses in expected.items():
        # log(exp(x)) of the evaluation is x to the last digits
        assert found.losses[layer].tolist() == pytest.approx(losses, rel=1e-14)
    assert found.tokens == 2 * 2 * 11


def test_a_map_goes_on_where_it_was(monkeypatch):
    model = tiny_moe("mixtral")
    batches = text_for(model)
    whole, seen = ablation_map(model, batches), {}
    layer = find_sites(model)[0].name
    known = {(layer, expert): 7.0 for expert in range(3)}
    again = ablation_map(
        model, batches, known=known, on_loss=lambda name, e, loss: seen.update({(name, e): loss})
    )
    assert again.losses[layer][:3].tolist() == [7.0] * 3
    assert torch.equal(again.losses[layer][3:], whole.losses[layer][3:])
    assert len(seen) == 2 * 8 - 3
    assert not set(seen) & set(known)


def test_what_an_expert_is_worth_is_the_rise_of_the_loss():
    model = tiny_moe("mixtral")
    found = ablation_map(model, text_for(model))
    layer = find_sites(model)[1].name
    rise = found.increases[layer]
    assert torch.allclose(rise, found.losses[layer] - found.whole)
    assert torch.allclose(found.perplexities[layer], math.exp(found.whole) * rise.exp())


def test_an_expert_that_carries_the_model_is_named():
    model = tiny_moe("mixtral")
    found = ablation_map(model, text_for(model))
    layer = find_sites(model)[1].name
    assert collapsing(found) == {}
    found.losses[layer][5] = found.whole + math.log(2)
    assert collapsing(found) == {layer: {"5": pytest.approx(2)}}
    assert stand_outs(found.increases) == {layer: [5]}


def test_experts_that_carry_the_model_are_a_table_of_the_report(tmp_path):
    model = tiny_moe("mixtral")
    found = ablation_map(model, text_for(model))
    first, layer = (site.name for site in find_sites(model))
    write_ablation(found, "tiny", tmp_path, figures=False)
    assert "| all | - |" in (tmp_path / "report.md").read_text()
    found.losses[layer][5] = found.whole + math.log(2)
    write_ablation(found, "tiny", tmp_path, figures=False)
    text = (tmp_path / "report.md").read_text().partition("## Super-experts")[2]
    assert f"| `{layer}` | 5 (x 2) |" in text
    assert first not in text


def test_the_map_of_single_experts_is_an_image_for_tensorboard(tmp_path):
    model = tiny_moe("mixtral")
    found = ablation_map(model, text_for(model))
    for _ in range(2):  # a second call replaces the events of the first
        write_ablation(found, "tiny", tmp_path, figures=True)
    assert (tmp_path / "ablation.png").stat().st_size > 2000
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["ablation"]


def test_models_that_need_all_their_experts_and_masked_ones_are_refused():
    model = tiny_moe("mixtral", num_experts=2)
    with pytest.raises(LitMoEError, match="has 2 experts and its router picks 2"):
        ablation_map(model, text_for(model))
    model = tiny_moe("mixtral")
    name = find_sites(model)[0].name
    plan = KeepPlan.identity({site.name: site.num_experts for site in find_sites(model)})
    kept = {**plan.kept, name: (0, 1, 2)}
    with (
        masked(model, KeepPlan(kept, plan.num_experts)),
        pytest.raises(LitMoEError, match="hidden by a mask"),
    ):
        ablation_map(model, text_for(model))


def test_the_command_writes_table_figure_and_json_and_goes_on(checkpoint, pages, tmp_path, capsys):
    words = [
        "ablate",
        f"--model={checkpoint}",
        f"--text.calibration_files=[{pages}]",
        f"--text.evaluation_files=[{pages}]",
        "--text.sequence_length=32",
        "--text.calibration_tokens=64",
        "--text.evaluation_tokens=128",
        f"--output={tmp_path}",
    ]
    assert cli.main(words) == 0
    written = (tmp_path / "cells.jsonl").read_text()
    assert written.count('"ablation"') == 2 * 8
    assert {"report.json", "report.md", "ablation.png"} <= {f.name for f in tmp_path.iterdir()}
    report = (tmp_path / "report.json").read_bytes()
    assert cli.main(words) == 0
    assert (tmp_path / "cells.jsonl").read_text() == written
    assert (tmp_path / "report.json").read_bytes() == report
    capsys.readouterr()
    assert cli.main([*words, "--budget=much"]) == 2
    assert "is no size in bytes" in capsys.readouterr().err
