"""Forwards that wait for each other: order, errors, threads, and how often layers run."""

import itertools
import threading
from collections import Counter
from typing import Any

import pytest
import torch

from lit_moe.refit import RefitOptions, refit
from lit_moe.refit.lockstep import HeldForward, Lockstep
from lit_moe.testing import tiny_moe
from tests.refit.models import assert_same_state, half_of, state_of, text_for

ROWS = 8  # per batch; probes and judgement see one row at a time


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def event(forward, *args) -> Any:
    return forward.advance(*args)


def hold_layers(model, lockstep):
    """Hold each layer's output; an answer replaces it."""

    def hook_for(index):
        def hook(_, __, output):
            answer = lockstep.hold(f"layer {index}", output)
            return output if answer is None else answer

        return hook

    return [layer.register_forward_hook(hook_for(i)) for i, layer in enumerate(model.model.layers)]


def test_a_forward_stops_hands_out_and_takes_in():
    heard = []

    def run():
        heard.append(forward.hold("first", 1))
        heard.append(forward.hold("second", 2))

    forward = HeldForward(run)
    assert heard == []
    assert forward.advance() == ("first", 1)
    assert forward.advance("a") == ("second", 2)
    assert heard == ["a"]
    assert forward.advance() is None
    assert heard == ["a", None]
    forward.abandon()


def test_forwards_of_two_models_meet_layer_by_layer():
    models = [tiny_moe("mixtral", seed=seed) for seed in (0, 1)]
    batches = text_for(models[0], batches=3, rows=6)
    sides = [Lockstep(model, batches) for model in models]
    hooks = [hold_layers(*pair) for pair in zip(models, sides, strict=True)]
    seen = []
    for layer in range(2):
        for index in range(3):
            events = [event(side, index) for side in sides]
            seen.append((layer, index, *[event[0] for event in events]))
    assert [[side.advance(index) for side in sides] for index in range(3)] == [[None] * 2] * 3
    assert seen == [
        (layer, index, f"layer {layer}", f"layer {layer}")
        for layer in range(2)
        for index in range(3)
    ]
    for side in sides:
        side.close()
    for hook in itertools.chain(*hooks):
        hook.remove()


@torch.no_grad()
def test_an_answer_takes_the_place_of_the_layers_output():
    model = tiny_moe("mixtral")
    (batch,) = text_for(model, batches=1, rows=2)
    side = Lockstep(model, [batch])
    hooks = hold_layers(model, side)
    _, first = event(side, 0)
    _, plain = event(side, 0, first)
    assert not plain.requires_grad
    assert side.advance(0) is None
    side.close()
    side = Lockstep(model, [batch])
    for hook in hooks:
        hook.remove()
    hooks = hold_layers(model, side)
    side.advance(0)
    _, changed = event(side, 0, torch.zeros_like(first))
    side.close()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(
        model.model.layers[1](torch.zeros_like(first), **rotary(model)), changed
    )
    assert not torch.equal(changed, plain)


def rotary(model):
    positions = torch.arange(16)[None]
    hidden = torch.zeros(2, 16, model.config.hidden_size)
    return {"position_embeddings": model.model.rotary_emb(hidden, positions)}


def test_forwards_that_nobody_waits_for_end_without_a_word():
    cleaned: list[str] = []

    def run():
        try:
            forward.hold("middle", None)
            cleaned.append("went on")
        finally:
            cleaned.append("left")

    forward = HeldForward(run)
    assert forward.advance() == ("middle", None)
    forward.abandon()
    assert cleaned == ["left"]
    HeldForward(lambda: cleaned.append("never")).abandon()
    assert cleaned == ["left"]


def test_an_error_in_a_forward_is_raised_where_it_is_advanced():
    def run():
        forward.hold("first", None)
        raise OSError("the disk went away")

    forward = HeldForward(run)
    forward.advance()
    with pytest.raises(OSError, match="went away"):
        forward.advance()
    forward.abandon()


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_an_error_in_a_layer_ends_the_refit_and_takes_back_what_was_done(mode, side, no_judge):
    teacher, student = half_of("mixtral")
    states = [state_of(teacher), state_of(student)]
    layer = {"teacher": teacher, "student": student}[side].model.layers[1].mlp

    def break_(_, args):
        if args[0].shape[0] == ROWS:
            raise OSError("the disk went away")

    hook = layer.register_forward_pre_hook(break_)
    hooks = [hooks_of(model) for model in (teacher, student)]
    batches = text_for(teacher, rows=2 * ROWS)
    with pytest.raises(OSError, match="went away"):
        refit(student, teacher, batches, RefitOptions(mode=mode))
    assert [hooks_of(model) for model in (teacher, student)] == hooks
    assert_same_state(teacher, states[0])
    assert_same_state(student, states[1])
    hook.remove()
    report = refit(student, teacher, batches, RefitOptions(mode=mode))
    assert len(report.layers) == 2


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "nemotron_h"])
def test_every_layer_runs_once_per_batch_on_either_side(family, no_judge):
    teacher, student = half_of(family)
    runs: Counter = Counter()

    def count(model, side):
        for name, module in model.named_modules():
            if name.startswith("model.layers.") and name.count(".") == 2:
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, key=(side, name): runs.update(
                        [key] if (args or tuple(kwargs.values()))[0].shape[0] == ROWS else []
                    ),
                    with_kwargs=True,
                )

    count(teacher, "teacher")
    count(student, "student")
    refit(student, teacher, text_for(teacher, rows=3 * ROWS, batches=3))
    layers = teacher.config.num_hidden_layers
    assert runs == {
        (side, f"model.layers.{i}"): 3 for side in ("teacher", "student") for i in range(layers)
    }


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_modes_and_gradients_of_both_models_are_as_before(mode, no_judge):
    teacher, student = half_of("mixtral")
    student.train()
    student.model.layers[0].eval()
    modes = [module.training for module in student.modules()]
    refit(student, teacher, text_for(teacher), RefitOptions(mode=mode))
    assert [module.training for module in student.modules()] == modes
    assert not teacher.training
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert torch.is_grad_enabled()
    assert hooks_of(student) == hooks_of(teacher) == 0
