"""A writer of JSONL files."""

import json

import pytest


@pytest.fixture
def write(tmp_path):
    """Return a function that writes records into a JSONL file and returns its path."""

    def records(name, *rows):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return str(file)

    return records
