"""Models that begin with random weights, from a config in YAML, under every mode."""

import pytest
import torch

from lit_moe import MoEModule
from lit_moe.callbacks import OneShotPruning, ReportWriter
from lit_moe.sharding.partitions import gathered
from tests.distributed import runs
from tests.distributed.runs import some

pytestmark = pytest.mark.distributed
FIELDS = {
    "model_type": "mixtral",
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.fixture
def random_start(monkeypatch):
    """Let the fits of a test begin with random weights; the checkpoint only gives the tokenizer."""

    def from_fields(name, **options):
        return MoEModule(name, architecture=FIELDS, **options)

    monkeypatch.setattr(runs, "MoEModule", from_fields)


def pruning():
    return [ReportWriter(False, False), OneShotPruning("reap", keep_ratio=0.5)]


@pytest.mark.parametrize("mode", some(["zero3"], ["ddp", "zero1", "zero2"]))
@pytest.mark.parametrize("callbacks", [list, pruning])
def test_random_weights_are_those_of_one_process(setup, random_start, mode, callbacks):
    options = {"callbacks": callbacks, "distillation": 0.5, "max_steps": 6}
    one, two = setup.fit("single", **options)[0], setup.fit(mode, **options)[0]
    assert two == pytest.approx(one, abs=1e-5)
    assert len(set(one)) == 6


def test_a_model_built_into_partitions_is_random_and_the_same_on_any_number_of_ranks(
    setup, random_start
):
    """Its weights are drawn in another order than those of a whole model, so they are others."""

    def looked_at(trainer, module):
        values = {}
        for name, parameter in module.model.named_parameters():
            with gathered(torch.nn.ParameterList([parameter])):
                values[name] = parameter.detach().clone()
        losses = next(c for c in trainer.callbacks if isinstance(c, runs.Losses)).values
        return values, losses, torch.get_rng_state()

    options = {"callbacks": pruning, "distillation": 0.5, "max_steps": 4, "look": looked_at}
    first, second = setup.fit("zero3-sharded-load", **options)
    (alone,) = setup.fit("zero3-sharded-load", "alone", ranks=1, **options)
    assert first[1] == second[1]
    assert first[1] == pytest.approx(alone[1], abs=1e-5)
    assert torch.equal(first[2], second[2])
    assert first[0].keys() == alone[0].keys()
    for name, values in alone[0].items():
        torch.testing.assert_close(first[0][name], values, rtol=0, atol=1e-4)
        assert float(values.std()) == pytest.approx(
            0.0 if values.ndim == 1 else 0.02, rel=0.2, abs=0.01
        )
