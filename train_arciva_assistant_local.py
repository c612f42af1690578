"""Train, evaluate, show and merge the Arciva assistant on this machine.

    python train_arciva_assistant_local.py                          everything, with the profile that fits this machine
    python train_arciva_assistant_local.py --epochs 2 --rank 32     any setting of the notebook's Config is a flag
    python train_arciva_assistant_local.py --stages evaluate merge  stages can be run later from what is on disk
    python train_arciva_assistant_local.py --output runs/a          one folder for adapter, merged model, reports, checkpoints

    torchrun --nproc-per-node=2 train_arciva_assistant_local.py     several GPUs: all train, the first one does the rest

Exit codes: 0 done, 2 something to put right (one sentence says what), 143 interrupted by SIGTERM, 130 by the keyboard: after
both the same command goes on.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from transformers import HfArgumentParser

import arciva_assistant_poc as arciva


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags that were given, and nothing else: what is left out keeps the profile's value."""
    parser = HfArgumentParser(
        arciva.Config, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser.add_argument("--stages", nargs="+", choices=arciva.STAGES, default=list(arciva.STAGES), help="what to run")
    parser.add_argument(
        "--output", type=Path, default=argparse.SUPPRESS, help="put all folders that are not named below it"
    )
    return parser.parse_args(arguments)


def folders_below(output: Path) -> dict[str, str]:
    """Every folder of a run, by its usual name in `output`."""
    return {f.name: str(output.expanduser() / f.default) for f in fields(arciva.Config) if f.name.endswith("_dir")}


def run(arguments: list[str] | None = None) -> dict[str, Path]:
    """Compose the run from its flags."""
    flags = vars(parse_arguments(arguments))
    stages, output = flags.pop("stages"), flags.pop("output", None)
    folders = folders_below(output) if output else {}
    config, reason = arciva.configure(arciva.detect_hardware(), **folders | flags)
    print(f"base model    {reason}")
    print(f"training      {arciva.settings_line(config)}")
    return arciva.run_pipeline(config, stages)


if __name__ == "__main__":
    sys.exit(arciva.run_main(run))
