"""Greedy answers to prompts of different lengths, in batches.

B prompts in a batch, S prompt tokens, G generated tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lit_moe.errors import LitMoEError
from lit_moe.evaluate.chat import ChatFormat
from lit_moe.evaluate.encoding import prompt_ids
from lit_moe.inference import evaluating
from lit_moe.sharding.partitions import is_partitioned


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are written.

    Attributes:
        max_new_tokens: per answer, at least 1.
        stop: an answer ends before the first of these texts, which may be none.
        batch_size: prompts that are answered together, at least 1.
    """

    max_new_tokens: int = 16
    stop: tuple[str, ...] = ("\n",)
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise LitMoEError(
                    f"{name}={getattr(self, name)} is too small; it must be 1 or more"
                )
        if "" in self.stop:
            raise LitMoEError("an empty stop text would end every answer at once; leave it out")


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: GenerationOptions,
    *,
    chat: ChatFormat | None = None,
) -> list[str]:
    """Return the most likely continuation of each prompt, up to a stop text or the end of text.

    Prompts are padded on the left; prompts of similar length are answered together. A model that
    is partitioned over ranks needs equally many prompts on every rank, which must all call this.

    Args:
        model: a decoder that transformers can generate with; left as it was.
        tokenizer: its own; special tokens are added to prompts as it is used to.
        prompts: any number.
        options: lengths, stop texts, batch size.
        chat: the format that the prompts are in, whose end of a turn ends an answer too; nothing
            is added to them. None for running text.

    Raises:
        LitMoEError: if the model cannot generate, or a prompt and its answer are longer than the
            model's context, before anything is generated.
    """
    check_can_generate(model)
    if not prompts:
        return []
    ids = prompt_ids(tokenizer, prompts, chat)
    check_context(model, ids, options)
    ends = _end_tokens(model, tokenizer, chat)
    if chat is not None:
        options = replace(options, stop=(*options.stop, *chat.stop))
    answers = [""] * len(prompts)
    with evaluating(model):
        for batch in _batches(ids, options.batch_size):
            rows = _greedy(model, tokenizer, [ids[index] for index in batch], options, ends)
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = _cut(text, options.stop)
    return answers


def check_can_generate(model: PreTrainedModel) -> None:
    """Refuse a model that does not continue its prompt.

    Raises:
        LitMoEError: for a model without a language head or with an encoder for the prompt.
    """
    if not isinstance(model, GenerationMixin):
        raise LitMoEError(f"{type(model).__name__} cannot generate text, so it cannot be asked")
    if model.config.is_encoder_decoder:
        raise LitMoEError(
            f"{type(model).__name__} reads a prompt with an encoder; only decoders can be asked"
        )


def check_context(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], options: GenerationOptions
) -> None:
    """Refuse prompts that leave no room for the answer.

    Raises:
        LitMoEError: with the longest prompt and the context of the model.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if context is not None and longest + options.max_new_tokens > context:
        raise LitMoEError(
            f"the longest prompt has {longest} tokens and its answer may have "
            f"{options.max_new_tokens}, but the model's context is {context}: use fewer examples "
            "(shots), a smaller max_new_tokens, or shorter questions"
        )


class _StopTexts(StoppingCriteria):
    """Ends each row whose answer holds a stop text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], num_prompt_tokens: int
    ) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield indices of at most ``size`` prompts, short prompts first."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    yield from (order[start : start + size] for start in range(0, len(order), size))


def _greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    ends: list[int],
) -> list[list[int]]:
    """Return the tokens written after each prompt, without the one that ends them."""
    filler = next(iter(ends), 0)
    width = max(map(len, prompts))
    ids_BS = torch.tensor([[filler] * (width - len(p)) + list(p) for p in prompts])
    mask_BS = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    written_BG = model.generate(
        ids_BS.to(model.device),
        attention_mask=mask_BS.to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=filler,
        ),
        stopping_criteria=StoppingCriteriaList([_StopTexts(tokenizer, options.stop, width)]),
        # Ranks that share the parameters must take equally many steps.
        synced_gpus=dist.is_initialized() and is_partitioned(model),
    )[:, width:]
    return [_before_end(row, ends) for row in written_BG.tolist()]


def _end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat | None
) -> list[int]:
    """Return every token that ends an answer, by model, tokenizer, or chat format."""
    configs = (model.config.get_text_config(), getattr(model, "generation_config", None))
    ends: list[int | None] = []
    for end in (getattr(config, "eos_token_id", None) for config in configs):
        ends += end if isinstance(end, list) else [end]
    ends += [tokenizer.eos_token_id, chat.end_id if chat else None]
    return list(dict.fromkeys(end for end in ends if end is not None))


def _before_end(row: list[int], ends: Sequence[int]) -> list[int]:
    at = next((index for index, token in enumerate(row) if token in ends), len(row))
    return row[:at]


def _cut(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop text."""
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]
