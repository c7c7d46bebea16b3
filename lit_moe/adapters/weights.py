"""The matrices of stacked experts in one canonical orientation.

Layouts in memory differ in four ways: gate and up fused or not, the two halves one after the
other or interleaved, matrices stored as (out, in) or transposed, biases or none.
"""

from __future__ import annotations

from torch import Tensor, nn


def is_decorated(experts: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` dispatches this module."""
    return hasattr(experts, "is_concatenated") and hasattr(experts, "is_transposed")


def canonical(
    experts: nn.Module, num_experts: int, *, transposed: bool | None = None
) -> dict[str, Tensor]:
    """Return views ``up (E, I, H)``, ``down (E, H, I)``, maybe ``gate`` and biases.

    Args:
        experts: module with ``down_proj`` and ``gate_up_proj`` or ``up_proj``, stacked.
        num_experts: rows that are routed experts; null experts after them are left out.
        transposed: whether matrices are stored (in, out); None to believe the module.
    """
    if transposed is None:
        transposed = bool(getattr(experts, "is_transposed", False))
    concatenated = bool(getattr(experts, "is_concatenated", True))
    found = {"down": _matrix(experts.down_proj, transposed)}
    if hasattr(experts, "gate_up_proj"):
        fused = _matrix(experts.gate_up_proj, transposed)
        found["gate"], found["up"] = halves(fused, dim=1, concatenated=concatenated)
    else:
        found["up"] = _matrix(experts.up_proj, transposed)
    if hasattr(experts, "gate_up_proj_bias"):
        fused_bias = experts.gate_up_proj_bias
        assert isinstance(fused_bias, Tensor)
        found["gate_bias"], found["up_bias"] = halves(fused_bias, dim=1, concatenated=concatenated)
    for name in ("up", "down"):
        bias = getattr(experts, f"{name}_proj_bias", None)
        if isinstance(bias, Tensor):
            found[f"{name}_bias"] = bias
    return {name: tensor[:num_experts] for name, tensor in found.items()}


def halves(fused: Tensor, *, dim: int, concatenated: bool) -> tuple[Tensor, Tensor]:
    """Split a fused gate-and-up tensor into gate and up views along ``dim``."""
    if concatenated:
        gate, up = fused.chunk(2, dim=dim)
        return gate, up
    width = fused.shape[dim] // 2
    paired = fused.unflatten(dim, (width, 2))
    return paired.select(dim + 1, 0), paired.select(dim + 1, 1)


def _matrix(weight: object, transposed: bool) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight.transpose(1, 2) if transposed else weight
