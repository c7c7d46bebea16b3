"""What a V-MoE is made of."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers.models.vit.configuration_vit import ViTConfig

RouterType = Literal["token_choice", "expert_choice"]
Dropped = Literal["zero", "delete"]
Pooling = Literal["token", "mean"]
ROUTERS, DROPPED, POOLINGS = get_args(RouterType), get_args(Dropped), get_args(Pooling)
_AT_LEAST_1 = (
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "tokens_per_expert"),
    "representation_size",
)
_AT_LEAST_0 = ("num_null_experts", "router_noise", "importance_loss", "load_loss")


@strict
class VMoEConfig(ViTConfig):
    """Config of a Vision Transformer in which some MLPs are sparse Mixtures of Experts.

    Source: V-MoE (Riquelme et al., arXiv 2106.05974), its ensembles E3 (Allingham et al., arXiv
    2110.03360); expert choice as in Chowdhury et al., arXiv 2405.16646.

    Attributes:
        num_experts: experts of each MoE layer.
        num_null_experts: router rows behind them without an expert: what goes there becomes 0.
        num_experts_per_tok: rows that a token chooses; under expert choice, experts per token on
            average, from which ``tokens_per_expert`` follows.
        moe_layers: indices of the layers that have experts; None for every second, 1, 3, 5, ...
        moe_intermediate_size: neurons of one expert; None for ``intermediate_size``.
        router_type: ``token_choice``: each token chooses its experts, gates are softmax over all
            rows, not renormalised. ``expert_choice``: each expert chooses tokens of each image, its
            gates are a softmax over those tokens.
        tokens_per_expert: tokens of an image that an expert chooses, under expert choice; None for
            ``num_experts_per_tok * tokens / num_experts``.
        capacity_factor: slots of an expert in training, as a multiple of what it would get if all
            rows were chosen equally often; None for no limit.
        eval_capacity_factor: likewise in evaluation.
        batch_priority: in evaluation, tokens with larger gates take their slots first.
        router_noise: in training, normal noise of this over the number of rows on the logits.
        importance_loss: weight of the importance loss in training.
        load_loss: weight of the load loss in training; needs router_noise.
        dropped_experts: what becomes of the router's rows when experts are dropped under token
            choice. ``zero``: they stay, and what goes there becomes 0 (arXiv 2405.16646);
            ``delete``: they go, so that tokens choose among the others.
        pooling: what the classifier reads: the class ``token`` or the ``mean`` of all tokens.
        representation_size: width of a tanh layer between that and the classifier; None for none.
        n_group: members of an ensemble (E3), each with its own equal share of the experts.
        topk_group: shares that a token may use: its own only.
    """

    model_type = "lit_vmoe"
    attribute_map = {"num_members": "n_group"}  # noqa: RUF012 - as transformers declares it
    fewest_experts: ClassVar[int] = 1
    """A layer with one expert and a router is still one whose experts can be counted."""

    num_experts: int = 8
    num_null_experts: int = 0
    num_experts_per_tok: int = 2
    moe_layers: list[int] | None = None
    moe_intermediate_size: int | None = None
    router_type: RouterType = "token_choice"
    tokens_per_expert: int | None = None
    capacity_factor: float | int | None = 1.05
    eval_capacity_factor: float | int | None = 1.05
    batch_priority: bool = True
    router_noise: float | int = 1.0
    importance_loss: float | int = 0.005
    load_loss: float | int = 0.005
    dropped_experts: Dropped = "zero"
    pooling: Pooling = "token"
    representation_size: int | None = None
    n_group: int = 1
    topk_group: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields, and refuse what cannot be built.

        Raises:
            ValueError: saying what does not fit together.
        """
        if self.moe_layers is None:
            self.moe_layers = list(range(1, self.num_hidden_layers, 2))
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        check_tiles(self.image_size, self.patch_size)
        _check_words(self)
        _check_numbers(self)
        if self.tokens_per_expert is None:
            share = self.num_experts_per_tok * num_tokens(self) / self.num_experts
            self.tokens_per_expert = min(max(round(share), 1), num_tokens(self))
        _check_layers(self.moe_layers, self.num_hidden_layers)
        members = kwargs.get("num_members", self.n_group)
        _check_members(members, self.num_experts, self.router_type)
        super().__post_init__(**kwargs)


def num_tokens(config: ViTConfig) -> int:
    """Return the tokens of an image, the class token among them."""
    (height, width), (rows, columns) = _pair(config.image_size), _pair(config.patch_size)
    return height // rows * (width // columns) + 1


def check_tiles(image_size: Any, patch_size: Any) -> None:
    """Refuse images that patches do not tile.

    Raises:
        ValueError: with both sizes and the nearest that would do.
    """
    (height, width), (rows, columns) = _pair(image_size), _pair(patch_size)
    if min(rows, columns) < 1:
        raise ValueError(f"patches of {rows} x {columns} pixels are none; patch_size is at least 1")
    if height % rows or width % columns or min(height, width) < 1:
        near = tuple(max(round(a / b), 1) * b for a, b in ((height, rows), (width, columns)))
        raise ValueError(
            f"images of {height} x {width} pixels cannot be cut into patches of "
            f"{rows} x {columns}; the nearest size that can is {near[0]} x {near[1]}"
        )


def _pair(size: Any) -> tuple[int, int]:
    first, second = size if isinstance(size, list | tuple) else (size, size)
    return int(first), int(second)


def _check_words(config: VMoEConfig) -> None:
    choices = {"router_type": ROUTERS, "dropped_experts": DROPPED, "pooling": POOLINGS}
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)!r}; it can be {' or '.join(known)}")


def _check_numbers(config: VMoEConfig) -> None:
    least = dict.fromkeys(_AT_LEAST_1, 1) | dict.fromkeys(_AT_LEAST_0, 0)
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int | float) or value < bound):
            raise ValueError(f"{name} is {value!r}; it must be a number of at least {bound}")
    for name in ("capacity_factor", "eval_capacity_factor"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0, or null for no limit")


def _check_layers(moe_layers: list[int], num_layers: int) -> None:
    odd = [i for i in moe_layers if i not in range(num_layers)]
    if odd or not moe_layers:
        raise ValueError(
            f"moe_layers={moe_layers} must name some of the layers 0 to {num_layers - 1}"
        )


def _check_members(num_members: int, num_experts: int, router_type: str) -> None:
    if num_members > 1 and router_type == "expert_choice":
        raise ValueError(
            f"num_members={num_members} splits experts among the members of an ensemble, which "
            "only router_type token_choice can"
        )
    if num_members < 1 or num_experts % num_members:
        raise ValueError(
            f"{num_experts} experts cannot be shared out equally among {num_members} members"
        )
