"""Train, evaluate, show and merge the Arciva assistant on this machine.

    python train_arciva_assistant_local.py                          everything, with the profile that fits this machine
    python train_arciva_assistant_local.py --epochs 2 --rank 32     any setting of the notebook's Config is a flag
    python train_arciva_assistant_local.py --stages evaluate merge  stages can be run later from what is on disk

    torchrun --nproc-per-node=2 train_arciva_assistant_local.py     several GPUs: all train, the first one does the rest

Exit codes: 0 done, 2 something to put right (one sentence says what), 143 interrupted: the same command goes on.
"""

import argparse
import sys
from pathlib import Path

from transformers import HfArgumentParser

import arciva_assistant_poc as arciva


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags that were given, and nothing else: what is left out keeps the profile's value."""
    parser = HfArgumentParser(arciva.Config, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser.add_argument("--stages", nargs="+", choices=arciva.STAGES, default=list(arciva.STAGES), help="what to run")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> dict[str, Path]:
    """Compose the run from its flags."""
    flags = vars(parse_arguments(arguments))
    stages = flags.pop("stages")
    config, reason = arciva.configure(arciva.detect_hardware(), **flags)
    print(f"base model    {reason}")
    return arciva.run_pipeline(config, stages)


if __name__ == "__main__":
    sys.exit(arciva.run_main(run))
