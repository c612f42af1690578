# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     comment_magics: false
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Arciva assistant: train, judge and package it
#
# Arciva is a project-first photo library. This notebook fine-tunes a 7B language model so that it answers product questions in
# English and German, guides photographers through their workflows, and says so when a feature does not exist. It runs
# unchanged in Colab, in RunPod's JupyterLab and on a laptop without a GPU: there it trains the small *nano* base that
# the repository carries, with the same code and a true 4-bit LoRA run.
#
# The data flow, one section after the other:
#
# `jsonl → examples → splits → encoded → base model + adapter → training result → predictions → scores → report → merged fp16`
#
# Cells that only define are exported to `arciva_assistant_poc.py`; the two training scripts import them from there.

# %% [markdown]
# ## 1. Environment Configuration
#
# This is the only cell that installs anything. Colab and RunPod ship a torch that fits their driver, so torch, numpy and pandas
# stay as they are: a constraints file holds pip to the installed versions. An old torchao makes peft refuse to create any
# adapter, even one that never uses it; the cell uninstalls it. Outside Colab and RunPod, install `requirements.txt` once and skip this cell.

# %% tags=["active-ipynb", "skip-execution"]
# import contextlib
# import tempfile
# from importlib.metadata import PackageNotFoundError, version
# from pathlib import Path
#
# kept = []
# for package in ("torch", "numpy", "pandas", "ipykernel", "ipywidgets", "jupyterlab"):
#     with contextlib.suppress(PackageNotFoundError):
#         kept.append(f"{package}=={version(package)}")
# if tuple(int(part) for part in version("torch").split(".")[:2]) < (2, 6):
#     raise RuntimeError(f"torch {version('torch')} is too old, expected 2.6 or newer: choose another image")
# constraints = Path(tempfile.gettempdir()) / "arciva-constraints.txt"
# constraints.write_text("\n".join(kept))
#
# %pip install -q -c {constraints} "transformers==5.23.0" "peft==0.21.2" "bitsandbytes==0.50.2" "accelerate==1.15.0" "datasets==5.2.0" "evaluate==0.4.6" "rouge-score==0.1.2" "sacrebleu==2.6.0" "matplotlib==3.11.2" "pydantic==2.14.3"
#
# try:
#     if tuple(int(part) for part in version("torchao").split(".")[:2]) < (0, 16):
#         %pip uninstall -q -y torchao
# except PackageNotFoundError:
#     pass
# %% [markdown]
# ## 2. Library Imports & Global Configuration
#
# All knobs live in one frozen `Config` that functions are given. A *profile* is a set of values for one size of base model,
# never another code path: the nano run does exactly what the 7B run does.
# %%
import contextlib
import copy
import errno
import functools
import gc
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import struct
import sys
import threading
import time
import unicodedata
import urllib.request
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises a hub kernel at import on every CPU

import bitsandbytes as bnb
import datasets
import evaluate
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import sacrebleu
import torch
import transformers
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from rouge_score import rouge_scorer
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints

IGNORE_INDEX = -100
# Where the repository's files lie when this runs as a module; a notebook runs in its own folder.
REPOSITORY = Path(globals().get("__file__", "notebook")).resolve().parent


class ArcivaError(Exception):
    """What a user can put right: the message names the thing, what was expected and what to do."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: in a notebook the sentence alone, a traceback is for bugs."""
        return [f"error: {self}"]


class Interrupted(Exception):
    """Training was told to stop before its end; a complete checkpoint of that step is on disk."""


# %% [markdown]
# The values of a profile come from different places. Those of *full* follow the QLoRA literature for a few thousand short pairs
# (all linear layers, rank 16, 2e-4, small batches); those of *nano* were swept on two CPU cores: a model this small needs a high
# rank and learning rate, and many epochs, before it names the right fact.


# %%
def knob(default, text: str):
    """A setting with the line of help that `--help` prints for it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Every knob of a run. What a profile sets holds the *full* profile's value here."""

    # model
    base_model: str = knob("auto", "auto, full, debug, nano, a hub id, or a folder")
    revision: str | None = knob(None, "hub commit or tag of the base model")
    use_debug_model: bool = knob(False, "a 1.1B model instead of the 7B one, to try things out")
    # data
    data: str = knob("data/arciva_qa_synthetic.jsonl", "JSONL files or URLs, comma-separated")
    max_length: int = knob(512, "tokens a pair may have; longer rows are reported, never cut")
    seed: int = knob(42, "seed of split, initialisation and order")
    # LoRA
    rank: int = knob(16, "rank of the adapters")
    alpha: int = knob(32, "scale of the adapters: their update counts alpha / rank")
    dropout: float = knob(0.05, "dropout before the adapters")
    # optimisation
    epochs: float = knob(3.0, "passes over the training pairs, unless early stopping ends them")
    learning_rate: float = knob(2e-4, "peak learning rate; falls to a tenth along a cosine")
    pairs_per_step: int = knob(16, "pairs per optimiser step, however they are packed")
    micro_batch_pairs: int = knob(0, "pairs per forward pass; 0 derives it from free memory")
    row_tokens: int = knob(1024, "tokens per packed row: longer rows cost attention, shorter ones padding")
    warmup: float = knob(0.05, "share of all steps in which the learning rate rises")
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm")
    evaluations_per_epoch: int = knob(4, "held-out losses, and checkpoints, per epoch")
    patience: int = knob(4, "evaluations without a better held-out loss before training stops")
    log_every: int = knob(5, "optimiser steps between two points of the loss curve")
    resume: str = knob("auto", "auto goes on from an interrupted run of this very configuration; never does not")
    report_to: str = knob("none", "none, tensorboard or wandb")
    # evaluation
    max_new_tokens: int = knob(256, "length limit of a generated answer, in tokens")
    generation_batch: int = knob(64, "answers generated at the same time")
    max_eval_rows: int = knob(600, "rows per held-out side that are answered in full")
    # acceptance: where one of these fails, nothing is merged and the run ends with an error
    min_bleu: float | None = knob(None, "smallest BLEU of the tuned model on rephrased test questions, 0 to 100")
    min_rouge_l: float | None = knob(None, "smallest ROUGE-L there, 0 to 1")
    min_exact_match: float | None = knob(None, "smallest share of exact answers there, 0 to 1")
    min_won: float | None = knob(
        None, "smallest share of them with a better ROUGE-L than the base's, a tie counts half"
    )
    min_checklists: float | None = knob(None, "smallest share of passed checklist items, 0 to 1")
    min_balanced_accuracy: float | None = knob(None, "smallest balanced accuracy on hallucination probes, 0 to 1")
    compare_to: str | None = knob(None, "reports folder of an accepted model that this one must not fall behind")
    # merge
    merge_base: str = knob(
        "dequantized", "weights that receive the adapter: dequantized (what was trained beside) or original"
    )
    # paths
    output_dir: str = knob("model_output", "adapter, tokenizer and manifest")
    merged_dir: str = knob("final_merged_model", "merged fp16 model")
    reports_dir: str = knob("reports", "metrics, predictions, figures and dashboard")
    checkpoint_dir: str = knob("checkpoints", "checkpoints of unfinished runs")


PROFILES = {
    "full": "Qwen/Qwen2.5-7B-Instruct",
    "debug": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "nano": "data/nano_base",
}
PRESETS = {
    "full": {},
    "debug": {"learning_rate": 3e-4},
    "nano": {
        "rank": 64,
        "alpha": 64,
        "dropout": 0.0,
        "epochs": 6.0,
        "learning_rate": 3e-3,
        "row_tokens": 128,
        "evaluations_per_epoch": 1,
        "patience": 3,
        "log_every": 10,
        "max_new_tokens": 96,
        "generation_batch": 128,
    },
}
VERSIONED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "sacrebleu",
    "rouge-score",
)


def package_versions() -> dict[str, str]:
    """Installed version of every package whose behaviour the results depend on."""
    return {name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}


# %% [markdown]
# Hardware decides two things: which base model is worth loading, and in which number format it computes. Both choices return
# their reason, because a silent fallback to a smaller model or a slower format costs an afternoon. `is_bf16_supported()` answers
# yes on a T4 (it would emulate), so the compute capability is asked instead.


# %%
@dataclass(frozen=True)
class Hardware:
    """Where the run computes, in which format, and why."""

    device: str  # "cuda" or "cpu"
    name: str
    memory_gib: float  # of the GPU, or of the machine
    dtype: torch.dtype  # what matrix products compute in while training
    dtype_reason: str

    @property
    def load_dtype(self) -> torch.dtype:
        """Format of what is not quantised, and what NF4 is made from."""
        return torch.float32 if self.device == "cpu" else self.dtype

    @property
    def attention(self) -> str:
        """Kernel of the attention: torch's fused one, but on a CPU its block mask costs more than plain products do."""
        return "eager" if self.device == "cpu" else "sdpa"

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision where `dtype` is a 16-bit format; nothing in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions, and torch can tell; emulated bf16 is slower than fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_dtype(device: str, capability: tuple[int, int], *, cpu_bf16: bool = False) -> tuple[torch.dtype, str]:
    """Compute format for a device, its CUDA capability and its CPU's instructions, with the reason."""
    if device == "cpu" and cpu_bf16:
        return torch.bfloat16, "this CPU multiplies bf16 natively; evaluation stays in fp32"
    if device == "cpu":
        return torch.float32, "this CPU has no bf16 instructions"
    if capability >= (8, 0):
        return torch.bfloat16, f"compute capability {capability[0]}.{capability[1]} has bf16 units"
    return (
        torch.float16,
        f"compute capability {capability[0]}.{capability[1]} has no bf16 units: fp16 with loss scaling",
    )


def detect_hardware() -> Hardware:
    """This process's GPU (the first, where there is one process) if torch sees any, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        dtype, reason = choose_dtype("cuda", (properties.major, properties.minor))
        return Hardware("cuda", properties.name, properties.total_memory / 2**30, dtype, reason)
    dtype, reason = choose_dtype("cpu", (0, 0), cpu_bf16=cpu_multiplies_bf16())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Hardware("cpu", f"CPU, {torch.get_num_threads()} threads", memory, dtype, reason)


# %%
def hub_reachable(model: str) -> bool:
    """Whether the hub can deliver `model`: its files are cached, or the hub answers within five seconds."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return True
    try:
        HfApi().model_info(model, timeout=5)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):  # not offline: another model would be trained for want of a valid token
            raise ArcivaError(
                f"the hub refuses {model} ({status}); renew or remove HF_TOKEN, or accept the model's terms on its page"
            ) from error
        return False
    except Exception:  # the hub's client raises a dozen kinds of network error; all mean the same here
        return False
    return True


def is_nano(base_model: str) -> bool:
    """Whether a base is the embedded one, which proves the pipeline and not the assistant."""
    return Path(base_model).name == Path(PROFILES["nano"]).name


def choose_profile(
    requested: str,
    use_debug_model: bool,
    hardware: Hardware,
    *,
    reachable: Callable[[str], bool] = hub_reachable,
) -> tuple[str, str, str]:
    """(profile, base model, reason) for what was asked and what there is."""
    if requested in PROFILES:
        return requested, PROFILES[requested], f"{requested!r} was asked for"
    if requested != "auto":
        return ("nano" if is_nano(requested) else "full"), requested, "named by the configuration"
    if hardware.device == "cpu" and not use_debug_model:
        return "nano", PROFILES["nano"], "no GPU: the embedded base proves the pipeline, not the assistant"
    if use_debug_model:
        profile, reason = "debug", "USE_DEBUG_MODEL is on"
    elif hardware.memory_gib >= 14:
        profile, reason = "full", f"{hardware.memory_gib:.0f} GiB of GPU memory hold a 7B model in 4 bits"
    else:
        profile, reason = "debug", f"{hardware.memory_gib:.0f} GiB of GPU memory; a 7B model needs 14"
    if not reachable(PROFILES[profile]):
        return "nano", PROFILES["nano"], f"{PROFILES[profile]} cannot be reached on the hub: the embedded base instead"
    return profile, PROFILES[profile], reason


def configure(hardware: Hardware, **overrides) -> tuple[Config, str]:
    """A complete `Config` and why its base model was chosen; an override of None keeps the profile's value."""
    overrides = {name: value for name, value in overrides.items() if value is not None}
    unknown = sorted(set(overrides) - {f.name for f in fields(Config)})
    if unknown:
        raise ArcivaError(f"unknown settings {unknown}; expected some of {[f.name for f in fields(Config)]}")
    asked = Config(**overrides)
    profile, base_model, reason = choose_profile(asked.base_model, asked.use_debug_model, hardware)
    if base_model == PROFILES["nano"] and not Path(base_model).is_dir():
        base_model = str(REPOSITORY / base_model)
        if not Path(base_model).is_dir():
            raise ArcivaError(
                f"no {PROFILES['nano']} here ({reason}); clone the repository and work inside it, or choose a GPU and a base model on the hub"
            )
    config = replace(Config(**PRESETS[profile]), **{**overrides, "base_model": base_model})
    check_config(config)
    return config, f"{base_model} ({profile}): {reason}"


def check_config(config: Config, processes: int | None = None) -> None:
    """Refuse values that would fail later, or worse, not fail; `processes` will train, by default those that run now."""
    numbers = (
        "rank alpha epochs learning_rate pairs_per_step row_tokens max_length max_new_tokens evaluations_per_epoch patience"
        " log_every generation_batch max_eval_rows"
    )
    for name in numbers.split():
        if getattr(config, name) <= 0:
            raise ArcivaError(f"{name} is {getattr(config, name)}, expected a number above 0")
    if config.resume not in ("auto", "never"):
        raise ArcivaError(f"resume is {config.resume!r}, expected 'auto' or 'never'")
    if config.merge_base not in ("dequantized", "original"):
        raise ArcivaError(f"merge_base is {config.merge_base!r}, expected 'dequantized' or 'original'")
    processes = processes or process_rank()[1]
    if config.pairs_per_step % ((config.micro_batch_pairs or 1) * processes):
        raise ArcivaError(
            f"pairs_per_step ({config.pairs_per_step}) must be a multiple of micro_batch_pairs ({config.micro_batch_pairs or 'any'})"
            f" times the number of processes ({processes})"
        )


def thresholds(config: Config) -> dict[str, float]:
    """The thresholds that are set, by the setting's name."""
    return {k: v for k, v in asdict(config).items() if k.startswith("min_") and v is not None}


def folder_of(reports: str) -> Path:
    """A reports folder, named itself or by a file in it."""
    return Path(reports).parent if Path(reports).is_file() else Path(reports)


def check_acceptance(config: Config) -> None:
    """Refuse, before any training, an acceptance that could not be decided after it."""
    if {"min_checklists", "min_balanced_accuracy"} & set(thresholds(config)) and not suite_files():
        raise ArcivaError(
            "no suites in data/suites, expected them for the thresholds on suites; bring them or drop those"
        )
    if config.compare_to is None:
        return
    if not (folder_of(config.compare_to) / "predictions.jsonl").is_file():
        raise ArcivaError(
            f"no predictions.jsonl in {config.compare_to}: expected the reports folder of an accepted model"
        )
    if folder_of(config.compare_to).resolve() == Path(config.reports_dir).resolve():
        raise ArcivaError(
            f"compare_to is this run's own {config.reports_dir}, which evaluation overwrites; keep the accepted reports elsewhere"
        )


def suite_files(folder: str = "data/suites") -> list[Path]:
    """The suites below the working directory or, where there are none, beside the module."""
    return sorted(Path(folder).glob("*.jsonl")) or sorted((REPOSITORY / folder).glob("*.jsonl"))


# %% [markdown]
# Results appear under their final name only when they are whole: a folder or file is written beside its place and renamed.


# %%
def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    transformers.set_seed(seed)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the name `final` when the block ends without an error; else it is removed."""
    final = Path(final)
    staging = final.with_name(f".{final.name}.unfinished")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise ArcivaError(
            f"cannot write to {final.parent}: {error.strerror}; choose another folder or free its rights"
        ) from error
    try:
        yield staging
        previous = final.with_name(f".{final.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        if final.exists():
            final.rename(previous)
        staging.rename(final)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def process_rank() -> tuple[int, int]:
    """(rank, number) of the processes that torchrun or accelerate started for this run; (0, 1) for a single one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under its final name only when it is whole."""
    path = Path(path)
    rank = process_rank()[0]  # several processes may write the same file at once
    staging = path.with_name(f".{path.name}.{f'{rank}.' if rank else ''}unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(text, encoding="utf-8")
        staging.replace(path)
    except OSError as error:
        raise ArcivaError(f"cannot write {path}: {error.strerror}; choose another folder or free its rights") from error


def running_in_notebook() -> bool:
    """Whether a Jupyter or Colab kernel runs this code."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return bool(shell) and shell.__class__.__name__ != "TerminalInteractiveShell"


def in_colab() -> bool:
    return importlib.util.find_spec("google") is not None and importlib.util.find_spec("google.colab") is not None


def quieten_libraries() -> None:
    """Keep third-party bars and advice out of the narrative; errors still show."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # from one library to another
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# %% [markdown]
# The switches. `None` keeps the profile's value; `USE_DEBUG_MODEL = True` trains a 1.1B model on a GPU to see everything work
# before the 7B run.

# %% tags=["active-ipynb", "parameters"]
# USE_DEBUG_MODEL = False
# BASE_MODEL = "auto"  # auto, full, debug, nano, a hub id, or a folder
# DATA = "data/arciva_qa_synthetic.jsonl"  # a path, a Drive path, a URL; several with commas
# EPOCHS = None
# LEARNING_RATE = None
# MAX_LENGTH = None  # tokens per pair
# PAIRS_PER_STEP = None
# MICRO_BATCH_PAIRS = None  # pairs per forward pass; None derives it from free memory
# LOG_EVERY = None  # optimiser steps
# SETTINGS = {}  # any other field of Config, as {"rank": 32, "merge_base": "original", "min_rouge_l": 0.4}
# OUTPUT_DIR = "model_output"
# MERGED_DIR = "final_merged_model"
# REPORTS_DIR = "reports"
# CHECKPOINT_DIR = "checkpoints"  # on Colab a Drive path outlives the machine
# RESUME = "auto"  # go on from an interrupted run of these settings, or "never"

# %% tags=["active-ipynb"]
# quieten_libraries()
# hardware = detect_hardware()
# config, reason = configure(
#     hardware,
#     use_debug_model=USE_DEBUG_MODEL,
#     base_model=BASE_MODEL,
#     data=DATA,
#     epochs=EPOCHS,
#     learning_rate=LEARNING_RATE,
#     max_length=MAX_LENGTH,
#     pairs_per_step=PAIRS_PER_STEP,
#     micro_batch_pairs=MICRO_BATCH_PAIRS,
#     log_every=LOG_EVERY,
#     output_dir=OUTPUT_DIR,
#     merged_dir=MERGED_DIR,
#     reports_dir=REPORTS_DIR,
#     checkpoint_dir=CHECKPOINT_DIR,
#     resume=RESUME,
#     **SETTINGS,
# )
# check_acceptance(config)
# seed_everything(config.seed)

# %% tags=["active-ipynb"]
# print(f"{'hardware':<12}{hardware.name}, {hardware.memory_gib:.0f} GiB")
# print(f"{'format':<12}{str(hardware.dtype).removeprefix('torch.')}: {hardware.dtype_reason}")
# print(f"{'base model':<12}{reason}")
# print(f"{'packages':<12}{', '.join(f'{name} {version}' for name, version in package_versions().items())}")

# %% [markdown]
# The base-model line is the one to read first: on a GPU it should name the 7B model, and if it does not, it says what to change.

# %% [markdown]
# ## 3. Data Ingestion & Splits
#
# A row is either `instruction` and `response` (or `output`), or a conversation in `messages`, as the labelling tool writes it
# together with its verdict in `review_metadata`. Whatever is wrong is collected and reported in one go, by file and line, because
# a run that stops at the first of forty bad rows is run forty times.


# %%
class Turn(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "user", "assistant"]
    content: str


class Row(BaseModel):
    """One line of a data file. Unknown fields are kept in `model_extra` and ignored."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | None = None
    instruction: str | None = None
    input: str | None = None
    response: str | None = None
    output: str | None = None
    messages: list[Turn] | None = None
    language: Literal["en", "de"] | None = None
    topic: str = "general"
    kind: str = "unspecified"
    style: str = "unspecified"
    fact_ids: list[str] = []
    review_metadata: dict | None = None

    @model_validator(mode="after")
    def conversation_is_complete(self) -> "Row":
        turns = self.conversation()
        spoken = [t for t in turns if t.role != "system"]
        if any(not t.content.strip() for t in turns):
            raise ValueError("a question or answer is empty; expected text")
        if [t.role for t in spoken] != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
            raise ValueError("turns must alternate user, assistant and end with the assistant")
        if any(t.role == "system" for t in turns[1:]):
            raise ValueError("a system turn may only stand first")
        return self

    def conversation(self) -> list[Turn]:
        """The row's turns, whichever of its forms it was written in."""
        if self.messages is not None:
            return self.messages
        answer = self.response if self.response is not None else self.output
        if self.instruction is None or answer is None:
            raise ValueError("expected 'instruction' with 'response' (or 'output'), or 'messages'")
        question = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        return [Turn(role="user", content=question), Turn(role="assistant", content=answer)]

    def verdict(self) -> str:
        """What a reviewer decided: verified, modified, discarded, or unreviewed."""
        label = str((self.review_metadata or {}).get("label", "")).casefold()
        return next(
            (word for word in ("verified", "modified", "discarded") if word in re.findall(r"\w+", label)), "unreviewed"
        )


# %%
@dataclass(frozen=True)
class Example:
    """One conversation to learn from or to be judged on."""

    id: str
    messages: list[dict]  # {"role", "content"}; ends with the assistant
    language: str
    topic: str
    kind: str
    style: str
    fact_ids: list[str]
    extra: str  # the row's unknown fields, as JSON

    @property
    def question(self) -> str:
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")


GERMAN = set("der die das und ist nicht ich wie ein eine kann wo du für mit auf zu den im es warum gibt was".split())
ENGLISH = set("the a and is not i how can where you for with on to in it why what does do my of".split())


def guess_language(text: str) -> str:
    """`de` or `en` by the more frequent function words; English on a tie."""
    tokens = re.findall(r"\w+", text.casefold())
    return "de" if sum(t in GERMAN for t in tokens) > sum(t in ENGLISH for t in tokens) else "en"


def example_from_row(row: Row) -> Example:
    """An `Example` with what the row leaves open filled in; the id of a row without one is a hash of its words."""
    messages = [{"role": t.role, "content": t.content.strip()} for t in row.conversation()]
    spoken = json.dumps(messages, ensure_ascii=False)
    # Rows that name no facts but share an answer are one family: they rest on the same knowledge.
    answer = hashlib.sha256(messages[-1]["content"].casefold().encode()).hexdigest()[:12]
    return Example(
        id=row.id or "row-" + hashlib.sha256(spoken.encode()).hexdigest()[:12],
        messages=messages,
        language=row.language or guess_language(messages[-1]["content"]),
        topic=row.topic,
        kind=row.kind,
        style=row.style,
        fact_ids=row.fact_ids or [f"answer-{answer}"],
        extra=json.dumps(row.model_extra or {}, ensure_ascii=False, sort_keys=True),
    )


# %% [markdown]
# `load_examples` takes files, Drive paths and URLs. When there is no data at all, as in a notebook opened alone in Colab, the
# message says how to bring it.


# %%
def fetch(source: str, folder: Path = Path("downloads")) -> Path:
    """A local path for a path or an http(s) URL; a download is kept in `folder`."""
    if not re.match(r"https?://", source):
        path = Path(source).expanduser()
        if not path.is_file():
            upload = (
                "upload it with the file browser, or mount Drive and give its path"
                if in_colab()
                else "give another path"
            )
            raise ArcivaError(
                f"no data at {source}: expected a JSONL file; {upload}, or set DATA to an https:// URL of it"
            )
        return path
    target = folder / (hashlib.sha256(source.encode()).hexdigest()[:12] + ".jsonl")
    if target.exists():
        print(f"{source}: the copy in {target} is used; delete it to fetch again")
    else:
        try:
            with urllib.request.urlopen(source, timeout=30) as response:
                write_atomic(target, response.read().decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ArcivaError(f"cannot download {source}: {error}; check the address or download it by hand") from error
    return target


def parse_line(line: str) -> Row:
    """A validated row, or ValueError with one readable reason."""
    try:
        return Row.model_validate(json.loads(line), strict=True)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except ValidationError as error:
        reasons = [
            f"{'.'.join(map(str, e['loc'])) or 'row'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        ]
        raise ValueError("; ".join(reasons)) from error


def load_examples(sources: str) -> tuple[list[Example], Counter]:
    """Examples of all comma-separated files, and how many rows each verdict of the reviewers got.

    Discarded rows are left out. Every bad row of every file is named in the one `ArcivaError` that ends the run.
    """
    examples, verdicts, problems, seen = [], Counter(), [], {}
    for source in (s.strip() for s in sources.split(",") if s.strip()):
        path = fetch(source)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ArcivaError(f"{path} is not UTF-8 at byte {error.start}; save it in that encoding") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_line(line)
            except ValueError as error:
                problems.append(f"{path.name}, line {number}: {error}")
                continue
            verdicts[row.verdict()] += 1
            if row.verdict() == "discarded":
                continue
            example = example_from_row(row)
            if example.id in seen:
                problems.append(f"{path.name}, line {number}: id {example.id!r} was used in {seen[example.id]}")
            seen[example.id] = f"{path.name}, line {number}"
            examples.append(example)
    if problems:
        raise ArcivaError(f"{len(problems)} bad rows, mend or remove them:\n  " + "\n  ".join(problems))
    if not examples:
        raise ArcivaError(f"{sources} holds no rows to train on; expected one JSON object a line")
    return examples, verdicts


# %% tags=["active-ipynb"]
# examples, verdicts = load_examples(config.data)
# print(f"{len(examples):,} examples from {config.data}; reviewers' verdicts: {dict(verdicts)}")
# pd.DataFrame([{"language": e.language, "topic": e.topic} for e in examples]).value_counts().unstack(0).T

# %% [markdown]
# A product assistant is asked two different things. *Rephrased*: something it was taught, in words it has not seen. *Unseen*:
# something it was never taught, where the right behaviour is not to know. A random split mixes them up and puts
# near-copies of one question on both sides. So whole families of facts are held out for *unseen*, single wordings for
# *rephrased*, and a training row whose wording nearly repeats a held-out one is set aside.
#
# Near-duplicates are questions whose sets of character 5-grams overlap by a Jaccard index of 0.8 or more. The search is exact and
# close to linear: two sets that similar must share one of their rarest grams (prefix filtering, Bayardo et al. 2007, "Scaling Up
# All Pairs Similarity Search").


# %%
NEAR_DUPLICATE = 0.8


def normalise(text: str) -> str:
    """Case, punctuation and spacing removed; letters and digits stay, umlauts included."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold()))


def shingles(text: str, n: int = 5) -> frozenset[str]:
    """Character n-grams of the normalised text; the text itself where it is shorter."""
    text = normalise(text)
    return frozenset(text[i : i + n] for i in range(max(1, len(text) - n + 1)))


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b)


def near_duplicates(texts: Sequence[str], threshold: float = NEAR_DUPLICATE) -> list[tuple[int, int]]:
    """All index pairs (i < j) of texts whose shingle sets have a Jaccard index of at least `threshold`.

    The filters of PPJoin (Xiao et al., https://doi.org/10.1145/1367497.1367516), from short to long and each set's rarest shingles
    first: two sets that are alike are of like size, share one of their first few shingles, and have enough left behind it.
    """
    sets = [shingles(t) for t in texts]
    frequency = Counter(gram for s in sets for gram in s)
    index, pairs = defaultdict(deque), []

    def least(share: float, size: int) -> int:
        return math.ceil(share * size - 1e-9)

    for j in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        size, candidates, hopeless = len(sets[j]), set(), set()
        rarest = sorted(sets[j], key=lambda gram: (frequency[gram], gram))
        for at, gram in enumerate(rarest[: size - least(threshold, size) + 1]):
            while index[gram] and index[gram][0][1] < threshold * size:
                index[gram].popleft()
            for i, other, place in index[gram]:
                if i in candidates or i in hopeless:
                    continue
                enough = min(size - at, other - place) >= threshold / (1 + threshold) * (size + other) - 1e-9
                (candidates if enough else hopeless).add(i)
        pairs += [(min(i, j), max(i, j)) for i in candidates if jaccard(sets[i], sets[j]) >= threshold]
        for place, gram in enumerate(rarest[: size - least(2 * threshold / (1 + threshold), size) + 1]):
            index[gram].append((j, size, place))
    return sorted(pairs)


# %%
def fraction(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone: the same on every machine, for any order of rows."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def fact_families(examples: Sequence[Example]) -> dict[str, str]:
    """Family of every fact: facts that one row uses together belong together. A family is named by its first fact."""
    parent = {}

    def root(fact: str) -> str:
        while parent.setdefault(fact, fact) != fact:
            fact = parent[fact]
        return fact

    for example in examples:
        first = root(example.fact_ids[0])
        for fact in example.fact_ids[1:]:
            low, high = sorted((first, root(fact)))
            parent[high] = first = low
    return {fact: root(fact) for fact in list(parent)}


def assign_sides(examples: Sequence[Example], seed: int) -> list[str]:
    """`train`, `validation` or `test` for each example, by hash alone.

    A tenth of the families goes to the held-out sides whole; of the other rows a ninth goes there one by one. Both halves
    are shared between validation and test. No row's side depends on another row, unless that row ties families together.
    """
    families = fact_families(examples)
    sides = []
    for example in examples:
        draw = fraction(seed, "family", families[example.fact_ids[0]])
        if draw >= 0.1:
            draw = fraction(seed, "row", normalise(example.question), example.language) * 0.9
        sides.append("validation" if draw < 0.05 else "test" if draw < 0.1 else "train")
    return sides


# %%
@dataclass(frozen=True)
class SplitReport:
    """What splitting did, and what a random split of the same sizes would have done."""

    counts: dict[str, dict[str, int]]  # side → novelty → rows
    set_aside: list[str]  # ids of training rows that nearly repeat a held-out wording
    naive_near_duplicates: float  # share of a random split's held-out rows with a near-copy in its training side
    naive_known_answers: float  # share of a random split's held-out rows whose very answer is in its training side
    near_duplicates: float  # the first share under this split
    known_answers: float  # the second share under this split, over its unseen half


def leak_rates(
    examples: Sequence[Example], sides: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """(near-copies, known answers): shares in [0, 1] of held-out rows that the training side gives away."""
    held_out = [i for i, side in enumerate(sides) if side in ("validation", "test")]
    copies = {held for i, j in pairs for held, other in ((i, j), (j, i)) if sides[other] == "train"}
    taught = {e.messages[-1]["content"] for e, side in zip(examples, sides, strict=True) if side == "train"}
    known = sum(examples[i].messages[-1]["content"] in taught for i in held_out)
    return sum(i in copies for i in held_out) / max(1, len(held_out)), known / max(1, len(held_out))


def random_sides(examples: Sequence[Example], seed: int, held_out: int) -> list[str]:
    """The naive split: `held_out` rows drawn at random, whatever they share with the rest."""
    order = sorted(range(len(examples)), key=lambda i: fraction(seed, "naive", examples[i].id))
    chosen = set(order[:held_out])
    return ["test" if i in chosen else "train" for i in range(len(examples))]


# %%
def split_examples(examples: Sequence[Example], seed: int) -> tuple[datasets.DatasetDict, SplitReport]:
    """Train, validation and test with a `novelty` column (train, rephrased, unseen), and what the split prevented."""
    examples = sorted(examples, key=lambda e: e.id)
    sides = assign_sides(examples, seed)
    pairs = near_duplicates([e.question for e in examples])
    held_out = {i for i, side in enumerate(sides) if side != "train"}
    # The training row gives way: a held-out row keeps its side whatever is added later.
    aside = {i for pair in pairs if len(held_out & set(pair)) == 1 for i in pair if i not in held_out}
    away = held_out | aside
    taught = {f for i, e in enumerate(examples) if i not in away for f in e.fact_ids}
    novelty = []
    for i, (example, side) in enumerate(zip(examples, sides, strict=True)):
        known = sum(f in taught for f in example.fact_ids)
        if side != "train" and 0 < known < len(example.fact_ids):
            aside.add(i)  # partly taught: an answer to neither question
        novelty.append("train" if side == "train" else "rephrased" if known else "unseen")
    naive = leak_rates(examples, random_sides(examples, seed, len(held_out)), pairs)
    kept = ["aside" if i in aside else side for i, side in enumerate(sides)]
    unseen = ["aside" if n == "rephrased" else side for n, side in zip(novelty, kept, strict=True)]
    rows = [{**vars(e), "novelty": n} for e, n in zip(examples, novelty, strict=True)]
    splits = {
        side: [r for r, k in zip(rows, kept, strict=True) if k == side] for side in ("train", "validation", "test")
    }
    empty = [side for side, members in splits.items() if not members]
    if empty:
        raise ArcivaError(
            f"{len(examples)} rows leave {' and '.join(empty)} empty; expected some hundreds of rows: add data"
        )
    report = SplitReport(
        counts={side: dict(sorted(Counter(r["novelty"] for r in members).items())) for side, members in splits.items()},
        set_aside=[examples[i].id for i in sorted(aside)],
        naive_near_duplicates=naive[0],
        naive_known_answers=naive[1],
        near_duplicates=leak_rates(examples, kept, pairs)[0],
        known_answers=leak_rates(examples, unseen, pairs)[1],
    )
    return datasets.DatasetDict({side: datasets.Dataset.from_list(members) for side, members in splits.items()}), report


# %% tags=["active-ipynb"]
# splits, split_report = split_examples(examples, config.seed)
# for side, counts in split_report.counts.items():
#     print(f"{side:<12}{sum(counts.values()):>6,}  {counts}")
# print(f"{'set aside':<12}{len(split_report.set_aside):>6,}")
# print(
#     f"near-copies in training   random split {split_report.naive_near_duplicates:6.1%}   this split {split_report.near_duplicates:6.1%}"
# )
# print(
#     f"answer known in training  random split {split_report.naive_known_answers:6.1%}   this split, unseen half {split_report.known_answers:6.1%}"
# )

# %% [markdown]
# The last line is why the split is not random: the share of held-out rows whose very answer a random split would have given away.
# What that does to the figures is measured in `benchmarks/leak.py`.
# Near-copies were weeded out while this corpus was written; collected data usually has some, and the line above would show them.
# Sides are not balanced by topic: a family goes as a whole, so a small held-out side can hold much of one topic, as the table shows.

# %% tags=["active-ipynb"]
# shares = pd.DataFrame(
#     {side: pd.Series(dataset["topic"]).value_counts(normalize=True) for side, dataset in splits.items()}
# )
# shares.fillna(0).style.format("{:.1%}").background_gradient(axis=None, cmap="Blues")

# %% [markdown]
# One pair of functions turns conversations into tokens, for training, metrics, suites and server alike: a model that is asked
# through another template than it was taught is a worse model. `encode` builds the ids piece by piece, so that the prompt's ids are
# an exact prefix of the training ids by construction. Everything up to the answer is masked by position, never by token id: where pad
# equals the end-of-turn token, masking by id is how models learn never to stop.


# %%
SYSTEM_PROMPT = "You are Arciva's help assistant."
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '### ' + message['role'] + '\\n' + message['content'] + (eos_token if message['role'] == 'assistant' else '') + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation; `labels` equal them on what is supervised and IGNORE_INDEX elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


@functools.lru_cache(maxsize=8)
def takes_system_role(tokenizer, template: str) -> bool:
    """Whether the chat template takes a system message; some refuse it, in jinja's own way."""
    try:
        render(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    except Exception as error:  # templates raise jinja2's TemplateError through raise_exception()
        if type(error).__module__.split(".")[0] != "jinja2":
            raise
        return False
    return True


def with_system_prompt(tokenizer, messages: Sequence[dict]) -> list[dict]:
    """The conversation with our system prompt first; folded into the first question where a template knows no system role."""
    spoken = [{"role": m["role"], "content": m["content"]} for m in messages]
    if spoken[0]["role"] != "system":
        spoken.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
    if not takes_system_role(tokenizer, tokenizer.chat_template):
        system = spoken.pop(0)["content"]
        spoken[0] = {"role": "user", "content": f"{system}\n\n{spoken[0]['content']}"}
    return spoken


def render(tokenizer, conversation: Sequence[dict], *, add_generation_prompt: bool = False) -> str:
    """The conversation as text in the tokenizer's own chat template."""
    return tokenizer.apply_chat_template(
        list(conversation), tokenize=False, add_generation_prompt=add_generation_prompt
    )


# %%
def tokenize(tokenizer, text: str, *, first: bool) -> list[int]:
    """Ids of a rendered piece of text; the first piece starts with exactly one BOS where the tokenizer uses one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if first and bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        ids = [bos, *ids]
    return ids


def encode_pieces(tokenizer, messages: Sequence[dict]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) for each assistant turn; the answer ends with its end-of-turn token.

    What a template puts behind that token belongs to the next prompt: the model never has to produce it.
    """
    conversation = with_system_prompt(tokenizer, messages)
    pieces, done, special_ids = [], "", set(tokenizer.all_special_ids)
    for i, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, conversation[:i], add_generation_prompt=True)
        full = render(tokenizer, conversation[: i + 1])
        if not prompt.startswith(done) or not full.startswith(prompt):
            raise ArcivaError(
                "the chat template rewrites earlier turns, expected one that only appends: set another template"
            )
        answer = tokenize(tokenizer, full[len(prompt) :], first=False)
        special = [at for at, token in enumerate(answer) if token in special_ids]
        tail = answer[special[-1] + 1 :] if special else []
        answer = answer[: special[-1] + 1] if special else [*answer, tokenizer.eos_token_id]
        pieces.append((tokenize(tokenizer, prompt[len(done) :], first=not done), answer))
        done = full[: len(full) - len(tokenizer.decode(tail))] if tail else full
    return pieces


def encode(tokenizer, messages: Sequence[dict]) -> Encoded:
    """Training ids and labels; every assistant turn is supervised, nothing else is."""
    input_ids, labels = [], []
    for prompt, answer in encode_pieces(tokenizer, messages):
        input_ids += prompt + answer
        labels += [IGNORE_INDEX] * len(prompt) + answer
    return Encoded(input_ids, labels)


def encode_prompt(tokenizer, messages: Sequence[dict] | str) -> list[int]:
    """Ids up to where the model starts to answer; an exact prefix of what `encode` gives for the whole conversation."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    pieces = encode_pieces(tokenizer, [*turns, {"role": "assistant", "content": "."}])
    return [token for prompt, answer in pieces[:-1] for token in prompt + answer] + pieces[-1][0]


# %%
def load_tokenizer(base_model: str, revision: str | None = None):
    """The base model's tokenizer, padding on the left, with a chat template in any case."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model, revision=revision)
    except (OSError, ValueError) as error:
        raise ArcivaError(
            f"no tokenizer for {base_model!r}: expected a hub id that can be reached or a folder with a model; check the name and the "
            f"network ({str(error).splitlines()[0]})"
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.chat_template is None:
        print(f"{base_model} has no chat template; the default one of this notebook is used and saved with the results")
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_split(tokenizer, dataset: datasets.Dataset, max_length: int) -> tuple[list[Encoded], list[int], list[str]]:
    """(encoded, indices, too long): what fits `max_length` tokens, where it stands, and the ids of rows that do not fit."""
    encoded, indices, too_long = [], [], []
    for i, row in enumerate(dataset):
        item = encode(tokenizer, row["messages"])
        if len(item.input_ids) > max_length:
            too_long.append(f"{row['id']} ({len(item.input_ids)} tokens)")
        else:
            encoded.append(item)
            indices.append(i)
    return encoded, indices, too_long


def name_too_long(too_long: Sequence[str], what: str, max_length: int) -> None:
    """Print which rows are left out, if any."""
    if too_long:
        print(f"{len(too_long)} {what} rows exceed {max_length} tokens and are left out: {', '.join(too_long[:5])}")


# %% tags=["active-ipynb"]
# tokenizer = load_tokenizer(config.base_model, config.revision)
# train_encoded, _, too_long = encode_split(tokenizer, splits["train"], config.max_length)
# lengths = np.array([len(item.input_ids) for item in train_encoded])
# print(
#     f"{len(train_encoded):,} training pairs, {lengths.sum():,} tokens, {sum(item.supervised for item in train_encoded):,} of them supervised"
# )
# print(
#     f"tokens per pair: median {np.median(lengths):.0f}, longest {lengths.max()}; {len(too_long)} rows exceed {config.max_length} {too_long[:3]}"
# )

# %% [markdown]
# One training pair as the model sees it. Grey is context, which carries no loss; what is highlighted is what the model learns to
# write, and it ends with the end-of-turn token.


# %%
def mask_html(tokenizer, item: Encoded) -> str:
    """The decoded pair with its supervised tokens highlighted."""
    spans = []
    for token, label in zip(item.input_ids, item.labels, strict=True):
        text = html.escape(tokenizer.decode([token])).replace("\n", "⏎<br>")
        style = "color:#888" if label == IGNORE_INDEX else "background:#1a7f5a33;border-bottom:2px solid #1a7f5a"
        spans.append(f'<span style="{style}">{text}</span>')
    return f'<div style="font-family:monospace;line-height:1.7">{"".join(spans)}</div>'


# %% tags=["active-ipynb"]
# from IPython.display import HTML, display
#
# display(HTML(mask_html(tokenizer, train_encoded[0])))

# %% [markdown]
# ## 4. QLoRA Fine-Tuning
#
# The base model is frozen in 4-bit NormalFloat (Dettmers et al. 2023, "QLoRA"); small fp32 adapters on every linear layer learn.
# Three details decide whether that works. Norms are kept in fp32, while embeddings and head are not upcast: for a 7B model
# that would cost 2 GiB and buy nothing. On a CPU, bitsandbytes repacks weights for a fused kernel at the first evaluation and
# never unpacks them; that kernel has no gradient, so the path is switched off. And weights come from safetensors only.


# %%
@contextlib.contextmanager
def naming_the_model(config: Config, hardware: Hardware) -> Iterator[None]:
    """Turns what transformers raises for a wrong name, a missing file or a full GPU into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ArcivaError(
            f"cannot load {config.base_model!r}: expected a hub id that can be reached or a folder with config.json and safetensors; "
            f"check the name and the network ({str(error).splitlines()[0]})"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ArcivaError(
            f"{config.base_model} does not fit {hardware.memory_gib:.0f} GiB of GPU memory; set USE_DEBUG_MODEL"
        ) from error


def model_shape(config: Config, hardware: Hardware):
    """The base model's configuration: its sizes, without its weights."""
    with naming_the_model(config, hardware):
        return AutoConfig.from_pretrained(config.base_model, revision=config.revision)


def load_base_model(config: Config, hardware: Hardware):
    """The base model on its device, in NF4 with double quantisation; nothing of it is trainable."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.dtype,
    )
    with naming_the_model(config, hardware):
        model = AutoModelForCausalLM.from_pretrained(
            config.base_model,
            revision=config.revision,
            quantization_config=quantization,
            dtype=hardware.load_dtype,
            attn_implementation=hardware.attention,
            device_map={"": torch.cuda.current_device() if hardware.device == "cuda" else "cpu"},
            use_safetensors=True,
            trust_remote_code=False,
        )
    return freeze(model)


def in_autocast_format(module, inputs, output: torch.Tensor) -> torch.Tensor:
    """Forward hook: `output` in the format that products compute in, where they compute in one of 16 bits."""
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


def freeze(model):
    """No gradients for the base, fp32 norms and residual stream, and no 4-bit inference kernel that loses gradients on a CPU.

    A norm hands on 16 bits where products compute in them: cast once, not by each of the products that read it.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1 and "norm" in name:
            parameter.data = parameter.data.float()
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(in_autocast_format)
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return model


@contextlib.contextmanager
def evaluation_precision(model, hardware: Hardware) -> Iterator[None]:
    """fp32 on a CPU, where 16-bit rounding would make an answer depend on its neighbours in the batch.

    On a GPU the format of what is not quantised: a merged fp16 model must not be judged in bf16, which overflows later.
    """
    if hardware.device != "cpu":
        with torch.autocast(hardware.device, dtype=unwrap(model).get_input_embeddings().weight.dtype):
            yield
        return
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.compute_dtype = torch.float32
    try:
        yield
    finally:
        for layer in layers:
            layer.compute_dtype = hardware.dtype


def add_adapter(model, config: Config) -> PeftModel:
    """LoRA on all linear layers but the head. Adapters are fp32 whatever the base computes in: fp16 ones cannot be scaled."""
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # to fp32, which autocast on a CPU would undo at once
    return model


# %% [markdown]
# How many pairs fit one forward pass follows from free memory. What is known before anything is loaded is estimated from the
# checkpoint's shape: weights in 4 bits and the rest, adapter with optimiser, activations kept for the backward pass, and the logits
# with their fp32 copy and gradient. It changes speed only, never the result: the pairs per optimiser step stay what the
# configuration says, and the rest is gradient accumulation. Should the estimate fail, the pass is halved and training goes on.


# %%
@dataclass(frozen=True)
class MemoryPlan:
    """How an optimiser step is cut into forward passes, and what that is estimated to need."""

    micro_batch_pairs: int
    gradient_checkpointing: bool
    weights_gib: float  # base weights, adapter, gradients and optimiser, as far as they are not loaded yet
    activations_gib: float
    free_gib: float

    def __str__(self) -> str:
        return (
            f"{self.micro_batch_pairs} pairs per forward pass, checkpointing {'on' if self.gradient_checkpointing else 'off'}: "
            f"weights and optimiser {self.weights_gib:.2f} GiB + activations {self.activations_gib:.2f} GiB of {self.free_gib:.1f} GiB"
        )


def activation_bytes(
    shape,
    tokens: float,
    supervised: float,
    element: int,
    *,
    rank: int,
    row_tokens: int,
    checkpointing: bool,
    attention: str = "sdpa",
) -> float:
    """Bytes that a packed LoRA step over `tokens` keeps for its backward pass, logits of `supervised` positions included.

    Counted from what autograd saves in a Llama block: attention's operands, two norms with their outputs, the MLP's four vectors, the
    seven adapters' inner ones and a row of the mask. The residual stream, which the norms save, is fp32 also where products are
    not. Eager attention keeps its weights, in fp32 and as they are used. Checkpointing keeps the residual stream and one block.
    """
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    operands = 2 * hidden * (1 + heads / shape.num_attention_heads)  # query and output, key and value
    block = element * (operands + 2 * hidden + 4 * inner + 7 * rank + row_tokens) + 4 * 2 * hidden
    if attention == "eager":
        block += shape.num_attention_heads * row_tokens * (4 if element == 4 else 4 + element)
    blocks = layers * 4 * hidden + block if checkpointing else layers * block
    return tokens * blocks + supervised * shape.vocab_size * (element + 4 + 4)


# %%
def weight_bytes(shape, hardware: Hardware, rank: int) -> tuple[float, float]:
    """(base, training): bytes of the 4-bit base; and of adapter, gradients and Adam's two moments in fp32 with 16-bit copies.

    Both follow from a model's shape alone.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    quantised = sum(m.weight.numel() for m in linear)
    rest = sum(p.numel() for p in model.parameters()) - quantised
    adapter = sum(rank * (m.in_features + m.out_features) for m in linear)
    # 4 bits, and per block of 64 one 8-bit scale, whose own scale is one fp32 per 256 (QLoRA, https://arxiv.org/abs/2305.14314, §3).
    base = quantised * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + rest * hardware.load_dtype.itemsize
    copies = 0 if hardware.dtype == torch.float32 else 2 * adapter  # autocast's
    if hardware.dtype.itemsize < hardware.load_dtype.itemsize:
        copies += 2 * shape.vocab_size * shape.hidden_size
    return base, adapter * (4 + 4 + 8) + copies


def plan_memory(
    shape,
    config: Config,
    weights_gib: float,
    free_gib: float,
    *,
    pair_tokens: float,
    answer_share: float,
    element: int,
    attention: str = "sdpa",
) -> MemoryPlan:
    """The largest micro-batch that fits in `free_gib` less a tenth; checkpointing only where a step does not fit without."""
    budget = (0.9 * free_gib - weights_gib) * 2**30
    share = config.pairs_per_step // process_rank()[1]
    divisors = [n for n in range(share, 0, -1) if share % n == 0]
    wanted = [config.micro_batch_pairs] if config.micro_batch_pairs else divisors
    plans = []
    for checkpointing in (False, True):
        for pairs in wanted:
            tokens = pairs * pair_tokens
            need = activation_bytes(
                shape,
                tokens,
                tokens * answer_share,
                element,
                rank=config.rank,
                row_tokens=config.row_tokens,
                checkpointing=checkpointing,
                attention=attention,
            )
            plans.append(MemoryPlan(pairs, checkpointing, weights_gib, need / 2**30, free_gib))
    fitting = [p for p in plans if p.activations_gib * 2**30 <= budget]
    enough = min(4, wanted[0])  # below that, recomputing activations costs less than dequantising for so few tokens
    return max(
        fitting or plans[-1:],
        key=lambda p: (p.micro_batch_pairs >= enough, not p.gradient_checkpointing, p.micro_batch_pairs),
    )


# %%
def free_memory_gib(hardware: Hardware) -> float:
    """Memory that is free now: of the GPU, or of the machine."""
    if hardware.device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    available = (
        re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        if Path("/proc/meminfo").exists()
        else None
    )
    return int(available[1]) / 2**20 if available else hardware.memory_gib / 2


def plan_for(shape, encoded: Sequence[Encoded], config: Config, hardware: Hardware, *, loaded: bool) -> MemoryPlan:
    """The memory plan for a model's shape and the pairs it will see, before or after its weights are loaded."""
    if not encoded:
        raise ArcivaError(f"every training row exceeds {config.max_length} tokens; raise max_length")
    base, training = weight_bytes(shape, hardware, config.rank)
    tokens = sum(len(item.input_ids) for item in encoded)
    return plan_memory(
        shape,
        config,
        ((0 if loaded else base) + training) / 2**30,
        free_memory_gib(hardware),
        pair_tokens=tokens / len(encoded),
        answer_share=sum(item.supervised for item in encoded) / tokens,
        element=hardware.dtype.itemsize,
        attention=hardware.attention,
    )


# %%
def release_memory() -> None:
    """Hand back what deleted models held on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_plan(plan: MemoryPlan, config: Config) -> MemoryPlan:
    """The next plan after an out-of-memory error: checkpointing first, then half the micro-batch."""
    if not plan.gradient_checkpointing:
        return replace(plan, gradient_checkpointing=True)
    smaller = [n for n in range(1, plan.micro_batch_pairs // 2 + 1) if plan.micro_batch_pairs % n == 0]
    if not smaller:
        raise ArcivaError(
            f"the GPU ran out of memory with a single pair of up to {config.max_length} tokens; lower max_length or the base model"
        )
    return replace(plan, micro_batch_pairs=smaller[-1])


def plan_of_checkpoint(checkpoint: Path, plan: MemoryPlan, share: int) -> MemoryPlan:
    """`plan` with the cut that the checkpoint's run used: another order of summation would change the last bits.

    Where a process's `share` of a step's pairs cannot be cut like that, because there are other processes now, the plan stays.
    """
    cut = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["micro_batch"]
    if share % cut["pairs"]:
        return plan
    return replace(plan, micro_batch_pairs=cut["pairs"], gradient_checkpointing=cut["checkpointing"])


def agreed_plan(plan: MemoryPlan, hardware: Hardware) -> MemoryPlan:
    """The most careful plan of all processes: with different cuts of a step they would wait for each other for ever."""
    if process_rank()[1] == 1:
        return plan
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=hardware.device == "cpu")
    return min(gather_object([plan]), key=lambda p: (not p.gradient_checkpointing, p.micro_batch_pairs))


# %% tags=["active-ipynb"]
# print(plan_for(model_shape(config, hardware), train_encoded, config, hardware, loaded=False))


# %% [markdown]
# The line says how an optimiser step is cut: pairs that go through the model together, whether activations are recomputed to save
# memory, and what both are estimated to need of what is free.
#
# Pairs here are short, and a 4-bit layer is dequantised once per pass, not per token: feeding pairs one by one, or
# padded, leaves most of the hardware idle. The pairs of a micro-batch are packed into a few rows of equal load instead. Position ids
# restart at every pair, from which transformers derives the block-diagonal mask. It does so **only without an attention
# mask and without a cache**; either one silently lets neighbours see each other.


# %%
def pack_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices grouped into rows of nearly equal load: longest first, each to the emptiest row (LPT scheduling)."""
    rows = max(1, min(len(lengths), round(sum(lengths) / row_tokens)))
    packed, load = [[] for _ in range(rows)], [0] * rows
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        emptiest = load.index(min(load))
        packed[emptiest].append(i)
        load[emptiest] += lengths[i]
    return packed


def collate_packed(batch: Sequence[Encoded], row_tokens: int, pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `position_ids`, `labels` and `segments` of shape (rows, longest row).

    `segments` holds the index of a token's pair in `batch`, -1 on padding. Padding forms a segment of its own; each pair's
    first label is IGNORE_INDEX, so that none is predicted across a boundary.
    """
    packed = pack_rows([len(item.input_ids) for item in batch], row_tokens)
    width = max(sum(len(batch[i].input_ids) for i in row) for row in packed)
    shape = (len(packed), width)
    input_ids, position_ids = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    labels, segments = torch.full(shape, IGNORE_INDEX), torch.full(shape, -1)
    for r, row in enumerate(packed):
        at = 0
        for i in row:
            item, end = batch[i], at + len(batch[i].input_ids)
            input_ids[r, at:end] = torch.tensor(item.input_ids)
            position_ids[r, at:end] = torch.arange(end - at)
            labels[r, at + 1 : end] = torch.tensor(item.labels[1:])
            segments[r, at:end] = i
            at = end
        position_ids[r, at:] = torch.arange(width - at)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "segments": segments}


# %% tags=["active-ipynb"]
# batch = collate_packed(train_encoded[: config.pairs_per_step], config.row_tokens, tokenizer.pad_token_id)
# padded = config.pairs_per_step * max(len(item.input_ids) for item in train_encoded[: config.pairs_per_step])
# print({name: tuple(tensor.shape) for name, tensor in batch.items()})
# print(
#     f"{(batch['segments'] >= 0).float().mean():.1%} of the packed tokens are real; padding these pairs to equal length gives {(batch['segments'] >= 0).sum() / padded:.1%}"
# )

# %% [markdown]
# The head turns every hidden state into one logit per vocabulary entry, and most of them would carry no loss. A hook passes only the
# supervised positions to the head. The loss is the sum over supervised tokens divided by their number **in the whole optimiser
# step**: averaging per micro-batch would weigh short answers more (the gradient-accumulation bug that many trainers had).


# %%
def unwrap(model):
    """The causal language model below DistributedDataParallel and peft."""
    model = getattr(model, "module", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def supervised_logits(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, targets, where): logits of shape (supervised, vocabulary), the tokens they should give, and their (row, column).

    Runs the packed forward pass: no attention mask, no cache, and the head on supervised positions only.
    """
    targets = batch["labels"][:, 1:]
    keep = F.pad(targets != IGNORE_INDEX, (0, 1))
    hook = unwrap(model).get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][keep],))
    try:
        output = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        hook.remove()
    return output.logits, targets[keep[:, :-1]], keep


def answer_loss(model, batch: dict[str, torch.Tensor], supervised: int | torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats, summed over the batch and divided by `supervised`, the tokens of the whole step."""
    logits, targets, _ = supervised_logits(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="sum") / supervised


@torch.no_grad()
def score_losses(
    model, encoded: Sequence[Encoded], hardware: Hardware, *, row_tokens: int, pad_id: int, batch_tokens: int = 4096
) -> np.ndarray:
    """(n, 2): summed negative log-likelihood in nats and number of supervised tokens of each pair, in the given order."""
    was_training = model.training
    model.eval()
    result, order = np.zeros((len(encoded), 2)), sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
    for chunk in chunk_by_tokens(order, [len(e.input_ids) for e in encoded], batch_tokens):
        batch = collate_packed([encoded[i] for i in chunk], row_tokens, pad_id)
        batch = {name: tensor.to(hardware.device) for name, tensor in batch.items()}
        with evaluation_precision(model, hardware):
            logits, targets, keep = supervised_logits(model, batch)
        losses = F.cross_entropy(logits.float(), targets, reduction="none").double().cpu().numpy()
        owners = np.array(chunk)[batch["segments"][keep].cpu().numpy()]
        np.add.at(result, (owners, 0), losses)
        np.add.at(result, (owners, 1), 1)
    model.train(was_training)
    return result


def chunk_by_tokens(order: Sequence[int], lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Consecutive parts of `order` of at most `limit` tokens; a single longer item stands alone."""
    chunk, load = [], 0
    for i in order:
        if chunk and load + lengths[i] > limit:
            yield chunk
            chunk, load = [], 0
        chunk.append(i)
        load += lengths[i]
    if chunk:
        yield chunk


def perplexity(losses: np.ndarray) -> float:
    """exp of the token-weighted mean loss: (n, 2) of nats and tokens → [1, inf)."""
    return math.exp(losses[:, 0].sum() / losses[:, 1].sum())


# %% [markdown]
# Training itself is the transformers `Trainer`: its checkpoints, resume, schedulers and loggers are better tested than any loop of
# ours. Two things change. The loss is the one above, and `evaluate` measures the token-weighted loss of both held-out halves;
# early stopping and the best checkpoint follow the rephrased half, because the unseen half rewards guessing.


# %%
COMPLETE = "COMPLETE"  # written last and by rename: a checkpoint without it was cut short and is never resumed from


class AnswerTrainer(Trainer):
    """`Trainer` with packed answer-only loss and a held-out loss for each novelty."""

    def __init__(
        self, *args, held_out: dict[str, list[Encoded]], hardware: Hardware, row_tokens: int, pad_id: int, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.held_out, self.hardware, self.row_tokens, self.pad_id = held_out, hardware, row_tokens, pad_id
        self.model_accepts_loss_kwargs = True  # count supervised tokens over the whole step
        self.loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Not by the Trainer's bf16 flag: that wraps the model's forward for good, and evaluation would stay in 16 bits.
        with self.hardware.autocast():
            loss = answer_loss(model, inputs, num_items_in_batch)
        # The count is global while gradients are averaged over processes: undo the average.
        return loss * self.accelerator.num_processes

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        metrics = {}
        for novelty, encoded in self.held_out.items():
            losses = score_losses(self.model, encoded, self.hardware, row_tokens=self.row_tokens, pad_id=self.pad_id)
            metrics[f"{metric_key_prefix}_{novelty}"] = math.log(perplexity(losses))
        halves = [metrics.get(f"{metric_key_prefix}_{name}") for name in ("rephrased", "unseen")]
        metrics[f"{metric_key_prefix}_loss"] = next(loss for loss in halves if loss is not None)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model, trial):
        # Older checkpoints may go only once this one is whole, on every process, and says so.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            plan = {"pairs": self.args.per_device_train_batch_size, "checkpointing": self.args.gradient_checkpointing}
            write_atomic(folder / COMPLETE, json.dumps({"versions": package_versions(), "micro_batch": plan}))
            rotate_checkpoints(self.args.output_dir, keep, self.state.best_model_checkpoint, use_mtime=True)

    def _load_best_model(self):
        best = Path(self.state.best_model_checkpoint)
        if not best.exists() and not self.args.should_save:
            return  # another machine keeps the checkpoints, and its first process goes on alone
        if not (best / COMPLETE).exists():
            raise ArcivaError(
                f"the best checkpoint {best} is gone, expected it until training ends; train again with resume=never"
            )
        super()._load_best_model()


def step_number(checkpoint: Path | None) -> int:
    """Optimiser step of a `checkpoint-<step>` folder, 0 for none."""
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end; incomplete ones are named and passed over."""
    for checkpoint in sorted(Path(folder).glob("checkpoint-*"), key=step_number, reverse=True):
        if (checkpoint / COMPLETE).exists():
            return checkpoint
        print(f"{checkpoint} is incomplete, a save was cut short there; an earlier one is used")
    return None


# %% [markdown]
# The loss curve is drawn while training runs, from the same history that ends up in `reports/loss.csv` and `reports/loss.png`.


# %%
INK, ACCENT, WARM, MUTED = "#1f2933", "#1a7f5a", "#c2571a", "#8a94a0"


def plot_loss(history: Sequence[dict]) -> Figure:
    """Training and held-out loss (nats per supervised token) over optimiser steps, each curve named at its end."""
    figure, axes = plt.subplots(figsize=(7.5, 3.6), dpi=110, layout="constrained")
    curves = {
        "loss": ("training", INK),
        "eval_rephrased": ("held-out, rephrased", ACCENT),
        "eval_unseen": ("held-out, unseen", WARM),
    }
    for key, (name, color) in curves.items():
        points = [(h["step"], h[key]) for h in history if key in h]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                linewidth=1.2 if key == "loss" else 1.8,
                marker="" if key == "loss" else "o",
                markersize=3.5,
            )
            axes.annotate(
                name, points[-1], xytext=(6, 0), textcoords="offset points", color=color, va="center", fontsize=9
            )
    axes.set(xlabel="optimiser step", ylabel="loss (nats per answer token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.22)
    return figure


class LossHistory(TrainerCallback):
    """Keeps what the trainer logs and, in a notebook, redraws the curve at every point."""

    def __init__(self, live: bool):
        self.live, self.display, self.history = live, None, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.history = [h for h in state.log_history if "loss" in h or "eval_loss" in h]
        if self.live and self.history:
            from IPython.display import display

            figure = plot_loss(self.history)
            if self.display is None:
                self.display = display(figure, display_id=True)
            else:
                self.display.update(figure)
            plt.close(figure)


# %% [markdown]
# A machine that is taken away sends SIGTERM first. The next step boundary then saves a checkpoint and training ends with `Interrupted`
# instead of a half-trained model that later stages would take for a whole one; the scripts exit with 143, and the same command goes on.


# %%
class StopOnSignal(TrainerCallback):
    """Turns SIGTERM into a checkpoint and an early end at the next optimiser step."""

    def __init__(self):
        self.received, self.previous = False, None

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there alone
            self.previous = signal.signal(signal.SIGTERM, self.receive)
        return self

    def __exit__(self, *_) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

    def receive(self, *_) -> None:
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():  # the signal reaches each process at a step of its own; all stop at one
            anyone = torch.tensor(self.received, dtype=torch.int32, device=args.device)
            torch.distributed.all_reduce(anyone, torch.distributed.ReduceOp.MAX)
            self.received = bool(anyone)
        if self.received:
            control.should_save = control.should_training_stop = True


# %%
@dataclass(frozen=True)
class TrainingResult:
    """What training did. The model itself carries the best adapter."""

    history: list[dict]  # one dict per logged point: step, epoch, and loss or eval_*
    best_step: int
    best_loss: float  # held-out loss on rephrased questions (unseen ones where there are none), nats per answer token
    steps: int
    seconds: float
    tokens_per_second: float  # prompt and answer tokens, no padding
    resumed_from: int  # optimiser step, 0 for a fresh run
    plan: MemoryPlan
    checkpoints: Path  # of this run, to be removed once the adapter is saved


def base_fingerprint(base_model: str) -> str | None:
    """Hash of a local base's config and weight headers, by which an adapter recognises its base; None for a hub id."""
    if not Path(base_model).is_dir():
        return None
    digest = hashlib.sha256((Path(base_model) / "config.json").read_bytes())
    for file in sorted(Path(base_model).glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]


def run_fingerprint(config: Config, encoded: Sequence[Encoded]) -> str:
    """Names a training run by what determines its weights: data, settings and package versions."""
    irrelevant = set(
        "report_to resume max_new_tokens generation_batch max_eval_rows merge_base log_every data compare_to".split()
    )
    settings = {
        k: v
        for k, v in asdict(config).items()
        if k not in irrelevant and not k.endswith("_dir") and not k.startswith("min_")
    }
    base = base_fingerprint(config.base_model)
    digest = hashlib.sha256(json.dumps([settings, package_versions(), base], sort_keys=True).encode())
    for item in encoded:
        digest.update(np.array(item.input_ids + item.labels, dtype=np.int64).tobytes())
    return digest.hexdigest()[:12]


def training_arguments(
    config: Config, hardware: Hardware, plan: MemoryPlan, folder: Path, pairs: int, *, bars: bool
) -> TrainingArguments:
    """Our settings in the Trainer's words."""
    steps_per_epoch = math.ceil(pairs / config.pairs_per_step)
    _, processes = process_rank()
    steps = math.ceil(steps_per_epoch * config.epochs)
    every = max(1, min(steps, steps_per_epoch // config.evaluations_per_epoch))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=plan.micro_batch_pairs,
        gradient_accumulation_steps=config.pairs_per_step // processes // plan.micro_batch_pairs,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        weight_decay=0.0,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        logging_steps=config.log_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        gradient_checkpointing=plan.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        fp16=hardware.dtype == torch.float16,  # for its loss scaling
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting where it was
        ddp_find_unused_parameters=False,
        use_cpu=hardware.device == "cpu",
        dataloader_pin_memory=hardware.device == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=not bars,
        report_to=config.report_to,
        seed=config.seed,
    )
    # A process has one GPU. Left alone, the Trainer multiplies the batch by all it sees, and a 4-bit model uses one of them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


# %%
def encode_held_out(tokenizer, dataset: datasets.Dataset, max_length: int) -> dict[str, list[Encoded]]:
    """The validation side's pairs by novelty; a half that has none is left out, and named."""
    encoded, indices, too_long = encode_split(tokenizer, dataset, max_length)
    name_too_long(too_long, "validation", max_length)
    halves = {"rephrased": [], "unseen": []}
    for item, i in zip(encoded, indices, strict=True):
        halves[dataset[i]["novelty"]].append(item)
    if not encoded:
        raise ArcivaError(f"no validation rows of at most {max_length} tokens; add data or raise max_length")
    if not halves["rephrased"]:
        print(
            "no held-out question asks for what training teaches, so the best checkpoint is the best on unseen ones; "
            "rows that rest on the same knowledge should have the same fact_ids"
        )
    return {name: items for name, items in halves.items() if items}


def ended(checkpoint: Path, patience: int) -> TrainerState | None:
    """The state of a run whose training was over with this checkpoint; None where there is more to do."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stopper = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    stopped = stopper.get("early_stopping_patience_counter", 0) >= patience
    return state if stopped or state.global_step >= state.max_steps else None


def train_until_it_fits(
    make_trainer: Callable[[MemoryPlan], AnswerTrainer], model, plan: MemoryPlan, folder: Path, config: Config
) -> tuple[AnswerTrainer, MemoryPlan, int]:
    """(trainer after training, plan that fitted, step that a former run had reached); goes on from the newest checkpoint.

    Each time memory runs out, the next smaller plan goes on from the newest checkpoint, or from the untrained adapter.
    """
    untrained = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    checkpoint = newest_checkpoint(folder) if config.resume == "auto" else None
    resumed_from = step_number(checkpoint)
    if checkpoint:
        plan = plan_of_checkpoint(checkpoint, plan, config.pairs_per_step // process_rank()[1])
    while True:
        trainer = make_trainer(plan)
        if checkpoint:
            print(f"going on from step {step_number(checkpoint):,} of an interrupted run ({checkpoint})")
            if state := ended(checkpoint, config.patience):
                trainer.state = state
                trainer._load_best_model()
                return trainer, plan, resumed_from
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return trainer, plan, resumed_from
        except torch.OutOfMemoryError:
            if process_rank()[1] > 1:  # the others wait for this one's gradients
                raise
        # Outside the except block, whose traceback would keep the failed step's tensors alive.
        plan = smaller_plan(plan, config)
        print(f"out of memory: going on with {plan}")
        model.load_state_dict(untrained, strict=False)
        model.zero_grad()
        del trainer
        release_memory()
        checkpoint = newest_checkpoint(folder)


def train_adapter(
    model,
    tokenizer,
    splits: datasets.DatasetDict,
    config: Config,
    hardware: Hardware,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train the adapter of `model` on the training split and leave the best held-out one in it.

    Checkpoints go to `checkpoint_dir/<run_fingerprint>/checkpoint-<step>` and stay until `save_adapter` has written the result;
    raises `Interrupted` after a SIGTERM.
    """
    train_encoded, _, too_long = encode_split(tokenizer, splits["train"], config.max_length)
    name_too_long(too_long, "training", config.max_length)
    folder = Path(config.checkpoint_dir) / run_fingerprint(config, train_encoded)
    if config.resume == "never" and process_rank()[0] == 0:
        shutil.rmtree(folder, ignore_errors=True)
    plan = agreed_plan(plan_for(unwrap(model).config, train_encoded, config, hardware, loaded=True), hardware)
    held_out = encode_held_out(tokenizer, splits["validation"], config.max_length)
    live, stop = LossHistory(live=running_in_notebook()), StopOnSignal()

    def make_trainer(plan: MemoryPlan) -> AnswerTrainer:
        trainer = AnswerTrainer(
            model=model,
            args=training_arguments(config, hardware, plan, folder, len(train_encoded), bars=not live.live),
            train_dataset=train_encoded,
            eval_dataset=splits["validation"],
            data_collator=lambda batch: collate_packed(batch, config.row_tokens, tokenizer.pad_token_id),
            callbacks=[live, EarlyStoppingCallback(config.patience), stop, *callbacks],
            held_out=held_out,
            hardware=hardware,
            row_tokens=config.row_tokens,
            pad_id=tokenizer.pad_token_id,
        )
        if live.live:
            trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        return trainer

    started = time.perf_counter()
    with stop:
        trainer, plan, resumed_from = train_until_it_fits(make_trainer, model, plan, folder, config)
    state = trainer.state
    if stop.received and state.global_step < state.max_steps:
        raise Interrupted(
            f"stopped by SIGTERM at step {state.global_step:,} of {state.max_steps:,}; the same command goes on from there"
        )
    if state.best_model_checkpoint is None and process_rank()[0] == 0:
        shutil.rmtree(folder, ignore_errors=True)  # or the same command would go on to the same end
        raise ArcivaError("training diverged: no held-out loss was a number; train again with a lower learning_rate")
    seconds, steps = time.perf_counter() - started, state.global_step - resumed_from
    mean_tokens = sum(len(item.input_ids) for item in train_encoded) / len(train_encoded)
    trainer.accelerator.wait_for_everyone()
    return TrainingResult(
        history=[h for h in state.log_history if "loss" in h or "eval_loss" in h],
        best_step=state.best_global_step or state.global_step,
        best_loss=state.best_metric,
        steps=state.global_step,
        seconds=seconds,
        tokens_per_second=mean_tokens * steps * config.pairs_per_step / seconds,
        resumed_from=resumed_from,
        plan=plan,
        checkpoints=folder,
    )


# %% tags=["active-ipynb"]
# model = add_adapter(load_base_model(config, hardware), config)
# print(f"{sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())} layers in 4 bits", end=", ")
# print(f"{model.get_memory_footprint() / 2**20:,.0f} MiB for weights and adapter; ", end="")
# model.print_trainable_parameters()
# training = train_adapter(model, tokenizer, splits, config, hardware)

# %% tags=["active-ipynb"]
# print(
#     f"{training.steps:,} steps in {training.seconds:,.0f} s, {training.tokens_per_second:,.0f} tokens/s without padding"
# )
# print(
#     f"best held-out loss {training.best_loss:.3f} nats per token at step {training.best_step:,}: perplexity {math.exp(training.best_loss):.2f}"
# )
# print(training.plan)

# %% [markdown]
# Both held-out curves should fall first. Afterwards they part: the rephrased one stays low, because the facts behind it are in
# training, while the unseen one rises once the model is sure of what it knows. A rephrased curve that rises is overfitting, and the
# run goes back to the best checkpoint.


# %%
def data_fingerprint(splits: datasets.DatasetDict) -> str:
    """A hash of every row of every side, in order."""
    digest = hashlib.sha256()
    for side, dataset in splits.items():
        for row in dataset:
            digest.update(json.dumps([side, row["id"], row["messages"]], ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def check_split(splits: datasets.DatasetDict, config: Config) -> None:
    """Refuse to judge an adapter on another split than it was trained on: what is held out here it may have read."""
    if read_manifest(config.output_dir)["data_fingerprint"] != data_fingerprint(splits):
        raise ArcivaError(
            f"the adapter in {config.output_dir} was trained on other data or with another seed than {config.data}, seed {config.seed}; name its own"
        )


def save_adapter(
    model: PeftModel, tokenizer, training: TrainingResult, splits: datasets.DatasetDict, config: Config
) -> Path:
    """Write adapter, tokenizer with its chat template, and manifest to `output_dir`, all or nothing.

    The run's checkpoints go then: what is left of them would only be resumed by mistake.
    """
    with atomic_folder(Path(config.output_dir)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        manifest = {
            "config": asdict(config),
            "versions": package_versions(),
            "data_fingerprint": data_fingerprint(splits),
            "base_model": config.base_model,
            "base_revision": getattr(unwrap(model).config, "_commit_hash", None),
            "base_fingerprint": base_fingerprint(config.base_model),
            "quantized_from": str(detect_hardware().load_dtype).removeprefix("torch."),
            "training": {k: v for k, v in asdict(training).items() if k not in ("history", "checkpoints")},
        }
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=2))
    shutil.rmtree(training.checkpoints, ignore_errors=True)
    return Path(config.output_dir)


def adapter_fingerprint(output_dir: str) -> str | None:
    """Hash of the adapter's weights, by which a report knows whom it judges; None where there is none."""
    file = Path(output_dir) / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None


def write_loss(history: Sequence[dict], reports_dir: str) -> None:
    """`loss.csv` and `loss.png` of a training history."""
    folder = Path(reports_dir)
    write_atomic(folder / "loss.csv", pd.DataFrame(history).to_csv(index=False))
    figure = plot_loss(history)
    figure.savefig(folder / "loss.png")
    plt.close(figure)


def read_manifest(folder: str) -> dict:
    """The manifest of an adapter or merged folder."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise ArcivaError(
            f"no manifest.json in {folder}: expected the folder of a finished run; train first, or give its path"
        )
    return json.loads(path.read_text(encoding="utf-8"))


# %%
def load_tuned_model(config: Config, hardware: Hardware) -> tuple[PeftModel, object]:
    """(model, tokenizer) from a finished run's adapter folder; the base must be the one it was trained on."""
    manifest = read_manifest(config.output_dir)
    trained_on, given = manifest["base_model"], config.base_model
    known, found = manifest.get("base_fingerprint"), base_fingerprint(given)
    if ((known or found) and known != found) or (not known and trained_on != given):
        raise ArcivaError(
            f"the adapter in {config.output_dir} was trained on {trained_on}, not on {given}; name that base model or train again"
        )
    model = PeftModel.from_pretrained(load_base_model(config, hardware), config.output_dir)
    for module in model.modules():
        module.requires_grad_(False)
    silent = [name for name, p in model.named_parameters() if "lora_B" in name and not p.any()]
    if silent:
        raise ArcivaError(
            f"{len(silent)} adapter matrices in {config.output_dir} are zero, such as {silent[0]}: not a trained adapter"
        )
    return model.eval(), load_tokenizer(config.output_dir)


# %% tags=["active-ipynb"]
# adapter_folder = save_adapter(model, tokenizer, training, splits, config)
# write_loss(training.history, config.reports_dir)
# print(*sorted(f"{p.stat().st_size / 2**20:8.2f} MiB  {p}" for p in adapter_folder.iterdir()), sep="\n")

# %% [markdown]
# ## 5. Metrics
#
# The untuned base stands beside the tuned model in everything below: it is the same network with its adapter switched off. Answers
# are decoded greedily and in batches. What all prompts share, the system prompt, is read once; padding stands before what they do not
# share, with explicit positions; and finished answers leave the batch, so that one long answer does not keep the others computing.
# 4-bit weights are dequantised once per call, where memory holds them, and not once per token.


# %%
@dataclass(frozen=True)
class Answer:
    """A generated answer; `cut` when it reached the length limit before its end-of-turn token."""

    text: str
    cut: bool
    tokens: int


@contextlib.contextmanager
def unpacked_weights(model, hardware: Hardware) -> Iterator[None]:
    """Within, 4-bit layers multiply by weights dequantised once instead of at every token: the same numbers, sooner.

    Four times the memory, so only where that is at most half of what is free; otherwise nothing changes.
    """
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    needed = sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in layers)
    if needed > free_memory_gib(hardware) * 2**30 / 2:
        layers = []
    for layer in layers:
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
        layer.forward = functools.partial(multiply, weight, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def multiply(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """What a 4-bit layer computes, from its dequantised weight: in the weight's format, handed on in the inputs'."""
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)


def stop_token_ids(tokenizer) -> list[int]:
    """Tokens that end an answer: the end-of-turn token that training supervised, and the tokenizer's eos."""
    end_of_turn = encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).labels[
        -1
    ]
    return sorted({end_of_turn, tokenizer.eos_token_id} - {None})


PREFILL_ROWS = 32


def read_prompts(
    model, prompts: Sequence[list[int]], hardware: Hardware, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
    """(next-token logits (n, vocabulary), mask (n, longest), cache) of prompts.

    What they all begin with is read once. The rest is read a few at a time, where neighbours in a sorted list need little padding; it
    is padded on its left, so between what is shared and what is not. A sliding window counts padding: such models share nothing.
    """
    beginning = DynamicCache(config=unwrap(model).config)
    shared, most = 0, 0 if len(prompts) == 1 or any(beginning.is_sliding) else min(map(len, prompts)) - 1
    while shared < most and len({p[shared] for p in prompts}) == 1:
        shared += 1
    if shared:
        ids = torch.tensor([prompts[0][:shared]], device=hardware.device)
        model(input_ids=ids, past_key_values=beginning, use_cache=True, logits_to_keep=1)
    logits, masks, caches = [], [], []
    for at in range(0, len(prompts), PREFILL_ROWS):
        part = [p[shared:] for p in prompts[at : at + PREFILL_ROWS]]
        width = max(map(len, part))
        ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in part], device=hardware.device)
        mask = [[1] * shared + [0] * (width - len(p)) + [1] * len(p) for p in part]
        masks.append(torch.tensor(mask, device=hardware.device))
        caches.append(copy.deepcopy(beginning))
        caches[-1].batch_repeat_interleave(len(part))
        output = model(
            input_ids=ids,
            attention_mask=masks[-1],
            position_ids=(masks[-1].cumsum(-1) - 1).clamp(min=0)[:, shared:],
            past_key_values=caches[-1],
            use_cache=True,
            logits_to_keep=1,
        )
        logits.append(output.logits[:, -1])
    width, whole = max(mask.shape[1] for mask in masks), DynamicCache(config=unwrap(model).config)
    for i, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        padded = [[F.pad(t, (0, 0, width - t.shape[-2], 0)) for t in (layer.keys, layer.values)] for layer in layers]
        whole.update(*(torch.cat(tensors) for tensors in zip(*padded, strict=True)), i)
    return torch.cat(logits), torch.cat([F.pad(mask, (width - mask.shape[1], 0)) for mask in masks]), whole


@torch.inference_mode()
def generate_batch(
    model, prompts: Sequence[list[int]], hardware: Hardware, *, max_new_tokens: int, stop: Sequence[int], pad_id: int
) -> list[list[int]]:
    """Greedy continuation ids of each prompt, its stop token included where it came."""
    logits, mask, cache = read_prompts(model, prompts, hardware, pad_id)
    positions, stops = mask.sum(-1, keepdim=True), torch.tensor(stop, device=hardware.device)
    alive, written = torch.arange(len(prompts)), [[] for _ in prompts]
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=hardware.device)
    for count in range(1, max_new_tokens + 1):
        ids = logits.argmax(-1, keepdim=True)
        for row, token, over in zip(alive.tolist(), ids[:, 0].tolist(), ended.tolist(), strict=True):
            if not over:
                written[row].append(token)
        ended |= torch.isin(ids[:, 0], stops)
        if count == max_new_tokens or ended.all():
            break
        # Leaving copies the cache: it pays for a sixteenth of the rows, not for one.
        if 16 * ended.sum() >= len(ended):
            going = ~ended
            cache.batch_select_indices(going.nonzero()[:, 0])
            ids, mask, positions, ended = ids[going], mask[going], positions[going], ended[going]
            alive = alive[going.cpu()]
        mask = F.pad(mask, (0, 1), value=1)
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits, positions = output.logits[:, -1], positions + 1
    return written


def generate_answers(
    model, tokenizer, prompts: Sequence, hardware: Hardware, *, max_new_tokens: int, batch_size: int
) -> list[Answer]:
    """Answers to questions or conversations, in their order; batched by length, the same at any batch size."""
    was_training = model.training
    model.eval()
    stop, pad_id = stop_token_ids(tokenizer), tokenizer.pad_token_id
    encoded = [encode_prompt(tokenizer, p) for p in prompts]
    order, answers = sorted(range(len(encoded)), key=lambda i: len(encoded[i])), [None] * len(encoded)
    with evaluation_precision(model, hardware), unpacked_weights(model, hardware):
        for at in range(0, len(order), batch_size):
            chunk = order[at : at + batch_size]
            written = generate_batch(
                model, [encoded[i] for i in chunk], hardware, max_new_tokens=max_new_tokens, stop=stop, pad_id=pad_id
            )
            for i, ids in zip(chunk, written, strict=True):
                ended = bool(ids) and ids[-1] in stop
                text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()
                answers[i] = Answer(text, cut=not ended, tokens=len(ids))
    model.train(was_training)
    return answers


@contextlib.contextmanager
def untuned(model) -> Iterator[None]:
    """The base model: the same weights with the adapter switched off."""
    with model.disable_adapter():
        yield


# %% [markdown]
# One table holds all that the report, the suites and the dashboard need: each answer is generated once. A sample of training rows is
# answered too, to be looked at; it enters no held-out figure.


# %%
def sample_rows(dataset: datasets.Dataset, limit: int, seed: int) -> list[int]:
    """At most `limit` row indices, chosen by hash and in the data's order."""
    order = sorted(range(len(dataset)), key=lambda i: fraction(seed, "sample", dataset[i]["id"]))
    return sorted(order[:limit])


def predict_split(model, tokenizer, dataset: datasets.Dataset, config: Config, hardware: Hardware) -> pd.DataFrame:
    """One row per example: question, reference, and for base and tuned the answer, its flags and the reference's loss."""
    encoded, indices, too_long = encode_split(tokenizer, dataset, config.max_length)
    name_too_long(too_long, "held-out or sampled", config.max_length)
    rows = [dataset[i] for i in indices]
    frame = pd.DataFrame([{k: r[k] for k in ("id", "novelty", "language", "topic", "kind", "style")} for r in rows])
    conversations = [r["messages"][:-1] for r in rows]
    frame["question"] = [c[-1]["content"] for c in conversations]
    frame["reference"] = [r["messages"][-1]["content"] for r in rows]
    for who in ("base", "tuned"):
        with untuned(model) if who == "base" else contextlib.nullcontext():
            losses = score_losses(model, encoded, hardware, row_tokens=config.row_tokens, pad_id=tokenizer.pad_token_id)
            answers = generate_answers(
                model,
                tokenizer,
                conversations,
                hardware,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.generation_batch,
            )
        frame[f"{who}_answer"] = [a.text for a in answers]
        frame[f"{who}_cut"] = [a.cut for a in answers]
        frame[f"{who}_nll"], frame["answer_tokens"] = losses[:, 0], losses[:, 1].astype(int)
    return frame


def predict(model, tokenizer, splits: datasets.DatasetDict, config: Config, hardware: Hardware) -> pd.DataFrame:
    """Predictions on both held-out sides and on a sample of the training side, with a `split` column."""
    frames = []
    for side, limit in (
        ("validation", config.max_eval_rows),
        ("test", config.max_eval_rows),
        ("train", min(40, config.max_eval_rows)),
    ):
        dataset = splits[side].select(sample_rows(splits[side], limit, config.seed))
        frames.append(predict_split(model, tokenizer, dataset, config, hardware).assign(split=side))
    return pd.concat(frames, ignore_index=True)


# %% tags=["active-ipynb"]
# started = time.perf_counter()
# predictions = predict(model, tokenizer, splits, config, hardware)
# print(f"{2 * len(predictions):,} answers in {time.perf_counter() - started:.0f} s")
# predictions.query("split == 'test' and novelty == 'rephrased'")[
#     ["question", "reference", "base_answer", "tuned_answer"]
# ].head(4)

# %% [markdown]
# BLEU and chrF come from sacrebleu, with its signature in the report. ROUGE-L comes from rouge-score, but not with its default tokenizer, which
# deletes every letter beyond a–z: *Größe* would become *gr e*. Three of them are also `evaluate.Metric`s, which drop into any
# script of the field; nothing is fetched from the hub. Beneath them lie sums per question ("statistics") that add up to the corpus
# figure; resampling the questions and adding again is the bootstrap.


# %%
class UnicodeWords:
    """Tokenizer for rouge-score: words of any script, case-folded, no stemming."""

    def tokenize(self, text: str) -> list[str]:
        return normalise(text).split()


ROUGE = rouge_scorer.RougeScorer(["rougeL"], tokenizer=UnicodeWords())
BLEU, CHRF = sacrebleu.BLEU(), sacrebleu.CHRF()
SENTENCE_BLEU = sacrebleu.BLEU(effective_order=True)


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), in [0, 1]."""
    return ROUGE.score(reference, prediction)["rougeL"].fmeasure


def exact_match(prediction: str, reference: str) -> float:
    """1.0 where both are equal after normalisation, else 0.0."""
    return float(normalise(prediction) == normalise(reference))


def corpus_statistics(metric, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(n, k) sufficient statistics per question of a sacrebleu metric; summed, they give the corpus score."""
    # sacrebleu's own significance tests use these two private methods; its public API has no other way to resample.
    return np.array(metric._extract_corpus_statistics(list(predictions), [list(references)]), dtype=float)


def corpus_score(metric, summed: np.ndarray) -> float:
    """Corpus score in [0, 100] from summed statistics."""
    return metric._compute_score_from_stats([round(x) for x in summed]).score


# %%
class AnswerMetric(evaluate.Metric):
    """Base of the three metrics below: strings in, a number out, nothing fetched."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=type(self).__doc__, citation="", features=features)


class CorpusBleu(AnswerMetric):
    """sacrebleu's corpus BLEU (13a) and chrF2, both in [0, 100]."""

    def _compute(self, predictions, references):
        return {
            "bleu": BLEU.corpus_score(predictions, [references]).score,
            "chrf": CHRF.corpus_score(predictions, [references]).score,
        }


class UnicodeRougeL(AnswerMetric):
    """Mean ROUGE-L F-measure over Unicode words, in [0, 1]."""

    def _compute(self, predictions, references):
        return {"rouge_l": float(np.mean([rouge_l(p, r) for p, r in zip(predictions, references, strict=True)]))}


class NormalisedExactMatch(AnswerMetric):
    """Share of answers equal to their reference after normalisation, in [0, 1]."""

    def _compute(self, predictions, references):
        return {
            "exact_match": float(np.mean([exact_match(p, r) for p, r in zip(predictions, references, strict=True)]))
        }


# %% [markdown]
# A figure without its uncertainty invites wrong decisions at a hundred questions a group. Every metric below comes with a 95 %
# bootstrap interval over questions, and base and tuned are compared **paired**, on the same resampled questions: the share of
# questions won, tied and lost, and the p-value of the paired bootstrap test (Koehn 2004).


# %%
@dataclass(frozen=True)
class MetricSpec:
    """How a metric adds up: statistics per question → one figure."""

    name: str
    better: Literal["higher", "lower", "neither"]
    statistics: Callable[[pd.DataFrame, str], np.ndarray]  # (frame, "base" | "tuned") → (n, k)
    figure: Callable[[np.ndarray], float]  # (k,) summed → figure


def mean_of(column: Callable[[pd.DataFrame, str], Sequence[float]]) -> Callable[[pd.DataFrame, str], np.ndarray]:
    """Statistics of a plain mean: the value and a one."""
    return lambda frame, who: np.stack([np.asarray(column(frame, who), dtype=float), np.ones(len(frame))], axis=1)


def ratio(summed: np.ndarray) -> float:
    return float(summed[0] / summed[1])


def pairwise(metric: Callable[[str, str], float]) -> Callable[[pd.DataFrame, str], list[float]]:
    return lambda frame, who: [metric(p, r) for p, r in zip(frame[f"{who}_answer"], frame["reference"], strict=True)]


def sacrebleu_spec(name: str, metric) -> MetricSpec:
    return MetricSpec(
        name,
        "higher",
        lambda f, who: corpus_statistics(metric, f[f"{who}_answer"], f["reference"]),
        lambda s: corpus_score(metric, s),
    )


METRICS = (
    MetricSpec(
        "perplexity",
        "lower",
        lambda f, who: f[[f"{who}_nll", "answer_tokens"]].to_numpy(float),
        lambda s: math.exp(min(700.0, ratio(s))),
    ),
    MetricSpec(
        "bits_per_byte",
        "lower",
        lambda f, who: np.stack([f[f"{who}_nll"] / math.log(2), f["reference"].str.encode("utf-8").str.len()], axis=1),
        ratio,
    ),
    sacrebleu_spec("bleu", BLEU),
    sacrebleu_spec("chrf", CHRF),
    MetricSpec("rouge_l", "higher", mean_of(pairwise(rouge_l)), ratio),
    MetricSpec("exact_match", "higher", mean_of(pairwise(exact_match)), ratio),
    MetricSpec("cut_off", "lower", mean_of(lambda f, who: f[f"{who}_cut"]), ratio),
    MetricSpec("answer_words", "neither", mean_of(lambda f, who: f[f"{who}_answer"].str.split().str.len()), ratio),
)


# %%
def resampling_weights(questions: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, questions): how often each question is drawn in each bootstrap sample."""
    return np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), size=resamples)


def compare(frame: pd.DataFrame, spec: MetricSpec, weights: np.ndarray) -> dict:
    """Base and tuned figures with 95 % intervals, questions won, tied and lost, and the paired p-value."""
    result, samples, single = {}, {}, {}
    for who in ("base", "tuned"):
        statistics = spec.statistics(frame, who)
        samples[who] = np.array([spec.figure(s) for s in weights @ statistics])
        single[who] = np.array([spec.figure(s) for s in statistics])
        low, high = np.percentile(samples[who], [2.5, 97.5])
        result[who] = {"value": spec.figure(statistics.sum(0)), "low": float(low), "high": float(high)}
    if spec.better != "neither":
        gain = (single["tuned"] - single["base"]) * (1 if spec.better == "higher" else -1)
        delta = samples["tuned"] - samples["base"]
        observed = result["tuned"]["value"] - result["base"]["value"]
        extreme = np.abs(delta - delta.mean()) >= abs(observed)
        result["paired"] = {
            "won": float((gain > 1e-9).mean()),
            "tied": float((np.abs(gain) <= 1e-9).mean()),
            "lost": float((gain < -1e-9).mean()),
            "p_value": float((extreme.sum() + 1) / (len(delta) + 1)),
        }
    return result


def score_group(frame: pd.DataFrame, seed: int, resamples: int) -> dict:
    """All metrics of one group of questions."""
    weights = resampling_weights(len(frame), resamples, seed)
    return {"questions": len(frame), **{spec.name: compare(frame, spec, weights) for spec in METRICS}}


# %%
def score_predictions(predictions: pd.DataFrame, seed: int) -> dict:
    """The report's figures: per held-out split and novelty, and over both held-out sides by language, topic, kind and style."""
    held_out = predictions[predictions["split"] != "train"]
    groups = {
        f"{split}/{novelty}": score_group(g, seed, 1000)
        for (split, novelty), g in held_out.groupby(["split", "novelty"])
    }
    slices = {}
    for column in ("language", "topic", "kind", "style"):
        for (novelty, value), g in held_out.groupby(["novelty", column]):
            slices.setdefault(column, {}).setdefault(value, {})[novelty] = score_group(g, seed, 100)
    return {"groups": groups, "by": slices}


def build_report(predictions: pd.DataFrame, config: Config) -> dict:
    """`reports/metrics.json`, schema version 1. `adapter` is the hash of the judged weights.

    `groups`: "split/novelty" → metric → {base, tuned: {value, low, high}, paired: {won, tied, lost, p_value}}; `by`: the same
    for both held-out sides together, by language, topic, kind and style (intervals there from 100 resamples, else 1,000).
    """
    return {
        "schema_version": 1,
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "config": asdict(config),
        "adapter": adapter_fingerprint(config.output_dir),
        "versions": package_versions(),
        "signatures": {
            "bleu": str(BLEU.get_signature()) if BLEU.corpus_score(["a"], [["a"]]) else "",
            "chrf": str(CHRF.get_signature()) if CHRF.corpus_score(["a"], [["a"]]) else "",
            "rouge_l": f"rouge-score {importlib.metadata.version('rouge-score')}, F-measure, Unicode words, case-folded, no stemming",
        },
        "decoding": {"greedy": True, "max_new_tokens": config.max_new_tokens},
        **score_predictions(predictions, config.seed),
    }


def report_table(
    report: dict, metrics: Sequence[str] = ("perplexity", "bleu", "chrf", "rouge_l", "exact_match", "cut_off")
) -> pd.DataFrame:
    """Base beside tuned with intervals, one line per held-out group and metric."""
    lines = []
    for group, scores in report["groups"].items():
        for name in metrics:
            base, tuned, paired = scores[name]["base"], scores[name]["tuned"], scores[name]["paired"]
            lines.append(
                {
                    "group": group,
                    "questions": scores["questions"],
                    "metric": name,
                    **{
                        who: f"{x['value']:.3g} [{x['low']:.3g}, {x['high']:.3g}]"
                        for who, x in (("base", base), ("tuned", tuned))
                    },
                    "won / tied / lost": f"{paired['won']:.0%} / {paired['tied']:.0%} / {paired['lost']:.0%}",
                    "p": f"{paired['p_value']:.3f}",
                }
            )
    return pd.DataFrame(lines).set_index(["group", "questions", "metric"])


# %% tags=["active-ipynb"]
# report = build_report(predictions, config)
# print(report["signatures"]["bleu"])
# report_table(report)

# %% [markdown]
# The same answers through `evaluate`'s interface, without intervals: BLEU must be the table's figure for the tuned model.

# %% tags=["active-ipynb"]
# rephrased = predictions.query("split == 'test' and novelty == 'rephrased'")
# CorpusBleu().compute(predictions=list(rephrased["tuned_answer"]), references=list(rephrased["reference"]))

# %% [markdown]
# Read the rephrased rows first: that is the assistant doing its job. Tuned perplexity near 1 with a high ROUGE-L means it found the
# fact behind a new wording; a low perplexity with a low ROUGE-L means fluent answers about the wrong fact. On the unseen rows a
# model that knows what it does not know would refuse; a nano base cannot, and its figures there only show how much is
# guesswork. `cut_off` should fall to nearly zero: a model that keeps talking was not taught to stop.


# %%
def save_predictions(predictions: pd.DataFrame, report: dict, reports_dir: str) -> None:
    """`predictions.jsonl`, `metrics.json` and `metrics.csv`; suites and dashboard of an earlier model do not stay beside them."""
    folder = Path(reports_dir)
    for name in ("suites.json", "suites_base.jsonl", "suites_tuned.jsonl", "dashboard.html", "dashboard.csv"):
        (folder / name).unlink(missing_ok=True)
    write_atomic(folder / "predictions.jsonl", predictions.to_json(orient="records", lines=True, force_ascii=False))
    write_atomic(folder / "metrics.json", json.dumps(report, indent=1))
    write_atomic(folder / "metrics.csv", report_table(report).to_csv())


def load_predictions(reports_dir: str) -> pd.DataFrame:
    """The predictions of an earlier evaluation."""
    path = Path(reports_dir) / "predictions.jsonl"
    if not path.is_file():
        raise ArcivaError(f"no {path}: expected the predictions of an evaluation; run the evaluate stage first")
    return pd.read_json(
        path,
        lines=True,
        convert_dates=False,
        dtype={"question": str, "reference": str, "base_answer": str, "tuned_answer": str},
    )


def load_report(reports_dir: str, *, missing_ok: bool = False) -> dict | None:
    """`metrics.json` of an earlier evaluation."""
    path = Path(reports_dir) / "metrics.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    if missing_ok:
        return None
    raise ArcivaError(f"no {path}: expected the report of an evaluation; run the evaluate stage first")


# %% tags=["active-ipynb"]
# save_predictions(predictions, report, config.reports_dir)

# %% [markdown]
# ## 6. Evaluation Suites
#
# Averages hide what a support team needs to know: does it name the right button, does it hold its ground when a question assumes
# something false? Suites are data files in `data/suites/`, each item with its own checks. Without suite
# files beside the notebook this section is skipped, with a message.

# %%
DENIAL = {
    "en": r"\b(no|not|none|cannot|can't|never|without|isn't|doesn't|nothing|neither|only|nowhere|lacks?)\b",
    "de": r"\b(nein|nicht|nichts|kein\w*|nie|niemals|ohne|weder|nur|nirgends|fehlt)\b",
}
OUTSIDE = r"\b(outside|beyond|only help|only answer|cannot help|can't help|can only|not something|außerhalb|nicht helfen|nur bei|nur zu|nur fragen|kann ich nicht|nichts sagen)\b"


class SuiteItem(BaseModel):
    """One question of a suite with the checks its answer must pass."""

    model_config = ConfigDict(extra="forbid")

    id: str
    suite: Literal["checklists", "probes"]
    capability: str
    type: Literal[
        "minimum", "invariance", "directional", "absent", "premise", "number", "other-product", "out-of-domain", "twin"
    ]
    language: Literal["en", "de"]
    prompt: str
    gold: str  # an answer that passes
    expect: Literal["answer", "deny", "decline"]  # a fact, that there is none, or that it is out of scope
    must: list[list[str]] = []  # each group needs one of its strings in the answer
    must_not: list[str] = []
    same_as: str | None = None  # invariance: must pass exactly where that item passes
    answer_language: Literal["en", "de"] | None = None
    steps: bool | None = None  # directional: whether the answer is a numbered list
    twin: str | None = None  # probes: the answerable question beside this one
    held_out: bool = False  # probes: no training row of the shipped corpora rests on these facts, at the default seed
    fact_ids: list[str] = []


def load_suites(folder: str = "data/suites") -> list[SuiteItem]:
    """Items of every suite file; an empty list, and a line that says so, where there are none."""
    files = suite_files(folder)
    if not files:
        print(f"no suites in {folder}: this section is skipped; the repository carries them")
    items, problems = [], []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").strip().split("\n"), 1):
            try:
                items.append(SuiteItem.model_validate_json(line))
            except ValidationError as error:
                problems.append(f"{file.name}, line {number}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}")
    if problems:
        raise ArcivaError(f"{len(problems)} bad suite items:\n  " + "\n  ".join(problems))
    return items


# %%
def denies(answer: str, language: str) -> bool:
    """Whether the first sentence says that something is not there."""
    return bool(re.search(DENIAL[language], re.split(r"(?<=[.!?])\s", answer.strip())[0], re.IGNORECASE))


def unsupported_claims(answer: str, vocabulary: str, prompt: str = "") -> list[str]:
    """Quoted labels, shortcuts and numbers of an answer that neither the knowledge nor the question contains."""
    claims = re.findall(r'"([^"\n]{2,80})"', answer)
    claims += re.findall(r"\b(?:Ctrl|Cmd|Strg|Alt|Shift)\+\w+", answer)
    claims += re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?![\w.]*\.\s)", re.sub(r"(?m)^\s*\d+\.\s", "", answer))
    known = vocabulary + "\n" + prompt
    return [c for c in dict.fromkeys(claims) if c not in known]


def failures(item: SuiteItem, answer: str) -> list[str]:
    """Why an answer fails an item; an empty list is a pass. `same_as` is judged over all items, in `run_suite`."""
    language, found = item.answer_language or item.language, []
    if not answer.strip():
        return ["empty"]
    if item.expect == "deny" and not denies(answer, language):
        found.append("does not say that it is not there")
    if item.expect == "decline" and not re.search(OUTSIDE, answer, re.IGNORECASE):
        found.append("does not decline")
    if item.expect == "answer" and re.search(OUTSIDE, answer, re.IGNORECASE):
        found.append("declines an answerable question")
    text = normalise(answer)
    found += [f"lacks {' or '.join(group)}" for group in item.must if not any(normalise(m) in text for m in group)]
    found += [f"says {word}" for word in item.must_not if normalise(word) in text]
    if item.answer_language and guess_language(answer) != item.answer_language:
        found.append(f"is not in {item.answer_language}")
    if item.steps is not None and bool(re.search(r"(?m)^\s*1[.)]\s", answer)) != item.steps:
        found.append("is not a numbered list" if item.steps else "is a numbered list")
    return found


def run_suite(items: Sequence[SuiteItem], answer: Callable[[list[str]], list[str]], vocabulary: str) -> pd.DataFrame:
    """One row per item: its answer, whether it passed and why not, and how many claims the knowledge does not support.

    `answer` maps prompts to answers: a model, a merged folder or a served endpoint.
    """
    answers = answer([item.prompt for item in items])
    reasons = {item.id: failures(item, text) for item, text in zip(items, answers, strict=True)}
    rows = []
    for item, text in zip(items, answers, strict=True):
        found = list(reasons[item.id])
        if item.same_as and bool(found) != bool(reasons.get(item.same_as)):
            found.append(f"differs in outcome from {item.same_as}")
        unsupported = unsupported_claims(text, vocabulary, item.prompt)
        rows.append(
            {
                **item.model_dump(),
                "answer": text,
                "passed": not found,
                "reasons": "; ".join(found),
                "unsupported": len(unsupported),
            }
        )
    return pd.DataFrame(rows)


# %%
def suite_matrix(results: pd.DataFrame) -> pd.DataFrame:
    """Pass rate of each capability and type of item."""
    return results.pivot_table(index="capability", columns="type", values="passed", aggfunc="mean")


def hallucination_summary(results: pd.DataFrame) -> dict[str, float]:
    """False answers to probes and false refusals of their answerable twins, together: shares in [0, 1].

    Refusing everything gives no false answer and only false refusals; `balanced_accuracy` is then one half. On `held_out` probes a
    model was never told that the thing is missing: they show whether it learned to say no, or which things to say no to.
    """
    probes = results[(results["suite"] == "probes")]
    twins, traps = probes[probes["type"] == "twin"], probes[probes["type"] != "twin"]
    false_answer, false_refusal = 1 - traps["passed"].mean(), 1 - twins["passed"].mean()
    return {
        "probes": len(traps),
        "twins": len(twins),
        "false_answer": float(false_answer),
        "false_answer_held_out": float(1 - traps[traps["held_out"]]["passed"].mean()),
        "false_refusal": float(false_refusal),
        "balanced_accuracy": float(1 - (false_answer + false_refusal) / 2),
        "unsupported_per_answer": float(results["unsupported"].mean()),
    }


# %%
def knowledge_vocabulary(examples: Sequence[Example], folder: str = "data/knowledge") -> str:
    """All that an answer may quote: the knowledge's labels where the repository is present, and every reference answer."""
    index = next((p for p in (Path(folder), REPOSITORY / folder) if (p / "facts.yaml").is_file()), None)
    labels = (index / "facts.yaml").read_text(encoding="utf-8") if index else ""
    return labels + "\n".join(e.messages[-1]["content"] for e in examples)


def answerer(model, tokenizer, config: Config, hardware: Hardware) -> Callable[[list[str]], list[str]]:
    """The model as a function from prompts to answers."""
    limits = {"max_new_tokens": config.max_new_tokens, "batch_size": config.generation_batch}
    return lambda prompts: [a.text for a in generate_answers(model, tokenizer, prompts, hardware, **limits)]


def run_suites(
    model, tokenizer, items: Sequence[SuiteItem], vocabulary: str, config: Config, hardware: Hardware
) -> dict[str, pd.DataFrame]:
    """Results of base and tuned on the same items."""
    answer = answerer(model, tokenizer, config, hardware)
    results = {"tuned": run_suite(items, answer, vocabulary)}
    with untuned(model):
        results["base"] = run_suite(items, answer, vocabulary)
    return results


def save_suites(suites: dict[str, pd.DataFrame], reports_dir: str) -> None:
    """`suites.json` (rates by suite, capability and type, probes together) and `suites_<who>.jsonl` (every answer)."""
    summary = {}
    for who, results in suites.items():
        write_atomic(
            Path(reports_dir) / f"suites_{who}.jsonl", results.to_json(orient="records", lines=True, force_ascii=False)
        )
        summary[who] = {
            "passed": results.groupby("suite")["passed"].mean().to_dict(),
            "probes": hallucination_summary(results),
            "matrix": json.loads(suite_matrix(results).to_json(orient="index")),
        }
    write_atomic(Path(reports_dir) / "suites.json", json.dumps(summary, indent=1))


def load_suite_results(reports_dir: str) -> dict[str, pd.DataFrame] | None:
    """Suite results of an earlier evaluation; None where it ran without suites."""
    files = {who: Path(reports_dir) / f"suites_{who}.jsonl" for who in ("tuned", "base")}
    if not all(file.is_file() for file in files.values()):
        return None
    return {who: pd.read_json(file, lines=True, convert_dates=False) for who, file in files.items()}


# %% tags=["active-ipynb"]
# suite_items = load_suites()
# suites = (
#     run_suites(model, tokenizer, suite_items, knowledge_vocabulary(examples), config, hardware) if suite_items else None
# )
# if suites:
#     save_suites(suites, config.reports_dir)

# %% tags=["active-ipynb"]
# pd.DataFrame({who: hallucination_summary(results) for who, results in suites.items()}) if suites else "no suites"

# %% [markdown]
# Read false answers and false refusals together: a model that refuses everything has none of the former and all of the latter, and its
# balanced accuracy is one half. A nano base stays below that: it neither refuses nor answers reliably. The matrix below shows the share of passed items by capability and type of check.

# %% tags=["active-ipynb"]
# suite_matrix(suites["tuned"]).style.format("{:.0%}", na_rep="") if suites else "no suites"

# %% [markdown]
# ### Whether it ships
#
# Thresholds turn the figures into a decision. None is set by default; a team sets its own, and names the reports of the model it
# has accepted last. The comparison is paired on the questions that both have answered, and a metric counts as worse only where
# the paired bootstrap's p-value is below 0.05.


# %%
def paired_with(accepted_dir: str, config: Config) -> tuple[pd.DataFrame, list[MetricSpec]]:
    """Rephrased test questions that both models answered, with the accepted one as `base`, and the metrics that compare them."""
    accepted, own = load_predictions(str(folder_of(accepted_dir))), load_predictions(config.reports_dir)
    own = own.query("split == 'test' and novelty == 'rephrased'").drop(columns=["base_answer", "base_cut", "base_nll"])
    columns = {f"tuned_{part}": f"base_{part}" for part in ("answer", "cut", "nll")}
    theirs = accepted[["question", "reference", "answer_tokens", *columns]].rename(columns=columns)
    frame = own.merge(theirs, on=["question", "reference"], suffixes=("", "_accepted"))
    if len(frame) < 20:
        raise ArcivaError(
            f"{accepted_dir} shares {len(frame)} rephrased test questions with this run, expected 20 or more; name reports on the same data and seed"
        )
    same_tokens = bool((frame["answer_tokens"] == frame["answer_tokens_accepted"]).all())
    comparable = [s for s in METRICS if s.better != "neither" and (s.name != "perplexity" or same_tokens)]
    return frame, comparable


def report_of_adapter(config: Config, *, missing_ok: bool = False) -> dict | None:
    """The report on the adapter in `output_dir`; another adapter's counts as none."""
    report = load_report(config.reports_dir, missing_ok=missing_ok)
    if report and report.get("adapter") != adapter_fingerprint(config.output_dir):
        if missing_ok:
            return None
        raise ArcivaError(
            f"the report in {config.reports_dir} judges another adapter than {config.output_dir} holds; run the evaluate stage"
        )
    return report


def shortfalls(config: Config) -> list[str]:
    """Why the evaluated model must not ship, one sentence each; an empty list accepts it."""
    asked = thresholds(config)
    if not asked and not config.compare_to:
        return []
    scores = report_of_adapter(config)["groups"].get("test/rephrased")
    if scores is None:
        raise ArcivaError("no rephrased test questions, expected some for the thresholds; give rows fact_ids")
    reached = {f"min_{name}": scores[name]["tuned"]["value"] for name in ("bleu", "rouge_l", "exact_match")}
    reached["min_won"] = scores["rouge_l"]["paired"]["won"] + scores["rouge_l"]["paired"]["tied"] / 2
    if {"min_checklists", "min_balanced_accuracy"} & set(asked):
        suites = load_suite_results(config.reports_dir)
        if suites is None:
            raise ArcivaError(
                f"no suite results in {config.reports_dir}, expected them for the thresholds on suites; evaluate with data/suites"
            )
        tuned = suites["tuned"]
        reached["min_checklists"] = float(tuned[tuned["suite"] == "checklists"]["passed"].mean())
        reached["min_balanced_accuracy"] = hallucination_summary(tuned)["balanced_accuracy"]
    found = [
        f"{k.removeprefix('min_')} is {reached[k]:.3g}, below {v:g}" for k, v in asked.items() if not reached[k] >= v
    ]
    if config.compare_to:
        frame, comparable = paired_with(config.compare_to, config)
        weights = resampling_weights(len(frame), 1000, config.seed)
        for spec in comparable:
            result = compare(frame, spec, weights)
            then, now, chance = result["base"]["value"], result["tuned"]["value"], result["paired"]["p_value"]
            if (now < then if spec.better == "higher" else now > then) and chance < 0.05:
                found.append(
                    f"{spec.name} went from {then:.3g} to {now:.3g} (p {chance:.3f}) against {config.compare_to}"
                )
    return found


def refuse_shortfalls(config: Config) -> None:
    """End the run with one sentence where a threshold is missed."""
    if found := shortfalls(config):
        raise ArcivaError(
            f"not accepted: {'; '.join(found)}; see {config.reports_dir}, then train longer, or on more, or lower the threshold"
        )


# %% tags=["active-ipynb"]
# refuse_shortfalls(config)
# print("accepted by every threshold" if thresholds(config) or config.compare_to else "no threshold is set")

# %% [markdown]
# ## 7. Interactive Dashboard
#
# Figures say how good the model is; the worst answers say why. Scoring and showing are kept apart: `rate_generations` adds a score
# per answer, the rest only displays.


# %%
def rate_generations(predictions: pd.DataFrame) -> pd.DataFrame:
    """The predictions with ROUGE-L, chrF, BLEU (sentence level) and perplexity of each answer, base and tuned."""
    rated = predictions.copy()
    for who in ("base", "tuned"):
        pairs = list(zip(rated[f"{who}_answer"], rated["reference"], strict=True))
        rated[f"{who}_rouge_l"] = [rouge_l(p, r) for p, r in pairs]
        rated[f"{who}_chrf"] = [CHRF.sentence_score(p, [r]).score for p, r in pairs]
        rated[f"{who}_bleu"] = [SENTENCE_BLEU.sentence_score(p, [r]).score for p, r in pairs]
        rated[f"{who}_exact_match"] = [exact_match(p, r) for p, r in pairs]
        rated[f"{who}_perplexity"] = np.exp(np.minimum(700.0, rated[f"{who}_nll"] / rated["answer_tokens"]))
    return rated


def best_and_worst(rated: pd.DataFrame, metric: str = "tuned_rouge_l", count: int = 5) -> pd.DataFrame:
    """The `count` best and worst answers of each split and novelty by one metric, best first."""
    lower_is_better = metric.endswith("perplexity")
    picked = []
    for _, group in rated.groupby(["split", "novelty"]):
        ordered = group.sort_values([metric, "id"], ascending=[lower_is_better, True])
        best, worst = ordered.head(count), ordered.iloc[max(count, len(ordered) - count) :]
        picked += [best.assign(rank="best"), worst.assign(rank="worst")]
    return pd.concat(picked, ignore_index=True)


SHOWN = [
    "split",
    "novelty",
    "rank",
    "topic",
    "language",
    "question",
    "reference",
    "base_answer",
    "tuned_answer",
    "tuned_rouge_l",
    "tuned_perplexity",
]


# %% [markdown]
# Colab has a table of its own, to sort and filter; Jupyter gets widgets, which a committed notebook does not keep: on GitHub the
# table after the next paragraph stands in for them.


# %%
def show_table(frame: pd.DataFrame) -> None:
    """A sortable, filterable table: Colab's DataTable, ipywidgets in Jupyter, a pandas preview anywhere else."""
    from IPython.display import display

    if in_colab():
        from google.colab import data_table

        display(data_table.DataTable(frame, include_index=False, num_rows_per_page=10))
    elif running_in_notebook() and importlib.util.find_spec("ipywidgets"):
        display(filter_widgets(frame))
    else:
        display(frame)


def filter_widgets(frame: pd.DataFrame):
    """Dropdowns for split, novelty, rank, language and sort order, and a search box, above the matching rows."""
    import ipywidgets as widgets
    from IPython.display import display

    menus = {
        name: widgets.Dropdown(options=["all", *sorted(frame[name].unique())], description=name)
        for name in ("split", "novelty", "rank", "language")
    }
    order = widgets.Dropdown(
        options=[c for c in frame.columns if pd.api.types.is_numeric_dtype(frame[c])], description="sort by"
    )
    falling = widgets.Checkbox(value=False, description="highest first")
    search = widgets.Text(description="search", placeholder="words in question or answer")
    output = widgets.Output()

    def refresh(_=None) -> None:
        chosen = frame
        for name, menu in menus.items():
            chosen = chosen if menu.value == "all" else chosen[chosen[name] == menu.value]
        if search.value:
            text = chosen[["question", "reference", "tuned_answer"]].agg(" ".join, axis=1)
            chosen = chosen[text.str.contains(search.value, case=False, regex=False)]
        with output:
            output.clear_output(wait=True)
            display(styled_table(chosen.sort_values(order.value, ascending=not falling.value).head(25)))

    for control in (*menus.values(), order, falling, search):
        control.observe(refresh, "value")
    refresh()
    return widgets.VBox([widgets.HBox([*menus.values()]), widgets.HBox([order, falling, search]), output])


def styled_table(frame: pd.DataFrame):
    """The frame as an escaped, wrapped HTML table: answers are a model's output and are never trusted."""
    from IPython.display import HTML

    return HTML(
        frame.style.format(precision=2, escape="html")
        .hide(axis="index")
        .set_properties(**{"white-space": "pre-wrap", "text-align": "left", "vertical-align": "top"})
        .to_html()
    )


# %% [markdown]
# The page that leaves the notebook is one HTML file with its data inside: it opens offline, in a mail, in Jupyter and in Colab. Its template
# lies in the repository; a notebook without it writes the CSV alone and says so. Answers are hostile input, so nothing of them
# reaches the page unescaped.


# %%
NOSCRIPT_ROWS, NOSCRIPT_TEXT = 300, 200
PAGE_COLUMNS = (
    "id",
    "split",
    "novelty",
    "language",
    "question",
    "reference",
    "base_answer",
    "tuned_answer",
    "tuned_rouge_l",
)


def plain(value):
    """`value` in JSON's own types: NumPy scalars unpacked, NaN and infinities as null, anything unknown as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def script_json(data: dict) -> str:
    """ASCII JSON that cannot end its script element; non-ASCII, U+2028 and U+2029 too, comes out as \\u escapes."""
    text = json.dumps(plain(data), ensure_ascii=True, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


# %%
def html_table(caption: str, columns: Sequence[str], rows: list[list]) -> str:
    """An escaped table with shortened cells."""

    def cell(value, tag="td") -> str:
        text = f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
        shown = text if len(text) <= NOSCRIPT_TEXT else text[:NOSCRIPT_TEXT] + " …"
        return f"<{tag}>{html.escape(shown.encode('utf-8', 'replace').decode())}</{tag}>"

    lines = ["".join(cell(c, "th") for c in columns), *("".join(map(cell, row)) for row in rows)]
    return f"<table><caption>{html.escape(caption)}</caption><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def render_page(data: dict, template: str) -> str:
    """The template with its title, its data and, for readers without scripts, two plain tables filled in."""
    rows, columns = data["rows"], ["group", "questions", "metric", "base", "tuned"]
    summary = [[*(x[c] for c in columns[:3]), x["base"]["value"], x["tuned"]["value"]] for x in data["summary"]]
    caption = f"The first {min(len(rows), NOSCRIPT_ROWS)} of {len(rows)} answers, shortened; scripts are off."
    answers = html_table(caption, PAGE_COLUMNS, [[r.get(c) for c in PAGE_COLUMNS] for r in rows[:NOSCRIPT_ROWS]])
    parts = {"TITLE": html.escape(data["title"]), "TABLE": html_table("Summary", columns, summary) + answers}
    # One pass, so that a placeholder within the data stays text.
    pattern = r"<!--ARCIVA_(TITLE|TABLE)-->|/\*ARCIVA_DATA\*/"
    return re.sub(pattern, lambda match: parts[match[1]] if match[1] else script_json(data), template)


# %%
METRIC_LABELS = {
    "rouge_l": ("ROUGE-L", "higher", 2),
    "chrf": ("chrF", "higher", 1),
    "bleu": ("BLEU", "higher", 1),
    "exact_match": ("Exact match", "higher", 2),
    "perplexity": ("Perplexity", "lower", 2),
    "bits_per_byte": ("Bits per byte", "lower", 2),
    "cut_off": ("Cut off", "lower", 2),
}


def suite_rows(suites: dict[str, pd.DataFrame]) -> list[dict]:
    """Suite items with base and tuned answers side by side."""
    base = suites["base"][["id", "answer", "passed"]].rename(columns={"answer": "base_answer", "passed": "base_passed"})
    joined = suites["tuned"].rename(columns={"answer": "tuned_answer", "passed": "tuned_passed"}).merge(base, on="id")
    kept = [
        "id",
        "suite",
        "capability",
        "type",
        "language",
        "prompt",
        "reasons",
        "base_answer",
        "tuned_answer",
        "base_passed",
        "tuned_passed",
    ]
    return joined[kept].to_dict("records")


def dashboard_data(rated: pd.DataFrame, report: dict, suites: dict[str, pd.DataFrame] | None = None) -> dict:
    """What the page shows: summary with intervals, metrics, rows, and the suites' items where they ran."""
    summary = [
        {"group": group, "questions": scores["questions"], "metric": name, **scores[name]}
        for group, scores in report["groups"].items()
        for name in METRIC_LABELS
    ]
    nano = is_nano(report["config"]["base_model"])
    return {
        "title": "Arciva assistant: base beside tuned",
        "generated": report["created"],
        "note": "Nano base: this page proves the pipeline, not the assistant." if nano else None,
        "summary": summary,
        "metrics": [
            {"name": n, "label": label, "better": better, "digits": d}
            for n, (label, better, d) in METRIC_LABELS.items()
        ],
        "suites": {"items": suite_rows(suites)} if suites else None,
        "rows": rated.to_dict("records"),
    }


def write_dashboard(
    predictions: pd.DataFrame,
    report: dict,
    reports_dir: str,
    *,
    suites: dict[str, pd.DataFrame] | None = None,
    template: str = "tools/dashboard_template.html",
) -> pd.DataFrame:
    """Write `dashboard.csv` and, with the template, `dashboard.html`; returns every rated answer."""
    rated = rate_generations(predictions)
    write_atomic(Path(reports_dir) / "dashboard.csv", rated.to_csv(index=False))
    found = next((p for p in (Path(template), REPOSITORY / template) if p.is_file()), None)
    if found:
        page = render_page(dashboard_data(rated, report, suites), found.read_text(encoding="utf-8"))
        write_atomic(Path(reports_dir) / "dashboard.html", page)
    else:
        print(f"no {template} here: the table is in dashboard.csv; the page needs the repository's template")
    return rated


# %% tags=["active-ipynb"]
# rated = write_dashboard(predictions, report, config.reports_dir, suites=suites)
# chosen = best_and_worst(rated, "tuned_rouge_l", count=4)
# show_table(chosen[SHOWN])

# %% [markdown]
# The worst rephrased answers deserve the time. One about a neighbouring feature: add wordings of the fact it should have found. One
# that is cut off: look at the length limit. One that is right in other words: write it down as a second form of the answer.

# %% tags=["active-ipynb"]
# styled_table(
#     chosen.query("split == 'test' and novelty == 'rephrased'")[
#         ["rank", "question", "reference", "base_answer", "tuned_answer", "tuned_rouge_l"]
#     ]
# )

# %% [markdown]
# ## 8. fp16 Merge & Artifacts
#
# The adapter becomes part of the weights: $W' = W + \frac{\alpha}{r} B A$. The result loads with plain transformers, without peft
# or bitsandbytes. It is computed tensor by tensor over the safetensors files, in fp32 and cast once, so memory follows
# the largest tensor: peft's own merge needs the whole model.
#
# Which $W$? The adapter learnt beside weights that had been rounded to 4 bits; adding it to the unrounded ones gives a model
# that nobody has judged. The default repeats the rounding first, so that what is merged is what was measured;
# `merge_base="original"` does the other, and `benchmarks/merge.py --bases` measures both.


# %%
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Delta:
    """The low-rank update of one weight."""

    a: torch.Tensor  # (rank, in)
    b: torch.Tensor  # (out, rank)
    scale: float

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of scale · B A in fp32."""
        return self.scale * (self.b[start:stop].float() @ self.a.float())


def load_deltas(adapter_dir: str) -> dict[str, Delta]:
    """Weight name in the base → its update. Adapters that are more than plain LoRA are refused, as are non-finite ones."""
    folder = Path(adapter_dir)
    if not (folder / "adapter_config.json").is_file():
        raise ArcivaError(
            f"no adapter in {folder}: expected adapter_config.json and adapter_model.safetensors; train first"
        )
    lora = LoraConfig.from_pretrained(str(folder))
    beyond = [
        name for name in ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern") if getattr(lora, name, None)
    ]
    if beyond or lora.bias != "none" or lora.fan_in_fan_out:
        raise ArcivaError(
            f"the adapter in {folder} uses {beyond or 'biases'}, expected plain LoRA; merge it with peft instead"
        )
    scale = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
    deltas = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = file.keys()  # safe_open is no mapping: it cannot be iterated itself
        for key in (name for name in names if name.endswith("lora_A.weight")):
            a, b = file.get_tensor(key), file.get_tensor(key.replace("lora_A", "lora_B"))
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            if not (a.isfinite().all() and b.isfinite().all()):
                raise ArcivaError(
                    f"the adapter has infinite or undefined values in {name}; that run diverged: train again with a lower learning rate"
                )
            deltas[name] = Delta(a, b, scale)
    return deltas


# %%
def base_shards(base_model: str, revision: str | None) -> dict[str, Path]:
    """Tensor name → safetensors file of the base, from a folder or the hub's cache."""
    folder = Path(base_model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                base_model,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt"],
                ignore_patterns=["consolidated*"],  # the same weights once more, under other names
            )
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if not files:
        raise ArcivaError(f"{base_model} has no safetensors files; expected a base model in that format")
    shards = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            shards.update(dict.fromkeys(opened.keys(), file))
    return shards


def nf4_round_trip(pieces: Iterable[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """What a 4-bit layer computes with: quantised to NF4 with double quantisation from `dtype`, and back, in fp32.

    A tensor comes and goes in pieces of whole blocks of 64, so that bitsandbytes' own copies stay small. Double quantisation centres
    the scales of all blocks of a tensor: every piece is read before the first goes back.
    """
    quantised = [bnb.functional.quantize_4bit(piece.to(dtype).contiguous(), quant_type="nf4") for piece in pieces]
    absmax = torch.cat([state.absmax for _, state in quantised])
    offset = absmax.mean()
    scales, scale_state = bnb.functional.quantize_blockwise(absmax - offset, blocksize=256)
    absmax = (bnb.functional.dequantize_blockwise(scales, scale_state) + offset).float()
    parts = absmax.split([state.absmax.numel() for _, state in quantised])
    for (packed, state), part in zip(quantised, parts, strict=True):
        state.absmax = part
        yield bnb.functional.dequantize_4bit(packed, state).float()


def merged_rows(base: torch.Tensor, delta: Delta | None, rows: slice, name: str) -> torch.Tensor:
    """fp16 rows of base + delta, refused where fp16 cannot hold them."""
    merged = base.float() if delta is None else base.float() + delta.rows(rows.start, rows.stop)
    largest = merged.abs().max().item() if merged.numel() else 0.0
    if not largest <= FP16_MAX:  # also true for NaN
        raise ArcivaError(
            f"{name} reaches {largest:.3g}, beyond fp16's {FP16_MAX:.0f}; the run diverged: train again with a lower learning rate"
        )
    return merged.half()


# %% [markdown]
# A safetensors file is a header of names, shapes and offsets, then the bytes. All shapes are known beforehand, so the header is written
# first and tensors follow one by one, large ones in blocks of rows.


# %%
def plan_shards(shapes: dict[str, list[int]], limit: int) -> list[list[str]]:
    """Names grouped into files of at most `limit` bytes in fp16; a larger tensor has a file of its own."""
    groups, load = [[]], 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if groups[-1] and load + size > limit:
            groups.append([])
            load = 0
        groups[-1].append(name)
        load += size
    return groups


def write_safetensors(
    path: Path, shapes: dict[str, list[int]], rows_of: Callable[[str], Iterable[torch.Tensor]]
) -> None:
    """An fp16 safetensors file whose tensors arrive as blocks of rows; never more than one block in memory."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns data to 8 bytes
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in shapes:
            for block in rows_of(name):
                stream.write(memoryview(block.contiguous().numpy()).cast("B"))
        stream.flush()
        os.fsync(stream.fileno())


BLOCK_ELEMENTS = 1 << 24  # 16 M elements: 64 MiB in fp32


def stored_shapes(shards: dict[str, Path]) -> dict[str, list[int]]:
    """The shape of every tensor, by name and in its order."""
    shapes = {}
    for file in set(shards.values()):
        with safe_open(file, "pt") as opened:
            shapes |= {name: list(opened.get_slice(name).get_shape()) for name in shards if shards[name] == file}
    return dict(sorted(shapes.items()))


def read_rows(file: Path, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
    """A tensor of a safetensors file, or a range of its rows.

    The file is opened for each read: what was looked at through an open one stays in memory, up to the whole checkpoint.
    """
    with safe_open(file, "pt") as opened:
        return opened.get_slice(name)[start:stop]


def merge_tensors(
    shards: dict[str, Path],
    deltas: dict[str, Delta],
    folder: Path,
    *,
    round_trip: torch.dtype | None,
    shard_bytes: int = 4 << 30,
) -> int:
    """Write the merged fp16 weights to `folder`; returns their size in bytes. `round_trip` is the format NF4 was made from."""
    shapes = stored_shapes(shards)
    missing = sorted(set(deltas) - set(shapes))
    if missing:
        raise ArcivaError(
            f"the adapter changes {missing[0]}, which the base does not have; it belongs to another base model"
        )

    def rows_of(name: str) -> Iterator[torch.Tensor]:
        file, shape, delta = shards[name], shapes[name], deltas.get(name)
        if delta is not None and [delta.b.shape[0], delta.a.shape[1]] != shape:
            raise ArcivaError(
                f"the adapter's update of {name} does not have the base's shape {shape}; it belongs to another base model"
            )
        if len(shape) < 2:
            yield merged_rows(read_rows(file, name), None, slice(0, 1), name)
            return
        step = max(64, BLOCK_ELEMENTS // math.prod(shape[1:]) // 64 * 64)  # whole blocks of NF4's 64
        parts = [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
        blocks = (read_rows(file, name, rows.start, rows.stop) for rows in parts)
        if delta is not None and round_trip:
            blocks = nf4_round_trip(blocks, round_trip)
        for rows, block in zip(parts, blocks, strict=True):
            yield merged_rows(block, delta, rows, name)

    groups = plan_shards(shapes, shard_bytes)
    weight_map, total = {}, sum(2 * math.prod(s) for s in shapes.values())
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / file, {name: shapes[name] for name in names}, rows_of)
        weight_map.update(dict.fromkeys(names, file))
    if len(groups) > 1:
        write_atomic(
            folder / "model.safetensors.index.json",
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1),
        )
    return total


# %%
def merge_adapter(config: Config) -> Path:
    """`output_dir` + base → `merged_dir`: fp16 weights, config, tokenizer and manifest, all or nothing."""
    manifest = read_manifest(config.output_dir)
    deltas, known = load_deltas(config.output_dir), manifest.get("base_fingerprint")
    moved = known and known == base_fingerprint(config.base_model)
    base_model = config.base_model if moved else manifest["base_model"]
    if known and known != base_fingerprint(base_model):
        raise ArcivaError(
            f"{base_model} is not the base that {config.output_dir} was trained on; restore that base or train again"
        )
    shards = base_shards(base_model, manifest.get("base_revision") or config.revision)
    elements = sum(math.prod(shape) for shape in stored_shapes(shards).values())
    parents = Path(config.merged_dir).absolute().parents
    free = shutil.disk_usage(next(folder for folder in parents if folder.exists())).free
    if free < 2.05 * elements:
        raise ArcivaError(
            f"merging needs {2.05 * elements / 2**30:.1f} GiB on disk and {free / 2**30:.1f} GiB are free; free some or set merged_dir elsewhere"
        )
    round_trip = getattr(torch, manifest["quantized_from"]) if config.merge_base == "dequantized" else None
    with atomic_folder(Path(config.merged_dir)) as folder:
        size = merge_tensors(shards, deltas, folder, round_trip=round_trip)
        model_config = AutoConfig.from_pretrained(base_model, revision=manifest.get("base_revision") or config.revision)
        model_config.dtype = torch.float16
        model_config.save_pretrained(folder)
        load_tokenizer(config.output_dir).save_pretrained(folder)
        merged = {
            **manifest,
            "merge": {
                "base": config.merge_base,
                "bytes": size,
                "tensors": len(shards),
                "merged_tensors": len(deltas),
            },
        }
        write_atomic(folder / "manifest.json", json.dumps(merged, indent=2))
    return Path(config.merged_dir)


# %% tags=["active-ipynb"]
# started = time.perf_counter()
# merged_folder = merge_adapter(config)
# print(f"merged in {time.perf_counter() - started:.1f} s")
# print(*sorted(f"{p.stat().st_size / 2**20:8.2f} MiB  {p}" for p in merged_folder.iterdir()), sep="\n")

# %% [markdown]
# A merge must be checked. The merged folder is loaded the way a user would, without peft or bitsandbytes, and answers
# held-out questions beside the live adapter model: the largest difference between their next-token distributions, the share of equal
# greedy answers, and both perplexities. The figures go into the manifest.


# %%
@torch.inference_mode()
def prompt_logits(model, tokenizer, prompts: Sequence, hardware: Hardware) -> torch.Tensor:
    """(n, vocabulary) log-probabilities of the first answer token, in fp32 on the CPU."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=hardware.device)
        with evaluation_precision(model, hardware):
            rows.append(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu())
    return torch.stack(rows).log_softmax(-1)


def measure_model(model, tokenizer, rows: Sequence[dict], config: Config, hardware: Hardware) -> dict:
    """Next-token log-probabilities, greedy answers and perplexity on held-out rows, for comparing two models."""
    model.eval()
    prompts = [r["messages"][:-1] for r in rows]
    losses = score_losses(
        model,
        [encode(tokenizer, r["messages"]) for r in rows],
        hardware,
        row_tokens=config.row_tokens,
        pad_id=tokenizer.pad_token_id,
    )
    answers = generate_answers(
        model, tokenizer, prompts, hardware, max_new_tokens=config.max_new_tokens, batch_size=config.generation_batch
    )
    return {
        "logits": prompt_logits(model, tokenizer, prompts, hardware),
        "answers": [a.text for a in answers],
        "perplexity": perplexity(losses),
    }


def compare_models(live: dict, merged: dict) -> dict:
    """How far a merged model is from the live one it was made of."""
    if not math.isfinite(merged["perplexity"]):
        raise ArcivaError(
            "the merged model's perplexity is not a number: its activations overflow fp16; ship the adapter with its base instead"
        )
    kl = F.kl_div(merged["logits"], live["logits"], log_target=True, reduction="none").sum(-1)
    equal = [a == b for a, b in zip(live["answers"], merged["answers"], strict=True)]
    return {
        "questions": len(equal),
        "equal_answers": sum(equal) / len(equal),
        "equal_first_tokens": (live["logits"].argmax(-1) == merged["logits"].argmax(-1)).float().mean().item(),
        "mean_kl_nats": kl.mean().item(),
        "max_log_probability_difference": (live["logits"] - merged["logits"]).abs().max().item(),
        "perplexity_adapter": live["perplexity"],
        "perplexity_merged": merged["perplexity"],
    }


def load_merged_model(config: Config, hardware: Hardware):
    """(model, tokenizer) of the merged folder with plain transformers; computed in fp32 on a CPU.

    On a GPU in fp16, and what does not fit there (15 GB of a 7B model on a T4) is offloaded.
    """
    dtype = torch.float16 if hardware.device == "cuda" else torch.float32
    device_map = "auto" if hardware.device == "cuda" else {"": "cpu"}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.merged_dir, dtype=dtype, device_map=device_map, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ArcivaError(
            f"no model in {config.merged_dir!r}: expected a folder with config.json and safetensors; merge first, or give its path"
        ) from error
    return model.eval(), load_tokenizer(config.merged_dir)


def verification_rows(splits: datasets.DatasetDict, config: Config, count: int = 60) -> list[dict]:
    """Held-out test rows on which merged and live model are compared."""
    return [splits["test"][i] for i in sample_rows(splits["test"], count, config.seed)]


# %%
MODEL_CARD = """---
base_model: {base_model}
language: [en, de]
library_name: transformers
pipeline_tag: text-generation
tags: [qlora, merged, product-assistant]
---
# Arciva assistant

Answers questions about the Arciva photo library in English and German. {base_model}, fine-tuned with QLoRA (rank {rank}, NF4) and merged to fp16.
{nano}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
```

Prompts go through the chat template saved here, with the system prompt `{system}`.

## Evaluation

{table}

Intervals are 95 % bootstrap intervals over questions. *Rephrased*: the facts were in training, the wording was not. *Unseen*: the facts were not.

## The merge

{merge}

Trained on data with fingerprint `{data}`; every setting and package version stands in `manifest.json`.
"""


def write_model_card(config: Config, report: dict | None) -> None:
    """The Hub card beside the merged weights, written from the manifest and the report."""
    manifest = read_manifest(config.merged_dir)
    checks = manifest.get("verification", {})
    merge = (
        "\n".join(f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in checks.items()) or "Not verified yet."
    )
    nano = (
        "\nThe nano base proves the pipeline, not the assistant: do not use these weights to answer anybody.\n"
        if is_nano(manifest["base_model"])
        else ""
    )
    table = markdown_table(report)
    card = MODEL_CARD.format(
        base_model=manifest["base_model"],
        rank=manifest["config"]["rank"],
        nano=nano,
        folder=Path(config.merged_dir).name,
        system=SYSTEM_PROMPT,
        table=table,
        merge=merge,
        data=manifest["data_fingerprint"],
    )
    write_atomic(Path(config.merged_dir) / "README.md", card)


# %% tags=["active-ipynb"]
# rows = verification_rows(splits, config)
# live = measure_model(model, tokenizer, rows, config, hardware)
# del model  # a GPU that held it in 4 bits may not hold both
# release_memory()

# %% tags=["active-ipynb"]
# merged_model, merged_tokenizer = load_merged_model(config, hardware)
# verification = compare_models(live, measure_model(merged_model, merged_tokenizer, rows, config, hardware))
# pd.Series(verification, name="merged against live adapter").to_frame()

# %% [markdown]
# Equal answers should be near 100 % and both perplexities the same to three digits; what is left is fp16 rounding, which can
# tip a near-tie between two tokens. The card and the manifest record the figures.


# %%
def markdown_table(report: dict | None) -> str:
    """The report's main table in Markdown."""
    if report is None:
        return "Not evaluated yet."
    frame = report_table(report).reset_index()
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns), *lines])


def record_verification(config: Config, verification: dict, report: dict | None) -> None:
    """Add the comparison and the held-out figures to the merged manifest and write the model card."""
    manifest = read_manifest(config.merged_dir)
    manifest |= {"verification": verification, "metrics": report["groups"] if report else None}
    write_atomic(Path(config.merged_dir) / "manifest.json", json.dumps(manifest, indent=2))
    write_model_card(config, report)


# %% tags=["active-ipynb"]
# record_verification(config, verification, report)
# print(Path(config.merged_dir, "README.md").read_text(encoding="utf-8")[:700])

# %% [markdown]
# ### The whole run as a function
#
# `run_pipeline` is the stages of this notebook as one function. The scripts call it; any stage can be run later from what an earlier one left on disk.


# %%
STAGES = ("train", "evaluate", "dashboard", "merge")


def run_pipeline(
    config: Config, stages: Sequence[str] = STAGES, *, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Path]:
    """Run the stages in order; returns what was written where. Stages that are left out are read from disk.

    Of several processes all train, and the first alone writes and goes on with the other stages.
    """
    if process_rank()[0] > 0 and "train" not in stages:
        return {}
    hardware, written, model = detect_hardware(), {}, None
    check_acceptance(config)
    seed_everything(config.seed)
    if {"train", "evaluate", "merge"} & set(stages):
        examples, _ = load_examples(config.data)
        splits, _ = split_examples(examples, config.seed)
        if "train" not in stages:
            check_split(splits, config)
    if "train" in stages:
        tokenizer = load_tokenizer(config.base_model, config.revision)
        encoded, _, _ = encode_split(tokenizer, splits["train"], config.max_length)
        print(plan_for(model_shape(config, hardware), encoded, config, hardware, loaded=False))
        model = add_adapter(load_base_model(config, hardware), config)
        training = train_adapter(model, tokenizer, splits, config, hardware, callbacks=callbacks)
        if process_rank()[0] > 0:
            return {}  # gradients were shared; one process judges, shows and merges
        written["adapter"] = save_adapter(model, tokenizer, training, splits, config)
        write_loss(training.history, config.reports_dir)
    if "evaluate" in stages or "merge" in stages:
        model, tokenizer = (model, tokenizer) if model is not None else load_tuned_model(config, hardware)
    if "evaluate" in stages:
        predictions = predict(model, tokenizer, splits, config, hardware)
        report = build_report(predictions, config)
        save_predictions(predictions, report, config.reports_dir)
        print(report_table(report).to_string())
        written["report"] = Path(config.reports_dir) / "metrics.json"
        if items := load_suites():
            save_suites(
                run_suites(model, tokenizer, items, knowledge_vocabulary(examples), config, hardware),
                config.reports_dir,
            )
            written["suites"] = Path(config.reports_dir) / "suites.json"
    if "dashboard" in stages:
        predictions, report = load_predictions(config.reports_dir), load_report(config.reports_dir)
        write_dashboard(predictions, report, config.reports_dir, suites=load_suite_results(config.reports_dir))
        written["dashboard"] = next(
            p for n in ("dashboard.html", "dashboard.csv") if (p := Path(config.reports_dir) / n).is_file()
        )
    if {"evaluate", "merge"} & set(stages):
        refuse_shortfalls(config)
    if "merge" in stages:
        rows = verification_rows(splits, config)
        live = measure_model(model, tokenizer, rows, config, hardware)
        del model
        release_memory()
        written["merged model"] = merge_adapter(config)
        merged = measure_model(*load_merged_model(config, hardware), rows, config, hardware)
        record_verification(config, compare_models(live, merged), report_of_adapter(config, missing_ok=True))
    return written


# %%
def disk_full(error: Exception) -> bool:
    """Whether a write failed for want of space; safetensors says so in words only."""
    return getattr(error, "errno", None) == errno.ENOSPC or "(os error 28)" in str(error)


def run_main(run: Callable[[], dict[str, Path]]) -> int:
    """Exit code of a script's run: 0 with a summary, 2 after one sentence on what to put right, 143 when interrupted."""
    quieten_libraries()
    started = time.perf_counter()
    try:
        written = run()
    except ArcivaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 143
    except (OSError, SafetensorError) as error:
        if not disk_full(error):
            raise
        print("error: the disk is full; free some space, and the same command goes on", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError:
        print(
            "error: the GPU ran out of memory; lower micro_batch_pairs or max_length, or set USE_DEBUG_MODEL",
            file=sys.stderr,
        )
        return 2
    for name, path in written.items():
        print(f"{name:<14}{path}")
    print(f"{'finished in':<14}{time.perf_counter() - started:.0f} s")
    return 0


def run_with_defaults() -> dict[str, Path]:
    """The whole pipeline with the profile that fits this machine."""
    config, reason = configure(detect_hardware())
    print(reason)
    return run_pipeline(config)


if __name__ == "__main__" and not running_in_notebook():
    sys.exit(run_main(run_with_defaults))
