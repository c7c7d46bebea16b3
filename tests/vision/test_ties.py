"""What a run says when nothing tells its experts apart."""

import json

import lightning as L
import pytest

import lit_moe
from lit_moe.callbacks import OneShotPruning
from lit_moe.errors import NoEffectWarning
from lit_moe.stats import observe
from lit_moe.testing.vision import TINY, VARIANTS, example_images, tiny_vmoe
from lit_moe.vmoe.ties import tie_under_expert_choice
from tests.vision.test_training import DIGITS, data, module, trainer

WORKING = ("router_norm", "reap", "obs")


def warnings_of(folder):
    return json.loads((folder / "report.json").read_text())["warnings"]


def test_a_frozen_router_stands_in_the_report(tmp_path):
    L.seed_everything(0, verbose=False)
    tiny_vmoe(num_labels=10).save_pretrained(tmp_path / "before")
    changes = {"ancestor": str(tmp_path / "before")}
    model = module(architecture=None, model_name_or_path=str(tmp_path / "before"))
    callback = OneShotPruning("router_change", changes, keep_ratio=0.5)
    with pytest.warns(NoEffectWarning, match="nothing tells experts apart"):
        trainer(tmp_path / "run", [callback], max_steps=1).fit(model, data())
    (found,) = [w for w in warnings_of(tmp_path / "run") if "nothing tells experts apart" in w]
    assert str(tmp_path / "before") in found


@pytest.mark.parametrize("criterion", ["frequency", "importance"])
def test_equal_shares_under_expert_choice_are_said_once(criterion, tmp_path):
    L.seed_everything(0, verbose=False)
    model = module(architecture={**DIGITS, **VARIANTS["expert_choice"]})
    with pytest.warns(NoEffectWarning, match="take router_change, router_norm, reap or obs"):
        trainer(tmp_path, [OneShotPruning(criterion, keep_ratio=0.5)], max_steps=1).fit(
            model, data()
        )
    (found,) = [w for w in warnings_of(tmp_path) if "rates all experts of every layer alike" in w]
    assert f"criterion {criterion!r}" in found


def test_nothing_is_said_where_tokens_choose(tmp_path):
    L.seed_everything(0, verbose=False)
    trainer(tmp_path, [OneShotPruning("frequency", keep_ratio=0.5)], max_steps=1).fit(
        module(), data()
    )
    assert not any("alike" in sentence for sentence in warnings_of(tmp_path))


@pytest.mark.parametrize("criterion", WORKING)
def test_what_is_recommended_tells_experts_apart(criterion):
    model = tiny_vmoe("expert_choice")
    images = [example_images(model, 16)]
    given = observe(model, images) if criterion == "reap" else model
    scores = lit_moe.score(given, criterion, model=model, batches=images)
    assert tie_under_expert_choice(model.config, scores, criterion) is None
    for values in scores.values():
        assert len(values.unique()) == TINY.get("num_experts", 8)
