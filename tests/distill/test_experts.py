"""Expert-wise distillation against slow loops over tokens and experts, and its exact truths."""

import copy

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.distill.comparison import mean_square
from lit_moe.distill.experts import ExpertDistillation
from lit_moe.distill.pairing import Pairing, PairingMemory
from lit_moe.distill.recovery import RecoveryLoss
from lit_moe.distill.step import Step
from lit_moe.distill.weights import LossWeights
from lit_moe.errors import LitMoEError, UnsupportedModelError
from lit_moe.masking import masked
from lit_moe.models import frozen_copy
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import FAMILIES, example_inputs, random_plan, tiny_moe

ALIGNMENTS = ["forced", "own", "dense"]
REFUSED = ["jetmoe", "llama4", "llama4_multimodal", "switch_transformers"]


def changed(model, seed=1):
    """A student: the model with other down projections."""
    student = copy.deepcopy(model).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    adapter = adapter_for(student.config)
    for site in find_sites(student):
        down = adapter.expert_weights(student, site)["down"]
        noise = torch.randn(down.shape, generator=generator) * down.std()
        adapter.set_expert_weights_(student, site, {"down": down + noise})
    return student


def padded(model):
    """Inputs whose second block ends early."""
    batch = example_inputs(model)
    batch.pop("decoder_input_ids", None)
    batch["attention_mask"][1, -5:] = 0
    return batch


def distil(student, teacher, batch, *, plan=None, **fields):
    loss = RecoveryLoss(LossWeights(**{"experts": 1.0, "experts_lambda": 1.0, **fields}))
    loss.terms = loss.terms[1:]  # not every family is a causal language model
    step = Step(student, teacher, batch, plan=plan)
    return loss(step), step


def slow_mixtral(student, teacher, batch, alignment, kept=None):
    """The sum over layers and experts, one token and expert at a time."""
    mine, theirs = inputs_of_experts(student, batch), inputs_of_experts(teacher, batch)
    mask, total = batch["attention_mask"].flatten().bool(), 0.0
    for name in mine:
        originals = range(8) if kept is None else kept[name]
        for expert, original in enumerate(originals):
            sent = {"forced": theirs[name][1] == original, "own": mine[name][1] == expert}
            seen = sent[alignment].any(dim=-1) if alignment in sent else mask
            source = mine if alignment == "own" else theirs
            errors = []
            for t in (seen & mask).nonzero().flatten():
                says = one_expert(student, name, expert, mine[name][0][t])
                said = one_expert(teacher, name, original, source[name][0][t])
                errors.append(float((says - said).detach().square().mean()))
            total += sum(errors) / max(len(errors), 1)
    return total


def inputs_of_experts(model, batch):
    """Layer -> hidden states, experts of each token, and their weights."""
    seen, hooks = {}, []
    for site in find_sites(model):

        def look(_, args, name=site.name):
            seen[name] = args

        hooks.append(model.get_submodule(site.experts).register_forward_pre_hook(look))
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def one_expert(model, name, expert, hidden):
    (site,) = (site for site in find_sites(model) if site.name == name)
    weights = adapter_for(model.config).expert_weights(model, site)
    gate, up = (weights[part][expert] @ hidden for part in ("gate", "up"))
    return weights["down"][expert] @ (torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_the_sum_is_that_of_a_loop_over_tokens_and_experts(alignment, shrunk):
    teacher = frozen_copy(tiny_moe("mixtral"))
    student, batch = changed(teacher), padded(teacher)
    plan = random_plan(teacher) if shrunk else None
    if plan is not None:
        shrink(student, plan)
    recovery, _ = distil(student, teacher, batch, plan=plan, alignment=alignment)
    expected = slow_mixtral(student, teacher, batch, alignment, plan and plan.kept)
    assert float(recovery.values["experts"].detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in REFUSED])
def test_every_family_learns_from_its_teacher(family):
    model = tiny_moe(family)
    model.register_forward_pre_hook(seed)  # some draw random numbers
    teacher, batch = frozen_copy(model), padded(model)
    for alignment in ALIGNMENTS:
        student = copy.deepcopy(model)
        plain = student(**batch).logits
        recovery, step = distil(student, teacher, batch, alignment=alignment)
        torch.testing.assert_close(step.logits, plain, atol=1e-5, rtol=1e-5)
        assert float(recovery.values["experts"].detach()) < 1e-9
        student = changed(model)
        recovery, _ = distil(student, teacher, batch, alignment=alignment)
        recovery.total.backward()
        for site in find_sites(student):
            if f"experts/{site.name}" in recovery.details:  # layers for images see no text
                assert_experts_learn(student, site)
        assert all(parameter.grad is None for parameter in teacher.parameters())


def seed(*_):
    torch.manual_seed(0)


def assert_experts_learn(student, site):
    tensors = {axis.name: student.get_parameter(axis.name) for axis in site.rows("expert")}
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1}
    assert matrices, site.name
    for name, parameter in matrices.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("family", REFUSED)
def test_experts_that_cannot_be_handed_tokens_are_refused_by_name(family):
    model = tiny_moe(family)
    with pytest.raises(UnsupportedModelError, match=model.config.model_type):
        RecoveryLoss(LossWeights(experts=1.0)).check(model)
    RecoveryLoss(LossWeights(router=1.0, distillation=1.0)).check(model)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_survivors_of_a_plan_are_compared_with_themselves(alignment):
    teacher = frozen_copy(tiny_moe("mixtral", num_hidden_layers=1))
    student, batch = copy.deepcopy(teacher), padded(teacher)
    plan = random_plan(teacher)
    shrink(student, plan)
    recovery, _ = distil(student, teacher, batch, plan=plan, alignment=alignment)
    assert float(recovery.values["experts"]) < 1e-9  # one layer: their inputs are the teacher's


def test_hidden_experts_count_as_dropped_ones():
    teacher = frozen_copy(tiny_moe("mixtral"))
    plan, batch = random_plan(teacher), padded(teacher)
    hidden, cut = changed(teacher), changed(teacher)
    shrink(cut, plan)
    with masked(hidden, plan):
        first, _ = distil(hidden, teacher, batch, plan=plan, router=1.0)
    second, _ = distil(cut, teacher, batch, plan=plan, router=1.0)
    for name in ("experts", "router"):
        torch.testing.assert_close(first.values[name], second.values[name])


def test_a_smaller_student_without_a_plan_is_refused():
    teacher = frozen_copy(tiny_moe("mixtral"))
    student, batch = copy.deepcopy(teacher), padded(teacher)
    shrink(student, random_plan(teacher))
    with pytest.raises(LitMoEError, match=r"4 experts in the student and 8 in the teacher"):
        distil(student, teacher, batch)
    wrong = KeepPlan(
        {s.name: (0, 1) for s in find_sites(teacher)}, {s.name: 8 for s in find_sites(teacher)}
    )
    with pytest.raises(LitMoEError, match=r"it keeps 2"):
        distil(student, teacher, batch, plan=wrong)


def test_a_teacher_with_other_layers_is_refused():
    student = tiny_moe("mixtral", num_hidden_layers=1)
    teacher = frozen_copy(tiny_moe("mixtral"))
    with pytest.raises(LitMoEError, match="1 MoE layers and the teacher 2"):
        distil(student, teacher, padded(student))


def test_padding_and_experts_without_tokens_do_not_count():
    teacher = frozen_copy(tiny_moe("mixtral"))
    student = changed(teacher)
    one = example_inputs(teacher, batch=1, length=2)
    recovery, _ = distil(student, teacher, one)
    assert 16 - 8 <= float(recovery.details["experts_skipped"]) < 16  # 2 layers x 2 tokens x top-2
    wide = {k: torch.cat([v, v.flip(1)], dim=1) for k, v in one.items()}
    wide["attention_mask"] = torch.tensor([[1, 1, 0, 0]])
    again, _ = distil(student, teacher, wide)
    torch.testing.assert_close(again.values["experts"], recovery.values["experts"])
    layers = [v for k, v in recovery.details.items() if k.startswith("experts/")]
    torch.testing.assert_close(sum(layers), recovery.values["experts"].detach())


def test_lambda_makes_both_terms_equal_once_and_stays():
    teacher = frozen_copy(tiny_moe("mixtral"))
    student, batch = changed(teacher), padded(teacher)
    loss = RecoveryLoss(LossWeights(experts=1.0))
    first = loss(Step(student, teacher, batch))
    torch.testing.assert_close(first.total, 2 * first.values["next_token"])
    measured = first.details["experts_lambda"]
    second = loss(Step(changed(teacher, seed=2), teacher, batch))
    assert second.details["experts_lambda"] == measured
    resumed = RecoveryLoss(LossWeights(experts=1.0))
    resumed.load_state(loss.state())
    third = resumed(Step(changed(teacher, seed=2), teacher, batch))
    torch.testing.assert_close(third.total, second.total)
    expected = second.values["next_token"] + measured * second.values["experts"]
    torch.testing.assert_close(second.total, expected)


def test_lambda_cannot_be_measured_on_a_student_that_is_its_teacher():
    model = tiny_moe("mixtral")
    with pytest.raises(LitMoEError, match="still equal the teacher's"):
        RecoveryLoss(LossWeights(experts=1.0))(Step(model, frozen_copy(model), padded(model)))


def test_the_models_run_once_each_and_keep_their_forwards():
    teacher = frozen_copy(tiny_moe("mixtral"))
    student, runs = changed(teacher), []
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_hook(lambda *_, name=name: runs.append(name))
    for alignment in ALIGNMENTS:
        distil(student, teacher, padded(teacher), alignment=alignment)
    assert runs == ["teacher", "student", "student", "teacher", "student"]  # own needs no forward
    for model in (student, teacher):
        for site in find_sites(model):
            assert "forward" not in vars(model.get_submodule(site.experts))


def test_twenty_steps_bring_experts_back():
    teacher = frozen_copy(tiny_moe("mixtral"))
    student, batch = changed(teacher), padded(teacher)
    adam = torch.optim.AdamW(student.parameters(), lr=3e-3)
    term = [float(distil(student, teacher, batch)[0].values["experts"].detach())]
    for _ in range(20):
        recovery, _ = distil(student, teacher, batch)
        recovery.total.backward()
        adam.step()
        adam.zero_grad()
        term.append(float(recovery.values["experts"].detach()))
    assert term[-1] < 0.5 * term[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": -1.0}, "loss.experts is -1.0"),
        ({"next_token": float("nan")}, "loss.next_token is nan"),
        ({"temperature": 0.0}, "loss.temperature is 0.0; it must be a number above 0"),
        ({"experts_lambda": 0.0}, "loss.experts_lambda is 0.0"),
        ({"alignment": "both"}, "it can be forced, own, dense"),
    ],
)
def test_impossible_weights_are_refused(fields, message):
    with pytest.raises(LitMoEError, match=message):
        LossWeights(**fields)


def test_a_term_of_weight_zero_is_left_out():
    names = [term.name for term in RecoveryLoss(LossWeights()).terms]
    assert names == ["next_token"]
    assert not RecoveryLoss(LossWeights(load_balance=1.0)).needs_teacher
    assert ExpertDistillation(1.0).needs_teacher


def test_the_pairing_is_found_anew_when_experts_are_cut_or_the_plan_changes():
    teacher = frozen_copy(tiny_moe("mixtral"))
    student, plan = copy.deepcopy(teacher), random_plan(teacher)
    memory = PairingMemory()
    whole = memory.of(student, teacher, None)
    assert memory.of(student, teacher, None) is whole
    hidden = memory.of(student, teacher, plan)
    assert hidden == Pairing.of(student, teacher, plan) != whole
    shrink(student, plan)
    cut = memory.of(student, teacher, plan)
    assert cut == Pairing.of(student, teacher, plan) != hidden
    assert memory.of(student, teacher, plan) is cut


def test_rows_differences_have_the_gradient_of_autograd():
    torch.manual_seed(0)
    outputs = torch.randn(5, 7, requires_grad=True)
    targets, weights = torch.randn(5, 7), torch.randn(5)
    (mine,) = torch.autograd.grad((mean_square(outputs, targets) * weights).sum(), outputs)
    plain = ((outputs - targets).square().mean(dim=-1) * weights).sum()
    (expected,) = torch.autograd.grad(plain, outputs)
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_logits_of_fused_experts_keep_their_bits(alignment):
    teacher = frozen_copy(tiny_moe("mixtral"))
    student, batch = changed(teacher), padded(teacher)
    plain = student(**batch).logits
    _, step = distil(student, teacher, batch, alignment=alignment)
    assert step.logits is not None
    assert torch.equal(step.logits, plain)
    assert torch.equal(student(**batch).logits, plain)
