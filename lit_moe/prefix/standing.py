"""Modules that return what they returned before, instead of running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def cloned(value: Any) -> Any:
    """Return an output with tensors of its own: models may write into what a layer returned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(cloned, value))
    if isinstance(value, list | tuple):
        return type(value)(map(cloned, value))
    if isinstance(value, dict):
        return type(value)({k: cloned(v) for k, v in value.items()})
    return value


def num_bytes(value: Any) -> int:
    """Return the bytes of all tensors in an output."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return num_bytes(list(value.values()))
    return sum(map(num_bytes, value)) if isinstance(value, list | tuple) else 0


@contextmanager
def standing_in(model: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Let modules return these outputs while the block runs; afterwards they are what they were.

    Args:
        model: owns the modules.
        outputs: dotted name -> what the module returns.
    """
    with ExitStack() as undo:
        for name, output in outputs.items():
            own = vars(model.get_submodule(name))
            undo.callback(_restorer(own))
            own["forward"] = _returning(output)
        yield


@contextmanager
def recording(model: nn.Module, on_output: Mapping[str, Callable[[Any], None]]) -> Iterator[None]:
    """Call back with the outputs of modules while the block runs."""
    with ExitStack() as undo:
        for name, take in on_output.items():
            hook = model.get_submodule(name).register_forward_hook(_taking(take))
            undo.callback(hook.remove)
        yield


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: cloned(output)


def _taking(take: Callable[[Any], None]) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        take(output)

    return hook


def _restorer(own: dict[str, Any]) -> Callable[[], None]:
    """Return what gives a module its own ``forward`` back, also one that somebody else had set."""
    if "forward" not in own:
        return lambda: own.pop("forward", None)
    earlier = own["forward"]
    return lambda: own.update(forward=earlier)
