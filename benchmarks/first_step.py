"""Where the seconds of `make run` go: from the imports to the verified merge, with the peak memory after each stage.

    python benchmarks/first_step.py                the nano base on the seed corpus, three runs
    python benchmarks/first_step.py --epochs 1     the same with less training
    python benchmarks/first_step.py --quick        a few steps and short answers, once

`run_pipeline` itself runs, in one process, with a clock around the functions it calls. A function that runs inside another one is listed
behind it, and its seconds are part of that stage's. Results go to a folder that is removed.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before every import below: they are the first stage

import argparse
import functools
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common
from transformers import TrainerCallback

import arciva_assistant_poc as arciva

IMPORTED = time.perf_counter()
IMPORT_PEAK = common.process_memory()["VmHWM"]
FIRST, TRAINING, REST = "training, up to the first step", "training, further steps", "everything else"
# Function of the module → the stage it belongs to, in the order of a run.
STAGES = {
    "load_examples": "data",
    "split_examples": "data",
    "load_tokenizer": "tokenizer, memory plan",
    "encode_split": "tokenizer, memory plan",
    "model_shape": "tokenizer, memory plan",
    "plan_for": "tokenizer, memory plan",
    "load_base_model": "base model, adapter",
    "add_adapter": "base model, adapter",
    "train_adapter": TRAINING,
    "save_adapter": "adapter, loss curve written",
    "write_loss": "adapter, loss curve written",
    "predict": "answers and losses",
    "build_report": "report",
    "save_predictions": "report",
    "load_suites": "suites",
    "knowledge_vocabulary": "suites",
    "run_suites": "suites",
    "save_suites": "suites",
    "write_dashboard": "dashboard",
    "merge_adapter": "merge",
    "verification_rows": "verification",
    "measure_model": "verification",
    "load_merged_model": "verification",
    "compare_models": "verification",
    "publish_merged": "verification",
}
# What is worth seeing within a stage.
INNER = {"generate_answers": "answers", "score_losses": "losses", "encode_split": "encoding"}


class Clock:
    """Seconds of each stage and of the inner functions within it, and the peak memory when the stage last ended."""

    def __init__(self):
        self.stages, self.inner, self.peak = Counter(), {}, {}
        self.stack: list[str] = []
        self.called: dict[str, float] = {}  # when a function was first called
        self.first_step: float | None = None

    def around(self, name: str, function: Callable, label: str | None) -> Callable:
        """`function`, timed as a stage when nothing is running yet, else as what `label` names within one."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            if self.stack and label is None:
                return function(*args, **kwargs)
            self.stack.append(name)
            started = time.perf_counter()
            self.called.setdefault(name, started)
            try:
                return function(*args, **kwargs)
            finally:
                self.stack.pop()
                self.note(name, label, time.perf_counter() - started)

        return timed

    def note(self, name: str, label: str | None, seconds: float) -> None:
        stage = STAGES[self.stack[0] if self.stack else name]
        if not self.stack:
            self.stages[stage] += seconds
            self.peak[stage] = common.process_memory()["VmHWM"]
        elif len(self.stack) == 1:  # deeper ones are part of an inner one already
            early = stage == TRAINING and self.first_step is None
            self.inner.setdefault(FIRST if early else stage, Counter())[label] += seconds


class FirstStep(TrainerCallback):
    """Notes when the first optimiser step ended, and the peak memory then."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        if self.clock.first_step is None:
            self.clock.first_step = time.perf_counter()
            self.clock.peak[FIRST] = common.process_memory()["VmHWM"]


def clocked_pipeline(config: arciva.Config) -> Clock:
    """One run of the pipeline with a clock around its functions."""
    clock = Clock()
    for name in {**STAGES, **INNER}:
        setattr(arciva, name, clock.around(name, getattr(arciva, name), INNER.get(name)))
    trainer = arciva.AnswerTrainer
    trainer.evaluate = clock.around("evaluate", trainer.evaluate, "held-out losses")
    trainer._save_checkpoint = clock.around("checkpoint", trainer._save_checkpoint, "checkpoints")
    arciva.run_pipeline(config, callbacks=[FirstStep(clock)])
    return clock


def child(options: argparse.Namespace) -> dict:
    """Seconds, inner seconds and peak GiB by stage."""
    limits = {"epochs": 0.2, "max_eval_rows": 10, "max_new_tokens": 4} if options.quick else {"epochs": options.epochs}
    with tempfile.TemporaryDirectory() as folder:
        names = ("output_dir", "merged_dir", "reports_dir", "checkpoint_dir")
        paths = {name: f"{folder}/{name}" for name in names}
        hardware = arciva.detect_hardware()
        config, _ = arciva.configure(hardware, base_model=options.base_model, data=options.data, **limits, **paths)
        clock = clocked_pipeline(config)
        steps = arciva.read_manifest(config.output_dir)["training"]["steps"]
    total = time.perf_counter() - STARTED
    to_first = clock.first_step - clock.called["train_adapter"]
    spent = {"imports": IMPORTED - STARTED, **clock.stages, FIRST: to_first}
    spent[TRAINING] -= to_first
    spent[REST] = total - sum(spent.values())
    peak = {"imports": IMPORT_PEAK, **clock.peak, REST: common.process_memory()["VmHWM"]}
    ordered = ["imports", *dict.fromkeys(STAGES.values()), REST]
    ordered.insert(ordered.index(TRAINING), FIRST)
    return {
        "total_s": total,
        "first_step_s": clock.first_step - STARTED,
        "steps": steps,
        "seconds": {stage: spent[stage] for stage in ordered},
        "inner_s": {stage: dict(inner) for stage, inner in clock.inner.items()},
        "peak_rss_gib": {stage: peak[stage] for stage in ordered},
    }


def lines(found: list[dict]) -> list[dict]:
    """The table's lines: one per stage, and the total."""
    total = [r["total_s"] for r in found]
    rows = []
    for stage in found[0]["seconds"]:
        seconds = [r["seconds"][stage] for r in found]
        inner = found[0]["inner_s"].get(stage, {})
        rows.append(
            {
                "stage": stage,
                "seconds": common.spread(seconds),
                "share": f"{sum(seconds) / sum(total):.1%}",
                "peak RSS GiB": common.spread([r["peak_rss_gib"][stage] for r in found]),
                "of which (first run)": ", ".join(f"{name} {s:.1f} s" for name, s in inner.items()),
            }
        )
    peak = common.spread([max(r["peak_rss_gib"].values()) for r in found])
    return [*rows, {"stage": "total", "seconds": common.spread(total), "share": "100.0%", "peak RSS GiB": peak}]


def parent(options: argparse.Namespace) -> Path:
    flags = ["--base-model", options.base_model, "--data", options.data] + ["--quick"] * options.quick
    flags += ["--epochs", options.epochs] if options.epochs else []
    repeats = 1 if options.quick else options.repeats
    found = common.interleave(Path(__file__), {"run": flags}, repeats)["run"]
    print(common.describe(common.environment()), common.table(lines(found)), sep="\n\n")
    first = common.spread([r["first_step_s"] for r in found])
    print(f"\nfrom the command to the end of the first optimiser step: {first} s; {found[0]['steps']} steps in all")
    return common.save("first-step", {"results": found}, options.out)


def main(arguments: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--epochs", type=float, help="else the profile's")
    parser.add_argument("--base-model", default=str(common.ROOT / "data/nano_base"))
    parser.add_argument("--data", default=str(common.ROOT / "data/arciva_qa_synthetic.jsonl"))
    options = parser.parse_args(arguments)
    return common.run(options, lambda: child(options), lambda: parent(options))


if __name__ == "__main__":
    sys.exit(main())
