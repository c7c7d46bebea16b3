"""Fixed blocks of tokens: documents of one domain packed end to end, without padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_moe.errors import LitMoEError


@dataclass(frozen=True)
class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """``N`` blocks of ``L`` tokens; a map-style dataset of dictionaries.

    Attributes:
        input_ids: shape ``(N, L)``, int64.
        domain: index into ``domains`` per block, shape ``(N,)``.
        num_bytes: UTF-8 bytes of the text of the predicted tokens, 1 to L-1, shape ``(N,)``.
        domains: names, in order of first appearance.
        idle: how many blocks at the end count for nothing; their attention mask is 0.
    """

    input_ids: Tensor
    domain: Tensor
    num_bytes: Tensor
    domains: tuple[str, ...]
    idle: int = 0

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.input_ids[index]
        return {
            "input_ids": ids,
            "attention_mask": torch.full_like(ids, int(index < len(self) - self.idle)),
            "domain": self.domain[index],
            "num_bytes": self.num_bytes[index],
        }

    def take(self, indices: Tensor) -> Blocks:
        """Return the blocks with these indices, in this order."""
        return Blocks(
            self.input_ids[indices], self.domain[indices], self.num_bytes[indices], self.domains
        )

    def filled(self, world_size: int) -> Blocks:
        """Return blocks that divide by ``world_size``, with idle ones at the end that fill up.

        Ranks that share one model must run it equally often.
        """
        missing = -len(self) % world_size
        if missing == 0:
            return self
        indices = torch.cat([torch.arange(len(self)), torch.zeros(missing, dtype=torch.long)])
        filled = self.take(indices)
        num_bytes = filled.num_bytes.clone()
        num_bytes[len(self) :] = 0
        return replace(filled, num_bytes=num_bytes, idle=missing)

    def share(self, rank: int, world_size: int) -> Blocks:
        """Return every ``world_size``-th block from block ``rank`` on, equally many for all."""
        everyone = self.filled(world_size)
        mine = everyone.take(torch.arange(rank, len(everyone), world_size))
        return replace(mine, idle=int(rank >= world_size - everyone.idle))

    def spread(self, num_blocks: int) -> Blocks:
        """Return ``num_blocks`` blocks taken in turn from each domain (all blocks if fewer)."""
        rank = torch.empty_like(self.domain)
        for index in range(len(self.domains)):
            mine = self.domain == index
            rank[mine] = torch.arange(int(mine.sum()))
        order = torch.argsort(rank * len(self.domains) + self.domain)
        return self.take(order[:num_blocks])


def pack(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, sequence_length: int, what: str
) -> Blocks:
    """Tokenize and pack documents; what does not fill a block at the end of a domain is left out.

    Args:
        documents: columns ``domain`` and ``text``.
        tokenizer: its ``eos_token`` is put after each document, where it has one.
        sequence_length: tokens per block.
        what: what the text is for ("calibration"), named in errors.

    Raises:
        LitMoEError: if not even one block is filled.
    """
    tokens = _tokenize(documents, tokenizer)
    owner = np.asarray(tokens["domain"])
    domains = tuple(dict.fromkeys(owner.tolist()))
    rows, owners = [], []
    for index, name in enumerate(domains):
        mine = tokens.select(np.flatnonzero(owner == name))
        stream = torch.cat([torch.as_tensor(ids, dtype=torch.long) for ids in mine["input_ids"]])
        blocks = stream[: len(stream) // sequence_length * sequence_length]
        rows.append(blocks.view(-1, sequence_length))
        owners.append(torch.full((rows[-1].shape[0],), index))
    input_ids = torch.cat(rows)
    if input_ids.shape[0] == 0:
        total = sum(len(ids) for ids in tokens["input_ids"])
        raise LitMoEError(
            f"{what} text has {total} tokens, less than one block of {sequence_length}; "
            "give more text or a smaller sequence_length"
        )
    return Blocks(input_ids, torch.cat(owners), _text_bytes(input_ids, tokenizer), domains)


def _tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [[*row, *end] for row in ids]}

    return documents.map(encode, batched=True, remove_columns=["text"], desc="tokenizing")


def _text_bytes(input_ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    texts = tokenizer.batch_decode(input_ids[:, 1:], skip_special_tokens=True)
    return torch.tensor([len(text.encode()) for text in texts])
