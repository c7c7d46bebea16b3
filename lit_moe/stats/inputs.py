"""What every matrix of the routed experts is fed: hidden states below, features above.

First projections (``gate``, ``up``) read the hidden state of a token, down projections the
intermediate features of a slot. Both are read where the model holds them; no forward is repeated
that :mod:`lit_moe.stats.features` would not repeat.

T tokens, S slots (token and chosen expert), R rows, E experts, H hidden, I expert width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.jetmoe import JetMoeAdapter
from lit_moe.adapters.llama4 import Llama4Adapter
from lit_moe.adapters.site import MoESite
from lit_moe.stats.features import FeatureSlots, features_of


@dataclass(frozen=True)
class InputSlots:
    """The slots of one call of one MoE block, in any order; only those that a real expert serves.

    An expert's first projections are fed ``scale * hidden[rows]``, its down projection
    ``scale * features``; with ``gates`` in the place of ``scale``, each slot counts as much as the
    model lets its output count.

    Attributes:
        expert_ids: shape ``(S,)``.
        token_ids: which token of the flattened batch, shape ``(S,)``.
        gates: the weight that the model gives each slot, shape ``(S,)``.
        scale: 1, or the gate in families that multiply an expert's input by it, shape ``(S,)``.
        hidden: shape ``(R, H)``.
        rows: which row of ``hidden`` each slot reads, shape ``(S,)``.
        features: inputs of the down projection, shape ``(S, I)``.
    """

    expert_ids: Tensor
    token_ids: Tensor
    gates: Tensor
    scale: Tensor
    hidden: Tensor
    rows: Tensor
    features: Tensor


OnInputs = Callable[[InputSlots], None]


@contextlib.contextmanager
def inputs_of(
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, on_inputs: OnInputs
) -> Iterator[None]:
    """Call ``on_inputs`` once per forward of one MoE block; its output stays what it was.

    Args:
        model: the model, in evaluation mode and without gradients.
        adapter: of its family.
        site: the MoE layer.
        on_inputs: called before the block returns (JetMoE: before its down projections run).
    """
    if isinstance(adapter, JetMoeAdapter):
        with _before_linears(model, site, on_inputs):
            yield
        return
    seen: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [args[0] if args else kwargs["hidden_states"]]

    def join(slots: FeatureSlots) -> None:
        hidden = seen.pop()
        on_inputs(_joined(adapter, site, hidden.reshape(-1, hidden.shape[-1]), slots))

    # Llama 4 hands its experts one copy of all tokens each; the block's own input is that once.
    source = site.name if isinstance(adapter, Llama4Adapter) else site.experts
    hook = model.get_submodule(source).register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with features_of(model, adapter, site, join):
            yield
    finally:
        hook.remove()


def after_inputs(model: PreTrainedModel, adapter: MoEAdapter, site: MoESite) -> str:
    """Return the module behind whose forward :func:`inputs_of` has reported.

    Run again with other expert weights, it gives what the layer then gives. JetMoE's attention
    experts are the exception: their queries are made before, so only their outputs change.
    """
    if isinstance(adapter, JetMoeAdapter) and not _runs_by_itself(model, site):
        return f"{site.name}.output_linear"
    return site.experts if adapter.tap_kind(site) == "contract" else site.name


def _joined(
    adapter: MoEAdapter, site: MoESite, hidden_TH: Tensor, slots: FeatureSlots
) -> InputSlots:
    real = (slots.expert_ids < site.num_experts) & (slots.gates != 0)
    if not bool(real.all()):
        parts = (slots.expert_ids, slots.gates, slots.features, slots.token_ids)
        slots = FeatureSlots(*(part[real] for part in parts))
    scales_inputs = isinstance(adapter, Llama4Adapter)
    return InputSlots(
        expert_ids=slots.expert_ids,
        token_ids=slots.token_ids,
        gates=slots.gates,
        scale=slots.gates if scales_inputs else torch.ones_like(slots.gates),
        hidden=hidden_TH,
        rows=slots.token_ids,
        features=slots.features,
    )


@contextlib.contextmanager
def _before_linears(model: PreTrainedModel, site: MoESite, on_inputs: OnInputs) -> Iterator[None]:
    """Read the rows, sorted by expert, that JetMoE hands its two stacks of matrices."""
    routed: list[tuple[Tensor, Tensor]] = []
    hidden: list[Tensor] = []

    def on_router(_: nn.Module, __: Any, output: tuple[Any, ...]) -> None:
        routed[:] = [(output[1], output[2])]

    def before_first(_: nn.Module, args: tuple[Any, ...]) -> None:
        hidden[:] = [args[0]]

    def before_down(_: nn.Module, args: tuple[Any, ...]) -> None:
        (token_ids, gates), rows_SH = routed.pop(), hidden.pop()
        sizes = torch.tensor(args[1], device=gates.device)
        ids = torch.arange(len(sizes), device=gates.device).repeat_interleave(sizes)
        rows = torch.arange(len(ids), device=gates.device)
        ones = torch.ones_like(gates)
        on_inputs(InputSlots(ids, token_ids, gates, ones, rows_SH, rows, args[0]))

    first, down = (model.get_submodule(f"{site.name}.{n}_linear") for n in ("input", "output"))
    hooks = [
        model.get_submodule(site.router).register_forward_hook(on_router),
        first.register_forward_pre_hook(before_first),
        down.register_forward_pre_hook(before_down),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _runs_by_itself(model: PreTrainedModel, site: MoESite) -> bool:
    """Whether a JetMoE block is called as a module; its attention experts are only mapped."""
    return not hasattr(model.get_submodule(site.name), "map")
