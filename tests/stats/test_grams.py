"""Gram matrices of expert features against the dense T x (E D) matrix."""

import pytest
import torch

from lit_moe.stats.features import FeatureSlots
from lit_moe.stats.grams import Gram, Piece, gated_features
from lit_moe.testing import run_distributed

TOKENS, EXPERTS, TOP_K, WIDTH, HIDDEN = 40, 5, 2, 3, 4


def random_piece(seed=0, *, tokens=TOKENS, idle=(), equal=False):
    """A piece whose tokens use two of the experts that are not idle; weights differ by token."""
    generator = torch.Generator().manual_seed(seed)
    busy = torch.tensor([e for e in range(EXPERTS) if e not in idle])
    choice = torch.rand(tokens, len(busy), generator=generator).topk(TOP_K, dim=1).indices
    slots = FeatureSlots(
        busy[choice].reshape(-1),
        torch.rand(tokens * TOP_K, generator=generator),
        torch.randn(tokens * TOP_K, WIDTH, generator=generator),
        torch.arange(tokens).repeat_interleave(TOP_K),
    )
    weights = torch.ones(tokens) if equal else torch.rand(tokens, generator=generator) + 0.1
    held = torch.arange(tokens) % 4 == 3
    residual = torch.randn(tokens, HIDDEN, generator=generator)
    parts = gated_features(slots, bias=False)
    return Piece(*parts, residual, weights * ~held, weights * held)


def dense(piece, width=WIDTH):
    """The matrix with one row per token and one column per feature of each expert, in float64."""
    psi = torch.zeros(len(piece.residual), EXPERTS, width, dtype=torch.float64)
    for expert, token, row in zip(piece.expert_ids, piece.token_ids, piece.features, strict=True):
        psi[token, expert] = row.double()
    return psi.flatten(1)


def gram_of(*pieces, joint, width=WIDTH):
    gram = Gram(EXPERTS, width, HIDDEN, joint=joint)
    for piece in pieces:
        gram.add(piece)
    return gram


def test_joint_sums_equal_the_dense_computation():
    pieces = [random_piece(seed) for seed in range(3)]
    gram = gram_of(*pieces, joint=True)
    matrix, cross = torch.zeros_like(gram.matrix), torch.zeros_like(gram.cross)
    energy = 0.0
    for piece in pieces:
        psi, weight = dense(piece), piece.fit.double()[:, None]
        matrix += psi.T @ (weight * psi)
        cross += (psi.T @ (weight * piece.residual.double())).view_as(cross)
        energy += float((weight * piece.residual.double().square()).sum())
    torch.testing.assert_close(gram.matrix, matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram.cross, cross, rtol=1e-5, atol=1e-5)
    assert float(gram.energy) == pytest.approx(energy, rel=1e-6)
    assert torch.equal(gram.matrix, gram.matrix.T)


def test_blocks_are_the_diagonal_of_the_joint_matrix():
    piece = random_piece()
    joint, blocks = gram_of(piece, joint=True), gram_of(piece, joint=False)
    assert torch.equal(joint.blocks, blocks.blocks)
    assert torch.equal(joint.cross, blocks.cross)
    assert joint.mean_diagonal == pytest.approx(blocks.mean_diagonal, rel=1e-12)
    for expert in range(EXPERTS):
        rows = slice(expert * WIDTH, (expert + 1) * WIDTH)
        assert torch.equal(joint.matrix[rows, rows], blocks.matrix[expert])


def test_held_out_tokens_do_not_enter():
    piece = random_piece()
    gram = gram_of(piece, joint=True)
    alone = gram_of(piece.held_out(), joint=True)
    assert not alone.matrix.any()
    assert float(alone.energy) == 0
    assert int(gram.count.sum()) == int((piece.fit > 0).sum()) * TOP_K


def test_a_token_of_weight_two_counts_like_two_tokens():
    once = random_piece(equal=True)
    both = gram_of(once, once, joint=True)
    doubled = gram_of(
        Piece(
            once.expert_ids, once.token_ids, once.features, once.residual, 2 * once.fit, once.held
        ),
        joint=True,
    )
    torch.testing.assert_close(doubled.matrix, both.matrix, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(doubled.cross, both.cross, rtol=1e-6, atol=1e-6)


def test_the_bias_is_a_last_feature_that_equals_the_gate():
    slots = FeatureSlots(
        torch.tensor([2, 0, 1]),
        torch.tensor([0.5, 0.25, 2.0]),
        torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        torch.tensor([0, 0, 1]),
    )
    expert_ids, token_ids, features = gated_features(slots, bias=True)
    assert expert_ids.tolist() == [0, 1, 2]
    assert token_ids.tolist() == [0, 1, 0]
    assert features.tolist() == [[0.75, 1.0, 0.25], [10.0, 12.0, 2.0], [0.5, 1.0, 0.5]]
    assert gated_features(slots, bias=False)[2].shape == (3, 2)


def test_no_slot_at_all_gives_empty_features():
    empty = torch.zeros(0, dtype=torch.long)
    slots = FeatureSlots(empty, torch.zeros(0), torch.zeros(0, WIDTH), empty)
    expert_ids, token_ids, features = gated_features(slots, bias=True)
    assert (len(expert_ids), len(token_ids), features.shape) == (0, 0, (0, WIDTH + 1))


def test_idle_experts_are_named_and_leave_the_unit_of_the_penalty_alone():
    piece = random_piece(idle=(1, 3))
    gram = gram_of(piece, joint=True)
    assert gram.unrouted == (1, 3)
    diagonal = (dense(piece).square() * piece.fit.double()[:, None]).sum(0)
    assert gram.mean_diagonal == pytest.approx(float(diagonal[diagonal > 0].mean()), rel=1e-6)
    assert Gram(EXPERTS, WIDTH, HIDDEN, joint=True).mean_diagonal == 0.0


def test_a_prediction_is_the_dense_product():
    piece = random_piece()
    update = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=torch.Generator().manual_seed(9))
    expected = dense(piece) @ update.double().flatten(0, 1)
    torch.testing.assert_close(piece.predict(update).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_held_out_part_predicts_what_the_whole_predicts_there():
    piece = random_piece()
    update = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=torch.Generator().manual_seed(9))
    part, mine = piece.held_out(), piece.held > 0
    assert len(part.residual) == int(mine.sum()) == TOKENS // 4
    assert torch.equal(part.residual, piece.residual[mine])
    assert torch.equal(part.held, piece.held[mine])
    torch.testing.assert_close(part.predict(update), piece.predict(update)[mine])


@pytest.mark.distributed
@pytest.mark.parametrize("joint", [True, False])
def test_two_ranks_with_half_the_tokens_each_have_the_sums_of_one(joint):
    pieces = [random_piece(0), random_piece(1, idle=(2,))]
    one = gram_of(*pieces, joint=joint)

    def work(rank):
        gram = gram_of(pieces[rank], joint=joint)
        gram.reduce()
        return gram.matrix, gram.cross, gram.energy, gram.count

    for found in run_distributed(work):
        expected = (one.matrix, one.cross, one.energy, one.count)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
