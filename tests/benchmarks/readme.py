"""``python -m tests.benchmarks.readme``: put the measured tables between their marks."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
END = "<!-- end -->"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for table in sorted(RESULTS.glob("*.md")):
        mark = f"<!-- {table.stem} -->"
        if mark in text:
            head, rest = text.split(mark, 1)
            text = f"{head}{mark}\n{table.read_text().rstrip()}\n{END}{rest.split(END, 1)[1]}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
