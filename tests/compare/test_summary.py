import numpy as np
import pytest
import torch

from lit_moe.compare.findings import load_changes
from lit_moe.compare.options import Line
from lit_moe.compare.stations import find_way
from lit_moe.compare.summary import Failure, Row, Spread, Summary, to_markdown
from lit_moe.errors import LitMoEError
from lit_moe.report.comparison import (
    Point,
    ablation_figure,
    activation_figure,
    agreement_figure,
    load_figure,
    perplexity_curves,
)
from lit_moe.testing import tiny_moe


def row(criterion, *values, direction="paper", procedure="one_shot"):
    return Row(
        Line(criterion, direction, procedure, "layer"),
        {0.5: Spread(tuple(values))} if values else {},
        {},
        {},
    )


def summary(*rows, failures=()):
    return Summary(Spread((10.0,)), (0.5,), rows, failures)


def test_a_spread_is_mean_and_deviation_of_the_sample():
    spread = Spread((1.0, 2.0, 3.0))
    assert (spread.mean, spread.deviation, spread.text) == (2.0, 1.0, "2.0 (1)")
    assert Spread((5.0,)).text == "5"
    assert Spread((5.0,)).deviation == 0


def test_a_criterion_beats_random_only_by_more_than_both_spreads():
    control = row("random", 90.0, 110.0)
    close, far = row("a", 80.0, 90.0), row("b", 60.0, 70.0)
    found = summary(control, close, far, row("c", 5.0, procedure="lottery"))
    assert found.beats_control(close, 0.5) is False
    assert found.beats_control(far, 0.5) is True
    assert found.beats_control(control, 0.5) is None
    assert found.beats_control(found.rows[3], 0.5) is None


def test_a_single_value_has_no_spread_and_gets_no_star():
    one, two = row("random", 90.0), row("random", 90.0, 95.0)
    for control, other in ((one, row("a", 5.0, 6.0)), (two, row("a", 5.0)), (one, row("a", 5.0))):
        found = summary(control, other)
        assert found.beats_control(other, 0.5) is None
        assert " * |" not in to_markdown(found)
    assert " * |" in to_markdown(summary(two, row("a", 5.0, 6.0)))


def test_directions_are_told_apart_and_losses_are_shown():
    found = summary(
        row("a", 1.0), row("a", 2.0, direction="opposite"), row("b", 3.0), row("c", 9.0)
    )
    assert found.paper_wins() == {"one_shot: a": {"0.5": True}}
    text = to_markdown(summary(row("a", 3.0), row("a", 2.0, direction="opposite")))
    assert "| one_shot: a | NO |" in text


def test_what_failed_is_in_the_text():
    line = Line("x", "paper", "lottery", "global")
    text = to_markdown(summary(row("a", 1.0), failures=(Failure(line, "no text", 3),)))
    assert "- lottery x, global (3 cells): no text" in text


def test_ways_come_by_all_ratios_or_are_refused():
    from lit_moe.adapters import find_sites

    sites = find_sites(tiny_moe("mixtral"))
    way = find_way(sites, [0.75, 0.5, 0.25], "layer", None)
    assert way.keep == tuple({site.name: n for site in sites} for n in (7, 6, 5, 4, 3, 2))
    assert way.stations == {2: 0.75, 4: 0.5, 6: 0.25}
    assert way.per_round == 2
    shorter = way.to([0.5])
    assert (len(shorter.keep), shorter.stations, shorter.per_round) == (4, {4: 0.5}, 2)
    everywhere = find_way(sites, [0.75, 0.5], "global", 2)
    assert everywhere.keep == (12, 8)
    with pytest.raises(LitMoEError, match=r"2 rounds .* miss 0\.5"):
        find_way(sites, [0.5, 0.25], "layer", 2)


def test_loads_are_shares_with_their_evenness():
    found = load_changes({"a": {"before": [30.0, 10.0], "after": [20.0, 20.0]}})
    assert found["a"]["before"]["shares"] == [0.75, 0.25]
    assert found["a"]["before"]["load_cv"] == pytest.approx(0.5)
    assert found["a"]["after"]["load_cv"] == 0
    assert found["a"]["after"]["entropy"] == pytest.approx(1)


def test_figures_stand_alone(tmp_path):
    loads = {"model.layers.0.mlp": torch.tensor([5.0, 1.0, 3.0])}
    values = torch.tensor([[1.0, -0.5], [-0.5, 1.0]]).double()
    curves = {"ean": [Point(0.5, 20.0, 18.0, 22.0)], "random": [Point(0.5, 40.0, 30.0, 50.0)]}
    figures = {
        "curves": perplexity_curves({"one-shot": curves, "lottery": curves}, whole=10.0),
        "matrix": agreement_figure({"all": values, "a": values}, ["x", "y"], "Spearman"),
        "load": load_figure(loads, loads),
        "ablation": ablation_figure({"a": torch.tensor([10.0, 30.0, float("inf")])}, 10.0),
    }
    figures["outlined"] = ablation_figure({"a": torch.tensor([10.0, 30.0])}, 10.0, {"a": [1]})
    loud = {"a": torch.tensor([1.0, 2.0, 50.0]), "b": torch.tensor([2.0, 2.0])}
    figures["activations"] = activation_figure(loud, {"a": [2]})
    assert [len(figures[n].axes[0].patches) for n in ("outlined", "ablation", "activations")] == [
        1,
        0,
        1,
    ]
    (image,) = figures["activations"].axes[0].get_images()
    assert np.ma.filled(np.ma.asarray(image.get_array()), 0).tolist() == [
        [0.5, 1.0, 25.0],
        [1.0, 1.0, 0.0],
    ]
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 2000
    panels = figures["curves"].axes
    assert [panel.get_title() for panel in panels] == ["one-shot", "lottery"]
    drawn = np.asarray(panels[0].get_lines()[0].get_xydata())
    assert drawn.tolist() == [[0.0, 10.0], [50.0, 20.0]]
