"""What a sharded run holds beside the weights that it trains: the teacher, and frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lit_moe.resuming import CheckpointHeader, read_stored
from lit_moe.sharding.weights import checked, put_whole, stored_parameters

_TEACHER = "teacher"


@contextmanager
def without_teacher(module: nn.Module) -> Iterator[None]:
    """Within it, a module has no teacher: none is written to a checkpoint or looked for in one."""
    teacher = module._modules.get(_TEACHER)
    if teacher is None:
        yield
        return
    place = vars(module)
    place[_TEACHER] = module._modules.pop(_TEACHER)  # there, but not as a submodule
    try:
        yield
    finally:
        module._modules[_TEACHER] = place.pop(_TEACHER)


@torch.no_grad()
def load_untrained(module: nn.Module, header: CheckpointHeader) -> None:
    """Copy what no optimizer holds from a checkpoint: frozen weights (not the teacher), buffers.

    Any number of ranks and any ZeRO stage can load what any other wrote. Collective.

    Raises:
        LitMoEError: if the checkpoint lacks a frozen weight or has another shape of it.
    """
    stored = read_stored(header.path)["module"]
    with without_teacher(module):
        frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
        buffers = {name: b for name, b in module.named_buffers() if name in stored}
    found = stored_parameters(header) if frozen else {}
    for name, parameter in frozen.items():
        put_whole(parameter, checked(found.get(name), name, parameter, header))
    for name, buffer in buffers.items():
        buffer.copy_(stored[name])
