"""Text for calibration, recovery, validation and test, from files or the embedded default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_moe.assets import EMBEDDED, Split, resolve_model, text_file
from lit_moe.data.blocks import Blocks, pack
from lit_moe.data.documents import load_documents
from lit_moe.data.order import ResumableLoader, ShareInOrder, ShuffledShare
from lit_moe.data.quiet import progress_bars_for
from lit_moe.errors import LitMoEError


class TextDataModule(L.LightningDataModule):
    """Blocks of tokens for the four purposes; each purpose has its own files.

    Args:
        calibration_files: text that experts are observed on. For this and the next three: ``.txt``,
            ``.jsonl``, ``.json``, ``.parquet``, a ``datasets`` folder, or a hub id; None takes the
            embedded text of that purpose.
        train_files: text for recovery or training.
        validation_files: text for the validation loop.
        test_files: text for the numbers in the report.
        tokenizer: folder or hub id; None takes the one of the model.
        sequence_length: tokens per block, at least 2.
        batch_size: blocks per batch and device.
        calibration_tokens: so many tokens are observed, rounded up to whole blocks, taken in turn
            from each domain; fewer if the text has fewer.
        test_tokens: likewise the tokens evaluated for the report; None takes all.
        text_column: the column of the text in structured files.
        balance_domains: draw training blocks so that each domain is equally frequent.
        seed: order of the training blocks.
    """

    def __init__(
        self,
        calibration_files: list[str] | None = None,
        train_files: list[str] | None = None,
        validation_files: list[str] | None = None,
        test_files: list[str] | None = None,
        tokenizer: str | None = None,
        sequence_length: int = 128,
        batch_size: int = 16,
        calibration_tokens: int = 16384,
        test_tokens: int | None = None,
        text_column: str = "text",
        balance_domains: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("sequence_length", sequence_length, 2),
            ("batch_size", batch_size, 1),
            ("calibration_tokens", calibration_tokens, sequence_length),
            ("test_tokens", test_tokens, sequence_length),
        ):
            if value is not None and value < least:
                raise LitMoEError(f"{name}={value} is too small; the least usable is {least}")
        self.files: dict[Split, list[str] | None] = {
            "calibration": calibration_files,
            "train": train_files,
            "validation": validation_files,
            "test": test_files,
        }
        self.tokenizer_name = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.calibration_tokens = calibration_tokens
        self.test_tokens = test_tokens
        self.text_column = text_column
        self.balance_domains = balance_domains
        self.seed = seed
        self._blocks: dict[Split, Blocks] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._loader: ResumableLoader | None = None
        self._position: dict[str, Any] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            name = self.tokenizer_name or self._model_name()
            self._tokenizer = _load_tokenizer(name)
        return self._tokenizer

    def blocks(self, split: Split) -> Blocks:
        """Return the packed blocks of a split, read on first use."""
        if split not in self._blocks:
            sources = self.files[split] or [str(text_file(split))]
            with progress_bars_for(_bytes_on_disk(sources)):
                documents = load_documents(sources, text_column=self.text_column)
                packed = pack(
                    documents, self.tokenizer, sequence_length=self.sequence_length, what=split
                )
            limit = {"calibration": self.calibration_tokens, "test": self.test_tokens}.get(split)
            if limit is not None:
                packed = packed.spread(-(-limit // self.sequence_length))
            self._blocks[split] = packed
        return self._blocks[split]

    def calibration_dataloader(self, *, rank: int = 0, world_size: int = 1) -> DataLoader:
        """Batches of this rank's share of the calibration blocks (every ``world_size``-th)."""
        share = self.blocks("calibration").share(rank, world_size)
        return self._in_order(share)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches of this rank; the last incomplete step is left out."""
        blocks = self.blocks("train")
        sampler = self._sampler(blocks)
        if len(sampler) < self.batch_size:
            raise LitMoEError(
                f"train text fills {len(blocks)} blocks of {self.sequence_length} tokens, less "
                f"than one batch of {sampler.multiple_of} for each device; give more text or a "
                "smaller batch_size"
            )
        self._loader = ResumableLoader(
            blocks, batch_size=self.batch_size, sampler=sampler, generator=torch.Generator()
        )
        self._loader.load_state_dict(self._position)
        self._position = {}
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """Return how far into the epoch training is."""
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let training go on where a checkpoint was written."""
        self._position = dict(state_dict)
        if self._loader is not None:
            self._loader.load_state_dict(self._position)
            self._position = {}

    def val_dataloader(self) -> DataLoader:
        """Validation batches in fixed order."""
        return self._shared_out("validation")

    def test_dataloader(self) -> DataLoader:
        """Test batches in fixed order."""
        return self._shared_out("test")

    def test_share(self, *, rank: int, world_size: int) -> tuple[DataLoader, tuple[str, ...]]:
        """Batches of this rank's share of the test blocks, and the names of the domains."""
        blocks = self.blocks("test")
        share = blocks.share(rank, world_size)
        return self._in_order(share), blocks.domains

    def predict_dataloader(self) -> DataLoader:
        """The test batches."""
        return self.test_dataloader()

    def _shared_out(self, split: Split) -> DataLoader:
        rank = 0 if self.trainer is None else self.trainer.global_rank
        world_size = 1 if self.trainer is None else self.trainer.world_size
        blocks = self.blocks(split).filled(world_size)
        sampler = ShareInOrder(blocks, rank=rank, world_size=world_size)
        return DataLoader(
            blocks, batch_size=self.batch_size, sampler=sampler, generator=torch.Generator()
        )

    def _in_order(self, blocks: Blocks) -> DataLoader:
        # A generator of its own: loaders draw a seed, which would move the model's random numbers.
        return DataLoader(blocks, batch_size=self.batch_size, generator=torch.Generator())

    def _sampler(self, blocks: Blocks) -> ShuffledShare:
        weights = None
        if self.balance_domains:
            weights = 1.0 / torch.bincount(blocks.domain).double()[blocks.domain]
        trainer = self.trainer
        return ShuffledShare(
            blocks,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            seed=self.seed,
            weights=weights,
            multiple_of=self.batch_size
            * (1 if trainer is None else trainer.accumulate_grad_batches),
        )

    def _model_name(self) -> str:
        trainer = self.trainer
        return getattr(trainer and trainer.lightning_module, "model_name_or_path", EMBEDDED)


def _bytes_on_disk(sources: list[str]) -> int:
    """Size of the files among the sources; a folder or hub id counts as large."""
    files = [Path(source) for source in sources]
    return sum(f.stat().st_size if f.is_file() else 1 << 30 for f in files)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise LitMoEError(f"{name!r} has no tokenizer that could be loaded: {error}") from error
    if len(tokenizer) < 2:  # transformers makes an empty one where a folder has none
        raise LitMoEError(
            f"{name!r} has no tokenizer; name a folder or hub id that has one in "
            "data.init_args.tokenizer"
        )
    return tokenizer
