"""A refit that is killed goes on at the layer where it was."""

import multiprocessing
import os
import signal

import pytest
import torch

from lit_moe.refit import RefitOptions, progress, refit
from lit_moe.refit.layer import LayerProblem
from lit_moe.refit.progress import Progress
from lit_moe.refit.report import LayerRefit
from tests.refit.models import downs_of, half_of, text_for

FIRST, SECOND = (f"model.layers.{i}.mlp" for i in range(2))
MODES = ("sequential", "parallel")


@pytest.fixture
def solved(monkeypatch):
    """A list that grows by one with every layer that is solved."""
    counts: list[int] = []
    solve = LayerProblem.solve

    def counted(self):
        counts.append(1)
        return solve(self)

    monkeypatch.setattr(LayerProblem, "solve", counted)
    return counts


def run(options, folder, on_layer=None, *, rows=32):
    """One refit of the same models on the same text."""
    teacher, student = half_of("mixtral")
    text = text_for(teacher, rows=rows)
    report = refit(student, teacher, text, options, progress_folder=folder, on_layer=on_layer)
    return report, downs_of(student)


def kill_after(name, options, folder):
    """Run in a process of its own that gets a kill -9 behind one layer."""

    def on_layer(layer, _):
        if layer == name:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=run, args=(options, folder, on_layer)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("solver", ["joint", "gauss_seidel"])
@pytest.mark.parametrize("mode", MODES)
def test_after_a_kill_solved_layers_are_not_solved_again_and_the_weights_are_the_same(
    mode, solver, tmp_path, solved, no_judge
):
    options = RefitOptions(mode=mode, solver=solver)
    whole, weights = run(options, tmp_path / "none")
    assert len(solved) == 2
    solved.clear()
    kill_after(FIRST, options, tmp_path / "progress")
    assert files_in(tmp_path / "progress") == [f"{FIRST}.safetensors"]
    resumed, again = run(options, tmp_path / "progress")
    assert len(solved) == 1
    assert resumed.layers[FIRST].resumed
    assert any(
        "1 layers had been solved by a run that was stopped" in s for s in resumed.sentences()
    )
    resumed.layers[FIRST].resumed = False
    assert resumed == whole
    for name, tensors in weights.items():
        assert torch.equal(again[name]["down"], tensors["down"])
    assert list(tmp_path.iterdir()) == []


def test_after_a_kill_behind_the_last_layer_nothing_is_solved(tmp_path, solved, no_judge):
    options = RefitOptions(mode="parallel")
    whole, weights = run(options, None)
    solved.clear()
    kill_after(SECOND, options, tmp_path)
    resumed, again = run(options, tmp_path)
    assert all(layer.resumed for layer in resumed.layers.values())
    for layer in resumed.layers.values():
        layer.resumed = False
    assert (solved, resumed) == ([], whole)
    for name, tensors in weights.items():
        assert torch.equal(again[name]["down"], tensors["down"])


def test_a_half_written_file_is_not_taken(tmp_path, solved, no_judge):
    options = RefitOptions()
    kill_after(FIRST, options, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / f"{SECOND}.unfinished").write_bytes(b"\x00\x01 half of a tensor")
    run(options, tmp_path)
    assert len(solved) == 1
    assert not folder.exists()


@pytest.mark.parametrize("change", ["options", "text", "student"])
def test_another_refit_does_not_take_the_layers_of_a_killed_one(change, tmp_path, solved, no_judge):
    options = RefitOptions(lam=0.1)
    kill_after(FIRST, options, tmp_path)
    if change == "options":
        run(RefitOptions(lam=0.2), tmp_path)
    elif change == "text":
        run(options, tmp_path, rows=48)
    else:
        teacher, student = half_of("mixtral")
        student.model.layers[1].mlp.experts.down_proj.data.mul_(1.5)
        refit(student, teacher, text_for(teacher), options, progress_folder=tmp_path)
    assert len(solved) == 2
    assert files_in(tmp_path) == [f"{FIRST}.safetensors"]


def test_a_layer_that_was_left_is_left_again(tmp_path, solved, no_judge):
    options = RefitOptions(lam=1e-6)
    teacher, student = half_of("mixtral")
    few = text_for(teacher, rows=8, length=12, batches=1)
    before = downs_of(student)

    def stop(_, record):
        assert not record.kept
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refit(student, teacher, few, options, progress_folder=tmp_path, on_layer=stop)
    solved.clear()
    report = refit(student, teacher, few, options, progress_folder=tmp_path)
    assert len(solved) == 1
    assert not report.layers[FIRST].kept
    assert torch.equal(downs_of(student)[FIRST]["down"], before[FIRST]["down"])


def test_progress_comes_back_as_it_was_saved(tmp_path):
    record = LayerRefit("joint", "stream", 0.1, 0.5, None, 0.25, 1e-30, True, "so", [3])
    saved = Progress(tmp_path / "progress", "one")
    assert saved.load("layer") is None
    update = torch.randn(2, 3, 4)
    saved.save("layer", update, record)
    saved.save("left", None, record)
    loaded = saved.load("layer")
    assert loaded is not None
    assert torch.equal(loaded[0], update)  # type: ignore[arg-type]
    record.resumed = True
    assert loaded[1] == record
    assert saved.load("left") == (None, record)
    assert Progress(tmp_path / "progress", "two").load("layer") is None
    saved.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_layer_is_never_there_before_it_is_whole(tmp_path, monkeypatch):
    def break_half_way(_, path):
        path.write_bytes(b"\x00\x01 half of a tensor")
        raise OSError("the disk is full")

    monkeypatch.setattr(progress, "save_file", break_half_way)
    saved = Progress(tmp_path, "one")
    with pytest.raises(OSError, match="disk is full"):
        saved.save("layer", None, LayerRefit())
    assert saved.load("layer") is None


def test_what_other_killed_refits_left_is_named(tmp_path, caplog):
    caplog.set_level("INFO")
    Progress(tmp_path, "mine").save("layer", None, LayerRefit())
    Progress(tmp_path, "mine")
    assert not caplog.records
    Progress(tmp_path, "new")
    assert "refits with other models, text or options, for instance mine" in caplog.text


def test_clearing_leaves_the_progress_of_others(tmp_path):
    mine, others = (Progress(tmp_path, name) for name in ("mine", "others"))
    for saved in (mine, others):
        saved.save("layer", None, LayerRefit())
    mine.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["others"]
    Progress(None, "").clear()
