"""Candidates on the live model: masks and maps that are put on and taken off again.

The model is never copied and never loaded again. A layer that only drops experts gets a router
mask. A layer that merges some has other tensors while its block runs, and no longer: at most one
layer more than the cache holds is in memory. Afterwards the model is bit for bit what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.discovery import IntAttribute
from lit_moe.adapters.site import MoESite
from lit_moe.adapters.taps import Handles
from lit_moe.errors import UnsupportedModelError
from lit_moe.merge_plan import MergePlan
from lit_moe.mixed_routing import Mixing
from lit_moe.mixing import mixed_routing, mixings
from lit_moe.plan import KeepPlan
from lit_moe.search.genome import Genome, Maps
from lit_moe.search.groups import LayerGroup
from lit_moe.search.material import ByteCache, Tensors, combined_modules, combined_tensors

RouterSpace = Literal["probabilities", "rows"]
_ROUTER_KINDS = ("router", "select_bias")


class LiveModel:
    """A model that computes as candidates say, one after the other.

    Args:
        model: a plain transformers model with all its experts.
        groups: of its MoE layers.
        router_space: what router maps act on, see :class:`lit_moe.merge_plan.MergePlan`.
        cache_bytes: for combined experts.
        merges: whether candidates may do more than drop experts.

    Raises:
        UnsupportedModelError: if experts of this family cannot be combined while it runs.
        PlanError: if router maps are to act on probabilities, and a router has none to mix.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Sequence[LayerGroup],
        *,
        router_space: RouterSpace = "probabilities",
        cache_bytes: int = 1 << 28,
        merges: bool = True,
    ) -> None:
        self.model, self.groups = model, tuple(groups)
        self.router_space = router_space
        self._sites = {site.name: site for site in find_sites(model)}
        self._adapter = adapter_for(model.config)
        self.cache = ByteCache(cache_bytes)
        self.top_k: int | None = None
        """Experts per token now, where that was changed."""
        self._how: Mapping[str, Mixing] = {}
        self._ints: dict[str, list[IntAttribute]] = {}
        if merges:
            self._check_mergeable()
            self._how = mixings(model) if router_space == "probabilities" else {}
            self._ints = {name: self._integers(site) for name, site in self._sites.items()}

    def tags(self, genome: Genome | None) -> dict[str, Hashable]:
        """Return MoE layer name -> what tells its present computation apart, of changed layers.

        Args:
            genome: the candidate that is applied now; None for none.
        """
        layers = {} if genome is None else genome.by_layer(self.groups)
        changed = {name: _tag(maps) for name, maps in layers.items() if not maps.is_identity}
        if self.top_k is None:
            return dict(changed)
        return {name: (self.top_k, changed.get(name)) for name in self._sites}

    def plan(self, genome: Genome, *, top_k: int | None = None) -> MergePlan:
        """Return a candidate as a plan."""
        layers = genome.by_layer(self.groups)
        return MergePlan(
            {name: torch.tensor(maps.experts) for name, maps in layers.items()},
            {name: torch.tensor(maps.routers) for name, maps in layers.items()},
            family=self.model.config.model_type,
            router_space=self.router_space,
            top_k=top_k,
        )

    def final_plan(self, genome: Genome, *, top_k: int | None = None) -> KeepPlan | MergePlan:
        """Return what to do to the model, in its simplest form: nothing is mixed without need."""
        plan = genome.keep_plan(self.groups)
        if plan is None or not all(map(self._masks, plan)):
            return self.plan(genome, top_k=top_k)
        plan = plan.made_for(family=self.model.config.model_type)
        return plan if top_k is None else replace(MergePlan.from_keep_plan(plan), top_k=top_k)

    @contextmanager
    def applied(self, genome: Genome) -> Iterator[None]:
        """Within it, the model computes as the candidate says."""
        with ExitStack() as undo:
            mixed: dict[str, Tensor] = {}
            for name, maps in genome.by_layer(self.groups).items():
                if maps.is_identity:
                    continue
                site = self._sites[name]
                if maps.kept is not None and self._masks(name):
                    undo.callback(self._adapter.mask_(self.model, site, maps.kept).remove)
                    continue
                undo.callback(self._merged(site, maps).remove)
                if self.router_space == "probabilities":
                    mixed[name] = torch.tensor(maps.routers)
            if mixed:
                undo.enter_context(mixed_routing(self.model, mixed, how=self._how))
            yield

    @contextmanager
    def active(self, top_k: int | None) -> Iterator[None]:
        """Within it, tokens use ``top_k`` experts; None leaves their number.

        Raises:
            UnsupportedModelError: if layers use different numbers now.
        """
        numbers = {site.top_k for site in self._sites.values()}
        if top_k is None or numbers == {top_k}:
            yield
            return
        if len(numbers) > 1:
            raise UnsupportedModelError(
                f"layers of this model use {sorted(numbers)} experts per token; their number can "
                "only be searched with where all use the same"
            )
        (before,) = numbers
        self._adapter.set_top_k(self.model, top_k)
        self.top_k = top_k
        try:
            yield
        finally:
            self._adapter.set_top_k(self.model, before)
            self.top_k = None

    def _masks(self, name: str) -> bool:
        """Whether dropping is a mask: not where the weights of what stays would grow by it."""
        if self.router_space == "rows" or not self._how:
            return True
        how = self._how[name]
        return how.renormalised or how.routing == "sigmoid"

    def _merged(self, site: MoESite, maps: Maps) -> Handles:
        """Let a block run with other tensors, made when it is entered."""
        model, cache = self.model, self.cache

        def tensors() -> Tensors:
            if site.rows("expert"):
                made = combined_tensors(model, site, ("expert",), maps.experts, cache)
            else:
                made = combined_modules(model, site, maps.experts, cache)
            if self.router_space == "rows":
                made = made | combined_tensors(model, site, _ROUTER_KINDS, maps.routers, cache)
            return made

        block = model.get_submodule(site.name)
        swap = _Swap(model, tensors, self._ints[site.name], len(maps.experts))
        return Handles(swap.hooks(block))

    def _integers(self, site: MoESite) -> list[IntAttribute]:
        """Return the numbers of experts that the code of a block reads while it merges."""
        scope = site.experts if self.router_space == "probabilities" else site.name
        found = [
            number
            for discovery in self._adapter.discoveries(self.model)
            if str(discovery.key) == site.config_key
            for number in discovery.ints
        ]
        return [n for n in found if f"{n.module}.".startswith(f"{scope}.")]

    def _check_mergeable(self) -> None:
        for site in self._sites.values():
            if site.rows("id_table"):
                raise UnsupportedModelError(
                    f"experts of {site.name} ({self.model.config.model_type}) cannot be combined: "
                    "they are chosen by a table of token ids; search for what to drop only "
                    "(effort.total not above effort.discrete)"
                )
            if site.num_groups > 1 and self.router_space == "probabilities":
                raise UnsupportedModelError(
                    f"{site.name} ({self.model.config.model_type}) routes within groups of "
                    "experts, whose probabilities cannot be mixed; set router_space: rows, or "
                    "search for what to drop only (effort.total not above effort.discrete)"
                )


class _Swap:
    """Gives modules other tensors and integers while a block runs."""

    def __init__(
        self,
        model: nn.Module,
        tensors: Callable[[], Tensors],
        integers: Sequence[IntAttribute],
        count: int,
    ) -> None:
        self._model, self._tensors = model, tensors
        self._integers, self._count = integers, count
        self._undo = ExitStack()

    def hooks(self, block: nn.Module) -> list[RemovableHandle]:
        enter = block.register_forward_pre_hook(self._enter)
        leave = block.register_forward_hook(self._leave, always_call=True)
        return [enter, leave]

    # Hooks must return None, anything else would replace the block's input or output.
    def _enter(self, *_: Any) -> None:
        for path, value in self._tensors().items():
            owner, name = _owner(self._model, path)
            is_buffer = name in owner._buffers
            held: dict[str, Any] = owner._buffers if is_buffer else owner._parameters
            self._undo.callback(held.__setitem__, name, held[name])
            held[name] = value if is_buffer else nn.Parameter(value, requires_grad=False)
        for number in self._integers:
            module = self._model.get_submodule(number.module)
            self._undo.callback(setattr, module, number.name, getattr(module, number.name))
            setattr(module, number.name, number.value(self._count))

    def _leave(self, *_: Any) -> None:
        self._undo.close()


def _tag(maps: Maps) -> Hashable:
    """Return what equal computations share; the order of new experts changes the last bits."""
    return maps.kept or (maps.experts.shape[0], maps.experts.tobytes(), maps.routers.tobytes())


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    module, _, name = path.rpartition(".")
    return model.get_submodule(module), name
