"""Proves on a small random copy of a model that its experts can be hidden, cut, saved, reloaded."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_moe.adapters.base import MoEAdapter, Traits
from lit_moe.adapters.config_keys import GROUP_KEYS, TOP_K_KEYS, expert_keys, sibling
from lit_moe.adapters.discovery import Blueprint
from lit_moe.adapters.routing_probe import classify_output
from lit_moe.adapters.site import ExpertAxis, MoESite
from lit_moe.adapters.taps import Handles, on_forward
from lit_moe.errors import LitMoEError, UnsupportedModelError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "image_size": 16,
    "patch_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPREAD = {"router": 1.0, "select_bias": 0.2, "expert": 0.2}
TOLERANCE = 1e-5
# What building and running somebody else's model may raise when our small config does not suit it.
FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def self_test(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Traits:
    """Return how the family routes, if everything lit-moe does to it works.

    Tested once per model class and config: the model with hidden experts gives the logits of the
    model without them, and so does the model without them after a save and a plain reload.

    Raises:
        UnsupportedModelError: saying which of these failed, or why they could not be tried.
    """
    return _self_test(Blueprint(model_class, config))


def randomise(model: PreTrainedModel, sites: Sequence[MoESite]) -> None:
    """Fill routers, biases and experts in place; transformers starts many of them with zeros."""
    parameters = model.named_parameters(remove_duplicate=False)
    tensors = dict([*parameters, *model.named_buffers(remove_duplicate=False)])
    for axis in (axis for site in sites for axis in site.axes):
        tensor = tensors[axis.name].data
        if axis.kind == "id_table":
            order = torch.rand(tensor.shape[0], axis.real).argsort(dim=1)
            tensor.copy_(order[:, : tensor.shape[1]])
        elif axis.kind == "select_bias":
            _randomise_bias(tensor, axis)
        else:
            tensor.normal_(0.0, SPREAD[axis.kind])


def _randomise_bias(tensor: Tensor, axis: ExpertAxis) -> None:
    # Null experts are left out: ZAYA resets their bias on loading. Not negative: A.X-K2 gives the
    # experts of closed groups the score 0, and a negative score would leave the choice to ties.
    tensor.narrow(axis.dim, 0, axis.real).normal_(0.0, SPREAD["select_bias"]).abs_()


@functools.lru_cache(maxsize=32)
def _self_test(blueprint: Blueprint) -> Traits:
    model_class, config = blueprint.model_class, blueprint.config
    name = f"{model_class.__name__} ({config.model_type})"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class._from_config(small_config(config)).float().eval()
            return _try_out(model)
    except LitMoEError:
        raise
    except FAILURES as error:
        raise UnsupportedModelError(
            f"{name} is no family that lit-moe knows, and a small copy of it could not be tried "
            f"out: {type(error).__name__}: {error}"
        ) from error


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a config with small sizes, few layers, and 4 experts per group."""
    data = _small(config, config.to_dict())
    small = type(config).from_dict(data)
    for key in expert_keys(config):
        groups, top_k = sibling(config, key, GROUP_KEYS), sibling(config, key, TOP_K_KEYS)
        key.set(small, 4 * max(2, groups[1] if groups else 1))
        if top_k:
            top_k[0].set(small, min(top_k[1], 2))
    return small


def _small(config: PreTrainedConfig, data: dict[str, Any]) -> dict[str, Any]:
    old_layers = getattr(config, "num_hidden_layers", None)
    # Latent attention wants as many key as query heads.
    equal_heads = data.get("num_key_value_heads") == data.get("num_attention_heads")
    data.pop("per_layer_config", None)
    for name, value in data.items():
        sub = getattr(config, name, None)
        if isinstance(sub, PreTrainedConfig):
            data[name] = _small(sub, value)
        elif isinstance(value, list) and len(value) == old_layers:
            data[name] = value[: SMALL["num_hidden_layers"]]
        elif isinstance(value, int) and not isinstance(value, bool):
            data[name] = min(value, SMALL.get(name, value))
    if equal_heads and "num_attention_heads" in data:
        data["num_key_value_heads"] = data["num_attention_heads"]
    return data


@torch.no_grad()
def _try_out(model: PreTrainedModel) -> Traits:
    adapter = MoEAdapter(Traits(group_score="top2"))
    sites = adapter.sites(model)
    randomise(model, sites)
    keep = {site.name: _half(adapter, site) for site in sites}
    inputs = _inputs(model)
    traits = _routing(model, sites, inputs)
    _observe(adapter, model, sites, inputs)
    hidden = Handles([adapter.mask_(model, site, keep[site.name]) for site in sites])
    masked = _run(model, inputs)
    hidden.remove()
    for site in sites:
        adapter.slice_(model, site, keep[site.name])
    adapter.finish_(model, sites, {name: len(ids) for name, ids in keep.items()})
    _same(model, "the model without experts", _run(model, inputs), "with hidden experts", masked)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
    _same(model, "the reloaded model", _run(again, inputs), "before saving", masked)
    return traits


def _half(adapter: MoEAdapter, site: MoESite) -> tuple[int, ...]:
    """Return a kept set that is legal, about half, and not the first half."""
    legal = adapter.legal_counts(site)
    count = min(legal, key=lambda n: abs(n - site.num_experts / 2))
    size, per_group = site.num_experts // site.num_groups, count // site.num_groups
    groups = range(site.num_groups)
    return tuple(e + g * size for g in groups for e in range(size - per_group, size))


def _routing(model: PreTrainedModel, sites: Sequence[MoESite], inputs: dict[str, Tensor]) -> Traits:
    """Return how the first router that ran turns logits into weights."""
    seen: list[Any] = []
    routers = [model.get_submodule(site.router) for site in sites]
    hooks = Handles([on_forward(r, lambda _, output: seen.append(output)) for r in routers])
    _run(model, inputs)
    hooks.remove()
    routing, renormalised = classify_output(seen[0] if seen else None)
    return Traits(routing, renormalised)


def _observe(
    adapter: MoEAdapter,
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    inputs: dict[str, Tensor],
) -> None:
    """Check that experts outside transformers' registry can be observed slot by slot."""
    plain = _run(model, inputs)
    odd = [site for site in sites if not site.registered]
    taps = Handles([adapter.attach_slots(model, site, lambda *_: None) for site in odd])
    observed = _run(model, inputs)
    taps.remove()
    _same(model, "the observed model", observed, "without observer", plain)


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        size, channels = model.config.image_size, getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, size, size)}
    ids = torch.randint(3, SMALL["vocab_size"], (2, 12))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    return inputs


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    logits: Tensor = output.logits if "logits" in output else output[0]
    return logits


def _same(model: nn.Module, what: str, got: Tensor, other: str, expected: Tensor) -> None:
    difference = float((got - expected).abs().max())
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no family that lit-moe knows, and a small copy of it "
            f"failed the test: logits of {what} differ from those {other} by {difference:.1e}"
        )
