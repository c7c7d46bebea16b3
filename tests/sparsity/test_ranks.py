"""Two processes with one batch each decide what one process with both decides."""

import pytest
import torch

from lit_moe.errors import CalibrationError
from lit_moe.sparsity import sparsify, weight_masks
from lit_moe.testing import example_inputs, run_distributed, tiny_moe
from tests.sparsity.oracle import state_of

pytestmark = pytest.mark.distributed


def alone(work):
    """One process of its own: forking just after threads have used the math library may hang."""
    return run_distributed(lambda _: work(), world_size=1)[0]


@pytest.mark.parametrize("earlier", ["pruned", "dense"])
@pytest.mark.parametrize("method", ["wanda", "moe_pruner", "sparsegpt"])
def test_two_ranks_prune_like_one(method, earlier):
    batches = [example_inputs(tiny_moe("gpt_oss"), seed=seed) for seed in range(2)]

    def prune(mine):
        model = tiny_moe("gpt_oss")
        thinning = sparsify(model, mine, method=method, ratio=0.5, earlier=earlier)
        return thinning.masks.to_dict()["bits"], thinning.unrouted, state_of(model)

    bits, unrouted, state = alone(lambda: prune(batches))
    for other_bits, other_unrouted, other in run_distributed(lambda rank: prune([batches[rank]])):
        assert other_unrouted == unrouted
        for layer, matrices in bits.items():
            for name, packed in matrices.items():
                assert torch.equal(other_bits[layer][name], packed), (layer, name)
        for name, tensor in state.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_experts_that_only_the_other_rank_meets_are_not_unrouted():
    model = tiny_moe("mixtral")
    batches = [example_inputs(model, batch=1, length=2, seed=seed) for seed in range(2)]

    def unrouted(mine):
        return sparsify(tiny_moe("mixtral"), mine, pattern="2:4").unrouted

    together = alone(lambda: unrouted(batches))
    assert together != alone(lambda: unrouted(batches[:1]))
    assert run_distributed(lambda rank: unrouted([batches[rank]])) == [together, together]


@pytest.mark.parametrize("earlier", ["pruned", "dense"])
def test_a_rank_without_text_is_refused_on_both(earlier):
    def refused(rank):
        model = tiny_moe("mixtral")
        batches = [example_inputs(model)] if rank == 0 else []
        with pytest.raises(CalibrationError, match=r"no calibration batch|1 other ranks stopped"):
            weight_masks(model, batches, pattern="2:4", earlier=earlier)
        return True

    assert run_distributed(refused) == [True, True]
