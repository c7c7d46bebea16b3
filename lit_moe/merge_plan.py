"""The plan of a merge: how the new experts and router rows are made of the old ones, as a value.

A :class:`~lit_moe.plan.KeepPlan` is the special case in which every new expert is an old one.

E experts before, N experts after (at most E).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_moe.errors import PlanError
from lit_moe.plan import KeepPlan

FORMAT = "lit-moe/merge-plan/1"
RouterSpace = Literal["rows", "probabilities"]
_EXPERTS, _ROUTER = "experts", "router"


@dataclass(frozen=True, eq=False)
class MergePlan:
    """How the experts of each MoE layer are combined.

    New expert ``n`` of a layer has the weights ``sum_e experts[n, e] W_e``. What the router map
    acts on is the router space: in ``rows`` its router row is ``sum_e routers[n, e] w_e``, biases
    likewise. In ``probabilities`` (EEP, arXiv 2407.00945, eq. 5) the old router stays, and the
    new expert's probability is ``sum_e routers[n, e] p_e``, before the top-k are taken.

    Attributes:
        experts: MoE layer name -> coefficients of the expert weights, shape ``(N, E)``, float64.
        routers: MoE layer name -> coefficients of router rows or probabilities, same shape.
        family: model type that the plan was made for; None if unknown. Like ``source`` it says
            where a decision comes from, not what it is: equal decisions are equal plans.
        source: folder or hub id of that model; None if unknown.
        router_space: what the router maps act on.
        top_k: experts that a token uses afterwards; None leaves their number.
        replayable: whether the plan alone gives the merged model. Experts that were rebuilt from
            segments of others are no sums of whole ones; then it says how many there are and what
            became of the routers.

    Raises:
        PlanError: if the mappings name different layers, shapes do not fit, a layer has more
            experts than before or none or fewer than ``top_k``, a coefficient is not finite, or a
            new expert is made of nothing.
    """

    experts: Mapping[str, Tensor]
    routers: Mapping[str, Tensor]
    family: str | None = field(default=None)
    source: str | None = field(default=None)
    router_space: RouterSpace = "rows"
    top_k: int | None = None
    replayable: bool = True

    def __post_init__(self) -> None:
        for name in ("experts", "routers"):
            maps: Mapping[str, Tensor] = getattr(self, name)
            own = {k: torch.as_tensor(v).detach().double().cpu().clone() for k, v in maps.items()}
            object.__setattr__(self, name, own)
        if set(self.experts) != set(self.routers):
            odd = sorted(set(self.experts) ^ set(self.routers))
            raise PlanError(f"plan names layers {odd} in only one of `experts` and `routers`")
        if self.router_space not in get_args(RouterSpace):
            raise PlanError(
                f"router maps act on {' or '.join(get_args(RouterSpace))} here; the plan's act on "
                f"{self.router_space!r}"
            )
        for layer, map_NE in self.experts.items():
            _check_maps(layer, map_NE, self.routers[layer])
            _check_top_k(layer, self.top_k, len(map_NE))

    def __iter__(self) -> Iterator[str]:
        return iter(self.experts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MergePlan) or set(self) != set(other):
            return False
        if (self.router_space, self.top_k) != (other.router_space, other.top_k):
            return False
        return all(
            torch.equal(self.experts[layer], other.experts[layer])
            and torch.equal(self.routers[layer], other.routers[layer])
            for layer in self
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_keep_plan(cls, plan: KeepPlan) -> MergePlan:
        """Return the one-hot plan that does what ``plan`` does."""
        maps = {}
        for layer, ids in plan.kept.items():
            maps[layer] = torch.zeros(len(ids), plan.num_experts[layer], dtype=torch.float64)
            maps[layer][range(len(ids)), ids] = 1.0
        return cls(maps, maps, plan.family, plan.source)

    def as_keep_plan(self) -> KeepPlan | None:
        """Inverse of :meth:`from_keep_plan`; None for a plan that does more than drop.

        One-hot maps of probabilities drop experts too where the chosen weights are divided by
        their sum; elsewhere the others keep the share that they had, so this is None for them.
        """
        if self.router_space != "rows" or self.top_k is not None:
            return None
        kept = {}
        for layer, map_NE in self.experts.items():
            ids = map_NE.argmax(dim=1)
            rises = bool((ids[1:] > ids[:-1]).all())
            one_hot = torch.nn.functional.one_hot(ids, map_NE.shape[1]).double()
            same = torch.equal(map_NE, one_hot) and torch.equal(self.routers[layer], one_hot)
            if not (rises and same):
                return None
            kept[layer] = tuple(ids.tolist())
        return KeepPlan(kept, self.num_experts, self.family, self.source)

    @property
    def is_identity(self) -> bool:
        """Whether every expert stays as it is."""
        if self.top_k is not None:
            return False
        eyes = {k: torch.eye(n, dtype=torch.float64) for k, n in self.num_experts.items()}
        maps = (self.experts, self.routers)
        return all(torch.equal(m[layer], eye) for layer, eye in eyes.items() for m in maps)

    @property
    def num_experts(self) -> dict[str, int]:
        """Layer name -> experts before."""
        return {layer: map_NE.shape[1] for layer, map_NE in self.experts.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Layer name -> experts after."""
        return {layer: map_NE.shape[0] for layer, map_NE in self.experts.items()}

    @property
    def keep_ratio(self) -> float:
        """Experts after over experts before, in (0, 1]."""
        return sum(self.counts.values()) / sum(self.num_experts.values())

    def members(self, layer: str) -> tuple[tuple[int, ...], ...]:
        """Return for each new expert the ascending ids of the old ones that it is made of."""
        return tuple(tuple(row.nonzero().flatten().tolist()) for row in self.experts[layer])

    def made_for(self, *, family: str | None, source: str | None = None) -> MergePlan:
        """Return the same decision with the model that it was made for."""
        return replace(self, family=family, source=source)

    def check_fits(self, num_experts: Mapping[str, int], *, family: str | None = None) -> None:
        """Refuse a plan made for another model; see :meth:`KeepPlan.check_fits`."""
        everyone = KeepPlan.identity(self.num_experts).made_for(family=self.family)
        everyone.check_fits(num_experts, family=family)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers; a map is a list of ``{old id: coefficient}``.

        A router map that equals the expert map is left out.
        """
        layers: dict[str, Any] = {}
        for layer, map_NE in self.experts.items():
            layers[layer] = {"num_experts": map_NE.shape[1], _EXPERTS: _sparse(map_NE)}
            if not torch.equal(map_NE, self.routers[layer]):
                layers[layer][_ROUTER] = _sparse(self.routers[layer])
        model = {"family": self.family, "source": self.source}
        fields: dict[str, Any] = {"router_space": self.router_space, "top_k": self.top_k}
        fields["replayable"] = self.replayable
        return {"format": FORMAT, "model": model, **fields, "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MergePlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            PlanError: if ``data`` is not a merge plan of this format.
        """
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        if found != FORMAT:
            raise PlanError(f"not a merge plan: expected format {FORMAT!r}, found {found!r}")
        try:
            layers, model = data["layers"], data["model"]
            experts = {k: _dense(v[_EXPERTS], v["num_experts"]) for k, v in layers.items()}
            routers = {
                k: _dense(v.get(_ROUTER, v[_EXPERTS]), v["num_experts"]) for k, v in layers.items()
            }
            more = {key: data[key] for key in ("top_k", "replayable") if key in data}
            space = data["router_space"]
            return cls(experts, routers, model["family"], model["source"], space, **more)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise PlanError(f"merge plan is damaged: {error!r} is missing or malformed") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, or as safetensors if ``path`` ends so; no digit is lost."""
        path = Path(path)
        if path.suffix != ".safetensors":
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            return
        tensors = {f"{_EXPERTS}/{k}": v.contiguous() for k, v in self.experts.items()}
        tensors |= {f"{_ROUTER}/{k}": v.contiguous() for k, v in self.routers.items()}
        known = {"family": self.family, "source": self.source}
        texts = {name: text for name, text in known.items() if text is not None}
        order = json.dumps(list(self.experts))
        if self.top_k is not None:
            texts["top_k"] = str(self.top_k)
        texts["replayable"] = json.dumps(self.replayable)
        metadata = {"format": FORMAT, "router_space": self.router_space, "layers": order, **texts}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> MergePlan:
        """Read a plan written by :meth:`save`.

        Raises:
            PlanError: if the file is missing or unreadable, or holds no merge plan.
        """
        path = Path(path)
        try:
            if path.suffix == ".safetensors":
                return _load_tensors(path)
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise PlanError(f"plan file {path} does not exist") from error
        except json.JSONDecodeError as error:
            raise PlanError(f"plan file {path} is not JSON: {error}") from error
        except SafetensorError as error:
            raise PlanError(f"plan file {path} is no safetensors file: {error}") from error


def _load_tensors(path: Path) -> MergePlan:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise PlanError(
                f"not a merge plan: expected format {FORMAT!r}, found {metadata.get('format')!r}"
            )
        layers = json.loads(metadata["layers"])
        experts, routers = (
            {layer: file.get_tensor(f"{kind}/{layer}") for layer in layers}
            for kind in (_EXPERTS, _ROUTER)
        )
    top_k = metadata.get("top_k")
    return MergePlan(
        experts,
        routers,
        metadata.get("family"),
        metadata.get("source"),
        metadata.get("router_space", "rows"),
        None if top_k is None else int(top_k),
        json.loads(metadata.get("replayable", "true")),
    )


def _check_maps(layer: str, map_NE: Tensor, router_NE: Tensor) -> None:
    if map_NE.dim() != 2 or map_NE.shape != router_NE.shape:
        raise PlanError(
            f"layer {layer!r}: expert and router map must have one shape (new, old), they have "
            f"{tuple(map_NE.shape)} and {tuple(router_NE.shape)}"
        )
    after, before = map_NE.shape
    if not 1 <= after <= before:
        raise PlanError(f"layer {layer!r}: {before} experts cannot become {after}; 1 to {before}")
    if not (map_NE.isfinite().all() and router_NE.isfinite().all()):
        raise PlanError(f"layer {layer!r} has coefficients that are not finite")
    empty = (map_NE == 0).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise PlanError(f"layer {layer!r}: new expert {empty[0]} is made of no old expert")


def _check_top_k(layer: str, top_k: int | None, num_experts: int) -> None:
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise PlanError(
            f"layer {layer!r}: top_k={top_k} of {num_experts} experts cannot be active; 1 to "
            f"{num_experts}"
        )


def _sparse(map_NE: Tensor) -> list[dict[str, float]]:
    rows = map_NE.tolist()
    return [{str(e): value for e, value in enumerate(row) if value != 0} for row in rows]


def _dense(rows: list[Mapping[str, float]], num_experts: int) -> Tensor:
    map_NE = torch.zeros(len(rows), num_experts, dtype=torch.float64)
    for n, row in enumerate(rows):
        for expert, value in row.items():
            if not (expert.isdigit() and int(expert) < num_experts):
                raise PlanError(f"merge plan names expert {expert!r} of {num_experts}")
            map_NE[n, int(expert)] = value
    return map_NE
