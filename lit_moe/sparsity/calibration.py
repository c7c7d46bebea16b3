"""Running the model to learn what its experts' matrices are fed, layer by layer or all at once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, adapter_for, find_sites
from lit_moe.errors import CalibrationError
from lit_moe.inference import body_inputs, evaluating, run_body
from lit_moe.sparsity.layout import unnoticed
from lit_moe.sparsity.moments import InputMoments, moments_for
from lit_moe.sparsity.relay import Relay
from lit_moe.stats.inputs import InputSlots, after_inputs, inputs_of
from lit_moe.stats.observe import failing_together
from lit_moe.stats.slots import is_fused
from lit_moe.stats.tap import TokenMask

Batch = Mapping[str, Tensor]
OnMoments = Callable[[MoESite, InputMoments], None]


def observe_inputs(
    model: PreTrainedModel, batches: Iterable[Batch], *, method: str
) -> dict[str, InputMoments]:
    """Run the model once as it is; return layer -> sums over the inputs of its experts.

    Batches are read one at a time. With a process group every rank must call this with its own
    share; all get the sums over all ranks.

    Args:
        model: any supported MoE model.
        batches: see :func:`lit_moe.sparsity.sparsify`.
        method: a name of ``SparsityOptions.method`` that needs text.

    Raises:
        CalibrationError: if there is no batch, or activations are not finite.
    """
    watch = _Watch(model, method)
    with evaluating(model), unnoticed(model), failing_together(), watch.attached():
        count = 0
        for batch in batches:
            inputs = _inputs(model, batch)
            watch.masks = [_mask_of(inputs)]
            run_body(model, inputs)
            count += 1
        _check_some(count)
    for site in watch.sites:
        watch.moments[site.name].reduce(site.name)
    return watch.moments


def walk_layers(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    on_moments: OnMoments,
    *,
    method: str,
    again: bool,
) -> None:
    """Call ``on_moments`` once per layer, in the order in which the model runs them.

    All batches advance together, so that each layer is entered with all layers before it done.
    Layers that the batches never reach come last, with empty sums. Collective, like
    :func:`observe_inputs`, once per layer.

    Args:
        model: any supported MoE model.
        batches: all of them stay in memory, with the hidden states of one layer.
        on_moments: may change the weights of its layer.
        method: a name of ``SparsityOptions.method`` that needs text.
        again: run the experts again after ``on_moments``, so that later layers see its changes.

    Raises:
        CalibrationError: if there is no batch, or activations are not finite.
    """
    walk = _Walk(model, on_moments, method, again=again)
    with evaluating(model), unnoticed(model):
        with failing_together():
            runs = [_inputs(model, batch) for batch in batches]
            _check_some(len(runs))
        walk.run(runs)


class _Watch:
    """Adds up what the experts of all layers are fed, while attached."""

    def __init__(self, model: PreTrainedModel, method: str) -> None:
        self.model, self.adapter = model, adapter_for(model.config)
        self.sites = find_sites(model)
        self.masks: list[TokenMask] = []
        self._method = method
        self.moments = {site.name: self.empty(site) for site in self.sites}

    @property
    def running(self) -> int:
        """Which batch is running now."""
        return 0

    def empty(self, site: MoESite) -> InputMoments:
        """Return sums of nothing for one layer."""
        weights = self.adapter.expert_weights(self.model, site)
        return moments_for(site, weights, method=self._method)

    def add(self, site: MoESite, slots: InputSlots) -> None:
        """Add one call of one layer."""
        self.moments[site.name].add(slots, self.masks[self.running].of(site))

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Watch every layer."""
        with contextlib.ExitStack() as stack:
            for site in self.sites:
                on_inputs = functools.partial(self.add, site)
                stack.enter_context(inputs_of(self.model, self.adapter, site, on_inputs))
            yield


class _Walk(_Watch):
    """Lets all batches wait for each other behind each layer."""

    def __init__(
        self, model: PreTrainedModel, on_moments: OnMoments, method: str, *, again: bool
    ) -> None:
        super().__init__(model, method)
        self.moments.clear()  # a layer's sums exist only while it is at work
        self._on_moments, self._again = on_moments, again
        self._is_repeating = False
        self._relay = Relay(())
        self._done: set[str] = set()

    @property
    def running(self) -> int:
        """Which batch is running now."""
        return self._relay.index

    def run(self, runs: list[dict[str, Tensor]]) -> None:
        """Run all batches to their ends, then see to layers that none of them reached."""
        self.masks = [_mask_of(inputs) for inputs in runs]
        self._relay = Relay([functools.partial(_run, self.model, inputs) for inputs in runs])
        with self.attached(), self._meeting():
            self._relay.run()
        for site in self.sites:
            if site.name not in self._done:
                self._finish(site)

    def add(self, site: MoESite, slots: InputSlots) -> None:
        """Add one call of one layer, unless it is the second one."""
        if self._is_repeating:
            return
        if site.name not in self.moments:
            self.moments[site.name] = self.empty(site)
        super().add(site, slots)

    def _finish(self, site: MoESite) -> None:
        moments = self.moments.pop(site.name, None) or self.empty(site)
        self._done.add(site.name)
        moments.reduce(site.name)
        self._on_moments(site, moments)

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for site in self.sites:
                module = self.model.get_submodule(after_inputs(self.model, self.adapter, site))
                hook = module.register_forward_hook(self._hook_for(site), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _hook_for(self, site: MoESite) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, _: Any) -> Any:
            if self._is_repeating:
                return None
            self._relay.meet(site.name, lambda: self._finish(site))
            return self._repeated(module, args, kwargs) if self._again else None

        return hook

    def _repeated(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._is_repeating = True
        try:
            # Fused experts are watched from within and need their hooks; of others, hooks would
            # only look a second time.
            run = module if is_fused(module) else module.forward
            return run(*args, **kwargs)
        finally:
            self._is_repeating = False


def _run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    on_gpu = model.device.type == "cuda"
    # Grad mode and the current GPU belong to the thread.
    with torch.no_grad(), torch.cuda.device(model.device) if on_gpu else contextlib.nullcontext():
        run_body(model, inputs)


def _inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    names = body_inputs(model)
    return {k: v.to(model.device) for k, v in batch.items() if k in names and isinstance(v, Tensor)}


def _mask_of(inputs: dict[str, Tensor]) -> TokenMask:
    mask = TokenMask()
    mask.set(inputs)
    return mask


def _check_some(count: int) -> None:
    if not count:
        raise CalibrationError("there is no calibration batch; give at least one per rank")
