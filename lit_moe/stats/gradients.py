"""What the gradient of the language-model loss says about each expert, from one pass.

Gradients of all calibration tokens are added up in one buffer per expert tensor; each parameter's
own ``.grad`` is taken over or emptied as soon as it is complete, so that there is never a second
copy. Of the sums, a few numbers per expert remain.

T tokens, E experts, I expert width, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.errors import CalibrationError, UnsupportedModelError
from lit_moe.inference import run_body
from lit_moe.sharding.partitions import is_partitioned
from lit_moe.stats.gradient_routing import RoutedTokens
from lit_moe.stats.gradient_stats import GradientObservation, layer_stats
from lit_moe.stats.observe import failing_together, model_inputs, shown

Batches = Iterable[Mapping[str, Tensor]]

IGNORED = -100
"""Label of a token that is not to be predicted."""


def observe_gradients(
    model: PreTrainedModel, batches: Batches, *, progress: bool = False
) -> GradientObservation:
    """Run the model forward and backward over ``batches`` and return what its experts were told.

    Only experts take gradients; weights, their ``.grad`` and ``requires_grad`` are afterwards what
    they were. The model runs in evaluation mode, on its own device. With a process group every
    rank must call this with its own share of the batches; all get the sums over all ranks.

    The loss is the mean over every predicted token of all batches and ranks; of questions, whose
    batches have labels, over the tokens of the answers. Which experts were used is counted over all
    tokens, those of the prompts too.

    Args:
        model: any supported MoE language model, not partitioned over ranks.
        batches: dictionaries with ``input_ids`` (B, S), optionally ``attention_mask``, decoder
            inputs, and ``labels`` as transformers has them: -100 where a token is not to be
            predicted; of a decoder the ids again, place by place, of a model with an encoder what
            each place of the decoder predicts. Other keys are ignored.
        progress: show a progress bar.

    Raises:
        CalibrationError: if there is nothing to predict on any rank, labels do not fit the inputs,
            gradients are switched off by ``torch.inference_mode``, or are not finite (the message
            names the layer).
        UnsupportedModelError: if the model gives no logits over its vocabulary, or its expert
            weights can take no gradient.
    """
    sites = find_sites(model)
    wanted = {site.name: _expert_parameters(model, site) for site in sites}
    _check_differentiable(model, wanted)
    total, routed = _Total(), RoutedTokens(model, sites)
    everything = list({id(p): p for group in wanted.values() for p in group.values()}.values())
    with _taking_gradients(model, everything), failing_together():
        with total.collecting(everything), routed.counting():
            _run(model, total, routed, shown(batches, progress))
        for name, parameters in wanted.items():
            total.check_finite(name, parameters.values())
    predicted = int(_sum_over_ranks(torch.tensor(total.tokens, device=model.device)))
    if not predicted:
        raise CalibrationError(
            "there is no token to predict in the calibration batches; give at least one row of 2 "
            "tokens or more, and of labels that are not all -100"
        )
    layers = {}
    for site in sites:
        gradients = total.give(wanted[site.name], predicted)
        count = _sum_over_ranks(routed.count[site.name])
        layers[site.name] = layer_stats(model, site, gradients, count)
    return GradientObservation(layers, int(_sum_over_ranks(routed.tokens)), predicted)


class _Total:
    """One float32 (or wider) buffer per parameter, filled while backward runs."""

    def __init__(self) -> None:
        self.tokens = 0
        self._weight = 0.0
        self._sums: dict[int, Tensor] = {}

    @contextmanager
    def collecting(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Take each gradient away from its parameter as soon as backward has completed it."""
        with ExitStack() as stack:
            for parameter in parameters:
                hook = parameter.register_post_accumulate_grad_hook(self._take)
                stack.callback(hook.remove)
            yield

    def backward(self, mean_loss: Tensor, num_tokens: int) -> None:
        """Add the gradient of a mean over so many tokens."""
        self._weight = float(num_tokens)
        self.tokens += num_tokens
        mean_loss.backward()

    def check_finite(self, layer: str, parameters: Iterable[nn.Parameter]) -> None:
        """Refuse gradients that are no longer numbers."""
        sums = (self._sums[id(p)] for p in parameters if id(p) in self._sums)
        if not all(bool(tensor.isfinite().all()) for tensor in sums):
            raise CalibrationError(
                f"gradients of the experts of layer {layer!r} became NaN or infinite; try dtype "
                "float32, or look for a damaged weight"
            )

    def give(self, parameters: Mapping[str, nn.Parameter], num_tokens: int) -> dict[str, Tensor]:
        """Return name -> gradient of the mean loss over all ranks, and keep nothing. Collective."""
        given = {}
        for name, parameter in parameters.items():
            tensor = self._sums.pop(id(parameter), None)
            if tensor is None:  # a module of an expert that saw no token here
                tensor = torch.zeros_like(parameter, dtype=_wide(parameter.dtype))
            given[name] = _sum_over_ranks(tensor).div_(num_tokens)
        return given

    def _take(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        known = self._sums.get(id(parameter))
        if known is None:
            wide = gradient.to(_wide(gradient.dtype))
            self._sums[id(parameter)] = wide.mul_(self._weight)
        else:
            known.add_(gradient, alpha=self._weight)


def _run(model: PreTrainedModel, total: _Total, routed: RoutedTokens, batches: Batches) -> None:
    for batch in batches:
        inputs = model_inputs(batch, model.device)
        labels_BS = _labels(inputs, batch.get("labels"))
        num_tokens = int((labels_BS >= 0).sum())
        routed.begin(inputs)
        if num_tokens:
            total.backward(_mean_loss(model, inputs, labels_BS), num_tokens)
        else:
            with torch.no_grad():
                run_body(model, inputs)


def _labels(inputs: Mapping[str, Tensor], given_BS: Tensor | None) -> Tensor:
    """Return what each place predicts, -100 for nothing: ``(B, S)``, or ``(B, S-1)`` without last.

    Args:
        inputs: of the model.
        given_BS: the labels of the batch; None takes every next token.
    """
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    ids = inputs.get(f"{prefix}input_ids")
    if ids is None:
        raise CalibrationError(
            f"criteria of gradients need the next token as label, but a batch has only "
            f"{sorted(inputs)}; give batches with input_ids"
        )
    if given_BS is not None and given_BS.shape != ids.shape:
        raise CalibrationError(
            f"labels of shape {tuple(given_BS.shape)} do not fit {prefix}input_ids of shape "
            f"{tuple(ids.shape)}; give one label per token, -100 where nothing is predicted"
        )
    mask = inputs.get(f"{prefix}attention_mask")
    if given_BS is not None and prefix:
        labels = given_BS.to(ids.device)
        return labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
    labels = (ids if given_BS is None else given_BS.to(ids.device))[:, 1:]
    return labels if mask is None else labels.masked_fill(mask[:, 1:] == 0, IGNORED)


def _mean_loss(model: PreTrainedModel, inputs: dict[str, Tensor], labels_BS: Tensor) -> Tensor:
    options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    output = model(**inputs, **options)
    logits = output.logits if "logits" in output else None
    if logits is None or logits.shape[-1] <= int(labels_BS.max()):
        width = "none" if logits is None else f"{logits.shape[-1]} classes"
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no logits over its vocabulary ({width}), so it has no "
            "next-token loss; take a criterion that needs no gradients"
        )
    flat = logits[:, : labels_BS.shape[1]].float().flatten(0, 1)
    return nn.functional.cross_entropy(flat, labels_BS.flatten(), ignore_index=IGNORED)


@contextmanager
def _taking_gradients(model: PreTrainedModel, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, and gradients for these parameters alone; everything is put back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.eval()
    try:
        for parameter, _, _ in flags:
            parameter.grad = None
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


def _expert_parameters(model: PreTrainedModel, site: MoESite) -> dict[str, nn.Parameter]:
    """Return name -> parameter of the experts of one layer: stacked ones, or modules of each."""
    names = [axis.name for axis in site.rows("expert")]
    if not names:
        inside = model.get_submodule(site.experts).named_parameters()
        names = [f"{site.experts}.{name}" for name, _ in inside]
    return {name: model.get_parameter(name) for name in names}


def _check_differentiable(
    model: PreTrainedModel, wanted: Mapping[str, Mapping[str, nn.Parameter]]
) -> None:
    if torch.is_inference_mode_enabled():
        raise CalibrationError(
            "criteria of gradients cannot run inside torch.inference_mode(); leave it, or use "
            "torch.no_grad(), which they switch on again for themselves"
        )
    if is_partitioned(model):
        raise UnsupportedModelError(
            "criteria of gradients need whole weights on each rank, but these are partitioned "
            "(ZeRO-3); take another criterion, or a strategy that replicates the model"
        )
    for name, parameters in wanted.items():
        for parameter in parameters.values():
            if not parameter.is_floating_point() or parameter.is_inference():
                raise UnsupportedModelError(
                    f"expert weights of {name!r} are {parameter.dtype} and can take no gradient; "
                    "load the model in float32 or bfloat16, outside of torch.inference_mode()"
                )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
