"""The shape that the user fixed: top level, the callbacks link, file sizes, no vague rooms."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"pyproject.toml", "lit_moe", "callbacks", "configs", "tests", "launch", "README.md"}
MAY_STAND_BESIDE = {"Makefile", "LICENSE", "CHANGELOG.md", "constraints.txt"}
VAGUE = {"utils", "helpers", "common", "manager", "misc"}


def tracked() -> list[Path]:
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in git.stdout.splitlines()]


def test_top_level_is_what_the_user_fixed():
    names = {path.parts[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL | MAY_STAND_BESIDE


def test_callbacks_is_a_real_folder_reached_through_a_tracked_link():
    link = ROOT / "lit_moe" / "callbacks"
    assert link.is_symlink()
    assert link.readlink() == Path("../callbacks")
    assert not (ROOT / "callbacks").is_symlink()
    mode = subprocess.run(
        ["git", "ls-files", "-s", "lit_moe/callbacks"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()[0]
    assert mode == "120000"


def test_callbacks_cannot_be_imported_by_its_folder_name():
    spec = importlib.util.spec_from_file_location("callbacks", ROOT / "callbacks" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match="import lit_moe.callbacks, not callbacks"):
        spec.loader.exec_module(module)
    assert importlib.import_module("lit_moe.callbacks").OneShotPruning


def test_no_file_outgrows_a_screenful_of_concepts_and_no_room_is_nameless():
    for path in tracked():
        if path.suffix != ".py" or not (ROOT / path).is_file():
            continue
        assert path.stem not in VAGUE, path
        lines = len((ROOT / path).read_text().splitlines())
        assert lines <= 400, f"{path} has {lines} lines: split it by concept"


def test_embedded_assets_are_small():
    total = sum(p.stat().st_size for p in (ROOT / "lit_moe" / "assets").rglob("*") if p.is_file())
    assert total <= 16_000_000


def test_every_public_name_resolves():
    import lit_moe

    for name in ("MoEModule", "observe", "score", "select", "shrink", "export", "masked", "load"):
        assert callable(getattr(lit_moe, name))
        assert name in dir(lit_moe)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lit_moe.nothing
    assert "torch" not in _modules_after("import lit_moe")


def _modules_after(statement: str) -> list[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    ).stdout.split()
