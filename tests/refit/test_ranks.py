"""Two processes with half of the rows each give the weights of one process."""

import itertools

import pytest
import torch

from lit_moe.errors import CalibrationError
from lit_moe.refit import RefitOptions, refit
from lit_moe.refit.layer import LayerProblem
from lit_moe.refit.rows import Rows
from lit_moe.testing import run_distributed, tiny_moe
from tests.refit.models import downs_of, half_of, held_rows, text_for

CPU = torch.device("cpu")
pytestmark = pytest.mark.distributed


def share_of(batches, rank, world_size=2):
    """Every ``world_size``-th row, in batches of four."""
    rows = {k: torch.cat([b[k] for b in batches])[rank::world_size] for k in batches[0]}
    size = len(rows["input_ids"])
    return [{k: v[i : i + 4] for k, v in rows.items()} for i in range(0, size, 4)]


@pytest.mark.parametrize("solver", ["joint", "jacobi", "gauss_seidel"])
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_two_ranks_fit_the_weights_of_one(mode, solver, no_judge):
    options = RefitOptions(mode=mode, solver=solver)
    teacher, student = half_of("gpt_oss")
    batches = text_for(teacher)
    one = refit(student, teacher, batches, options)

    def work(rank):
        mine = half_of("gpt_oss")[1]
        report = refit(mine, teacher, share_of(batches, rank), options)
        return report, downs_of(mine)

    (first, weights), (second, others) = run_distributed(work)
    assert (first.tokens, first.held_out_tokens) == (one.tokens, one.held_out_tokens) == (448, 64)
    assert first == second
    for name, layer in one.layers.items():
        assert first.layers[name].lam == layer.lam
        assert first.layers[name].held_out_after == pytest.approx(layer.held_out_after, rel=1e-3)
        for key, tensor in downs_of(student)[name].items():
            assert torch.equal(weights[name][key], others[name][key])
            torch.testing.assert_close(weights[name][key], tensor, rtol=1e-3, atol=2e-4)


def test_two_ranks_judge_by_the_loss_of_one():
    teacher, student = half_of("mixtral")
    batches = text_for(teacher)
    one = refit(student, teacher, batches)

    def work(rank):
        return refit(half_of("mixtral")[1], teacher, share_of(batches, rank))

    for report in run_distributed(work):
        assert report.kept == one.kept
        assert report.loss_before == pytest.approx(one.loss_before, rel=1e-6)
        assert report.loss_after == pytest.approx(one.loss_after, rel=1e-4)


@pytest.mark.parametrize("held_out", [0.5, 0.25, 0.125, 0.1])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_held_out_rows_are_the_same_on_any_number_of_ranks(held_out, world_size):
    model = tiny_moe("mixtral")
    batches = text_for(model, rows=30)

    def held(rank, world_size):
        share = share_of(batches, rank, world_size)
        rows = Rows(share, held_out, CPU, rank=rank, world_size=world_size)
        return [row for b in rows.held_batches() for row in b["input_ids"].tolist()]

    alone = held(0, 1)
    assert len(alone) in (30 // round(1 / held_out), 30 // round(1 / held_out) + 1)
    shares = run_distributed(lambda rank: held(rank, world_size), world_size)
    assert sorted(itertools.chain(*shares)) == sorted(alone)


@pytest.mark.parametrize("num_domains", [2, 4, 6, 8])
def test_no_domain_of_a_text_that_deals_them_in_turn_is_left_out(num_domains):
    domains = torch.arange(128) % num_domains
    held = torch.bincount(domains[held_rows(128)], minlength=num_domains)
    assert int(held.sum()) == 16
    assert int(held.min()) > 0


def test_two_ranks_go_on_where_they_were_killed(tmp_path, no_judge):
    teacher, _ = half_of("mixtral")
    batches = text_for(teacher)
    solved: list[int] = []

    def work(rank, stop_after=None):
        student = half_of("mixtral")[1]

        def on_layer(name, _):
            if name == stop_after:
                raise KeyboardInterrupt

        try:
            refit(
                student,
                teacher,
                share_of(batches, rank),
                progress_folder=tmp_path / "progress",
                on_layer=on_layer,
            )
        except KeyboardInterrupt:
            return None
        return len(solved), downs_of(student)

    def again(rank):
        count_solves(solved)
        return work(rank)

    assert run_distributed(lambda rank: work(rank, "model.layers.0.mlp")) == [None, None]
    assert len(list((tmp_path / "progress").rglob("*.safetensors"))) == 1
    straight = run_distributed(lambda rank: downs_after(rank, teacher, batches))
    for (count, weights), whole in zip(run_distributed(again), straight, strict=True):
        assert count == 1
        for name, tensors in whole.items():
            assert torch.equal(weights[name]["down"], tensors["down"])
    assert not (tmp_path / "progress").exists()


def count_solves(solved):
    """In a process of its own: note every layer that is solved."""
    solve = LayerProblem.solve

    def counted(self):
        solved.append(1)
        return solve(self)

    LayerProblem.solve = counted  # type: ignore[method-assign]


def downs_after(rank, teacher, batches):
    student = half_of("mixtral")[1]
    refit(student, teacher, share_of(batches, rank))
    return downs_of(student)


def test_rows_too_few_for_two_ranks_together_are_refused_on_both():
    (batch,) = text_for(tiny_moe("mixtral"), rows=7, batches=1)

    def refused(rank):
        mine = {k: v[rank::2] for k, v in batch.items()}
        with pytest.raises(CalibrationError, match="7 calibration rows are too few .* one in 8"):
            Rows([mine], 0.125, CPU, rank=rank, world_size=2)
        return True

    assert run_distributed(refused) == [True, True]
