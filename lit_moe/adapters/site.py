"""What an MoE layer looks like from outside: names, counts, and tensor axes indexed by experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

AxisKind = Literal["expert", "router", "select_bias", "id_table"]


@dataclass(frozen=True)
class ExpertAxis:
    """One dimension of one tensor that is indexed by the routed experts of a layer.

    Attributes:
        name: dotted name of the parameter or buffer in the model.
        dim: the dimension.
        real: rows ``[0, real)`` are routed experts, in their order.
        tail: rows after them that are no routed expert (null or shared ones) and always stay.
        kind: ``expert`` weights, ``router`` weights or biases inside the logits, a bias that only
            steers selection, or a table whose *entries* are expert ids.
        rows_per_expert: consecutive rows that belong to one expert (1 for stacked tensors; the
            expert width for 2-D layouts such as DBRX's).
    """

    name: str
    dim: int
    real: int
    tail: int = 0
    kind: AxisKind = "expert"
    rows_per_expert: int = 1


@dataclass(frozen=True)
class MoESite:
    """One MoE layer of one model.

    Attributes:
        name: dotted path of the block that holds router and experts; the layer's name everywhere
            (plans, reports, scores).
        layer: index of the decoder (or encoder) layer.
        experts: dotted path of the experts module.
        router: dotted path of the router module.
        num_experts: routed experts, without shared or null ones.
        top_k: experts per token.
        num_groups: groups of group-limited routing; 1 when routing is not limited.
        top_k_groups: groups that a token may use.
        routing: how logits become probabilities.
        renormalised: whether the chosen weights are divided by their sum (count-invariant), None
            if it depends on more than the config.
        axes: everything to cut when an expert goes.
        num_shared: shared experts that every token uses; never scored and never removed.
        config_key: dotted path of the number in the model's config that counts these experts.
        registered: whether the experts run through transformers' registry of implementations.
        one_per_group: whether a group works with a single expert; those that are scored by their
            two best do not.
    """

    name: str
    layer: int
    experts: str
    router: str
    num_experts: int
    top_k: int
    num_groups: int = 1
    top_k_groups: int = 1
    routing: Literal["softmax", "sigmoid", "custom"] = "softmax"
    renormalised: bool | None = None
    axes: tuple[ExpertAxis, ...] = field(default=(), repr=False)
    num_shared: int = 0
    config_key: str = ""
    registered: bool = True
    one_per_group: bool = False

    def rows(self, kind: AxisKind) -> tuple[ExpertAxis, ...]:
        """Return the axes of one kind."""
        return tuple(axis for axis in self.axes if axis.kind == kind)

    @property
    def owners(self) -> tuple[str, ...]:
        """Dotted paths of the modules that hold everything to cut when an expert goes."""
        found = {self.experts, *(axis.name.rpartition(".")[0] for axis in self.axes)}
        inner = {a for a in found for b in found if a != b and a.startswith(f"{b}.")}
        return tuple(sorted(found - inner))

    @property
    def router_tail(self) -> int:
        """Router rows behind the routed experts (null or shared ones)."""
        return max((axis.tail for axis in self.rows("router")), default=0)
