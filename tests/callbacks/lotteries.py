"""Short runs of rounds on a tiny model, and what they are compared with."""

import json
from pathlib import Path

import lightning as L
import torch

from lit_moe.callbacks.rounds import FineTuning

NO_QUALITY = {"measure_quality": False, "figures": False}
LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")
RATE = 1e-2


def steps(first=2, **options):
    return FineTuning(
        **{"first": first, "growth": 1.0, "unit": "steps", "when_data_ends": "repeat", **options}
    )


class Watch(L.Callback):
    """Notes batches, learning rates, and whether moments are empty; saves once."""

    def __init__(self, save_at=None, path=None):
        self.save_at, self.path = save_at, path
        self.rates, self.empty, self.batches = [], [], []

    def on_before_optimizer_step(self, *hook):
        optimizer = hook[2]
        self.rates.append(optimizer.param_groups[0]["lr"])
        state = list(optimizer.state.values())
        self.empty.append(all(not s["exp_avg"].any() and s["step"] == 0 for s in state))

    def on_train_batch_start(self, *hook):
        self.batches.append(hook[2]["input_ids"])

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)


def assert_same_weights(mine, theirs, tolerance):
    for (name, a), (_, b) in zip(
        mine.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=name)


def rounds_of(trainer):
    return json.loads((Path(trainer.log_dir) / "rounds.json").read_text())
