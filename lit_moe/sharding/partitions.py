"""ZeRO-3 partitions of a model that no engine manages yet: look at them whole, change them, run.

A partitioned parameter is an empty placeholder; each rank holds a share of its values beside it.
Everything here is collective: all ranks must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_MANAGED = "managed_by_an_engine"


def is_partitioned(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` is spread over ranks."""
    return any(hasattr(parameter, "ds_tensor") for parameter in module.parameters())


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor, also of one that is spread over ranks."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def whole_numel(tensor: Tensor) -> int:
    """Return the elements of a tensor, also of one that is spread over ranks."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def is_managed(module: nn.Module) -> bool:
    """Whether an engine gathers the parameters of ``module`` while it runs."""
    return _MANAGED in vars(module)


def mark_managed(module: nn.Module) -> None:
    """Note that an engine gathers the parameters of ``module`` while it runs."""
    for part in module.modules():
        vars(part)[_MANAGED] = True


def mark_released(module: nn.Module) -> None:
    """Note that no engine looks after ``module`` any more."""
    for part in module.modules():
        vars(part).pop(_MANAGED, None)


def has_master(tensor: Any) -> bool:
    """Whether DeepSpeed holds float32 weights of a parameter beside those that the model uses."""
    return hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping")


@contextmanager
def loading_partitioned(config: Mapping[str, Any] | None) -> Iterator[None]:
    """Let transformers load models straight into partitions inside the block.

    Args:
        config: a DeepSpeed configuration of stage 3; None loads whole models as ever.
    """
    if config is None:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    switch = HfDeepSpeedConfig(dict(config))  # transformers asks it as long as it lives
    try:
        yield
    finally:
        del switch


def loads_partitioned() -> bool:
    """Whether models are made straight into partitions now, as in :func:`loading_partitioned`."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Let the parameters of ``module`` be whole on each rank, to be read, inside the block."""
    parameters = [p for p in module.parameters() if hasattr(p, "ds_tensor")]
    if not parameters:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(parameters):
        yield


@contextmanager
def opened(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Let the parameters of some modules be ordinary ones inside the block, to be replaced.

    Afterwards whatever is there is partitioned like before. Parameters that other modules share
    are still shared. A model that is not partitioned is left alone.

    Args:
        model: partitioned, or whole.
        paths: of modules that are small enough to be whole on each rank.
    """
    if not is_partitioned(model):
        yield
        return
    from deepspeed import zero

    modules = [model.get_submodule(path) for path in paths]
    whole: dict[int, nn.Parameter] = {}
    for module in modules:
        parameters = [p for p in module.parameters() if id(p) not in whole]
        with zero.GatheredParameters(parameters):
            for parameter in parameters:
                values = parameter.detach().clone()
                whole[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    for part in model.modules():
        for name, own in part._parameters.items():
            if id(own) in whole:
                part._parameters[name] = whole[id(own)]
    try:
        yield
    finally:
        for module in modules:
            zero.Init(module=module)


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Let a partitioned model run inside the block, one decoder layer whole at a time.

    Nothing happens for a model that is whole, or that an engine manages.
    """
    with ExitStack() as stack:
        if is_partitioned(model) and not is_managed(model):
            for unit, parameters in _units(model):
                stack.callback(_gather_around(unit, parameters))
        yield


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yield what is gathered together: each entry of a list of layers, and what is outside."""
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        if isinstance(module, nn.ModuleList):
            for layer in module:
                inside.update(id(part) for part in layer.modules())
                yield layer, _partitioned(layer.parameters())
            continue
        yield module, _partitioned(module.parameters(recurse=False))


def _partitioned(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if hasattr(p, "ds_tensor")]


def _gather_around(unit: nn.Module, parameters: list[nn.Parameter]) -> Any:
    from deepspeed import zero

    open_ones: list[Any] = []

    def enter(*_: Any) -> None:
        context = zero.GatheredParameters(parameters)
        context.__enter__()
        open_ones.append(context)

    def leave(*_: Any) -> None:
        if open_ones:
            open_ones.pop().__exit__(None, None, None)

    hooks: list[Any] = []
    if parameters:
        hooks.append(unit.register_forward_pre_hook(enter, prepend=True))
        hooks.append(unit.register_forward_hook(leave, always_call=True))

    def remove() -> None:
        for hook in hooks:
            hook.remove()
        leave()

    return remove


def stream_whole(model: nn.Module, *, masters: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the state dict by name, whole, one at a time.

    Args:
        model: partitioned or whole, with or without an engine.
        masters: where an engine trains a parameter, its float32 master weights.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if masters and has_master(tensor):
            from deepspeed.utils import safe_get_full_fp32_param

            yield name, safe_get_full_fp32_param(tensor).view(whole_shape(tensor))
            continue
        if not hasattr(tensor, "ds_tensor"):
            yield name, tensor.detach()
            continue
        from deepspeed import zero

        with zero.GatheredParameters([tensor]):
            yield name, tensor.detach()


@torch.no_grad()
def copy_partitions(source: nn.Module, target: nn.Module) -> None:
    """Give ``target``, built and partitioned alike, the values of ``source``."""
    theirs: dict[str, Any] = dict(source.named_parameters())
    mine: dict[str, Any] = dict(target.named_parameters())
    for name, parameter in mine.items():
        parameter.ds_tensor.data.copy_(theirs[name].ds_tensor.data)
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def zero_shard_(parameter: Any, zeros: Tensor) -> None:
    """Set entries of a partitioned parameter to exactly 0, in this rank's share and its master.

    Args:
        parameter: partitioned; an engine may manage it.
        zeros: True where a zero belongs, in the shape of the whole parameter.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    size = parameter.ds_tensor.numel()
    mine = zeros.flatten()[dist.get_rank() * size :][:size]
    shares = [parameter.ds_tensor]
    if hasattr(parameter, "_z3_optimizer"):
        shares.append(safe_get_local_fp32_param(parameter))
    for share in shares:
        share.view(-1)[: mine.numel()].masked_fill_(mine.to(share.device), 0.0)
