"""One observed pass over a model, and what all criteria make of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters.site import MoESite
from lit_moe.criteria import Criterion, Evidence, UnroutedRule, apply_unrouted, score_evidence
from lit_moe.criteria.base import Need
from lit_moe.stats import (
    GATHERABLE,
    GradientObservation,
    Observation,
    observe,
    observe_gradients,
)

Scores = dict[str, Tensor]


class Calibration:
    """What one draw of calibration text says about a model as it now is.

    Every pass is done when it is first wanted, and once: one observed forward for all criteria of
    routing and activations, one forward and backward for all of gradients.

    Args:
        model: maybe masked; then say what the mask leaves.
        sites: its MoE layers.
        batches: of the calibration text.
        needs: of all criteria that are going to be asked for.
        seed: of random choices.
        alive: layer -> experts that a mask leaves; None if nothing is masked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: tuple[MoESite, ...],
        batches: Sequence[Mapping[str, Tensor]],
        *,
        needs: Iterable[Need],
        seed: int,
        alive: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.model, self.sites, self.batches, self.seed = model, sites, batches, seed
        self.needs, self.alive = frozenset(needs), alive

    @cached_property
    def observation(self) -> Observation:
        """Sums of one observed forward."""
        gather = [kind for kind in GATHERABLE if kind in self.needs]
        return observe(self.model, self.batches, gather=gather)

    @cached_property
    def gradients(self) -> GradientObservation:
        """Numbers of one forward and backward."""
        return observe_gradients(self.model, self.batches)

    def scores(
        self, criterion: Criterion, *, unrouted: UnroutedRule, keep: Mapping[str, int] | None = None
    ) -> Scores:
        """Return layer -> scores ``(E,)``, with the rule for unrouted experts applied.

        Args:
            criterion: whose needs are among those of this calibration.
            unrouted: the rule.
            keep: experts that will stay per layer, for criteria that rate subsets.

        Raises:
            LitMoEError: if the model cannot be observed, or the criterion lacks something.
        """
        routed, graded = "routing" in criterion.needs, "gradients" in criterion.needs
        evidence = Evidence(
            observation=self.observation if routed else None,
            gradients=self.gradients if graded else None,
            model=self.model,
            sites=self.sites,
            batches=self._inputs() if "forward" in criterion.needs else None,
            keep=keep,
            seed=self.seed,
            alive=self.alive,
        )
        scores = score_evidence(criterion, evidence)
        if not (routed or graded):
            return scores
        seen = self.gradients if graded else self.observation
        return apply_unrouted(scores, _seen(seen, self.alive), unrouted)

    def _inputs(self) -> list[dict[str, Tensor]]:
        names = ("input_ids", "attention_mask")
        return [{k: batch[k].to(self.model.device) for k in names} for batch in self.batches]


@dataclass(frozen=True)
class _Seen:
    tokens: int
    unrouted: Mapping[str, tuple[int, ...]]


def _seen(
    seen: Observation | GradientObservation, alive: Mapping[str, tuple[int, ...]] | None
) -> _Seen:
    """Return what was seen of the experts that a mask leaves."""
    unrouted = {
        name: tuple(e for e in ids if alive is None or e in alive[name])
        for name, ids in seen.unrouted.items()
    }
    return _Seen(seen.tokens, {name: ids for name, ids in unrouted.items() if ids})
