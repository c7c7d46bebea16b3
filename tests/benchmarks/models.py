"""``make models``: train the benchmark models, once, into a cache folder outside git.

``$LIT_MOE_CACHE`` or ``~/.cache/lit-moe`` holds them; a model that is there is not trained again.
``python -m tests.benchmarks.models [RECIPE ...]`` trains only some.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ("mixtral_8x2", "olmoe_16x4")
SEEDS = (1, 2, 3)


def cache_folder() -> Path:
    """Where trained benchmark models lie."""
    return Path(os.environ.get("LIT_MOE_CACHE", "~/.cache/lit-moe")).expanduser() / "models"


def model_folder(recipe: str, seed: int) -> Path:
    """Folder of one trained model; exists only once the model is complete."""
    return cache_folder() / f"{recipe}-seed{seed}"


def main() -> None:
    for seed in SEEDS:
        for recipe in sys.argv[1:] or RECIPES:
            folder = model_folder(recipe, seed)
            if folder.exists():
                print(f"{folder} is there")
                continue
            words = [
                *(sys.executable, "-m", "lit_moe", "fit"),
                f"--config={ROOT}/configs/models/{recipe}.yaml",
                f"--seed_everything={seed}",
                f"--data.init_args.seed={seed}",
                f"--trainer.default_root_dir={cache_folder()}/runs/{recipe}-seed{seed}",
            ]
            subprocess.run(words, check=True)
            runs = cache_folder() / "runs" / f"{recipe}-seed{seed}" / "lightning_logs"
            max(runs.glob("*/model"), key=lambda path: path.stat().st_mtime).replace(folder)


if __name__ == "__main__":
    main()
