"""Calls of MoE blocks on rows of text, of as many layers at a time as memory holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lit_moe.adapters.site import MoESite
from lit_moe.criteria.replay import BlockCall, capture_calls
from lit_moe.errors import LitMoEError
from lit_moe.grouping.inputs import Batch, of_all_ranks
from lit_moe.grouping.memory import at_least, bytes_in
from lit_moe.grouping.mixed_text import Pair, mixed
from lit_moe.inference import body_inputs, evaluating, run_body


def calls_of_layers(
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    rows: Sequence[Batch],
    pairs: Sequence[Pair],
    *,
    memory_gib: float,
) -> Iterator[dict[str, list[BlockCall]]]:
    """Yield layer name -> one call per row and per pair, for one part of the layers after another.

    Each part is a run of the model over all rows: as many layers as half the budget holds, with the
    outputs of one of them; one layer at least. Empty what is yielded before asking for more.

    Args:
        model: runs on its own device, as it is.
        sites: the layers.
        rows: this rank's, one row each.
        pairs: mixed text, see :func:`lit_moe.grouping.mixed_text.mixed`.
        memory_gib: for inputs and outputs of the layers on these rows.

    Raises:
        LitMoEError: if one layer does not fit, naming what it needs; on all ranks. Collective.
    """
    sizes = _sizes(model, sites, [*rows, *(pair.first for pair in pairs)])
    _check_fit(sizes, len(rows) + len(pairs), memory_gib)
    for some in _parts(sites, sizes, bytes_in(memory_gib) / 2):
        yield capture_calls(model, some, chain(rows, mixed(model, pairs)))


@dataclass
class _Size:
    """Bytes of one layer on all rows of this rank, padding included."""

    inputs: float = 0
    outputs: float = 0


def _sizes(
    model: PreTrainedModel, sites: Sequence[MoESite], rows: Sequence[Batch]
) -> dict[str, _Size]:
    """Return layer name -> its size, from a run of the model on the first row."""
    sizes = {site.name: _Size() for site in sites}
    if not rows:
        return sizes
    times = sum(map(_length, rows)) / _length(rows[0])
    with evaluating(model), ExitStack() as stack:
        for site in sites:
            hook = _measure(sizes[site.name], times)
            block = model.get_submodule(site.name)
            stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        accepted = body_inputs(model)
        run_body(model, {k: v.to(model.device) for k, v in rows[0].items() if k in accepted})
    return sizes


def _length(row: Batch) -> int:
    return next(iter(row.values())).numel()


def _measure(size: _Size, times: float) -> Any:
    """Return a hook that adds what one call of a block takes, ``times`` over."""

    def measure(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        plain = {k: v for k, v in kwargs.items() if not k.startswith("past_key_value")}
        size.inputs += times * _bytes((args, plain))
        size.outputs += times * _bytes(output if isinstance(output, Tensor) else output[0])

    return measure


def _bytes(tree: Any) -> int:
    return sum(x.untyped_storage().nbytes() for x in tree_leaves(tree) if isinstance(x, Tensor))


def _check_fit(sizes: Mapping[str, _Size], num_rows: int, memory_gib: float) -> None:
    mine = max(size.inputs + size.outputs for size in sizes.values())
    needed, most_rows = max(of_all_ranks((mine, num_rows)))
    if needed > bytes_in(memory_gib):
        raise LitMoEError(
            f"memory_gib={memory_gib:g} does not hold the inputs and outputs of one layer on the "
            f"{most_rows} rows of one rank that coefficients are learned on; give at least "
            f"{at_least(needed):g}, or fewer max_tokens or mixed_rows"
        )


def _parts(
    sites: Sequence[MoESite], sizes: Mapping[str, _Size], budget: float
) -> Iterator[list[MoESite]]:
    """Yield runs of neighbours whose inputs fit with the largest outputs; one layer at least."""
    part: list[MoESite] = []
    for site in sites:
        wider = [sizes[s.name] for s in (*part, site)]
        if part and sum(s.inputs for s in wider) + max(s.outputs for s in wider) > budget:
            yield part
            part = []
        part.append(site)
    yield part
