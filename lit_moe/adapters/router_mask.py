"""Makes a router behave as if some experts did not exist, without touching its code.

While the router runs, every result of the router's own weights is followed: what they give
together with the hidden states are logits, what a selection bias gives together with the scores
are biased scores. In both the dropped experts become -inf, as if their rows were never there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_moe.adapters.site import MoESite

_TOPK = (torch.topk, Tensor.topk)
_MASKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_masked(module: nn.Module) -> bool:
    """Whether a :class:`RouterHandle` is attached to this router."""
    return module in _MASKED


def drop_mask(num_experts: int, keep: Iterable[int], tail: int, device: torch.device) -> Tensor:
    """Return a boolean row, True where an expert goes; tail rows always stay.

    Returns:
        Shape ``(num_experts + tail,)``.
    """
    drop = torch.zeros(num_experts + tail, dtype=torch.bool, device=device)
    drop[:num_experts] = True
    drop[list(keep)] = False
    return drop


class RouterHandle:
    """Masks one router from construction until :meth:`remove`.

    Args:
        model: the model, left unchanged but for two hooks on the router.
        site: the MoE layer.
        keep: expert ids that stay.
    """

    def __init__(self, model: nn.Module, site: MoESite, keep: Iterable[int]) -> None:
        self._router = model.get_submodule(site.router)
        self._mode = _FollowRouter(model, site, tuple(keep))
        enter = self._router.register_forward_pre_hook(self._enter)
        leave = self._router.register_forward_hook(self._leave, always_call=True)
        self._hooks = (enter, leave)
        _MASKED.add(self._router)

    def remove(self) -> None:
        """Give the router back as it was."""
        for hook in self._hooks:
            hook.remove()
        _MASKED.discard(self._router)

    # Hooks must return None, anything else would replace the router's input or output.
    def _enter(self, *_: Any) -> None:
        self._mode.start()
        self._mode.__enter__()

    def _leave(self, *_: Any) -> None:
        self._mode.__exit__(None, None, None)
        self._mode.stop()


class HookedMask:
    """Masks one router by changing what it returns, from construction until :meth:`remove`.

    Args:
        router: the router.
        change: takes what its forward returns, and returns it with experts hidden.
    """

    def __init__(self, router: nn.Module, change: Callable[[Any], Any]) -> None:
        self._router = router
        self._hook = router.register_forward_hook(lambda _, __, output: change(output))
        _MASKED.add(router)

    def remove(self) -> None:
        """Give the router back as it was."""
        self._hook.remove()
        _MASKED.discard(self._router)


class _FollowRouter(TorchFunctionMode):
    """Intercepts torch functions; active only inside the router's forward."""

    def __init__(self, model: nn.Module, site: MoESite, keep: tuple[int, ...]) -> None:
        super().__init__()
        axes = (*site.rows("router"), *site.rows("select_bias"))
        self._owners = [(model.get_submodule(a.name.rpartition(".")[0]), a) for a in axes]
        self._keep = keep
        self._tails = {axis.real + axis.tail: axis.tail for axis in axes}
        self._drops: dict[tuple[int, torch.device], Tensor] = {}
        # id -> the tensor itself, which keeps the id from being given to another tensor.
        self._followed: dict[int, Tensor] = {}

    def start(self) -> None:
        """Look up the weights anew: optimizers, casts and ZeRO may have replaced them."""
        tensors = [getattr(owner, a.name.rpartition(".")[2]) for owner, a in self._owners]
        self._followed = {id(tensor): tensor for tensor in tensors}

    def stop(self) -> None:
        """Let go of the tensors of this forward."""
        self._followed = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func``; mask its result, or follow it, if the router's weights took part."""
        kwargs = kwargs or {}
        if func in _TOPK and args:
            # Scores of groups that a token may not use are set to 0 by some routers, and 0 would
            # bring a dropped expert back.
            args = (self._mask(args[0]), *args[1:])
        out = func(*args, **kwargs)
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        followed = [id(a) in self._followed for a in inputs]
        if not any(followed) or not isinstance(out, Tensor):
            return out
        if not all(followed):
            return self._mask(out)
        self._followed[id(out)] = out
        return out

    def _mask(self, scores: Tensor) -> Tensor:
        width, device = scores.shape[-1], scores.device
        if width not in self._tails:
            return scores
        if (width, device) not in self._drops:
            tail = self._tails[width]
            self._drops[width, device] = drop_mask(width - tail, self._keep, tail, device)
        return scores.masked_fill(self._drops[width, device], float("-inf"))
