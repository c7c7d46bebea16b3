"""An evolutionary search as validation loops: one of lightning's own for each generation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.utilities import _reset_progress
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng

from lit_moe.callbacks.evolution_view import LiveView
from lit_moe.callbacks.refit import Refit
from lit_moe.callbacks.weight_sparsity import WeightPruning
from lit_moe.errors import LitMoEError
from lit_moe.search.live import LiveModel
from lit_moe.search.problem import Generation
from lit_moe.search.run import Progress, SearchRun

Loop = Literal["auto", "validation", "fit_start"]


def is_in_validation(loop: Loop, trainer: Trainer) -> bool:
    """Return whether a search is to run as validation loops.

    Args:
        loop: ``auto`` says yes wherever it is possible.
        trainer: that would validate.

    Raises:
        LitMoEError: for a word that is unknown, or ``validation`` where it is not possible.
    """
    if loop not in get_args(Loop):
        raise LitMoEError(f"loop={loop!r} is unknown; use {', '.join(get_args(Loop))}")
    if loop == "fit_start":
        return False
    reason = _reason_against(trainer)
    if reason is not None and loop == "validation":
        raise LitMoEError(
            f"EvolutionarySearch cannot run as validation loops: {reason}; take loop: fit_start, "
            "which finds the same plan before the model is wrapped"
        )
    return reason is None


def _reason_against(trainer: Trainer) -> str | None:
    if not trainer.enable_validation:
        return (
            f"the trainer does not validate (limit_val_batches is {trainer.limit_val_batches}, or "
            "there is no validation data)"
        )
    strategy: Any = trainer.strategy
    if getattr(strategy, "stage", 0) == 3:
        return "under ZeRO stage 3 no rank holds a whole model to try a candidate of its own on"
    plain = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    if not plain and not hasattr(strategy, "wrap_again"):
        return f"{type(strategy).__name__} cannot wrap the model again when experts are gone"
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    earlier = [type(c).__name__ for c in callbacks if isinstance(c, Refit | WeightPruning)]
    return f"{earlier[0]} would act before the search, not after it" if earlier else None


class ValidationLoops:
    """Runs a search in front of the first training step, a validation loop for each generation.

    A generation is evaluated when its loop begins; what the loop validates is the best candidate so
    far. Callbacks see these loops like any other, except those that monitor a metric
    (ModelCheckpoint, EarlyStopping), which count from the reduced model on. Loggers get the metrics
    by candidates evaluated, under ``search/``. Afterwards nothing in the trainer or in its random
    numbers tells that there were such loops.

    Args:
        trainer: in a fit, its model wrapped, before any training step.
        live: the model within.
        top_k: experts per token that all candidates have.
        view: where metrics go.
    """

    def __init__(
        self, trainer: Trainer, live: LiveModel, top_k: int | None, view: LiveView
    ) -> None:
        self._trainer, self._live, self._top_k, self._view = trainer, live, top_k, view
        self._search: SearchRun | None = None
        self._generation: Generation | None = None
        self._progress: Progress | None = None
        self._shown = ExitStack()

    def run(self, search: SearchRun) -> None:
        """Evaluate generations until the search is over; those on record need no loop. Collective.

        Raises:
            LitMoEError: if the validation data has not a single batch.
        """
        loop = self._trainer.fit_loop.epoch_loop.val_loop
        self._search = search
        with _apart(self._trainer), self._shown:
            loop.setup_data()
            if loop.skip:
                raise LitMoEError(
                    "EvolutionarySearch cannot run as validation loops: the validation data has no "
                    "batch; give more text or questions, or take loop: fit_start"
                )
            while (generation := search.ask()) is not None:
                if search.is_on_record(generation):
                    search.evaluate(generation)
                    continue
                self._generation = generation
                metrics = loop.run()
                assert self._progress is not None
                self._view.show_validation(metrics, self._progress.evaluated)

    def begin(self) -> None:
        """When a validation begins. Evaluates the generation, and shows the best to the loop."""
        assert self._search is not None
        assert self._generation is not None
        self._progress = self._search.evaluate(self._generation)
        self._shown.enter_context(self._live.active(self._top_k))
        self._shown.enter_context(self._live.applied(self._progress.genome))

    def end(self) -> None:
        """When a validation ends. Shows all experts again."""
        self._shown.close()


@contextmanager
def _apart(trainer: Trainer) -> Iterator[None]:
    """Let the trainer validate inside the block without a trace, as in its sanity check."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    own: Any = trainer
    callbacks, loggers, stage = own.callbacks, trainer.loggers, trainer.state.stage
    own.callbacks = [callback for callback in callbacks if not _monitors(callback)]
    trainer.loggers = []
    connector.reset_results()
    connector.reset_metrics()
    own.validating = True
    try:
        with isolate_rng():
            yield
    finally:
        own.callbacks, trainer.loggers = callbacks, loggers
        trainer.state.stage = stage
        connector.reset_results()
        connector.reset_metrics()
        _reset_progress(loop)
        loop._seen_batches_per_dataloader = defaultdict(int)


def _monitors(callback: Callback) -> bool:
    """Whether it keeps checkpoints or goes by the metrics of validations."""
    return isinstance(callback, Checkpoint) or hasattr(callback, "monitor")
