"""Report files: written so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from lit_moe.errors import LitMoEError
from lit_moe.report.markdown import to_markdown
from lit_moe.report.schema import RunReport


def write_json(report: RunReport, path: str | Path) -> None:
    """Write ``report`` as JSON, replacing an older file in one step."""
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    _replace(Path(path), text + "\n")


def read_json(path: str | Path) -> RunReport:
    """Read what :func:`write_json` wrote.

    Raises:
        LitMoEError: if the file is missing, is not JSON, or is no report.
    """
    try:
        return RunReport.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise LitMoEError(f"report {path} does not exist") from error
    except json.JSONDecodeError as error:
        raise LitMoEError(f"report {path} is not JSON: {error}") from error


def write_markdown(report: RunReport, path: str | Path, *, figures: Sequence[Path] = ()) -> None:
    """Write ``report`` as Markdown that shows ``figures``, which lie in the same folder."""
    _replace(Path(path), to_markdown(report, figures=[figure.name for figure in figures]))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
