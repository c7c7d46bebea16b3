"""What experts are fed, so that each of them can be asked about tokens that another one serves.

T tokens, E experts, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import MoEAdapter, MoESite, adapter_for
from lit_moe.errors import CalibrationError, UnsupportedModelError
from lit_moe.inference import body_inputs, evaluating, run_body
from lit_moe.stats.tap import TokenMask

Batch = Mapping[str, Tensor]
V = TypeVar("V")


def check_can_be_asked(model: PreTrainedModel, sites: Sequence[MoESite]) -> None:
    """Refuse families whose experts cannot be run on tokens of our choice.

    Raises:
        UnsupportedModelError: naming what needs no text.
    """
    adapter = adapter_for(model.config)
    if type(adapter).attach_slots is not MoEAdapter.attach_slots:
        raise UnsupportedModelError(
            f"the experts of {model.config.model_type} ({sites[0].name}) are not called with "
            "tokens and expert ids, so their outputs on the same tokens cannot be compared; take "
            "a similarity of weights or router rows: weights, surrogate, router"
        )


def expert_inputs(
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    batches: Iterable[Batch],
    *,
    max_tokens: int,
    share: float = 1.0,
) -> dict[str, Tensor]:
    """Return layer name -> hidden states that its experts are fed, shape ``(T, H)``.

    Collective: the rows of all ranks, in the order in which they were dealt, so that every rank
    gets what one process would. Padding is left out. Holds layers x T x H numbers, those of one
    layer twice for a moment.

    Args:
        model: runs on its own device, as it is.
        sites: the layers to look at.
        batches: this rank's rows, every ``world_size``-th.
        max_tokens: of all ranks, rounded up to whole rows.
        share: of the tokens of each row that are kept, drawn at random but always the same.

    Raises:
        CalibrationError: if there is no row, or hidden states are not finite.
    """
    rows: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    mask, accepted = _RowMask(), body_inputs(model)
    with evaluating(model), ExitStack() as stack:
        for site in sites:
            stack.callback(_record(model, site, rows[site.name], mask, share))
        for batch in first_rows(batches, max_tokens):
            inputs = {k: v.to(model.device) for k, v in batch.items() if k in accepted}
            mask.set(inputs)
            run_body(model, inputs)
    return {site.name: _together(site.name, rows.pop(site.name), model.device) for site in sites}


def count_inputs(batches: Iterable[Batch], *, max_tokens: int, share: float) -> int:
    """Return how many tokens :func:`expert_inputs` keeps of each layer, padding included.

    Collective.
    """
    count = 0
    for batch in first_rows(batches, max_tokens):
        num_rows, length = next(iter(batch.values())).shape[:2]
        count += num_rows * math.ceil(share * length)
    return sum(of_all_ranks(count))


def check_text(sites: Sequence[MoESite], batches: Iterable[Batch], *, asked: str) -> None:
    """Refuse text that is padding alone for some layer. Collective; nothing is run.

    Args:
        sites: the layers to look at.
        batches: this rank's, all that will be read.
        asked: what reads them, for the message.

    Raises:
        CalibrationError: on all ranks alike.
    """
    mask, num_rows, with_text = TokenMask(), 0, dict.fromkeys((site.name for site in sites), False)
    for batch in batches:
        mask.set(batch)
        num_rows += len(next(iter(batch.values())))
        for site in sites:
            valid = mask.of(site)
            with_text[site.name] |= valid is None or bool(valid.any())
    shares = of_all_ranks((num_rows, with_text))
    empty = [name for name in with_text if not any(share[name] for _, share in shares)]
    if empty:
        raise CalibrationError(
            f"{asked} looks at text, but there is no calibration token for {empty[0]} in the "
            f"{sum(rows for rows, _ in shares)} rows that it reads, padding left out; give rows "
            "with text, or take similarity weights, surrogate or router and coefficients uniform"
        )


def first_rows(batches: Iterable[Batch], max_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's part of the first rows that hold ``max_tokens`` tokens, padding included.

    Row ``i`` of rank ``r`` of ``w`` is row ``i w + r`` of all.
    """
    rank, world_size = rank_and_world_size()
    seen = 0
    for batch in batches:
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        num_rows, length = next(iter(tensors.values())).shape[:2]
        wanted = -(-max_tokens // length)
        mine = min(num_rows, max(0, -(-(wanted - rank) // world_size) - seen))
        if mine == 0:
            return
        yield {k: v[:mine] for k, v in tensors.items()}
        seen += mine


def outputs_of(model: PreTrainedModel, site: MoESite, hidden_TH: Tensor) -> Tensor:
    """Return what every expert makes of the same tokens, shape ``(E, T, H)``, float32.

    No router takes part, and outputs are not weighted.
    """
    adapter, experts = adapter_for(model.config), model.get_submodule(site.experts)
    slots = 2 if adapter.needs_two_slots else 1
    weights = torch.zeros(len(hidden_TH), slots, dtype=hidden_TH.dtype, device=hidden_TH.device)
    weights[:, 0] = 1
    ids = torch.zeros(weights.shape, dtype=torch.long, device=hidden_TH.device)
    outputs_ETH = hidden_TH.new_empty(site.num_experts, *hidden_TH.shape, dtype=torch.float32)
    for expert in range(site.num_experts):
        output = experts.forward(hidden_TH, ids + expert, weights)
        outputs_ETH[expert] = output.reshape(len(hidden_TH), -1)
        del output
    return outputs_ETH


class _RowMask(TokenMask):
    """Also knows how many rows the current batch has."""

    num_rows = 0

    def set(self, batch: Batch) -> None:
        """Read the masks of a batch."""
        super().set(batch)
        self.num_rows = len(next(iter(batch.values())))


def _record(
    model: PreTrainedModel, site: MoESite, rows: list[Tensor], mask: _RowMask, share: float
) -> Any:
    """Append the hidden states of each row whenever the experts of a layer are called."""
    rank, world_size = rank_and_world_size()

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        counted = mask.of(site)
        lengths = _row_lengths(counted, mask.num_rows, len(hidden_TH))
        if counted is not None:
            hidden_TH = hidden_TH[counted]
        for row in hidden_TH.split(lengths):
            rows.append(row if share == 1 else _drawn(row, share, len(rows) * world_size + rank))

    experts = model.get_submodule(site.experts)
    return experts.register_forward_pre_hook(record, with_kwargs=True).remove


def _drawn(row_TH: Tensor, share: float, seed: int) -> Tensor:
    """Return a share of the tokens of one row, in their order."""
    generator = torch.Generator().manual_seed(seed)
    kept = math.ceil(share * len(row_TH))
    chosen = torch.randperm(len(row_TH), generator=generator)[:kept].sort().values
    return row_TH[chosen.to(row_TH.device)]


def of_all_ranks(value: V) -> list[V]:
    """Return what each rank has, by rank. Collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rank_and_world_size() -> tuple[int, int]:
    """Return (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _row_lengths(counted: Tensor | None, num_rows: int, num_tokens: int) -> list[int]:
    if counted is None:
        return [num_tokens // num_rows] * num_rows
    return counted.view(num_rows, -1).sum(1).tolist()


def _together(layer: str, rows: list[Tensor], device: torch.device) -> Tensor:
    shares: list[Any] = [rows]
    if dist.is_available() and dist.is_initialized():
        shares = of_all_ranks([row.cpu() for row in rows])
    longest = max(map(len, shares))
    dealt = [share[i] for i in range(longest) for share in shares if i < len(share)]
    if not dealt or sum(map(len, dealt)) == 0:
        raise CalibrationError(f"there is no calibration token to compare experts of {layer} on")
    hidden_TH = torch.cat([row.to(device) for row in dealt])
    if not hidden_TH.isfinite().all():
        raise CalibrationError(
            f"the experts of {layer} are fed NaN or infinity; try dtype float32, or look for a "
            "damaged weight in an earlier layer"
        )
    return hidden_TH
