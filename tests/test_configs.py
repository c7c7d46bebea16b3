"""Every file in configs/ parses against the real signatures and builds its objects."""

import sys
from pathlib import Path

import lightning as L
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lit_moe.criteria import available
from lit_moe.module import MoEModule

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.yaml"))
FITS = [path for path in CONFIGS if "trainer" in yaml.safe_load((ROOT / path).read_text())]


@pytest.mark.parametrize("path", FITS, ids=str)
def test_config_instantiates(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-moe"])
    built = LightningCLI(
        MoEModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=["--config", str(ROOT / path), f"--trainer.default_root_dir={tmp_path}"],
    )
    assert isinstance(built.model, MoEModule)
    assert isinstance(built.datamodule, L.LightningDataModule)


@pytest.mark.parametrize("path", FITS, ids=str)
def test_config_says_what_it_is_and_how_to_run_it(path):
    lines = (ROOT / path).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert any(str(path) in line for line in lines[:8]), "the head names the command"


def test_every_criterion_has_a_config():
    have = {path.stem for path in CONFIGS if path.parent.name == "one_shot"}
    assert have == set(available())
