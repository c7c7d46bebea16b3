"""The four trainer commands: LightningCLI with errors of one sentence that name the right key."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import re
import sys
import typing
from argparse import Action
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed import default_pg_timeout

from lit_moe.contact import reasons_shared
from lit_moe.errors import LitMoEError
from lit_moe.module import MoEModule
from lit_moe.resuming import newest_checkpoint
from lit_moe.sharding import (
    DeepSpeedLauncherEnvironment,
    MoEDeepSpeed,
    add_requeue,
    register_short_names,
)
from lit_moe.sharding.rendezvous import meeting_explained

_IN_CLASS = re.compile(
    r"Problem with given class_path '([\w.]+)':\s+(?=(Parser key[^\n]+\n[^\n]+|\S[^\n]*))"
)
_CALLBACK = re.compile(r"--([A-Z]\w+)\.(\w+(?:\.\w+)*)(?:=(.*))?$", re.DOTALL)
_KEY = re.compile(
    r"(?:(?:[Oo]ption|(?<!Parser )[Kk]ey|attribute) ['\"]|unrecognized arguments: --)([\w.]+)"
)

# What lightning says of requests that only their author can change.
_REQUESTS = ("SLURM", "launcher started", "does not match", "invalid strategy name")


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        print(f"lit-moe: error: {one_sentence(message, _keys(parser))}", file=sys.stderr)
        sys.exit(2)


class _ProgressBar(RichProgressBar):
    """Lightning's own, which counts to epoch -2 in a run whose end is a number of steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        return description.replace("/-2", "   ")  # as wide as before: else it flickers


class _CLI(LightningCLI):
    overrides: ClassVar[list[tuple[str, str, str]]] = []

    def before_instantiate_classes(self) -> None:
        """Set the fields of callbacks that were named by class on the command line."""
        config = self.config[self.subcommand]
        for name, field, text in self.overrides:
            _override(config.trainer.callbacks or [], name, field, yaml.safe_load(text))
        _try_strategy(config.trainer.strategy)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer, with our progress bar where lightning would add its own."""
        config = self._get(self.config_init, "trainer")
        callbacks = config.callbacks or []
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if config.enable_progress_bar is not False and not has_bar:
            kwargs["callbacks"] = [*callbacks, _ProgressBar()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            if not any(sign in said for sign in _REQUESTS):
                raise
            raise LitMoEError(said) from error
        _check_world(trainer)
        _check_strategy(trainer, self.model)
        add_requeue(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        timeout = getattr(self.trainer.strategy, "_timeout", None)
        rank, patience = self.trainer.global_rank, timeout or default_pg_timeout
        together = meeting_explained(rank, self.trainer.world_size, patience)
        with reasons_shared(rank, timeout), together:
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Tell the module where it resumes from: lightning does so only after it is built."""
        self._tell_module(TrainerFn.FITTING)

    def before_validate(self) -> None:
        """Tell the module which checkpoint is evaluated."""
        self._tell_module(TrainerFn.VALIDATING)

    def before_test(self) -> None:
        """Tell the module which checkpoint is evaluated."""
        self._tell_module(TrainerFn.TESTING)

    def before_predict(self) -> None:
        """Tell the module which checkpoint predicts."""
        self._tell_module(TrainerFn.PREDICTING)

    def _tell_module(self, command: TrainerFn) -> None:
        options = self.config_init[self.subcommand]
        connector = self.trainer._checkpoint_connector
        if options.ckpt_path == "last":
            options.ckpt_path = self._last_checkpoint(command)
        elif options.ckpt_path is None and SLURMEnvironment.detect():
            self.model.resume_from = connector._hpc_resume_path  # of a run that SLURM requeued
        if options.ckpt_path is not None:
            self.model.resume_from = connector._parse_ckpt_path(
                command, options.ckpt_path, model_provided=True, model_connected=False
            )

    def _last_checkpoint(self, command: TrainerFn) -> str | None:
        """Return the newest checkpoint of any run below the root folder; None if there is none.

        Lightning looks only where this very run is going to write, which is a new folder.
        """
        places = [Path(self.trainer.default_root_dir)]
        places += [Path(c.dirpath) for c in self.trainer.checkpoint_callbacks if c.dirpath]  # type: ignore[attr-defined]
        newest = newest_checkpoint(places)
        if newest is None and command != TrainerFn.FITTING:
            raise LitMoEError(
                f"there is no checkpoint below {places[0]} to {command.value}; name one by "
                "--ckpt_path PATH, or the folder of its run by --trainer.default_root_dir"
            )
        if newest is None:
            rank_zero_info(f"no checkpoint below {places[0]} yet: the run starts at its beginning")
        return None if newest is None else str(newest)


def _check_world(trainer: L.Trainer) -> None:
    """Refuse numbers of devices and nodes that the launcher did not start."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_default = type(environment) is LightningEnvironment
    if is_default and DeepSpeedLauncherEnvironment.detect() and trainer.num_nodes > 1:
        raise LitMoEError(
            "the deepspeed launcher started this run, and with strategy "
            f"{type(trainer.strategy).__name__} every machine would take itself for the first: "
            "use zero1, zero2 or zero3, or launch/torchrun.sh"
        )
    if environment is None:
        return
    try:
        environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
    except ValueError as error:
        raise LitMoEError(" ".join(str(error).split())) from error


def _try_strategy(asked: Any) -> None:
    """Let our strategy refuse its fields itself; the parser buries that among types that it tried.

    Raises:
        LitMoEError: what the strategy says.
    """
    if getattr(asked, "class_path", "").startswith("lit_moe.sharding."):
        fields = {k: v for k, v in vars(asked.init_args).items() if not isinstance(v, Namespace)}
        with contextlib.suppress(TypeError):  # a field that is none: the parser knows its name
            MoEDeepSpeed(**fields, **getattr(asked, "dict_kwargs", {}))


def _check_strategy(trainer: L.Trainer, module: MoEModule) -> None:
    """Refuse a strategy in the module's words before lightning sets it up, in words of its own."""
    module.trainer = trainer  # as the command does next
    module._check_strategy()


def run_trainer() -> None:
    """Parse ``sys.argv``, build trainer, module and data, and run the command."""
    register_short_names()
    words, _CLI.overrides = split_callback_words(sys.argv[1:])
    # Further ranks are started with sys.argv as it is; only the parser must not see our words.
    _CLI(
        MoEModule,
        L.LightningDataModule,
        args=words,
        parser_class=_Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=42,
        save_config_kwargs={"overwrite": True},
    )


def split_callback_words(words: list[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Take ``--Class.field value`` and ``--Class.field=value`` out of a command line.

    Returns:
        The other words, and triples of class name, field and text of the value.

    >>> split_callback_words(["fit", "--OneShotPruning.keep_ratio", "0.25", "--trainer.devices=2"])
    (['fit', '--trainer.devices=2'], [('OneShotPruning', 'keep_ratio', '0.25')])
    """
    rest: list[str] = []
    found: list[tuple[str, str, str]] = []
    stream = iter(words)
    for word in stream:
        match = _CALLBACK.match(word)
        if match is None:
            rest.append(word)
            continue
        name, field, value = match.groups()
        found.append((name, field, next(stream, "") if value is None else value))
    return rest, found


def _override(callbacks: list[Any], name: str, field: str, value: object) -> None:
    classes = {entry.class_path.rpartition(".")[2]: entry for entry in callbacks}
    if name not in classes:
        raise LitMoEError(
            f"--{name}.{field}: the configuration has no callback {name}; it has {sorted(classes)}"
        )
    first, _, inner = field.partition(".")
    known = _names_near(classes[name].class_path, "")
    _check_known(f"--{name}.{field}", first, known)
    if "init_args" not in classes[name]:
        classes[name]["init_args"] = Namespace()
    given = classes[name].init_args
    if inner and _is_dict(classes[name].class_path, first):
        given[first] = {**(given.get(first) or {}), inner: value}
        return
    kind = _dataclass_of(classes[name].class_path, first)
    if kind is None or not (inner or isinstance(value, dict)):
        _check_known(f"--{name}.{field}", inner or first, [] if inner else known)
        given[field] = value
        return
    changes: dict[str, Any] = {inner: value}
    if isinstance(value, dict) and not inner:
        changes = value
    for key in changes:
        _check_known(f"--{name}.{field}", key, [f.name for f in dataclasses.fields(kind)])
    before = vars(given[first]) if inner and given.get(first) else {}
    merged = {**before, **changes}
    kind(**merged)  # a wrong value is refused here, in its own words
    given[first] = Namespace(merged)


def _check_known(option: str, field: str, known: list[str]) -> None:
    if field not in known:
        near = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        raise LitMoEError(f"{option}: there is no field {field!r}; {hint}")


def _dataclass_of(class_path: str, field: str) -> type[Any] | None:
    """Return the dataclass that is the type of an argument of a class, None if it is none."""
    for candidate in _types_of(class_path, field):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _is_dict(class_path: str, field: str) -> bool:
    """Whether an argument of a class takes a dictionary with keys of its own."""
    return any(typing.get_origin(kind) is dict for kind in _types_of(class_path, field))


def _types_of(class_path: str, field: str) -> tuple[Any, ...]:
    module, _, name = class_path.rpartition(".")
    owner = getattr(import_module(module), name)
    kind = typing.get_type_hints(owner.__init__).get(field)
    return (kind, *typing.get_args(kind))


def one_sentence(message: str, known: list[str]) -> str:
    """Reduce a parser's report to its innermost complaint, with the nearest right key.

    Args:
        message: what jsonargparse says.
        known: options of the command, for keys outside of any class.
    """
    problems = _IN_CLASS.findall(message)
    if not problems:
        return message + _nearest(message, known)
    class_path, lines = problems[-1]
    reason = " ".join(lines.replace("a typing.Literal", "one of ").split())
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
