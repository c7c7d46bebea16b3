"""``python -m tests.benchmarks [NAME ...]``: run the benchmarks and write their tables."""

import sys
from importlib import import_module
from pathlib import Path

BENCHMARKS = (
    "calibration",
    "train_step",
    "surgery_export",
    "pruning_curves",
    "scale",
    "mc_suite",
    "sparsity",
    "distillation",
    "refit",
    "search",
)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    names = sys.argv[1:] or BENCHMARKS
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        print(f"== {name}", flush=True)
        table = import_module(f"tests.benchmarks.{name}").run()
        (RESULTS / f"{name}.md").write_text(table + "\n")
        print(table, flush=True)


if __name__ == "__main__":
    main()
