import json
import subprocess
import sys
import time

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_moe import cli
from lit_moe.commands import one_sentence

TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.init_args.sequence_length=32",
    "--data.init_args.calibration_tokens=256",
]


def run(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "lit_moe", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def test_help_needs_no_heavy_import():
    start = time.perf_counter()
    result = run("--help")
    # A bound that only an import of torch or lightning would break, even on a loaded machine.
    assert time.perf_counter() - start < 3
    assert result.returncode == 0
    assert "inspect" in result.stdout
    code = "import sys, lit_moe.cli; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"


def test_a_misspelt_command_names_the_nearest(capsys):
    assert cli.main(["fitt"]) == 2
    assert "did you mean 'fit'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("--data.init_args.batch_sise=2", "did you mean 'batch_size'?"),
        ("--model.init_args.model_nam_or_path=x", "did you mean 'model_name_or_path'?"),
        ("--trainer.max_stepz=1", "did you mean 'trainer.max_steps'?"),
    ],
)
def test_a_misspelt_key_names_the_nearest_in_one_line(key, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-moe"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", "configs/one_shot/random.yaml", key])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--OneShotPruning.keep_ratio", "1.5"], "keep_ratio=1.5"),
        (["--OneShotPruning.keep_ratio=0"], "keep_ratio=0"),
        (["--OneShotPruning.criterion=reapp"], "did you mean 'reap'?"),
        (["--OneShotPruning.kep_ratio=0.5"], "did you mean 'keep_ratio'?"),
        (["--OneShotPruning.plan=nope.json"], "nope.json does not exist"),
        (["--OneShotPruning.budget={keep_experts: 4}"], "keep_ratio: null"),
        (["--ExpertMonitor.every_n_steps=2"], "has no callback ExpertMonitor"),
        (
            ["--OneShotPruning.criterion=ean", "--OneShotPruning.criterion_options.direction=down"],
            "direction='down' is unknown; use 'paper' or 'opposite'",
        ),
        (["--data.init_args.batch_size=0"], "batch_size=0"),
    ],
)
def test_a_wrong_value_from_yaml_or_the_command_line_is_one_sentence(
    words, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(sys, "argv", ["lit-moe"])
    here = cli.__file__.removesuffix("lit_moe/cli.py")
    monkeypatch.chdir(tmp_path)
    config = f"{here}configs/one_shot/reap.yaml"
    assert cli.main(["fit", "--config", config, *words]) == 2
    said = capsys.readouterr().err.splitlines()
    (sentence,) = [line for line in said if "error:" in line]
    assert message in sentence
    assert not any("what was found" in line for line in said)  # nothing was


def test_a_strategy_that_cannot_prune_is_refused_before_it_is_set_up(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-moe"])
    monkeypatch.setattr(DeepSpeedStrategy, "setup_environment", lambda _: pytest.fail("set up"))
    words = ["--config=configs/one_shot/reap.yaml", "--trainer.accelerator=cpu"]
    words += ["--trainer.devices=1", "--trainer.strategy=deepspeed_stage_3"]
    assert cli.main(["fit", *words]) == 2
    error = capsys.readouterr().err
    (sentence,) = [line for line in error.splitlines() if "error:" in line]
    assert sentence.startswith(
        "lit-moe: error: strategy DeepSpeedStrategy builds models inside deepspeed.zero.Init, "
        "where experts cannot be pruned and random weights become NaN; take strategy: zero1, zero2"
    )
    assert "Traceback" not in error


def test_a_literal_that_is_none_names_the_choices(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-moe"])
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config=configs/one_shot/reap.yaml", "--model.init_args.dtype=float31"])
    assert "'bfloat16'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--Refit.options.lamb=0.1", "no field 'lamb'; did you mean 'lam'?"),
        ("--Refit.options={memory_gb: 1}", "no field 'memory_gb'; did you mean 'memory_gib'?"),
        ("--Refit.options.lam=abc", "lam='abc' is not a number"),
        ("--Refit.options.solver=choleski", "known: auto, joint, jacobi, gauss_seidel"),
        ("--Refit.options.held_out=0.9", "held_out=0.9 must be in (0, 0.5]"),
        ("--Refit.teacher=no/such/folder", "no/such/folder"),
    ],
)
def test_options_of_the_refit_are_checked_on_the_command_line(
    word, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(sys, "argv", ["lit-moe"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = cli.__file__.removesuffix("lit_moe/cli.py")
    assert cli.main(["fit", "--config", f"{here}configs/refit/refit_only.yaml", word]) == 2
    error = capsys.readouterr().err
    assert error.count("lit-moe: error: ") == 1
    assert message in error


def test_help_of_a_command_is_quick_and_names_the_keys_people_change(capsys):
    assert cli.main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("calibration_files", "--OneShotPruning.keep_ratio", "--help-all"):
        assert word in shown


def test_a_parser_report_is_reduced_to_its_innermost_complaint():
    report = (
        "Parser key \"model\":\n  Problem with given class_path 'lit_moe.MoEModule':\n"
        "    Problem with given class_path 'lit_moe.module.LossWeights':\n"
        "      Option 'distilation' is not accepted\n"
    )
    expected = (
        "lit_moe.module.LossWeights: Option 'distilation' is not accepted; "
        "did you mean 'distillation'?"
    )
    assert one_sentence(report, []) == expected


def test_fit_from_another_folder_with_composed_configs(checkpoint, pages, tmp_path):
    extra = tmp_path / "extra.yaml"
    extra.write_text(
        "trainer:\n  callbacks+:\n"
        "    - class_path: lit_moe.callbacks.ReportWriter\n"
        "      init_args: {figures: false}\n"
    )
    here = cli.__file__.removesuffix("lit_moe/cli.py")
    result = run(
        "fit",
        "--config",
        f"{here}configs/one_shot/frequency.yaml",
        "--config",
        str(extra),
        "--OneShotPruning.keep_ratio=0.25",
        f"--model.init_args.model_name_or_path={checkpoint}",
        f"--data.init_args.calibration_files=[{pages}]",
        f"--data.init_args.test_files=[{pages}]",
        *TINY,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs/one_shot_frequency/lightning_logs").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "finished"
    assert {len(layer["kept"]) for layer in report["experts"].values()} == {2}
    assert "keep_ratio: 0.25" in (folder / "config.yaml").read_text()
    assert (folder / "model" / "config.json").is_file()
    assert not list(folder.glob("*.png"))  # the appended ReportWriter replaced the default one
    assert "report.md" in result.stdout


def test_a_request_that_cannot_be_met_is_one_sentence_and_exit_2(checkpoint, tmp_path):
    result = run(
        "fit",
        "--config",
        "configs/one_shot/frequency.yaml",
        f"--model.init_args.model_name_or_path={tmp_path}/nothing",
        f"--trainer.default_root_dir={tmp_path}",
        *TINY,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "nothing" in result.stderr.strip().splitlines()[-1]


def test_inspect_prints_tables_and_json(checkpoint, capsys):
    assert cli.main(["inspect", str(checkpoint)]) == 0
    assert "routed experts" in capsys.readouterr().out
    assert cli.main(["inspect", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "mixtral"


def test_inspect_of_a_folder_without_config_is_one_sentence(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_word_of_lightning_sdk_is_handed_on_to_it(tmp_path, monkeypatch, capsys):
    info = tmp_path / "lightning_sdk-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nlightning = sdk_cli:main\n")
    (tmp_path / "sdk_cli.py").write_text(
        "import sys\ndef main():\n    print('sdk', sys.argv[1:])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["login", "--now"]) == 0
    assert "sdk ['login', '--now']" in capsys.readouterr().out
