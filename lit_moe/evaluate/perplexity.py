"""Perplexity on fixed blocks, with its standard error, per token and per byte, per domain."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel

from lit_moe.distill.losses import next_token_nll
from lit_moe.distill.step import targets_of
from lit_moe.inference import evaluating


@dataclass(frozen=True)
class Quality:
    """How well a model predicts held-out text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token.
        stderr: its standard error over blocks (delta method: perplexity x error of the mean).
        bits_per_byte: comparable between tokenizers.
        tokens: predicted tokens.
        tokens_per_second: wall-clock speed of the evaluation, 0 if not measured.
        domains: domain -> its perplexity.
    """

    perplexity: float
    stderr: float
    bits_per_byte: float
    tokens: int
    tokens_per_second: float = 0.0
    domains: dict[str, float] = field(default_factory=dict)


_ROWS = ("nll", "tokens", "nll_nll", "nll_tokens", "tokens_tokens", "blocks", "bytes")


class Perplexity(Metric):
    """Accumulates sums per domain, reduced over ranks by torchmetrics.

    Args:
        domains: names in the order of the domain index in the batches.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, domains: Sequence[str]) -> None:
        super().__init__()
        self.domains = tuple(domains)
        zeros = torch.zeros(len(_ROWS), len(self.domains), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def update(
        self, nll_BS: Tensor, mask_BS: Tensor, domain_B: Tensor, num_bytes_B: Tensor
    ) -> None:
        """Add blocks.

        Args:
            nll_BS: nats per predicted token, 0 where masked.
            mask_BS: 1 where a predicted token counts.
            domain_B: domain index per block.
            num_bytes_B: bytes of the predicted text per block.
        """
        nll, tokens = nll_BS.double().sum(dim=1), mask_BS.double().sum(dim=1)
        blocks, num_bytes = (tokens > 0).double(), num_bytes_B.double()
        rows = [nll, tokens, nll * nll, nll * tokens, tokens * tokens, blocks, num_bytes]
        self.sums.index_add_(1, domain_B, torch.stack(rows))

    def compute(self) -> Tensor:
        """Return the sums over ranks, shape ``(5, domains)``."""
        return self.sums

    def quality(self) -> Quality:
        """Return the quality over all domains together and the perplexity of each.

        Collective: every rank must call it.
        """
        sums = self.compute().cpu()
        total = dict(zip(_ROWS, sums.sum(dim=1).tolist(), strict=True))
        mean = total["nll"] / max(total["tokens"], 1)
        perplexity = math.exp(min(mean, 700.0))
        per_domain = {
            name: math.exp(min(float(sums[0, i] / sums[1, i]), 700.0))
            for i, name in enumerate(self.domains)
            if sums[1, i] > 0
        }
        return Quality(
            perplexity=perplexity,
            stderr=perplexity * _error_of_mean(total, mean),
            bits_per_byte=total["nll"] / math.log(2) / max(total["bytes"], 1),
            tokens=int(total["tokens"]),
            domains=per_domain,
        )


def _error_of_mean(total: dict[str, float], mean: float) -> float:
    """Standard error of the ratio nll / tokens over blocks, which may differ in length."""
    squares = total["nll_nll"] - 2 * mean * total["nll_tokens"] + mean**2 * total["tokens_tokens"]
    blocks = total["blocks"]
    if blocks < 2:
        return 0.0
    return math.sqrt(max(squares, 0.0) * blocks / (blocks - 1)) / max(total["tokens"], 1)


def evaluate_perplexity(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], domains: Sequence[str]
) -> Quality:
    """Measure a model on batches of blocks, in evaluation mode, on its own device.

    With a process group each rank passes its own share; all ranks must call this and all get the
    result over all shares.

    Args:
        model: any causal language model.
        batches: dictionaries with ``input_ids``, ``attention_mask``, ``domain``, ``num_bytes``, and
            maybe ``labels``; then only labelled tokens are predicted.
        domains: names of the domain indices.
    """
    metric = Perplexity(domains).to(model.device)
    start, tokens = time.perf_counter(), 0
    with evaluating(model):
        for cpu_batch in batches:
            batch = {key: value.to(model.device) for key, value in cpu_batch.items()}
            mask, targets = batch["attention_mask"], targets_of(batch)
            logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits
            nll = next_token_nll(logits, targets.ids, targets.counted)
            metric.update(nll, targets.counted[:, 1:], batch["domain"], batch["num_bytes"])
            tokens += int(mask.sum())
    seconds = time.perf_counter() - start
    return replace(metric.quality(), tokens_per_second=tokens / max(seconds, 1e-9))
