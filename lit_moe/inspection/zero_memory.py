"""Bytes of one rank under ZeRO, from the sizes of the parameters.

P: all trained parameters, N: ranks, c: bytes of a parameter (2 in bf16, 4 in fp32). Mixed-precision
Adam needs (2 + 2 + 12) P bytes: parameters, gradients, and fp32 master, momentum and variance.
Stage 1 divides the last by N, stage 2 the last two, stage 3 all three (ZeRO, arXiv 1910.02054,
section 5). Where DeepSpeed's optimizers hold more or less than the paper, this counts what they do.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_moe.inspection.ranks import Held, RankRequest

PERSISTENT = 100_000
"""Parameters up to this size stay whole under stage 3 (``stage3_param_persistence_threshold``)."""

_ITEMSIZE = {"bf16": 2, "fp32": 4}
_FP32 = 4
_ADAM = 3 * _FP32


def parameter_bytes(
    elements: Sequence[int], request: RankRequest, *, persistent: int = PERSISTENT
) -> Held:
    """Bytes of parameters: c P, or under stage 3 c P / N, each parameter rounded up by itself.

    Under stage 3 small parameters are held whole beside their shard. A frozen teacher is divided
    in the same way.

    Args:
        elements: of each parameter.
        request: the run.
        persistent: largest small parameter.
    """
    width = itemsize(request)
    if request.stage < 3:
        return Held(device=width * sum(elements))
    shards = width * shard(elements, request)
    small = width * sum(n for n in elements if n <= persistent)
    return Held(small, shards) if request.offloads_parameters else Held(small + shards)


def gradient_bytes(elements: Sequence[int], request: RankRequest) -> Held:
    """Bytes of gradients: c P, from stage 2 on c P / N.

    Stage 1 frees those of other ranks when the last backward of a step is over. With the optimizer
    on the host gradients go there, under stage 2 through a buffer of the largest parameter on
    either side; stage 1 is counted with whole gradients on the device.
    """
    width = itemsize(request)
    if request.stage == 1:
        return Held(device=width * sum(elements))
    mine = width * shard(elements, request)
    if not request.offloads_optimizer:
        return Held(device=mine)
    if request.stage == 3:
        return Held(host=mine)
    largest = width * max(elements)
    return Held(device=largest, host=largest)


def optimizer_bytes(elements: Sequence[int], request: RankRequest) -> Held:
    """Bytes of Adam's state: 12 P / N for fp32 master, momentum and variance.

    In fp32 under stage 3 the parameters are their own master: 8 P / N; under stages 1 and 2 it is a
    copy even then. Stages 1 and 2 with the optimizer on the host stage the new parameters there:
    c P / N more.
    """
    mine = shard(elements, request)
    if not request.offloads_optimizer:
        shares_master = request.stage == 3 and request.precision == "fp32"
        return Held(device=(_ADAM - _FP32 if shares_master else _ADAM) * mine)
    staged = 0 if request.stage == 3 else itemsize(request)
    return Held(host=(_ADAM + staged) * mine)


def step_bytes(elements: Sequence[int], request: RankRequest) -> Held:
    """Bytes of the fp32 gradients that the step works on: 4 P / N, beside those of backward.

    As in DeepSpeed's own estimate of 18 bytes a parameter. On the host they stay between steps.
    """
    needed = _FP32 * shard(elements, request)
    return Held(host=needed) if request.offloads_optimizer else Held(device=needed)


def gathered_bytes(trained_module: int, teacher_module: int, request: RankRequest) -> Held:
    """Bytes of the largest module that stage 3 makes whole at once, and 0 under other stages.

    In backward its gradient is whole beside it: 2 c elements, as DeepSpeed's estimate has it (the
    experts of a layer are one module). The teacher runs forward only: c elements.

    Args:
        trained_module: elements of the largest module of the student.
        teacher_module: elements of that of the teacher, 0 without one.
        request: the run.
    """
    width = itemsize(request)
    whole = max(2 * width * trained_module, width * teacher_module)
    return Held(device=whole if request.stage == 3 else 0)


def itemsize(request: RankRequest) -> int:
    """Bytes of one element of parameters, gradients and activations."""
    return _ITEMSIZE[request.precision]


def shard(elements: Sequence[int], request: RankRequest) -> int:
    """Elements of one rank: P / N rounded up, under stage 3 for each parameter by itself."""
    if request.stage < 3:
        return -(-sum(elements) // request.ranks)
    return sum(-(-n // request.ranks) for n in elements)
