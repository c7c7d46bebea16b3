"""Layers and experts that must stay, whatever they score."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError
from lit_moe.stats.observation import Observation

Protection = Sequence[str] | Mapping[str, Iterable[int]]


def parse_protection(protect: Protection, sites: Iterable[MoESite]) -> dict[str, frozenset[int]]:
    """Return layer name -> protected expert ids, for every layer (empty if none).

    Args:
        protect: strings ``"pattern"`` (the whole layer stays) or ``"pattern:3,5"`` (these experts
            stay), where the pattern matches layer names as shells match file names, so
            ``"*.layers.0.*"`` is the first layer; or a mapping pattern -> expert ids.
        sites: the MoE layers.

    Raises:
        LitMoEError: if a pattern matches no layer, or an id is no expert of its layer.

    >>> sites = [MoESite("layers.0.mlp", 0, "", "", num_experts=4, top_k=2)]
    >>> sorted(parse_protection(["layers.0*:3,1"], sites)["layers.0.mlp"])
    [1, 3]
    """
    layers = {site.name: site.num_experts for site in sites}
    result: dict[str, frozenset[int]] = dict.fromkeys(layers, frozenset())
    for pattern, ids in _entries(protect):
        names = [name for name in layers if fnmatchcase(name, pattern)]
        if not names:
            near = difflib.get_close_matches(pattern, list(layers), n=1, cutoff=0.0)
            raise LitMoEError(
                f"protected layer {pattern!r} matches none of the {len(layers)} MoE layers; "
                f"nearest is {near[0] if near else None!r}"
            )
        for name in names:
            result[name] |= _checked_ids(name, ids, layers[name])
    return result


def as_patterns(experts: Mapping[str, Iterable[int]]) -> tuple[str, ...]:
    """Return protected experts as strings, to join with others or to write into YAML.

    >>> as_patterns({"layers.0.mlp": [3, 5], "layers.1.mlp": []})
    ('layers.0.mlp:3,5',)
    """
    lists = {layer: sorted(ids) for layer, ids in experts.items()}
    return tuple(f"{layer}:{','.join(map(str, ids))}" for layer, ids in lists.items() if ids)


def find_super_experts(
    observation: Observation,
    *,
    quantile: float = 0.995,
    fraction_of_max: float = 0.1,
    depth: float = 0.75,
) -> dict[str, tuple[int, ...]]:
    """Return the experts that write extreme activations: layer name -> ids, layers with some.

    ``a_e`` is the largest ``|f_e(x)_j|`` seen, over all tokens ``x`` and dimensions ``j`` of the
    expert's raw output. Expert ``e`` is super if ``a_e`` is above the ``quantile`` of the ``a`` of
    all experts of all layers, and above ``fraction_of_max`` times the largest of them, and its
    layer is among the first ``depth`` of the MoE layers (the last layers write large values by
    nature). Removing a handful of them was seen to wreck a model of thousands of experts.

    Source: Su et al., arXiv 2507.23279; thresholds and the depth of 75 % as in the code of REAP
    (arXiv 2510.13999, ``get_super_expert_indices``), except that REAP takes a signed maximum.

    >>> from lit_moe.stats.observation import LayerStats
    >>> a, zeros = torch.tensor([1.0, 90.0, 2.0]).double(), torch.zeros(3).double()
    >>> quiet, loud = (LayerStats(9, *[zeros] * 6, max_abs=m) for m in (a / 90, a))
    >>> find_super_experts(Observation({"layers.0": loud, "layers.1": quiet}))
    {'layers.0': (1,)}
    """
    layers = list(observation.layers.items())
    everyone = torch.cat([stats.max_abs.double() for _, stats in layers])
    threshold = max(torch.quantile(everyone, quantile), everyone.max() * fraction_of_max)
    found = {
        name: tuple((stats.max_abs > threshold).nonzero().flatten().tolist())
        for name, stats in layers[: int(depth * len(layers))]
    }
    return {name: ids for name, ids in found.items() if ids}


def _entries(protect: Protection) -> list[tuple[str, frozenset[int] | None]]:
    if isinstance(protect, str):
        protect = [protect]
    if isinstance(protect, Mapping):
        return [(pattern, frozenset(ids)) for pattern, ids in protect.items()]
    return [_entry(text) for text in protect]


def _entry(text: str) -> tuple[str, frozenset[int] | None]:
    pattern, colon, ids = text.partition(":")
    if not colon:
        return pattern, None
    try:
        return pattern, frozenset(int(e) for e in ids.split(","))
    except ValueError as error:
        raise LitMoEError(
            f"cannot read protected experts {text!r}; write 'layer' or 'layer:3,5'"
        ) from error


def _checked_ids(layer: str, ids: frozenset[int] | None, num_experts: int) -> frozenset[int]:
    everyone = frozenset(range(num_experts))
    wrong = sorted((ids or frozenset()) - everyone)
    if wrong:
        raise LitMoEError(
            f"layer {layer!r} has experts 0 to {num_experts - 1}; cannot protect {wrong}"
        )
    return everyone if ids is None else ids
