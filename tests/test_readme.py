"""The README tells the truth: its commands exist, its files are there, its five lines run."""

import re
from pathlib import Path
from typing import Any

import torch
import yaml

import lit_moe
from lit_moe.assets import model_folder
from lit_moe.models import build_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_make_targets_of_the_readme_exist_and_ci_runs_the_test_command():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    assert (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1] == "make test"


def test_commands_of_the_readme_name_real_configs_and_keys():
    shell = "\n".join(blocks("bash"))
    for path in re.findall(r"configs/\S+\.yaml", shell):
        assert (ROOT / path).is_file(), path
    config = yaml.safe_load((ROOT / "configs/one_shot/reap.yaml").read_text())
    for section, key in re.findall(r"--(model|data)\.init_args\.(\w+)", shell):
        assert key in config[section]["init_args"], key


def test_the_tree_of_the_readme_is_the_tree():
    tree = README.split("## The tree")[1]
    for name in re.findall(r"^  (\w+(?:\.py|/))", tree, flags=re.M):
        assert (ROOT / "lit_moe" / name).exists(), name
    for name in re.findall(r"^(\w+/) ", tree, flags=re.M):
        assert (ROOT / name).is_dir(), name


def test_the_five_lines_run(tmp_path):
    (code,) = blocks("python")
    model = build_model("embedded", dtype="float32")
    ids = torch.randint(0, 1024, (8, 64), generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {
        "lit_moe": lit_moe,
        "model": model,
        "batches": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}],
    }
    exec(code.replace('"smaller"', repr(str(tmp_path / "smaller"))), names)
    assert names["plan"].keep_ratio == 0.5
    assert (tmp_path / "smaller" / "config.json").is_file()
    assert (model_folder() / "config.json").is_file()


def test_a_masked_model_equals_the_cut_model_to_rounding():
    model = build_model("embedded", dtype="float32")
    ids = torch.randint(0, 1024, (2, 32), generator=torch.Generator().manual_seed(0))
    plan = lit_moe.select(lit_moe.score(model, "random"), keep_ratio=0.5)
    with torch.no_grad():
        before = model(ids).logits
        with lit_moe.masked(model, plan):
            masked = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        lit_moe.shrink(model, plan)
        # A softmax over 16 entries, 8 of them 0, adds up in another order than one over 8.
        torch.testing.assert_close(model(ids).logits, masked, rtol=0, atol=3e-5)


def test_every_test_that_the_scale_table_names_exists():
    table = README.split("**What runs where.**")[1].split("A dash means")[0]
    names = re.findall(r"`(test_\w+)`", table)
    assert len(names) > 10
    sources = "".join(path.read_text() for path in (ROOT / "tests/distributed").glob("*.py"))
    for name in names:
        assert f"def {name}(" in sources, name


def test_every_table_of_a_benchmark_is_the_one_that_was_measured():
    results = ROOT / "tests/benchmarks/results"
    for name in ("calibration", "scale"):
        assert (results / f"{name}.md").read_text().strip() in README, name
