"""The four trainer commands: LightningCLI with errors of one sentence that name the right key."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from argparse import Action
from importlib import import_module
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerFn

from lit_moe.module import MoEModule

_IN_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':\s+(?=(\S[^\n]*))")
_KEY = re.compile(
    r"(?:(?:[Oo]ption|(?<!Parser )[Kk]ey|attribute) ['\"]|unrecognized arguments: --)([\w.]+)"
)


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        print(f"lit-moe: error: {one_sentence(message, _keys(parser))}", file=sys.stderr)
        sys.exit(2)


class _CLI(LightningCLI):
    def before_fit(self) -> None:
        """Tell the module where it resumes from: lightning does so only after it is built."""
        path = self._get(self.config_init, "ckpt_path")
        if path is not None:
            connector = self.trainer._checkpoint_connector
            self.model.resume_from = connector._parse_ckpt_path(
                TrainerFn.FITTING, path, model_provided=True, model_connected=False
            )


def run_trainer() -> None:
    """Parse ``sys.argv``, build trainer, module and data, and run the command."""
    _CLI(
        MoEModule,
        L.LightningDataModule,
        parser_class=_Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=42,
        save_config_kwargs={"overwrite": True},
    )


def one_sentence(message: str, known: list[str]) -> str:
    """Reduce a parser's report to its innermost complaint, with the nearest right key.

    Args:
        message: what jsonargparse says.
        known: options of the command, for keys outside of any class.
    """
    problems = _IN_CLASS.findall(message)
    if not problems:
        return message + _nearest(message, known)
    class_path, reason = problems[-1]
    return f"{class_path}: {reason}{_nearest(reason, _names_near(class_path, reason))}"


def _nearest(reason: str, known: list[str]) -> str:
    keys = _KEY.findall(reason)
    if not keys or not known:
        return ""
    near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; accepted: {', '.join(known)}" if len(known) <= 20 else ""


def _names_near(class_path: str, reason: str) -> list[str]:
    """Constructor fields of a class, or the names of its module if the class is what is wrong."""
    module_name, _, class_name = class_path.rpartition(".")
    try:
        module = import_module(module_name)
    except ImportError:
        return []
    if "has no attribute" in reason:
        return [name for name in dir(module) if not name.startswith("_")]
    cls: Any = getattr(module, class_name, None)
    return [] if cls is None else list(inspect.signature(cls).parameters)


def _keys(parser: LightningArgumentParser) -> list[str]:
    """Options of a parser and of its commands."""
    actions: list[Action] = parser._actions
    commands = [getattr(action, "_name_parser_map", {}) for action in actions]
    below = [key for names in commands for command in names.values() for key in _keys(command)]
    return [action.dest for action in actions] + below
