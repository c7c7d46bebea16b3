from pathlib import Path

import pytest

from lit_moe.callbacks.rounds import FineTuning
from lit_moe.compare.options import CompareOptions, TextOptions
from lit_moe.optimization import OptimizerConfig


@pytest.fixture
def small_options(checkpoint, pages, tmp_path):
    """Return a function that makes options of a comparison of seconds; keywords override."""

    def make(**changes):
        text = TextOptions(
            calibration_files=[pages],
            train_files=[pages],
            evaluation_files=[pages],
            sequence_length=32,
            batch_size=4,
            calibration_tokens=256,
            evaluation_tokens=256,
        )
        options = {
            "models": [str(checkpoint)],
            "criteria": ["ean"],
            "keep_ratios": [0.75, 0.5],
            "seeds": [0, 1],
            "random_draws": 0,
            "rounds": 2,
            "fine_tuning": FineTuning(first=2, growth=1.0, unit="steps", when_data_ends="repeat"),
            "optimizer": OptimizerConfig(learning_rate=1e-2),
            "text": text,
            "output": str(tmp_path / "out"),
            "figures": False,
        }
        return CompareOptions(**{**options, **changes})

    return make


@pytest.fixture
def cells_of():
    """Return a function that gives key -> value of all cells, without the time that they took."""

    def read(found):
        cells = {}
        for key, value in found.store.all("cell"):
            name = tuple(sorted((k, str(v)) for k, v in key.items()))
            cells[name] = {k: v for k, v in value.items() if "second" not in k}
        return cells

    return read


@pytest.fixture
def output(tmp_path):
    """Where the results go."""
    return Path(tmp_path / "out")
