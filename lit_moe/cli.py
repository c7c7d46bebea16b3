"""The command line: the trainer's commands, and our own; only this file knows argv."""

from __future__ import annotations

import argparse
import difflib
import glob
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from lit_moe.errors import LitMoEError

USAGE = """\
usage: lit-moe <command> [options]

Train and compress sparse Mixture-of-Experts models with PyTorch Lightning.

commands:
  fit        calibrate, prune, recover, export: whatever the config file says
  validate   run the validation loop
  test       run the test loop
  predict    run the prediction loop
  inspect    show the experts of a checkpoint without loading its weights
  compare    criteria, ratios and procedures of dropping experts, side by side
  ablate     the loss without each single expert

examples:
  lit-moe fit --config configs/quickstart.yaml
  lit-moe fit --config configs/one_shot/reap.yaml --model.init_args.model_name_or_path FOLDER
  lit-moe inspect FOLDER_OR_HUB_ID
  lit-moe inspect FOLDER_OR_HUB_ID --ranks 8 --stage 3 --teacher
  lit-moe compare --config configs/mc_suite/compare.yaml --criteria '[reap, ean]'

lit-moe <command> --help lists the options of a command.
`lightning` and `python -m lit_moe` are the same program.
"""

COMMAND_USAGE = """\
usage: lit-moe {command} --config FILE [--config FILE ...] [--KEY VALUE ...]

  --config FILE                 a YAML file; later ones are merged over earlier ones
  --model.init_args.KEY VALUE   model_name_or_path, dtype, optimizer.learning_rate, ...
  --data.init_args.KEY VALUE    calibration_files, train_files, test_files, sequence_length, ...
  --trainer.KEY VALUE           devices, strategy, precision, max_steps, default_root_dir, ...
  --CALLBACK.KEY VALUE          a field of a callback in the file: --OneShotPruning.keep_ratio 0.25
  --ckpt_path PATH              go on from a checkpoint ("last" for the newest)
  --print_config                print the merged configuration and stop
  --help-all                    every key, with its type and default

A list in YAML is replaced by that of a later file; `callbacks+:` appends to it.
"""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = (*TRAINER_COMMANDS, "inspect", "compare", "ablate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: words after the program's name; None takes those of the process.

    Returns:
        0 when done, 1 when parts of a comparison failed, 2 for a request that cannot be met (one
        sentence on standard error).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        return _run(args)
    except Exception as error:
        request = _unmet_request(error)
        if request is None:
            raise
        print(f"lit-moe: error: {request}", file=sys.stderr)
        return 2


def _unmet_request(error: BaseException | None) -> LitMoEError | None:
    """Return the error that a user can mend, also from below what a parser wrapped around it.

    Only causes are followed: what breaks while such an error is handled is a defect, and is shown.
    """
    while error is not None:
        if isinstance(error, LitMoEError):
            return error
        error = error.__cause__
    return None


def _run(args: list[str]) -> int:
    if args[0] == "--version":
        from lit_moe import __version__

        print(f"lit-moe {__version__}")
        return 0
    if args[0] in TRAINER_COMMANDS and args[1:] in (["-h"], ["--help"]):
        print(COMMAND_USAGE.format(command=args[0]), end="")
        return 0
    if args[0] in TRAINER_COMMANDS:
        return _train(args)
    if args[0] == "inspect":
        return _inspect(args[1:])
    if args[0] in ("compare", "ablate"):
        return _compare(args)
    return _foreign(args)


def _train(args: list[str]) -> int:
    _silence_third_parties()
    from lit_moe.commands import run_trainer

    # Lightning reads sys.argv, also to start further ranks as processes of their own.
    sys.argv = [sys.argv[0], *("--help" if word == "--help-all" else word for word in args)]
    run_trainer()
    return 0


def _compare(args: list[str]) -> int:
    _silence_third_parties()
    from lit_moe.option_commands import run_ablate, run_compare

    return (run_compare if args[0] == "compare" else run_ablate)(args[1:])


def _inspect(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lit-moe inspect",
        description="Show the experts of a checkpoint without loading its weights.",
    )
    parser.add_argument("model", help="folder, hub id, or `embedded`")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_refit_options(parser)
    _add_rank_options(parser)
    options = parser.parse_args(args)

    from rich.console import Console

    from lit_moe.assets import resolve_model
    from lit_moe.inspection import RankRequest, RefitRequest, inspect_model, render

    refit = RefitRequest(options.tokens, options.memory_gib) if options.refit else None
    ranks = None
    if options.ranks is not None:
        fields = ("ranks", "stage", "offload", "precision", "keep_ratio", "teacher")
        ranks = RankRequest(
            **{name: getattr(options, name) for name in fields},
            tokens_per_rank=options.tokens_per_rank,
        )
    inspection = inspect_model(resolve_model(options.model), refit=refit, ranks=ranks)
    if options.json:
        print(json.dumps(inspection.to_dict(), indent=2))
    else:
        Console().print(render(inspection))
    return 0


def _add_refit_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory of a closed-form refit")
    group.add_argument("--refit", action="store_true", help="say what it would hold, and where")
    group.add_argument("--tokens", type=int, default=65536, help="calibration tokens")
    group.add_argument("--memory-gib", type=float, default=4.0, help="as in Refit's options")


def _add_rank_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory of one rank of a run under DeepSpeed")
    group.add_argument("--ranks", type=int, help="processes on all machines, one per device")
    group.add_argument("--stage", type=int, default=3, help="of ZeRO: 1, 2 or 3 (default)")
    group.add_argument(
        "--offload",
        choices=("none", "optimizer", "parameters", "both"),
        default="none",
        help="what lies on the host instead of the device",
    )
    group.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    group.add_argument("--keep-ratio", type=float, default=0.5, help="experts that stay")
    group.add_argument("--teacher", action="store_true", help="distillation: keep the whole model")
    group.add_argument("--tokens-per-rank", type=int, help="of one forward: estimate activations")


def _foreign(args: list[str]) -> int:
    """Hand a word that is not ours to lightning-sdk, if it is there; it owns `lightning` too."""
    for script in entry_points(group="console_scripts", name="lightning"):
        if script.dist is not None and script.dist.name.replace("_", "-") == "lightning-sdk":
            sys.argv = [sys.argv[0], *args]
            result: Any = script.load()()
            return int(result or 0)
    near = difflib.get_close_matches(args[0], COMMANDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise LitMoEError(f"there is no command {args[0]!r}{hint} (commands: {', '.join(COMMANDS)})")


def _silence_third_parties() -> None:
    """Drop notices that a user of lit-moe can do nothing about."""
    for message in (
        ".*LeafSpec.*is deprecated.*",  # lightning's use of torch's pytree
        ".*args parameter is intended to run from within Python.*",  # we take our own words out
        ".*does not have many workers.*",  # blocks are in memory: workers only cost
        ".*torch.distributed.*is deprecated.*",  # deepspeed's use of it
        ".*in eval mode at the start of training.*",  # the frozen teacher is meant to be
    ):
        warnings.filterwarnings("ignore", message=message)
    # lightning still calls what jsonargparse has renamed.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # Without it, deepspeed warns on each import that it looked for a GPU and found none.
    if not glob.glob("/dev/nvidia*"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()  # advertisements
    )
