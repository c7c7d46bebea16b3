"""``python -m tests.benchmarks.readme``: put the measured tables between their marks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for table in sorted(RESULTS.glob("*.md")):
        mark = f"<!-- {table.stem.replace('_table', ' table')} -->"
        block = f"{mark}\n{table.read_text().rstrip()}\n<!-- end -->"
        text = re.sub(
            rf"{re.escape(mark)}\n.*?<!-- end -->", lambda _, b=block: b, text, flags=re.S
        )
    readme.write_text(text)


if __name__ == "__main__":
    main()
