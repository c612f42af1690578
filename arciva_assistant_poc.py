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
# import shutil
# import sys
# import tempfile
# from importlib.metadata import PackageNotFoundError, version
# from pathlib import Path
#
# if sys.version_info < (3, 11):
#     raise RuntimeError(f"Python {sys.version.split()[0]} is too old, expected 3.11 or newer: choose another image")
# kept = {}
# for package in ("torch", "numpy", "pandas", "ipykernel", "ipywidgets", "jupyterlab"):
#     with contextlib.suppress(PackageNotFoundError):
#         kept[package] = version(package)
# if "torch" not in kept or tuple(int(part) for part in kept["torch"].split(".")[:2]) < (2, 6):
#     raise RuntimeError(f"torch is {kept.get('torch', 'missing')}, expected 2.6 or newer: choose another image")
# constraints = Path(tempfile.gettempdir()) / "arciva-constraints.txt"
# constraints.write_text("\n".join(f"{package}=={found}" for package, found in kept.items()))
#
# pins = (
#     "transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 accelerate==1.15.0 datasets==5.2.0 evaluate==0.4.6"
#     " rouge-score==0.1.2 sacrebleu==2.6.0 matplotlib==3.11.2 pydantic==2.14.3"
# )
# if shutil.which("nvidia-smi"):
#     pins += " liger-kernel==0.8.5"
# %pip install -q -c {constraints} {pins}
#
# for pin in pins.split():  # pip reports a conflict and goes on; what the image brought must not be taken for it
#     name, _, expected = pin.partition("==")
#     found = "missing"
#     with contextlib.suppress(PackageNotFoundError):
#         found = version(name)
#     if found != expected:
#         raise RuntimeError(
#             f"{name} is {found}, expected {expected}: see what pip says above, then restart and run again"
#         )
# with contextlib.suppress(PackageNotFoundError):
#     if tuple(int(part) for part in version("torchao").split(".")[:2]) < (0, 16):
#         %pip uninstall -q -y torchao
# %% [markdown]
# ## 2. Library Imports & Global Configuration
#
# All knobs live in one frozen `Config` that functions are given. A *profile* is a set of values for one size of base model,
# never another code path: the nano run does exactly what the 7B run does.
# %%
import base64
import contextlib
import copy
import errno
import functools
import gc
import hashlib
import html
import http.client
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import struct
import sys
import sysconfig
import tempfile
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
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from rouge_score import rouge_scorer
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    EarlyStoppingCallback,
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import is_liger_kernel_available

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
# (all linear layers, rank 16, 2e-4, small batches); those of *nano* were tried out on two CPU cores, where its four epochs take less
# than a minute.


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
    not_worse_than_base: bool = knob(False, "refuse a model that is worse than its untuned base, beyond chance")
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
        "epochs": 4.0,
        "learning_rate": 1e-3,
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
        """Kernel of the attention where answers are written, in transformers' words."""
        return "eager" if self.device == "cpu" else "sdpa"

    @property
    def packed_attention(self) -> str:
        """Kernel of the attention in packed rows, so in training."""
        return choose_packed_attention(self)[0]

    @property
    def attention_reason(self) -> str:
        """Why this kernel in packed rows."""
        return choose_packed_attention(self)[1]

    @property
    def liger(self) -> bool:
        """Whether Liger's kernels rotate and multiply gates in training."""
        return choose_liger(self)[0]

    @property
    def liger_reason(self) -> str:
        """Why, or why not."""
        return choose_liger(self)[1]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision where `dtype` is a 16-bit format; nothing in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)


VARLEN = "torch_varlen"  # torch's flash attention over pairs of any length, by which a packed row has no mask


def varlen_options() -> set[str]:
    """Names of what torch's attention over pairs of any length can be told; none before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return set()
    return set(inspect.signature(varlen_attn).parameters)


def choose_packed_attention(hardware: Hardware) -> tuple[str, str]:
    """Attention kernel of packed rows, with the reason; benchmarks/train_gpu.py measures the others beside it."""
    if hardware.device == "cpu":
        return hardware.attention, "on a CPU the fused kernel's block mask costs more than plain products do"
    if hardware.dtype != torch.bfloat16:
        return hardware.attention, "flash kernels for pairs of any length need compute capability 8.0"
    if "window_size" not in varlen_options():
        return hardware.attention, f"torch {torch.__version__} has no attention over pairs of any length, 2.11 has"
    return VARLEN, "packed pairs attend to themselves alone, where a mask would pay for whole rows"


def is_known(shape) -> bool:
    """Whether a model of this shape computes as the kernels for GPUs do: RMS norms, SiLU gates, plain causal attention."""
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return (
        shape.model_type in ("llama", "mistral", "qwen2")
        and shape.hidden_act == "silu"
        and not getattr(shape, "attention_dropout", 0.0)
        and size % 8 == 0
        and size <= 256  # torch's flash attention takes no other heads
    )


def packed_kernel(hardware: Hardware, shape) -> str:
    """The attention kernel of packed rows of a model of this shape."""
    return hardware.packed_attention if is_known(shape) else hardware.attention


def uses_liger(hardware: Hardware, shape) -> bool:
    """Whether Liger's kernels train a model of this shape."""
    return hardware.liger and is_known(shape)


def choose_liger(hardware: Hardware) -> tuple[bool, str]:
    """Whether training uses Liger's Triton kernels (https://github.com/linkedin/Liger-Kernel), with the reason."""
    if hardware.device == "cpu":
        return False, "Triton's kernels are a GPU's"
    if hardware.dtype != torch.bfloat16:
        return False, "nobody has measured them on a card without bf16 units"
    if not is_liger_kernel_available():
        return False, "liger-kernel is not installed; requirements-gpu.txt pins it"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not Path(sysconfig.get_path("include"), "Python.h").exists():
        return False, "Triton builds its kernels with a C compiler and Python.h; install gcc and python3-dev"
    return True, "rotation and gates in one kernel each: a tenth more tokens per second (benchmarks/README.md)"


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
    for name, wanted in Config.__annotations__.items():  # so that 2 and 2.0 epochs are one run
        if wanted in (float, float | None) and type(overrides.get(name)) is int:
            overrides[name] = float(overrides[name])
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
    for name, wanted in Config.__annotations__.items():  # HfArgumentParser changes the types that `fields` gives
        value = getattr(config, name)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ArcivaError(f"{name} is {value!r}, expected {getattr(wanted, '__name__', wanted)}")
    numbers = (
        "rank alpha epochs learning_rate pairs_per_step row_tokens max_length max_new_tokens evaluations_per_epoch patience"
        " log_every generation_batch max_eval_rows"
    )
    for name in numbers.split():
        if not 0 < getattr(config, name) < math.inf:
            raise ArcivaError(f"{name} is {getattr(config, name)}, expected a number above 0")
    upper = {"dropout": 1, "warmup": 1, "max_grad_norm": math.inf, "micro_batch_pairs": math.inf, "seed": 2**32}
    for name, limit in upper.items():
        if not 0 <= getattr(config, name) < limit:  # also refuses NaN
            most = f" and below {limit}" if limit < math.inf else ""
            raise ArcivaError(f"{name} is {getattr(config, name)}, expected 0 or more{most}")
    for name, value in thresholds(config).items():
        most = 100 if name == "min_bleu" else 1
        if not 0 <= value <= most:
            raise ArcivaError(f"{name} is {value}, expected a figure from 0 to {most}")
    check_folders(config)
    if config.report_to not in ("none", "tensorboard", "wandb"):
        raise ArcivaError(f"report_to is {config.report_to!r}, expected 'none', 'tensorboard' or 'wandb'")
    if config.report_to != "none" and not importlib.util.find_spec(config.report_to):
        raise ArcivaError(f"report_to is {config.report_to!r}, which is not installed; pip install {config.report_to}")
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


FOLDERS = ("output_dir", "merged_dir", "reports_dir", "checkpoint_dir")


def check_folders(config: Config) -> None:
    """Refuse an adapter or merged folder that could not be replaced as a whole without taking something else with it."""
    places = {name: Path(getattr(config, name)).expanduser().resolve() for name in FOLDERS}
    for name in ("output_dir", "merged_dir"):
        for other, place in {**places, "the working folder": Path.cwd()}.items():
            if name != other and place.is_relative_to(places[name]):
                raise ArcivaError(
                    f"{other} ({place}) lies in {name} ({places[name]}), expected a folder of its own; name another"
                )


def check_writable(config: Config) -> None:
    """Refuse, before any training, folders that its results could not be written to."""
    for name in FOLDERS:
        place = Path(getattr(config, name)).absolute()
        replaced = name in ("output_dir", "merged_dir")  # written beside its place and renamed
        folder = next(p for p in (place.parent if replaced else place, *place.parents) if p.exists())
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ArcivaError(
                f"cannot write {name} in {folder}: {error.strerror}; choose another folder or free its rights"
            ) from error


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


def settings_line(config: Config) -> str:
    """What training will do, in one line: the values that count after profile, switches and flags."""
    names = "rank alpha dropout epochs learning_rate pairs_per_step row_tokens max_length seed".split()
    values = {name: getattr(config, name) for name in names}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


# %% [markdown]
# Results appear under their final name only when they are whole: a folder or file is written beside its place and renamed.


# %%
def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    transformers.set_seed(seed)


def take_place(staging: Path, final: Path) -> None:
    """Give a finished folder its name; what had it before goes only then."""
    previous = final.with_name(f".{final.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if final.exists():
        final.rename(previous)
    staging.rename(final)
    shutil.rmtree(previous, ignore_errors=True)


def check_replaceable(final: Path, made: str = "manifest.json") -> None:
    """Refuse to replace a folder that is neither empty nor holds a file `made` (a pattern): it is no earlier run's."""
    if final.exists() and not (final.is_dir() and (any(final.glob(made)) or not any(final.iterdir()))):
        raise ArcivaError(
            f"{final} is there and holds no {made}, expected a new folder or an earlier run's; name another"
        )


@contextlib.contextmanager
def atomic_folder(final: Path, made: str = "manifest.json") -> Iterator[Path]:
    """Yield a temporary folder that takes the name `final` when the block ends without an error; else it is removed.

    A folder of that name goes only where `check_replaceable` finds an earlier run's.
    """
    final = Path(final).absolute()
    check_replaceable(final, made)
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
        take_place(staging, final)
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
# SETTINGS = {}  # any field of Config, before those above, as {"rank": 32, "merge_base": "original", "min_rouge_l": 0.4}
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
#     **dict(
#         use_debug_model=USE_DEBUG_MODEL,
#         base_model=BASE_MODEL,
#         data=DATA,
#         epochs=EPOCHS,
#         learning_rate=LEARNING_RATE,
#         max_length=MAX_LENGTH,
#         pairs_per_step=PAIRS_PER_STEP,
#         micro_batch_pairs=MICRO_BATCH_PAIRS,
#         log_every=LOG_EVERY,
#         output_dir=OUTPUT_DIR,
#         merged_dir=MERGED_DIR,
#         reports_dir=REPORTS_DIR,
#         checkpoint_dir=CHECKPOINT_DIR,
#         resume=RESUME,
#     )
#     | SETTINGS,
# )
# check_writable(config)
# check_acceptance(config)
# seed_everything(config.seed)

# %% tags=["active-ipynb"]
# print(f"{'hardware':<12}{hardware.name}, {hardware.memory_gib:.0f} GiB")
# print(f"{'format':<12}{str(hardware.dtype).removeprefix('torch.')}: {hardware.dtype_reason}")
# print(f"{'attention':<12}{hardware.packed_attention}: {hardware.attention_reason}")
# print(f"{'Liger':<12}{'on' if hardware.liger else 'off'}: {hardware.liger_reason}")
# print(f"{'base model':<12}{reason}")
# print(f"{'training':<12}{settings_line(config)}")
# print(f"{'packages':<12}{', '.join(f'{name} {version}' for name, version in package_versions().items())}")

# %% [markdown]
# The base-model line is the one to read first: on a GPU it should name the 7B model, and if it does not, it says why. The training
# line holds the values that count, after the profile's and those of the switches above.

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
        if any("\ud800" <= character <= "\udfff" for t in turns for character in t.content):
            raise ValueError("half of a character (a lone surrogate); expected valid Unicode")
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
        if not path.is_file() and (REPOSITORY / path).is_file():  # the shipped corpus, from another working directory
            path = REPOSITORY / path
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
        except (OSError, ValueError, http.client.HTTPException) as error:  # an address can be wrong in all these ways
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


def judges_the_model(row: Row) -> bool:
    """Whether a row is a dashboard's label of a held-out answer or suite item: trained on, it could not judge a model any more."""
    extra = row.model_extra or {}
    labelled = extra.get("source") == "dashboard" or (row.id or "").startswith("generation/")
    return labelled and (extra.get("split") != "train" or extra.get("suite") is not None)


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
            if judges_the_model(row):
                problems.append(
                    f"{path.name}, line {number}: labels a held-out answer or suite item, which must not be trained on; "
                    "tools/labeling.py import keeps it elsewhere"
                )
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
# pd.DataFrame([{"language": e.language, "topic": e.topic} for e in examples]).value_counts().unstack(0)

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
    known_rephrased: float  # the same over its rephrased half, which asks for what was taught


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
    halves = {
        half: [side if n in ("train", half) else "aside" for n, side in zip(novelty, kept, strict=True)]
        for half in ("unseen", "rephrased")
    }
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
        known_answers=leak_rates(examples, halves["unseen"], pairs)[1],
        known_rephrased=leak_rates(examples, halves["rephrased"], pairs)[1],
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
#     f"answer known in training  random split {split_report.naive_known_answers:6.1%}   this split {split_report.known_answers:6.1%}"
#     f" of the unseen half, {split_report.known_rephrased:.1%} of the rephrased one"
# )

# %% [markdown]
# The last line is why the split is not random. A random split gives the very answer of most held-out rows away and does not say of
# which; here the rephrased half asks for what was taught, on purpose, and nothing of the unseen half was. What that does to the
# figures is measured in `benchmarks/leak.py`.
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
    return with_bos_in_template(tokenizer)


def with_bos_in_template(tokenizer):
    """The tokenizer with a template that renders the BOS which the tokenizer itself would add.

    Servers render the saved template and add nothing: without this they would ask another way than was trained.
    """
    bos = tokenizer.bos_token
    rendered = render(tokenizer, [{"role": "user", "content": "a"}], add_generation_prompt=True)
    if bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and not rendered.startswith(bos):
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
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
# The base model is frozen in 4-bit NormalFloat (Dettmers et al. 2023, "QLoRA"); fp32 adapters on every linear layer learn.
# Three details decide whether that works. Norms are kept in fp32, while embeddings and head are not upcast: for a 7B model
# that would cost 2 GiB and buy nothing. On a CPU, bitsandbytes repacks weights for a fused kernel at the first evaluation and
# never unpacks them; that kernel has no gradient, so the path is switched off. And weights come from safetensors only.


# %%
@contextlib.contextmanager
def naming_the_model(config: Config, hardware: Hardware) -> Iterator[None]:
    """Turns what transformers raises for a wrong name, a missing file or a full GPU into one sentence."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
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
        shape = AutoConfig.from_pretrained(config.base_model, revision=config.revision)
    if getattr(shape, "quantization_config", None):
        raise ArcivaError(
            f"{config.base_model} is quantised already, expected 16- or 32-bit weights to merge into; name the original"
        )
    return shape


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


def in_autocast_format(module, inputs, output):
    """Forward hook: the output's tensors in the format that products compute in, where they compute in one of 16 bits."""
    tensors = output if isinstance(output, tuple) else (output,)
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return output
    cast = tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    return cast if isinstance(output, tuple) else cast[0]


def freeze(model):
    """No gradients for the base, fp32 norms and residual stream, and no 4-bit inference kernel that loses gradients on a CPU.

    A norm hands on 16 bits where products compute in them: cast once, not by each of the products that read it. So do sine and cosine,
    which would turn queries and keys into fp32.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1 and "norm" in name:
            parameter.data = parameter.data.float()
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
    for name, module in model.named_modules():
        if name.endswith(("norm", "rotary_emb")):
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
    """How an optimiser step is cut into forward passes, and what that is estimated to need.

    Activations are what tensors hold at the peak of a step beyond weights, gradients and optimiser. A process takes more than the sum: its
    libraries, the GPU's context, and what its allocator keeps in reserve.
    """

    micro_batch_pairs: int
    gradient_checkpointing: bool
    weights_gib: float  # base weights, adapter, gradients and optimiser, as far as they are not loaded yet
    activations_gib: float  # at the peak
    free_gib: float
    unpacked_gib: float = 0.0  # 4-bit weights dequantised once for the whole training, 0 where they stay packed
    host_gib: float = 0.0  # of the machine's memory while the base loads, 0 once it has
    host_free_gib: float = 0.0

    def __str__(self) -> str:
        unpacked = f" + dequantised weights {self.unpacked_gib:.2f} GiB" if self.unpacked_gib else ""
        text = (
            f"{self.micro_batch_pairs} pairs per forward pass, checkpointing {'on' if self.gradient_checkpointing else 'off'}: "
            f"weights and optimiser {self.weights_gib:.2f} GiB + activations at their peak {self.activations_gib:.2f} GiB"
            f"{unpacked} of {self.free_gib:.1f} GiB"
        )
        if not self.host_gib:
            return text
        text += f"; loading takes up to {self.host_gib:.2f} GiB of {self.host_free_gib:.1f} GiB of the machine's memory"
        enough = self.host_gib <= self.host_free_gib
        return text if enough else f"{text}, which may not do: choose a machine with more, or set USE_DEBUG_MODEL"


# %%
def block_bytes(shape, config: Config, row: float, element: int, attention: str, liger: bool) -> float:
    """Bytes per token that autograd saves in one Llama block, in rows of `row` tokens.

    Attention's operands, the MLP's vectors, the adapters' inputs and inner vectors, and the residual stream, which both norms save in fp32
    also where products are not. With dropout every adapter has an input of its own, and a byte of mask for each element of it.
    """
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    # Eager attention, and the fused kernel under a mask, repeat keys and values for every head.
    kept = 1 if attention in ("eager", "sdpa") else (getattr(shape, "num_key_value_heads", None) or heads) / heads
    operands = 2 * hidden * (1 + kept)  # query and output, key and value
    inputs = (6 * hidden + inner) * (element + 1) if config.dropout else (2 * hidden + inner) * element
    mask = {"eager": heads * row * (4 if element == 4 else 4 + element), "sdpa": element * row}.get(attention, 0)
    gates = (2 if liger else 3) * inner  # Liger multiplies them without keeping the activation's result
    return element * (operands + gates + 7 * config.rank) + inputs + mask + 4 * 2 * hidden


def activation_bytes(
    shape,
    config: Config,
    tokens: float,
    supervised: float,
    *,
    element: int,
    checkpointing: bool,
    attention: str = "sdpa",
    liger: bool = False,
) -> float:
    """Bytes that a packed LoRA step over `tokens` holds at its peak beyond weights, gradients and optimiser.

    All blocks' saved tensors, or with checkpointing the residual stream before each; on top of them the larger of two peaks that come
    one after the other: the logits of `supervised` positions (their logarithms and two gradients in fp32), and one block at
    work on its gradients, which checkpointing has computed again, with its largest matrix out of 4 bits.
    """
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    row = tokens / max(1, round(tokens / config.row_tokens))  # as `pack_rows` cuts them
    block = block_bytes(shape, config, row, element, attention, liger)
    work = 2 * inner * element
    if attention == "eager":  # by the time attention works on its weights' gradients, the MLP's vectors are gone
        work = max(work, heads * row * (8 if element == 4 else 8 - element) - 4 * inner * element)
    if checkpointing:
        kept, work = 4 * hidden * (shape.num_hidden_layers + 1), block - 4 * hidden + work
    else:
        kept = block * shape.num_hidden_layers
    # For all blocks once: the mask, sine and cosine.
    kept += row * {"eager": 4, "sdpa": 1}.get(attention, 0) + 8 * hidden / heads
    return tokens * kept + max(supervised * shape.vocab_size * 3 * 4, tokens * work + hidden * inner * element)


# %%
def empty_model(shape) -> tuple[torch.nn.Module, list[torch.nn.Linear]]:
    """(model of this shape without memory, those of its layers that are quantised)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    return model, [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]


def weight_bytes(shape, hardware: Hardware, rank: int) -> tuple[float, float]:
    """(base, training): bytes of the 4-bit base; and of adapter, gradients and Adam's two moments in fp32 with 16-bit copies.

    Both follow from a model's shape alone.
    """
    model, linear = empty_model(shape)
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
    liger: bool = False,
) -> MemoryPlan:
    """The largest micro-batch that fits in `free_gib` less a tenth; checkpointing only where a step does not fit without."""
    budget = (0.9 * free_gib - weights_gib) * 2**30
    share = config.pairs_per_step // process_rank()[1]
    divisors = [n for n in range(share, 0, -1) if share % n == 0]
    wanted = [config.micro_batch_pairs] if config.micro_batch_pairs else divisors
    plans, shaped = [], replace(config, row_tokens=max(config.row_tokens, round(pair_tokens)))
    for checkpointing in (False, True):
        for pairs in wanted:
            tokens = pairs * pair_tokens
            settings = {"element": element, "checkpointing": checkpointing, "attention": attention, "liger": liger}
            need = activation_bytes(shape, shaped, tokens, tokens * answer_share, **settings)
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
    plan = plan_memory(
        shape,
        config,
        ((0 if loaded else base) + training) / 2**30,
        free_memory_gib(hardware),
        pair_tokens=tokens / len(encoded),
        answer_share=sum(item.supervised for item in encoded) / tokens,
        element=hardware.dtype.itemsize,
        attention=packed_kernel(hardware, shape),
        liger=uses_liger(hardware, shape),
    )
    plan = with_unpacked(plan, shape, hardware)
    if loaded:
        return plan
    host = replace(hardware, device="cpu")
    return replace(plan, host_gib=host_gib(shape, hardware), host_free_gib=free_memory_gib(host))


def with_unpacked(plan: MemoryPlan, shape, hardware: Hardware) -> MemoryPlan:
    """`plan` with dequantised copies of all 4-bit weights, where they fit beside what is planned already, less a tenth."""
    needed = sum(m.weight.numel() for m in empty_model(shape)[1]) * hardware.dtype.itemsize / 2**30
    spare = 0.9 * plan.free_gib - plan.weights_gib - plan.activations_gib
    return replace(plan, unpacked_gib=needed if needed <= spare else 0.0)


def host_gib(shape, hardware: Hardware) -> float:
    """GiB of the machine's memory that loading the base takes at most: a shard of its 16-bit weights, and on a CPU the 4-bit ones.

    Weights come shard by shard and go to the GPU one by one. Published checkpoints have shards of at most 5 GB, a small one is one shard.
    """
    weights = sum(p.numel() for p in empty_model(shape)[0].parameters())
    resident = weight_bytes(shape, hardware, rank=0)[0] if hardware.device == "cpu" else 0
    return (min(2 * weights, 5e9) + resident) / 2**30


# %%
def release_memory() -> None:
    """Hand back what deleted models held on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_plan(plan: MemoryPlan, config: Config) -> MemoryPlan:
    """The next plan after an out-of-memory error: weights packed first, then checkpointing, then half the micro-batch."""
    if plan.unpacked_gib:
        return replace(plan, unpacked_gib=0.0)
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
    same = (cut["pairs"], cut["checkpointing"]) == (plan.micro_batch_pairs, plan.gradient_checkpointing)
    packed = {} if same else {"unpacked_gib": 0.0}  # what another cut leaves free was not estimated
    return replace(plan, micro_batch_pairs=cut["pairs"], gradient_checkpointing=cut["checkpointing"], **packed)


def agreed_plan(plan: MemoryPlan, hardware: Hardware) -> MemoryPlan:
    """The most careful plan of all processes: with different cuts of a step they would wait for each other for ever."""
    if process_rank()[1] == 1:
        return plan
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=hardware.device == "cpu")
    return min(gather_object([plan]), key=lambda p: (not p.gradient_checkpointing, p.micro_batch_pairs, p.unpacked_gib))


# %% tags=["active-ipynb"]
# print(plan_for(model_shape(config, hardware), train_encoded, config, hardware, loaded=False))


# %% [markdown]
# The line says how an optimiser step is cut: pairs that go through the model together, whether activations are recomputed to save
# memory, and what that is estimated to need of what is free, with 4-bit weights dequantised for the whole training where there is room.
# What loading takes of the machine's memory is for GPU machines that have less of it than the card.
#
# Pairs here are short, and bitsandbytes dequantises a layer in every forward and backward pass, however few tokens it is for: feeding
# pairs one by one, or padded, leaves most of the hardware idle. The pairs of a micro-batch are packed into a few rows of equal load instead. Position ids
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
# Next the base itself is loaded, in 4 bits, with an adapter on every linear layer.

# %% tags=["active-ipynb"]
# model = add_adapter(load_base_model(config, hardware), config)
# print(f"{sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())} layers in 4 bits", end=", ")
# print(f"{model.get_memory_footprint() / 2**20:,.0f} MiB for weights and adapter; ", end="")
# model.print_trainable_parameters()

# %% [markdown]
# The head turns every hidden state into one logit per vocabulary entry, and most of them would carry no loss. A hook passes only the
# supervised positions to the head. The loss is the sum over supervised tokens divided by their number **in the whole optimiser
# step**: averaging per micro-batch would weigh short answers more (the gradient-accumulation bug that many trainers had).


# %%
def unwrap(model):
    """The causal language model below DistributedDataParallel and peft."""
    model = getattr(model, "module", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


MASKED = ("eager", "sdpa", "flex_attention")  # kernels that transformers gives a mask, made from the positions


def pair_bounds(position_ids: torch.Tensor) -> dict:
    """Where pairs begin in packed rows laid end to end, and how long the longest is, in the words of transformers' flash kernels."""
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).int()
    longest = int(position_ids.max()) + 1
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def supervised_logits(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, targets, where): logits of shape (supervised, vocabulary), the tokens they should give, and their (row, column).

    Runs the packed forward pass: no attention mask, no cache, and the head on supervised positions only.
    """
    targets = batch["labels"][:, 1:]
    keep = F.pad(targets != IGNORE_INDEX, (0, 1))
    bounds = pair_bounds(batch["position_ids"]) if unwrap(model).config._attn_implementation not in MASKED else {}
    hook = unwrap(model).get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][keep],))
    try:
        output = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **bounds)
    finally:
        hook.remove()
    return output.logits, targets[keep[:, :-1]], keep


def answer_loss(model, batch: dict[str, torch.Tensor], supervised: int | torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats, summed over the batch and divided by `supervised`, the tokens of the whole step."""
    logits, targets, _ = supervised_logits(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="sum") / supervised


def until_it_fits(attempt: Callable[[int], object], size: int, what: str):
    """`attempt(size)`; each time the GPU runs out of memory again with half the size, and a line that says so."""
    while True:
        try:
            return attempt(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Outside the except block, whose traceback would keep the failed attempt's tensors alive.
        size //= 2
        release_memory()
        print(f"out of memory: going on with {size} {what} at a time")


@torch.no_grad()
def score_losses(
    model, encoded: Sequence[Encoded], hardware: Hardware, *, row_tokens: int, pad_id: int, batch_tokens: int = 4096
) -> np.ndarray:
    """(n, 2): summed negative log-likelihood in nats and number of supervised tokens of each pair, in the given order."""
    was_training = model.training
    model.eval()
    lengths = [len(item.input_ids) for item in encoded]
    order = sorted(range(len(encoded)), key=lambda i: lengths[i])

    def attempt(limit: int) -> np.ndarray:
        result = np.zeros((len(encoded), 2))
        for chunk in chunk_by_tokens(order, lengths, limit):
            batch = collate_packed([encoded[i] for i in chunk], row_tokens, pad_id)
            batch = {name: tensor.to(hardware.device) for name, tensor in batch.items()}
            with evaluation_precision(model, hardware):
                logits, targets, keep = supervised_logits(model, batch)
            losses = F.cross_entropy(logits.float(), targets, reduction="none").double().cpu().numpy()
            owners = np.array(chunk)[batch["segments"][keep].cpu().numpy()]
            np.add.at(result, (owners, 0), losses)
            np.add.at(result, (owners, 1), 1)
        return result

    try:
        return until_it_fits(attempt, batch_tokens, "tokens")
    finally:
        model.train(was_training)


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


def mean_loss(losses: np.ndarray) -> float:
    """Token-weighted mean: (n, 2) of nats and tokens → nats per token."""
    return float(losses[:, 0].sum() / losses[:, 1].sum())


def perplexity(losses: np.ndarray) -> float:
    """exp of the token-weighted mean loss: (n, 2) of nats and tokens → [1, e^700]; NaN stays NaN."""
    return math.exp(min(mean_loss(losses), 700.0))


# %% [markdown]
# What the model loses before it has learnt anything, beside what guessing among all tokens would cost. A base that has read much
# loses far less; a figure near the guess means that weights or prompts are not what they should be.

# %% tags=["active-ipynb"]
# losses = score_losses(model, train_encoded[:64], hardware, row_tokens=config.row_tokens, pad_id=tokenizer.pad_token_id)
# print(f"{mean_loss(losses):.2f} nats per answer token, guessing costs {math.log(len(tokenizer)):.2f}")

# %% [markdown]
# Beside its matrix products a LoRA step moves tensors about, and that can cost as much. While training runs, three things are done
# otherwise than peft, bitsandbytes and transformers do them, with the same numbers: the adapter's product is added into the layer's
# result instead of to copies of it; where memory is left, 4-bit weights are dequantised once for the whole training; and on GPUs
# norms are torch's fused ones, and attention works on pairs of any length, without a mask, where the card has the kernel.


# %%
@contextlib.contextmanager
def replaced_forwards(forwards: dict[torch.nn.Module, Callable]) -> Iterator[None]:
    """Within, each module computes by the function it is given; hooks still run."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        forwards.clear()  # a notebook keeps the traceback of an interrupted cell, and this frame with it
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def adapted(layer: LoraLayer, inputs: torch.Tensor) -> torch.Tensor:
    """The forward pass of peft's LoRA layer, `base(x) + scaling · B(A(dropout(x)))`, summed within the base layer's result.

    On rows alone: an addition into a view would copy gradients on the way back.
    """
    rows = inputs.flatten(0, -2)
    result = layer.base_layer(rows)
    for name in layer.active_adapters:
        inner = layer.lora_A[name](layer.lora_dropout[name](rows)).to(result.dtype)
        result.addmm_(inner, layer.lora_B[name].weight.to(result.dtype).T, alpha=layer.scaling[name])
    return result.unflatten(0, inputs.shape[:-1])


def normalised(norm: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The forward pass of a Llama, Mistral or Qwen2 RMS norm by torch's own, which newer versions fuse on a GPU."""
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


@contextlib.contextmanager
def unpacked_weights(model, room_gib: float) -> Iterator[None]:
    """Within, 4-bit layers multiply by weights dequantised once instead of at every pass: the same numbers, sooner.

    Four times the memory, so only where that is at most `room_gib`; otherwise nothing changes.
    """
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    needed = sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in layers)
    forwards = {}
    for layer in layers if needed <= room_gib * 2**30 else ():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
        forwards[layer] = functools.partial(multiply, layer, weight)
    with replaced_forwards(forwards):
        yield


def multiply(layer: bnb.nn.Linear4bit, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """What a 4-bit layer computes, from its dequantised weight: in the weight's format, handed on in the inputs'."""
    if layer.compute_dtype != weight.dtype:  # an evaluation in another format has its own rounding
        return type(layer).forward(layer, inputs)
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    return F.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)


# %%
def varlen_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    cu_seq_lens_q,
    max_length_q,
    scaling=None,
    sliding_window=None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention within each pair of packed rows; operands (batch, heads, row, size), result (batch, row, heads, size).

    `cu_seq_lens_q`, (pairs + 1,) in int32, says where pairs begin in the rows laid end to end; none is longer than `max_length_q`.
    """
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, row, size = query.shape
    device = query.device.type
    format_ = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    flat = [x.transpose(1, 2).reshape(batch * row, x.shape[1], size).to(format_) for x in (query, key, value)]
    causal = {"window_size": (-1 if sliding_window is None else sliding_window - 1, 0), "scale": scaling}
    if heads != key.shape[1] and "enable_gqa" in varlen_options():
        causal["enable_gqa"] = True  # torch 2.11 takes fewer heads of keys and values unasked
    result = varlen_attn(*flat, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **causal)
    return result.view(batch, row, heads, size), None


@contextlib.contextmanager
def liger_kernels(model) -> Iterator[None]:
    """Within, Liger rotates queries and keys and multiplies gates, each in one kernel, with one vector per token less to keep."""
    from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb

    modeling = sys.modules[type(unwrap(model)).__module__]
    rotate, modeling.apply_rotary_pos_emb = modeling.apply_rotary_pos_emb, liger_rotary_pos_emb
    gated = {m: functools.partial(LigerSwiGLUMLP.forward, m) for m in model.modules() if hasattr(m, "gate_proj")}
    try:
        with replaced_forwards(gated):
            yield
    finally:
        modeling.apply_rotary_pos_emb = rotate


@contextlib.contextmanager
def training_kernels(model, hardware: Hardware, *, unpack: bool = False) -> Iterator[None]:
    """Within, the model computes as training wants it, with dequantised weights if asked; only packed batches can be read."""
    shape = unwrap(model).config
    forwards = {m: functools.partial(adapted, m) for m in model.modules() if isinstance(m, LoraLayer)}
    if hardware.device == "cuda" and is_known(shape):
        forwards |= {m: functools.partial(normalised, m) for m in model.modules() if hasattr(m, "variance_epsilon")}
    liger = liger_kernels(model) if uses_liger(hardware, shape) else contextlib.nullcontext()
    AttentionInterface.register(VARLEN, varlen_attention)
    unwrap(model).set_attn_implementation(packed_kernel(hardware, shape))
    try:
        with replaced_forwards(forwards), unpacked_weights(model, math.inf if unpack else 0.0), liger:
            yield
    finally:
        unwrap(model).set_attn_implementation(hardware.attention)


# %%
def check_packing(model, encoded: Sequence[Encoded], hardware: Hardware, pad_id: int) -> None:
    """Refuse a base model that lets packed neighbours see each other: two pairs in one row must lose what each loses alone.

    An architecture that ignores position ids would train on, contaminated, without a word. Alone they go through the model as transformers
    computes it, packed as training will, so a kernel that does not fit the model shows too. Rounding alone stays far below 2 %.
    """
    pairs, settings = (
        sorted(encoded, key=lambda item: len(item.input_ids))[:2],
        {"pad_id": pad_id, "batch_tokens": 1 << 30},
    )
    alone = score_losses(model, pairs, hardware, row_tokens=1, **settings)[:, 0]
    with training_kernels(model, hardware):
        packed = score_losses(model, pairs, hardware, row_tokens=1 << 30, **settings)[:, 0]
    if not np.isfinite(alone).all():
        raise ArcivaError(
            f"the base model's loss is {alone} in {hardware.dtype}: its activations overflow; name another base model"
        )
    if not np.allclose(packed, alone, rtol=0.02):
        raise ArcivaError(
            f"{model.config.model_type} does not keep packed pairs apart (losses {packed.round(2)} packed, {alone.round(2)} alone); "
            "expected a Llama, Mistral or Qwen2 architecture"
        )


# %% tags=["active-ipynb"]
# check_packing(model, train_encoded, hardware, tokenizer.pad_token_id)
# print(f"{model.config.model_type}: two pairs in one row lose what each loses alone")

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
            metrics[f"{metric_key_prefix}_{novelty}"] = mean_loss(losses)
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
        if not (best / COMPLETE).exists():
            if not self.args.should_save:
                return  # another machine keeps the checkpoints, and its first process goes on alone
            raise ArcivaError(
                f"the best checkpoint {best} is gone, expected it until training ends; train again with resume=never"
            )
        super()._load_best_model()


# %%
def step_number(checkpoint: Path | None) -> int:
    """Optimiser step of a `checkpoint-<step>` folder, 0 for none."""
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end, on every process's machine; others are named and passed over."""
    checkpoints = {step_number(path): path for path in Path(folder).glob("checkpoint-*")}
    mine = common = {step for step, path in checkpoints.items() if (path / COMPLETE).exists()}
    if torch.distributed.is_initialized():  # machines may have been cut off at different steps
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        common = set.intersection(*everyone)
    newest = max(common, default=0)
    for step in sorted(step for step in checkpoints if step > newest and process_rank()[0] == 0):
        reason = "is not on every machine" if step in mine else "is incomplete, a save was cut short there"
        print(f"{checkpoints[step]} {reason}; an earlier one is used")
    return checkpoints.get(newest)


def name_other_runs(folder: Path) -> None:
    """Say that checkpoints of other runs are left alone: a run that starts anew in silence costs hours."""
    others = sorted({path.parents[1].name for path in folder.parent.glob(f"*/checkpoint-*/{COMPLETE}")} - {folder.name})
    if others and process_rank()[0] == 0:
        print(
            f"training starts anew: the checkpoints in {folder.parent} ({', '.join(others)}) belong to other settings, data or versions"
        )


def make_writable(folder: Path) -> None:
    """Refuse a folder that checkpoints cannot be written to, which the first save would find out."""
    probe = folder / f".probe-{process_rank()[0]}"
    write_atomic(probe, "")
    probe.unlink()


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
    last = max((h["step"] for h in history), default=0)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
    axes.set_xlim(right=axes.get_xlim()[1] * 1.22)  # for the curves' names
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
        self.received, self.stopped, self.previous = False, False, None

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there alone
            self.previous = signal.signal(signal.SIGTERM, self.receive)
        return self

    def __exit__(self, *_) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

    def receive(self, *_) -> None:
        self.received = True

    def agreed(self, device: torch.device) -> bool:
        """Whether the signal has reached any process: it reaches each at a step of its own, and all stop at one."""
        stop = self.received  # only `receive` writes it: a signal during the collective counts at the next step
        if torch.distributed.is_initialized():
            anyone = torch.tensor(stop, dtype=torch.int32, device=device)
            torch.distributed.all_reduce(anyone, torch.distributed.ReduceOp.MAX)
            stop = bool(anyone)
        return stop

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed(args.device):
            self.stopped = control.should_save = control.should_training_stop = True


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
    """Names a training run by what determines its result: training and held-out pairs, settings and package versions."""
    irrelevant = set(
        "report_to resume max_new_tokens generation_batch max_eval_rows merge_base log_every data"
        " compare_to not_worse_than_base".split()
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
        # Fused, the loss scaler's skipped steps would count for the schedule.
        optim="adamw_torch" if hardware.dtype == torch.float16 else "adamw_torch_fused",
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
    make_writable(folder)
    checkpoint = newest_checkpoint(folder) if config.resume == "auto" else None
    if checkpoint is None:
        name_other_runs(folder)
    resumed_from = step_number(checkpoint)
    if checkpoint:
        plan = plan_of_checkpoint(checkpoint, plan, config.pairs_per_step // process_rank()[1])
    while True:
        trainer = make_trainer(plan)
        trainer.args.eval_on_start = checkpoint is None  # where the curves begin: the untrained adapter is the base
        if checkpoint:
            print(f"going on from step {step_number(checkpoint):,} of an interrupted run ({checkpoint})")
            if state := ended(checkpoint, config.patience):
                trainer.state = state
                if state.best_model_checkpoint:  # none where training diverged
                    trainer._load_best_model()
                return trainer, plan, resumed_from
        try:
            with training_kernels(model, trainer.hardware, unpack=plan.unpacked_gib > 0):
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
    held_out = encode_held_out(tokenizer, splits["validation"], config.max_length)
    folder = Path(config.checkpoint_dir) / run_fingerprint(
        config, [*train_encoded, *itertools.chain(*held_out.values())]
    )
    if config.resume == "never" and process_rank()[0] == 0:
        shutil.rmtree(folder, ignore_errors=True)
    plan = agreed_plan(plan_for(unwrap(model).config, train_encoded, config, hardware, loaded=True), hardware)
    check_packing(unwrap(model), train_encoded, hardware, tokenizer.pad_token_id)
    # The Trainer's own place for it is among the checkpoints, which go when the adapter is saved.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(config.reports_dir).absolute() / "tensorboard"))
    live, stop = LossHistory(live=running_in_notebook()), StopOnSignal()
    if process_rank()[0] == 0:
        per_epoch = math.ceil(len(train_encoded) / config.pairs_per_step)
        print(
            f"{len(train_encoded):,} pairs, {config.pairs_per_step} per step: {per_epoch:,} steps an epoch, "
            f"at most {math.ceil(per_epoch * config.epochs):,} in {config.epochs:g}"
        )

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
        interrupted = stop.stopped or stop.agreed(trainer.args.device)  # or in the last step's evaluation and save
    state = trainer.state
    if interrupted:
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
# training = train_adapter(model, tokenizer, splits, config, hardware)

# %% tags=["active-ipynb"]
# print(
#     f"{training.steps:,} steps in {training.seconds:,.0f} s, {training.tokens_per_second:,.0f} tokens/s without padding"
# )
# print(
#     f"best validation loss {training.best_loss:.3f} nats per token at step {training.best_step:,}: perplexity {math.exp(training.best_loss):.2f}"
# )
# print(training.plan)

# %% [markdown]
# The held-out curves begin at step 0, with the base. The rephrased one should fall and stay low, because the facts behind it are in
# training; the unseen one hardly moves, or rises again once the model is sure of what it knows. A rephrased curve that rises is overfitting, and
# the run goes back to the best checkpoint.


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


def record_in_manifest(folder: str, **facts) -> None:
    """Add to the manifest of an adapter or merged folder."""
    write_atomic(Path(folder) / "manifest.json", json.dumps(read_manifest(folder) | facts, indent=2))


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
    trained = manifest.get("base_revision")
    if trained and config.revision and not trained.startswith(config.revision):
        print(f"the adapter was trained on revision {trained}, which is loaded in place of {config.revision}")
    base = load_base_model(replace(config, revision=trained or config.revision), hardware)
    with naming_the_model(replace(config, base_model=config.output_dir), hardware):
        model = PeftModel.from_pretrained(base, config.output_dir)
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
# print(*sorted(f"{p.stat().st_size / 2**10:10,.1f} KiB  {p}" for p in adapter_folder.iterdir()), sep="\n")

# %% [markdown]
# ## 5. Metrics
#
# The untuned base stands beside the tuned model in everything below: it is the same network with its adapter switched off. Answers
# are decoded greedily and in batches. What all prompts share, the system prompt, is read once; padding stands before what they do not
# share, with explicit positions; and finished answers leave the batch, so that one long answer does not keep the others computing.
# Where memory holds them, 4-bit weights are dequantised once for all these answers instead of at every token.


# %%
@dataclass(frozen=True)
class Answer:
    """A generated answer; `cut` when it reached the length limit before its end-of-turn token."""

    text: str
    cut: bool
    tokens: int


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
    order, written = sorted(range(len(encoded)), key=lambda i: len(encoded[i])), {}

    def attempt(size: int) -> None:
        quiet = running_in_notebook() or len(order) <= size
        for at in tqdm(range(0, len(order), size), desc="answers", unit="batch", leave=False, disable=quiet):
            chunk = [i for i in order[at : at + size] if i not in written]
            if chunk:
                ids = [encoded[i] for i in chunk]
                found = generate_batch(model, ids, hardware, max_new_tokens=max_new_tokens, stop=stop, pad_id=pad_id)
                written.update(zip(chunk, found, strict=True))

    try:
        with evaluation_precision(model, hardware), unpacked_weights(model, free_memory_gib(hardware) / 2):
            until_it_fits(attempt, batch_size, "answers")
    finally:
        model.train(was_training)
    return [read_answer(tokenizer, written[i], stop) for i in range(len(encoded))]


def read_answer(tokenizer, ids: Sequence[int], stop: Sequence[int]) -> Answer:
    """The text of generated ids."""
    ended = bool(ids) and ids[-1] in stop
    text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()
    return Answer(text, cut=not ended, tokens=len(ids))


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
    copied = ("id", "novelty", "language", "topic", "kind", "style", "fact_ids")
    frame = pd.DataFrame([{k: r[k] for k in copied} for r in rows])
    families = fact_families([Example(**{f.name: r[f.name] for f in fields(Example)}) for r in rows])
    frame["family"] = [families[r["fact_ids"][0]] for r in rows]
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
# with pd.option_context("display.max_colwidth", None):
#     shown = ["question", "reference", "base_answer", "tuned_answer"]
#     display(predictions.query("split == 'test' and novelty == 'rephrased'")[shown].head(4))

# %% [markdown]
# Where a tuned answer is not its reference, look whether it says the same in other words or answers another question. Exact match counts
# both as misses, and BLEU and ROUGE-L give the former a part of the credit, but only it helps a user.
#
# BLEU and chrF come from sacrebleu, with its signature in the report. ROUGE-L comes from rouge-score, but not with its default tokenizer, which
# deletes every letter beyond a–z: *Größe* would become *gr e*. BLEU, ROUGE-L and exact match are also `evaluate.Metric`s, which drop into any
# script of the field; nothing is fetched from the hub. Beneath them lie sums per question ("statistics") that add up to the corpus
# figure; drawing questions again and adding their sums is the bootstrap. sacrebleu counts; the step from its counts to a figure is
# written out here for whole arrays, because a thousand samples of each group would take sacrebleu minutes.


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


def bleu_figure(summed: np.ndarray, *, effective_order: bool = False) -> np.ndarray:
    """(…) BLEU in [0, 100] from (…, 10) sums, as sacrebleu's `compute_bleu` with its exponential smoothing."""
    length, reference, right, total = summed[..., 0], summed[..., 1], summed[..., 2:6], summed[..., 6:10]
    misses = np.cumsum((right == 0) & (total > 0), axis=-1)
    precision = np.where(right > 0, right, 0.5**misses) / np.maximum(total, 1)
    logs = np.where(total > 0, np.log(precision), 0 if effective_order else -1e10)
    orders = np.maximum(1, (total > 0).sum(-1)) if effective_order else right.shape[-1]
    brevity = np.minimum(0, 1 - reference / np.maximum(length, 1e-9))
    return np.where(right.any(-1), 100 * np.exp(brevity + logs.sum(-1) / orders), 0.0)


def chrf_figure(summed: np.ndarray) -> np.ndarray:
    """(…) chrF2 in [0, 100] from (…, 18) sums, as sacrebleu's `CHRF`: mean precision and recall over the orders that occur."""
    found, wanted, right = summed[..., 0::3], summed[..., 1::3], summed[..., 2::3]
    counted = (found > 0) & (wanted > 0)
    orders = np.maximum(1, counted.sum(-1))
    precision = np.where(counted, right / np.maximum(found, 1), 0).sum(-1) / orders
    recall = np.where(counted, right / np.maximum(wanted, 1), 0).sum(-1) / orders
    return 100 * 5 * precision * recall / np.maximum(4 * precision + recall, 1e-16)


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
# bootstrap interval. What is drawn is not single questions but whole families of facts: five wordings of one fact succeed and fail
# together, and held-out *unseen* rows come in whole families, so that drawing rows would promise far more than a few dozen families
# can tell (the cluster bootstrap, Field and Welsh 2007; for language models Miller 2024, "Adding Error Bars to Evals").
#
# Base and tuned are compared **paired**, on the same questions: the share won, tied and lost, the bootstrap interval of their difference
# (Koehn 2004), and a two-sided p-value. That comes from approximate randomisation, sacrebleu's `--paired-ar`: base and tuned change
# places in a random half of the families, as they could if it made no difference which is which. The p-value of the paired bootstrap is
# too small where there are few families; this one cannot fall below 2^(1−n) with n of them, so that one family proves nothing and six are
# the fewest that can reach 0.05.


# %%
@dataclass(frozen=True)
class MetricSpec:
    """How a metric adds up: statistics per question → one figure."""

    name: str
    better: Literal["higher", "lower", "neither"]
    statistics: Callable[[pd.DataFrame, str], np.ndarray]  # (frame, "base" | "tuned") → (n, k)
    figure: Callable[[np.ndarray], np.ndarray]  # (…, k) summed → (…) figures
    single: Callable[[np.ndarray], np.ndarray] | None = None  # the figure of one question alone, where that differs


def mean_of(column: Callable[[pd.DataFrame, str], Sequence[float]]) -> Callable[[pd.DataFrame, str], np.ndarray]:
    """Statistics of a plain mean: the value and a one."""
    return lambda frame, who: np.stack([np.asarray(column(frame, who), dtype=float), np.ones(len(frame))], axis=1)


def ratio(summed: np.ndarray) -> np.ndarray:
    return summed[..., 0] / summed[..., 1]


def pairwise(metric: Callable[[str, str], float]) -> Callable[[pd.DataFrame, str], list[float]]:
    return lambda frame, who: [metric(p, r) for p, r in zip(frame[f"{who}_answer"], frame["reference"], strict=True)]


def counted_by(metric) -> Callable[[pd.DataFrame, str], np.ndarray]:
    return lambda frame, who: corpus_statistics(metric, frame[f"{who}_answer"], frame["reference"])


METRICS = (
    MetricSpec(
        "perplexity",
        "lower",
        lambda f, who: f[[f"{who}_nll", "answer_tokens"]].to_numpy(float),
        lambda s: np.exp(np.minimum(700.0, ratio(s))),
    ),
    MetricSpec(
        "bits_per_byte",
        "lower",
        lambda f, who: np.stack([f[f"{who}_nll"] / math.log(2), f["reference"].str.encode("utf-8").str.len()], axis=1),
        ratio,
    ),
    # One short answer has no 4-grams; as in sacrebleu's sentence BLEU, only the orders that it has count there.
    MetricSpec("bleu", "higher", counted_by(BLEU), bleu_figure, functools.partial(bleu_figure, effective_order=True)),
    MetricSpec("chrf", "higher", counted_by(CHRF), chrf_figure),
    MetricSpec("rouge_l", "higher", mean_of(pairwise(rouge_l)), ratio),
    MetricSpec("exact_match", "higher", mean_of(pairwise(exact_match)), ratio),
    MetricSpec("cut_off", "lower", mean_of(lambda f, who: f[f"{who}_cut"]), ratio),
    MetricSpec("answer_words", "neither", mean_of(lambda f, who: f[f"{who}_answer"].str.split().str.len()), ratio),
)


# %%
RESAMPLES = 1000


@dataclass(frozen=True)
class Resamples:
    """Draws that every metric of a group shares, so that all are judged on the same ones."""

    weights: np.ndarray  # (resamples, clusters): how often each cluster is drawn
    swaps: np.ndarray  # (resamples, clusters): 1 where base and tuned change places


def resample(clusters: int, seed: int, resamples: int = RESAMPLES) -> Resamples:
    """Draws over so many clusters, the same for the same seed."""
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    return Resamples(weights, rng.integers(0, 2, size=weights.shape))


def clusters_of(frame: pd.DataFrame) -> np.ndarray:
    """Number of each question's cluster, from 0: its family of facts, or itself in reports from before there were families."""
    return pd.factorize(frame["family"] if "family" in frame else frame["id"])[0]


def sum_by_cluster(clusters: np.ndarray, statistics: np.ndarray) -> np.ndarray:
    """(clusters, k) sums of (n, k) statistics."""
    summed = np.zeros((clusters.max() + 1, statistics.shape[1]))
    np.add.at(summed, clusters, statistics)
    return summed


def with_interval(value, samples: np.ndarray) -> dict[str, float]:
    """A figure with the middle 95 % of its bootstrap samples, those left out in which it is not defined."""
    samples = samples[np.isfinite(samples)]
    low, high = np.percentile(samples, [2.5, 97.5]) if len(samples) else (math.nan, math.nan)
    return {"value": float(value), "low": float(low), "high": float(high)}


# %%
def randomisation_p(figure: Callable, base: np.ndarray, tuned: np.ndarray, swaps: np.ndarray) -> float:
    """Two-sided p-value in (0, 1] of approximate randomisation (Riezler and Maxwell 2005) over (clusters, k) sums."""
    observed = abs(figure(tuned.sum(0)) - figure(base.sum(0)))
    moved = swaps @ (tuned - base)
    chance = np.abs(figure(tuned.sum(0) - moved) - figure(base.sum(0) + moved))
    smaller = np.sum(chance < observed * (1 - 1e-9))  # a figure that is not defined proves nothing
    return float((len(swaps) - smaller + 1) / (len(swaps) + 1))


def compare(frame: pd.DataFrame, spec: MetricSpec, draws: Resamples) -> dict:
    """Base and tuned figures with 95 % intervals; with a direction also questions won, tied and lost, difference and p-value."""
    clusters, result, sums, samples, single = clusters_of(frame), {}, {}, {}, {}
    for who in ("base", "tuned"):
        statistics = spec.statistics(frame, who)
        sums[who] = sum_by_cluster(clusters, statistics)
        samples[who] = spec.figure(draws.weights @ sums[who])
        single[who] = (spec.single or spec.figure)(statistics)
        result[who] = with_interval(spec.figure(statistics.sum(0)), samples[who])
    if spec.better != "neither":
        gain = (single["tuned"] - single["base"]) * (1 if spec.better == "higher" else -1)
        difference = result["tuned"]["value"] - result["base"]["value"]
        result["paired"] = {
            "won": float((gain > 1e-9).mean()),
            "tied": float((np.abs(gain) <= 1e-9).mean()),
            "lost": float((gain < -1e-9).mean()),
            "difference": with_interval(difference, samples["tuned"] - samples["base"]),
            "p_value": randomisation_p(spec.figure, sums["base"], sums["tuned"], draws.swaps),
        }
    return result


def score_group(frame: pd.DataFrame, seed: int, resamples: int = RESAMPLES) -> dict:
    """All metrics of one group of questions."""
    clusters = int(clusters_of(frame).max()) + 1
    draws = resample(clusters, seed, resamples)
    figures = {spec.name: compare(frame, spec, draws) for spec in METRICS}
    return {"questions": len(frame), "clusters": clusters, **figures}


# %%
def score_predictions(predictions: pd.DataFrame, seed: int) -> dict:
    """The report's figures: per held-out split and novelty, and over both held-out sides by language, topic, kind and style."""
    held_out = predictions[predictions["split"] != "train"]
    groups = {
        f"{split}/{novelty}": score_group(g, seed) for (split, novelty), g in held_out.groupby(["split", "novelty"])
    }
    slices = {}
    for column in ("language", "topic", "kind", "style"):
        for (novelty, value), g in held_out.groupby(["novelty", column]):
            slices.setdefault(column, {}).setdefault(value, {})[novelty] = score_group(g, seed)
    return {"groups": groups, "by": slices}


def build_report(predictions: pd.DataFrame, config: Config) -> dict:
    """`reports/metrics.json`, schema version 2. `adapter` is the hash of the judged weights.

    `groups`: "split/novelty" → questions, clusters (families of facts) and metric → {base, tuned: {value, low, high}, paired: {won,
    tied, lost, difference: {value, low, high}, p_value}}, `paired` only where a direction is better; `by`: the same for both held-out
    sides together, by language, topic, kind and style. Intervals are 95 %, from 1,000 resamples of clusters; p-values are two-sided.
    Version 1 drew questions instead of clusters and had neither `clusters` nor `difference`.
    """
    return {
        "schema_version": 2,
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


# Of n families, base and tuned can be told apart with p ≥ 2^(1 - n): below 0.05 from six on.
LEAST_FAMILIES = 6


def report_line(group: str, scores: dict, metric: str) -> dict:
    """One metric of one group as text; what has no direction was neither won nor lost."""
    figure, paired = scores[metric], scores[metric].get("paired")
    return {
        "group": group,
        "questions": scores["questions"],
        "families": scores["clusters"],
        "metric": metric,
        **{who: "{value:.3g} [{low:.3g}, {high:.3g}]".format(**figure[who]) for who in ("base", "tuned")},
        "won / tied / lost": "{won:.0%} / {tied:.0%} / {lost:.0%}".format(**paired) if paired else "",
        "p": f"{paired['p_value']:.3f}" if paired else "",
    }


def report_table(report: dict, metrics: Sequence[str] = tuple(spec.name for spec in METRICS)) -> pd.DataFrame:
    """Base beside tuned with intervals, one line per held-out group and metric."""
    lines = [report_line(group, scores, name) for group, scores in report["groups"].items() for name in metrics]
    index = ["group", "questions", "families", "metric"]
    return pd.DataFrame(lines, columns=[*index, "base", "tuned", "won / tied / lost", "p"]).set_index(index)


def slice_table(
    report: dict, column: str, metrics: Sequence[str] = ("rouge_l",), least: int = LEAST_FAMILIES
) -> pd.DataFrame:
    """The same by language, topic, kind or style, both held-out sides together, for slices of at least so many families."""
    groups = {
        f"{value}/{novelty}": scores
        for value, both in report["by"][column].items()
        for novelty, scores in both.items()
        if scores["clusters"] >= least
    }
    return report_table({"groups": dict(sorted(groups.items()))}, metrics)


# %% tags=["active-ipynb"]
# report = build_report(predictions, config)
# print(report["signatures"]["bleu"])
# report_table(report)

# %% [markdown]
# Read the rephrased rows first: that is the assistant doing its job. Tuned perplexity near 1 with a high ROUGE-L means it found the
# fact behind a new wording; a low perplexity with a low ROUGE-L means fluent answers about the wrong fact. The untuned nano base is of
# the second kind: from the first words of a reference on it knows the rest by heart, but it seldom finds the right one. On the unseen rows
# a model that knows what it does not know would refuse; a nano model guesses instead. Its BLEU can rise there all the same, because
# tuning teaches it the language and the form of an answer; whether it knows more shows in the perplexity. `cut_off` should be nearly zero
# after tuning: a model that keeps talking was not taught to stop.

# %% [markdown]
# The same answers through `evaluate`'s interface, without intervals: the figures must be the table's for the tuned model.

# %% tags=["active-ipynb"]
# rephrased = predictions.query("split == 'test' and novelty == 'rephrased'")
# answers = {"predictions": list(rephrased["tuned_answer"]), "references": list(rephrased["reference"])}
# for metric in (CorpusBleu(), UnicodeRougeL(), NormalisedExactMatch()):
#     print({name: round(value, 4) for name, value in metric.compute(**answers).items()})

# %% [markdown]
# A small model recites what it was taught, so one can count whether it recites the right thing: an answer of this corpus about what was
# asked, in whichever of its forms, one about something else, or neither. A large model mostly has words of its own, which are neither;
# of the nano base, which has read the extended corpus too, it can be an answer from there.


# %%
def recited(predictions: pd.DataFrame, examples: Sequence[Example], who: str = "tuned") -> pd.Series:
    """For each answer `right fact` or `another fact` where it is word for word an answer of `examples`, else `neither`."""
    authored = defaultdict(set)
    for example in examples:
        authored[normalise(example.messages[-1]["content"])] |= set(example.fact_ids)

    def kind(answer: str, asked: Sequence[str]) -> str:
        facts = authored.get(normalise(answer))
        return "neither" if facts is None else "right fact" if facts & set(asked) else "another fact"

    asked = zip(predictions[f"{who}_answer"], predictions["fact_ids"], strict=True)
    return pd.Series([kind(answer, fact_ids) for answer, fact_ids in asked], index=predictions.index)


# %% tags=["active-ipynb"]
# pd.DataFrame({who: recited(rephrased, examples, who).value_counts() for who in ("base", "tuned")}).fillna(0).astype(int)

# %% [markdown]
# Where the assistant is weak is a question of language, topic and kind. Slices are of validation and test together, and those of fewer than six
# families are left out: no difference could be shown there. Compare the others' intervals before their values, and expect a p-value
# below 0.05 in one of twenty without any cause.

# %% tags=["active-ipynb"]
# pd.concat([slice_table(report, column) for column in ("language", "topic", "kind")], keys=["language", "topic", "kind"])


# %%
def save_predictions(predictions: pd.DataFrame, report: dict, reports_dir: str) -> None:
    """`predictions.jsonl`, `metrics.json` and `metrics.csv`; suites and dashboard of an earlier model do not stay beside them."""
    folder = Path(reports_dir)
    for name in ("suites.json", "suites_base.jsonl", "suites_tuned.jsonl", "dashboard.html", "dashboard.csv"):
        (folder / name).unlink(missing_ok=True)
    write_atomic(folder / "predictions.jsonl", predictions.to_json(orient="records", lines=True, force_ascii=False))
    write_atomic(folder / "metrics.json", json.dumps(report, indent=1, allow_nan=False))
    write_atomic(folder / "metrics.csv", report_table(report).to_csv())


def load_predictions(reports_dir: str) -> pd.DataFrame:
    """The predictions of an earlier evaluation."""
    path = Path(reports_dir) / "predictions.jsonl"
    if not path.is_file():
        raise ArcivaError(f"no {path}: expected the predictions of an evaluation; run the evaluate stage first")
    return pd.read_json(path, lines=True, dtype=False)  # an id or answer of "0012" is no number


def load_report(reports_dir: str, *, missing_ok: bool = False) -> dict | None:
    """`metrics.json` of an earlier evaluation, in the shape of today."""
    path = Path(reports_dir) / "metrics.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"schema_version": None}
    if report["schema_version"] == 2:
        return report
    if missing_ok:
        return None
    if path.is_file():
        raise ArcivaError(f"{path} is of another version, expected schema version 2; run the evaluate stage again")
    raise ArcivaError(f"no {path}: expected the report of an evaluation; run the evaluate stage first")


# %% tags=["active-ipynb"]
# save_predictions(predictions, report, config.reports_dir)
# record_in_manifest(config.output_dir, metrics=report["groups"])

# %% [markdown]
# ## 6. Evaluation Suites
#
# Averages hide what a support team needs to know: does it name the right button, does it hold its ground when a question assumes
# something false? Suites are data files in `data/suites/`, each item with its own checks. Without suite
# files beside the notebook this section is skipped, with a message.

# %%
DENIAL = {
    "en": r"\b(no|not|none|cannot|never|nothing|neither|nor|nobody|nowhere|lacks?|\w+n't|unavailable|unsupported|missing|other way round)\b",
    "de": r"\b(nein|nicht|nichts|kein\w*|nie|niemals|niemand|weder|nirgends|fehl(t|en)|leider|umgekehrt)\b",
}
# The same words in phrases that deny nothing.
NO_DENIAL = (
    r"\b(no (problem|worries|doubt|trouble|matter)|not (only|just|a problem|hard|difficult)|nothing (easier|simpler)|why not"
    r"|keine? (problem|sorge|zweifel)|nicht (nur|schwer|schwierig)|nichts (leichter|einfacher) als|warum nicht)\b"
)
AFFIRMATION = (
    r"\W*(yes|yeah|sure|of course|certainly|absolutely|definitely|ja|klar|natürlich|gerne?|sicher|selbstverständlich)\b"
    r"(?!\W*(not|nicht)\b)"
)
INSTRUCTION = (
    r"\W*((just|simply|einfach) )?(open|click|press|go|use|select|choose|tap|drag|tick|you"
    r"|öffne|klicke?|drücke?|wähle|gehe?|nutze|ziehe?|du|sie)\b"
)
# The assistant speaks of itself and its scope. "Outside" or "only" alone would do for half of all answers about the product.
OUTSIDE = (
    r"\bI( can(not|'t)| could(n't| not)| do(n't| not)| won't| will not|'d rather not| (have|hold|know|give) no)\b"
    r"|\bI('m| am) (unable|not able)\b"
    r"|\bI('m| am| can| could| do)?( only| just| simply)* (here|made|only|for|help|answer|cover|deal|know)\b.{0,40}\bArciva\b"
    r"|\b(as|I'm|I am|stay)( only| just| simply| here as)* (the|an) (Arciva assistant|assistant for Arciva)\b"
    r"|\b(outside|beyond|not (with)?in|out of|not? part of)\b.{0,25}\b(I|my|me|scope|the Arciva assistant)\b"
    r"|\b(not|nothing|something) (something )?(I|the Arciva assistant|on which I)\b"
    r"|\b(kann|darf|werde|weiß|kenne|gebe|helfe|äußere|habe|schreibe|kommentiere|lasse) ich\b.{0,50}\b(nicht|nichts|kein\w*|lieber|außerhalb)\b"
    r"|\bich\b.{0,30}\b(nur|ausschließlich|nicht helfen)\b|\bich (kenne|weiß) (kein\w*|nicht)\b"
    r"|\b(ich bin|bin ich|als|bleibe|der)( nur| hier als)* (der |dein )?(Arciva-Assistent|Assistent für Arciva)"
    r"|\b(außerhalb|gehör\w+ nicht|nicht mein|übersteig\w+)\b.{0,40}\b(ich|mein\w*|mir|Arciva-Assistent\w*)\b"
)
SUITE_TYPES = Literal[
    "minimum", "invariance", "directional", "absent", "premise", "number", "other-product", "out-of-domain", "twin"
]


class SuiteItem(BaseModel):
    """One question of a suite with the checks its answer must pass."""

    model_config = ConfigDict(extra="forbid")

    id: str
    suite: Literal["checklists", "probes"]
    capability: str
    type: SUITE_TYPES
    language: Literal["en", "de"]
    prompt: str
    gold: str  # an answer that passes
    expect: Literal["answer", "deny", "decline"]  # a fact, that there is none, or that it is out of scope
    must: list[list[str]] = []  # each group needs one of its strings in the answer
    must_not: list[str] = []
    same_as: str | None = None  # invariance: must pass exactly where that item passes
    variant: Literal["typo", "casing", "polite", "language"] | None = None  # invariance: what differs from that item
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


# %% [markdown]
# Checks read answers by rules, without a judge model, so the rules have to be narrow. A denial stands in the first two sentences and is
# none after *yes* or *no problem*. A refusal speaks in the first person of what the assistant covers. A number or a short word in an
# answer counts as a whole: a wanted *3* is not in *13*.


# %%
def opening(answer: str, count: int = 2) -> list[str]:
    """The first sentences, with straight apostrophes."""
    return re.split(r"(?<=[.!?:])\s+", re.sub("[’ʼ]", "'", answer.strip()))[:count]


def denies(answer: str, language: str) -> bool:
    """Whether the first two sentences say that something is not there; a second one after an instruction does not count."""
    first, *second = opening(answer)
    if re.match(AFFIRMATION, first, re.IGNORECASE):
        return False
    said = [first] if re.match(INSTRUCTION, first, re.IGNORECASE) else [first, *second]
    # Nor does a question, or a refusal: "I cannot help with that" says nothing about the product.
    said = [re.sub(NO_DENIAL, " ", s, flags=re.IGNORECASE) for s in said if not s.endswith("?") and not declines(s)]
    return any(re.search(DENIAL[language], s, re.IGNORECASE) for s in said)


def declines(answer: str) -> bool:
    """Whether the first two sentences place the question outside what the assistant answers."""
    return bool(re.search(OUTSIDE, " ".join(opening(answer)), re.IGNORECASE))


def tokens_of(text: str) -> list[str]:
    """Words and numbers, case-folded: 12,000 is 12000, 2,5 is 2.5 and 4GB is 4 gb."""
    text = unicodedata.normalize("NFC", text).casefold()
    text = re.sub(r"(?<=\d)[.,](?=\d{3}(?!\d))", "", text)
    return re.findall(r"[^\W\d]\w*|\d+(?:[.:]\d+)*", re.sub(r"(?<=\d),(?=\d)", ".", text))


def contains(text: str, wanted: str) -> bool:
    """Whether the answer says it; digits and what is shorter than four letters as whole words, the rest also as part of a word."""
    text, wanted = f" {' '.join(tokens_of(text))} ", " ".join(tokens_of(wanted))
    return (f" {wanted} " if len(wanted) < 4 or re.search(r"\d", wanted) else wanted) in text


def speaks(answer: str, language: str) -> bool:
    """Whether the answer is in that language; too short an answer to tell is."""
    english = set(tokens_of(answer)) & ENGLISH - {"in"}  # which German has too
    return guess_language(answer) == language or (language == "de" and not english)


# %% [markdown]
# An answer that names a button, a menu, a shortcut or a number that the knowledge does not have is wrong, whatever else it says. The
# knowledge is the labels of `data/knowledge/facts.yaml` and all its authored answers, where the repository is present, and the reference
# answers of the data. A label may be a run of whole words of a known one; a menu path, a shortcut and a number must be known as a whole.

# %%
QUOTED = re.compile(
    r"\*\*(?=\S)([^*\n]{1,80})\*\*|`([^`\n]{1,80})`|[\"“”„]([^\"“”„\n]{1,80})[\"“”]|[«»]([^«»\n]{1,80})[«»]"
    r"|(?<!\w)['‘‚]([^'‘’‚\n]{2,60})['‘’](?!\w)"
)
CAPITALISED = r"[\"“„'*]{0,2}[A-ZÄÖÜ][\w&…-]*"
SMALL_WORDS = "for|as|to|by|of|in|and|&|from|with|und|für|als|nach|von|im"
SEGMENT = rf"{CAPITALISED}(?: (?:(?:{SMALL_WORDS}) )?[A-ZÄÖÜ][\w&…-]*){{0,3}}[\"“”'*]{{0,2}}"
ARROW = r"(?:\s*(?:->|[>→›⇒▸])\s*|\s+»\s+)"
MENU_PATH = re.compile(rf"{SEGMENT}(?:{ARROW}{SEGMENT})+")
BEFORE_PATH = r"^(?:(?:then|open|click|choose|select|use|go|to|see|under|in|dann|öffne|klicke?|auf|wähle|gehe?|nach|unter|siehe) )+"
MODIFIERS = {
    **dict.fromkeys(("ctrl", "control", "strg", "steuerung"), "ctrl"),
    **dict.fromkeys(("cmd", "command", "befehl", "meta"), "cmd"),
    **dict.fromkeys(("alt", "option", "opt", "wahl"), "alt"),
    **dict.fromkeys(("shift", "umschalt"), "shift"),
}
SYMBOLS = {"⌘": "cmd+", "⌃": "ctrl+", "⌥": "alt+", "⇧": "shift+"}
KEYS = {"escape": "esc", "return": "enter", "eingabe": "enter", "entf": "delete", "del": "delete", "leertaste": "space"}
KEY = rf"(?:F\d{{1,2}}|{'|'.join(KEYS)}|enter|esc|tab|space|delete|backspace|home|end|up|down|left|right|[ck]lick\w*|\w|[\[\]\\/.,;=+-])"
SHORTCUT = re.compile(
    rf"(?<!\w)(?:(?:{'|'.join(MODIFIERS)})(?:/(?:{'|'.join(MODIFIERS)}))*\s*[+-]\s*|[⌃⌘⌥⇧]\s*\+?\s*)+{KEY}(?!\w)"
    r"|(?<![\w.-])F(?:[1-9]|1[0-2])(?!\w)"
    r"|(?<=press )(?-i:[A-Z])(?![\w'])|(?<=key )(?-i:[A-Z])(?![\w'])|(?<=taste )(?-i:[A-Z])(?!\w)|(?<=drücke )(?-i:[A-Z])(?!\w)",
    re.IGNORECASE,
)


def shortcut_forms(shortcut: str) -> list[str]:
    """`Strg/Cmd + Z` as `ctrl+z` and `cmd+z`."""
    text = shortcut.casefold()
    for symbol, name in SYMBOLS.items():
        text = text.replace(symbol, name)
    *held, key = [part for part in re.split(r"\s*[+-]\s*(?=\S)", text) if part]
    key = "click" if re.match("[ck]lick", key) else KEYS.get(key, key)
    combinations = [[]]
    for part in held:
        combinations = [[*c, MODIFIERS[m]] for c in combinations for m in part.split("/")]
    return ["+".join([*sorted(c), key]) for c in combinations]


# %%
def claims(text: str) -> list[tuple[str, str, list[str]]]:
    """(kind, as written, forms to look up) of every menu path, label, shortcut and number in a text; list numbers are none."""
    text, found = re.sub(r"(?m)^\s*\d+[.)]\s", " ", text), []

    def take(kind: str, pattern: re.Pattern, forms: Callable) -> None:
        nonlocal text

        def taken(match: re.Match) -> str:
            written = next((g for g in match.groups() if g), match[0])
            written = re.sub(BEFORE_PATH, "", written, flags=re.IGNORECASE) if kind == "paths" else written
            if kind == "labels" and SHORTCUT.fullmatch(written):
                return f" {written} "
            found.append((kind, written, forms(written)))
            return " "

        text = pattern.sub(taken, text)

    take("paths", MENU_PATH, lambda path: [" > ".join(map(normalise, re.split(ARROW, path)))])
    take("labels", QUOTED, lambda label: [normalise(label)])
    take("shortcuts", SHORTCUT, shortcut_forms)
    return found + [("numbers", token, [token]) for token in tokens_of(text) if token[0].isdigit()]


def runs(parts: Sequence[str], shortest: int, joint: str) -> set[str]:
    """Every run of at least so many neighbouring parts."""
    places = range(len(parts) + 1)
    return {joint.join(parts[a:b]) for a in places for b in places[a + shortest :]}


@dataclass(frozen=True)
class Vocabulary:
    """What answers may name: the forms of `claims`, by kind."""

    labels: frozenset[str]
    paths: frozenset[str]
    shortcuts: frozenset[str]
    numbers: frozenset[str]


def build_vocabulary(labels: Sequence[str], texts: Iterable[str]) -> Vocabulary:
    """All that the labels and the texts name."""
    known = {kind: set() for kind in Vocabulary.__dataclass_fields__}
    for text in {*texts, *(f'"{label}"' for label in labels), *labels}:
        for kind, _, forms in claims(text):
            for form in forms:
                parts = {"labels": (form.split(), 1, " "), "paths": (form.split(" > "), 2, " > ")}.get(kind)
                known[kind] |= runs(*parts) if parts else {form}
    known["shortcuts"] |= {label.casefold() for label in labels if len(label) == 1}
    return Vocabulary(**{kind: frozenset(forms) for kind, forms in known.items()})


# %%
def unsupported_claims(answer: str, vocabulary: Vocabulary, prompt: str = "") -> list[str]:
    """Labels, menu paths, shortcuts and numbers of an answer that neither the knowledge nor the question contains."""
    missing = [
        (kind, written, forms)
        for kind, written, forms in claims(answer)
        if not set(forms) <= getattr(vocabulary, kind) | {""}
    ]
    if not missing:
        return []
    asked, words = {form for _, _, forms in claims(prompt) for form in forms}, f" {normalise(prompt)} "
    return list(
        dict.fromkeys(
            written
            for kind, written, forms in missing
            if not set(forms) <= asked and not (kind == "labels" and f" {forms[0]} " in words)
        )
    )


def failures(item: SuiteItem, answer: str, unsupported: Sequence[str] = ()) -> list[str]:
    """Why an answer fails an item; an empty list is a pass. `same_as` is judged over all items, in `run_suite`."""
    language, found = item.answer_language or item.language, []
    if not answer.strip():
        return ["empty"]
    if item.expect == "deny" and not denies(answer, language):
        found.append("does not say that it is not there")
    if item.expect == "deny" and unsupported:
        found.append(f"denies, and yet names {', '.join(unsupported)}")
    if item.expect == "decline" and not declines(answer):
        found.append("does not decline")
    if item.expect == "answer" and declines(answer):
        found.append("declines an answerable question")
    found += [f"lacks {' or '.join(group)}" for group in item.must if not any(contains(answer, m) for m in group)]
    found += [f"says {word}" for word in item.must_not if contains(answer, word)]
    if item.answer_language and not speaks(answer, item.answer_language):
        found.append(f"is not in {item.answer_language}")
    if item.steps is not None and bool(re.search(r"(?m)^\s*1[.)]\s", answer)) != item.steps:
        found.append("is not a numbered list" if item.steps else "is a numbered list")
    return found


def run_suite(
    items: Sequence[SuiteItem], answer: Callable[[list[str]], list[str]], vocabulary: Vocabulary
) -> pd.DataFrame:
    """One row per item: its answer, whether it passed and why not, and the claims that the knowledge does not support.

    `answer` maps prompts to answers: a model, a merged folder or a served endpoint. `family` is the family of the item's facts.
    """
    answers = answer([item.prompt for item in items])
    claimed = [unsupported_claims(a, vocabulary, item.prompt) for item, a in zip(items, answers, strict=True)]
    reasons = {i.id: failures(i, a, c) for i, a, c in zip(items, answers, claimed, strict=True)}
    families, rows = fact_families([item for item in items if item.fact_ids]), []
    for item, text, unsupported in zip(items, answers, claimed, strict=True):
        found = list(reasons[item.id])
        flipped = bool(item.same_as) and bool(found) != bool(reasons.get(item.same_as))
        if flipped:
            found.append(f"differs in outcome from {item.same_as}")
        rows.append(
            {
                **item.model_dump(),
                "family": families[item.fact_ids[0]] if item.fact_ids else item.id,
                "answer": text,
                "passed": not found,
                "flipped": flipped if item.same_as else None,
                "reasons": "; ".join(found),
                "unsupported": len(unsupported),
                "unsupported_claims": unsupported,
            }
        )
    return pd.DataFrame(rows)


# %% tags=["active-ipynb"]
# suite_items = load_suites()
# print(
#     f"{len(suite_items)} items:", ", ".join(f"{n} {kind}" for kind, n in Counter(i.type for i in suite_items).items())
# )
# for item in [i for i in suite_items if i.type in ("absent", "twin") and i.language == "en"][:2]:
#     print(f"\n{item.type}: {item.prompt}")
#     for answer in (item.gold, "Yes, just open the menu.", "There is no such feature."):
#         print(f"  {'; '.join(failures(item, answer)) or 'passes'}: {answer[:90]}")

# %% [markdown]
# A probe asks for what does not exist, its twin for what does. The authored answer must pass both; saying yes to everything must fail
# the one, and denying everything the other.


# %%
def suite_matrix(results: pd.DataFrame) -> pd.DataFrame:
    """Pass rate of each capability and type of item."""
    return results.pivot_table(index="capability", columns="type", values="passed", aggfunc="mean")


# %% [markdown]
# Of a suite, these rates are reported with 95 % intervals over families of facts, as for the metrics. False answers to probes and false
# refusals of their answerable twins belong together: their mean is what *balanced accuracy* lacks to one. On `held_out` probes a model was
# never told by either corpus that the thing is missing: they show whether it learned to say no, or which things to say no to. *Flips* are the variants of a
# question (typing errors, capitals, courtesy, the other language) that pass where the question fails, or the reverse;
# a model that fails everything flips nothing.


# %%
def rate(summed: np.ndarray) -> np.ndarray:
    """(…) first column over the second; not a number where there is nothing to count."""
    return np.divide(summed[..., 0], summed[..., 1], out=np.full(summed.shape[:-1], np.nan), where=summed[..., 1] > 0)


def share_of(column: str, among: Callable[[pd.DataFrame], pd.Series]) -> Callable[[pd.DataFrame, str], np.ndarray]:
    """Statistics of the mean of a column among some items."""

    def statistics(frame: pd.DataFrame, who: str) -> np.ndarray:
        counted = among(frame).to_numpy(float)
        return np.stack([frame[f"{who}_{column}"].to_numpy(float) * counted, counted], axis=1)

    return statistics


def is_trap(frame: pd.DataFrame) -> pd.Series:
    return (frame["suite"] == "probes") & (frame["type"] != "twin")


FALSE_ANSWER = share_of("failed", is_trap)
FALSE_REFUSAL = share_of("failed", lambda f: f["type"] == "twin")
SUITE_METRICS = (
    MetricSpec("checklists", "higher", share_of("passed", lambda f: f["suite"] == "checklists"), rate),
    MetricSpec("false_answer", "lower", FALSE_ANSWER, rate),
    MetricSpec("false_answer_held_out", "lower", share_of("failed", lambda f: is_trap(f) & f["held_out"]), rate),
    MetricSpec("false_refusal", "lower", FALSE_REFUSAL, rate),
    MetricSpec(
        "balanced_accuracy",
        "higher",
        lambda f, who: np.hstack([FALSE_ANSWER(f, who), FALSE_REFUSAL(f, who)]),
        lambda s: 1 - (rate(s[..., :2]) + rate(s[..., 2:])) / 2,
    ),
    MetricSpec("flips", "lower", share_of("flipped", lambda f: f["same_as"].notna()), rate),
    MetricSpec("unsupported_per_answer", "lower", share_of("unsupported", lambda f: f["id"].notna()), rate),
)


def side_by_side(base: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """Items that both answered, with what each did."""
    judged = ["passed", "flipped", "unsupported"]
    frames = [
        r[["id", "prompt", *judged]].rename(columns={c: f"{who}_{c}" for c in judged})
        for who, r in (("base", base), ("tuned", tuned))
    ]
    frame = tuned.drop(columns=judged).merge(frames[0], on=["id", "prompt"]).merge(frames[1], on=["id", "prompt"])
    for who in ("base", "tuned"):
        frame[f"{who}_flipped"] = frame[f"{who}_flipped"].eq(True)  # none where there is nothing to flip
        frame[f"{who}_failed"] = ~frame[f"{who}_passed"].astype(bool)
    return frame


# %%
def suite_scores(base: pd.DataFrame, tuned: pd.DataFrame) -> dict:
    """Rates of base and tuned with their intervals, their difference and its p-value; shares in [0, 1], but for unsupported claims."""
    frame = side_by_side(base, tuned)
    draws = resample(int(clusters_of(frame).max()) + 1, 0)
    scores = {spec.name: compare(frame, spec, draws) for spec in SUITE_METRICS}
    for figures in scores.values():
        figures["paired"] = {k: figures["paired"][k] for k in ("difference", "p_value")}
    return scores


def hallucination_summary(results: pd.DataFrame) -> dict[str, float]:
    """The rates without their intervals, and how many probes and twins they rest on.

    Denying everything gives nothing but false refusals of the twins, and false answers wherever a probe asks for the right fact beside the
    denial or for a refusal; declining everything passes out-of-domain probes alone. Both stay below a balanced accuracy of one half.
    """
    frame = side_by_side(results, results)
    counts = {"probes": int(is_trap(frame).sum()), "twins": int((frame["type"] == "twin").sum())}
    return counts | {spec.name: float(spec.figure(spec.statistics(frame, "tuned").sum(0))) for spec in SUITE_METRICS}


def suite_table(suites: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Base beside tuned, one line per rate."""
    scores = suite_scores(suites.get("base", suites["tuned"]), suites["tuned"])
    text = "{value:.3g} [{low:.3g}, {high:.3g}]".format
    lines = {
        name: {who: text(**figures[who]) for who in ("base", "tuned") if who in suites}
        | ({"p": f"{figures['paired']['p_value']:.3f}"} if len(suites) > 1 else {})
        for name, figures in scores.items()
    }
    return pd.DataFrame.from_dict(lines, orient="index")


# %%
def texts_below(value) -> Iterator[str]:
    """Every string in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_below(inner)


def knowledge_vocabulary(examples: Sequence[Example], folder: str = "data/knowledge") -> Vocabulary:
    """All that an answer may name: labels and authored answers of the knowledge, where it is present, and reference answers."""
    index = next((p for p in (Path(folder), REPOSITORY / folder) if (p / "facts.yaml").is_file()), None)
    labels, texts = [], [e.messages[-1]["content"] for e in examples]
    if index:
        import yaml  # only the repository has files to read with it

        files, loader = {}, getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        for file in sorted(index.glob("*.yaml")):
            try:
                files[file.name] = yaml.load(file.read_text(encoding="utf-8"), loader)
            except yaml.YAMLError as error:
                raise ArcivaError(f"{file} is no valid YAML ({' '.join(str(error).split())}); mend it") from error
        labels = [str(label) for fact in files.pop("facts.yaml").values() for label in fact.get("labels", [])]
        for entries in ((content or {}).get("entries") or [] for content in files.values()):
            texts += texts_below([entry.get("answers", {}) for entry in entries])
    return build_vocabulary(labels, texts)


def answerer(model, tokenizer, config: Config, hardware: Hardware) -> Callable[[list[str]], list[str]]:
    """The model as a function from prompts to answers."""
    limits = {"max_new_tokens": config.max_new_tokens, "batch_size": config.generation_batch}
    return lambda prompts: [a.text for a in generate_answers(model, tokenizer, prompts, hardware, **limits)]


def run_suites(
    model, tokenizer, items: Sequence[SuiteItem], vocabulary: Vocabulary, config: Config, hardware: Hardware
) -> dict[str, pd.DataFrame]:
    """Results of base and tuned on the same items."""
    answer = answerer(model, tokenizer, config, hardware)
    results = {"tuned": run_suite(items, answer, vocabulary)}
    with untuned(model):
        results["base"] = run_suite(items, answer, vocabulary)
    return results


def or_null(value):
    """The same with None for what is not a number, which JSON does not know."""
    if isinstance(value, dict):
        return {k: or_null(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def suite_summary(suites: dict[str, pd.DataFrame], adapter: str | None) -> dict:
    """`suites.json`, schema version 2. `adapter` is the hash of the judged weights, `suites` that of the items.

    `base` and `tuned`: `rates` (name → {value, low, high}), `flips` by variant and `matrix` (capability → type → share passed); `paired`:
    name → {difference: {value, low, high}, p_value}. A model without its base, as behind an endpoint, is `tuned` alone.
    """
    tuned = suites["tuned"]
    items = tuned[[c for c in SuiteItem.model_fields if c in tuned]].to_json(orient="records")
    scores = suite_scores(suites.get("base", tuned), tuned)
    summary = {"schema_version": 2, "adapter": adapter, "suites": hashlib.sha256(items.encode()).hexdigest()[:12]}
    for who, results in suites.items():
        variants = results[results["same_as"].notna()]
        summary[who] = {
            "rates": {name: figures[who] for name, figures in scores.items()},
            "flips": variants["flipped"].astype(float).groupby(variants["variant"]).mean().to_dict(),
            "matrix": json.loads(suite_matrix(results).to_json(orient="index")),
        }
    if "base" in suites:
        summary["paired"] = {name: figures["paired"] for name, figures in scores.items()}
    return or_null(summary)


def save_suites(suites: dict[str, pd.DataFrame], reports_dir: str, adapter: str | None = None) -> None:
    """`suites.json` (the summary above) and `suites_<who>.jsonl` (every answer, with its reasons and unsupported claims)."""
    for who, results in suites.items():
        lines = results.to_json(orient="records", lines=True, force_ascii=False)
        write_atomic(Path(reports_dir) / f"suites_{who}.jsonl", lines)
    text = json.dumps(suite_summary(suites, adapter), indent=1, allow_nan=False)
    write_atomic(Path(reports_dir) / "suites.json", text)


def load_suite_results(reports_dir: str) -> dict[str, pd.DataFrame] | None:
    """Suite results of an earlier evaluation; None where it ran without suites."""
    files = {who: Path(reports_dir) / f"suites_{who}.jsonl" for who in ("tuned", "base")}
    if not all(file.is_file() for file in files.values()):
        return None
    return {who: pd.read_json(file, lines=True, dtype=False) for who, file in files.items()}


# %% tags=["active-ipynb"]
# suites = (
#     run_suites(model, tokenizer, suite_items, knowledge_vocabulary(examples), config, hardware) if suite_items else None
# )
# if suites:
#     save_suites(suites, config.reports_dir, adapter_fingerprint(config.output_dir))

# %% tags=["active-ipynb"]
# suite_table(suites) if suites else "no suites"

# %% [markdown]
# Read false answers and false refusals together: a model that denies everything has few of the former and all of the latter, and one that
# declines everything fails the probes too, because "I cannot help" does not tell anybody that a feature is missing. Neither gets a balanced
# accuracy of one half. What such answerers without any knowledge reach is printed by `python tools/run_suites.py --canned`; a figure
# near theirs says nothing.
#
# The suites ask about the whole product, whatever the data were. So the items whose facts training has taught come apart from the others
# first.

# %% tags=["active-ipynb"]
# taught = {fact for row in splits["train"] for fact in row["fact_ids"]}
# by_facts = {
#     who: frame.assign(
#         facts=np.where([bool(f) and taught.issuperset(f) for f in frame["fact_ids"]], "taught", "not taught")
#     ).groupby(["suite", "facts"])
#     for who, frame in sorted((suites or {}).items())
# }
# pd.DataFrame(
#     {"items": by_facts["tuned"].size()}
#     | {who: groups["passed"].mean().map("{:.1%}".format) for who, groups in by_facts.items()}
# ) if suites else "no suites"

# %% [markdown]
# The matrix shows the share of passed items by capability and type of check, for the base and for the tuned model, behind the number of
# items of the whole row. Most cells hold fewer than six; read those in the dashboard, which shows the number in each.

# %% tags=["active-ipynb"]
# matrices = {who: suite_matrix(suites[who]) for who in ("base", "tuned")} if suites else {}
# matrix = pd.concat(matrices, names=["model"]).swaplevel().sort_index() if suites else None
# if suites:
#     matrix.insert(
#         0, "items", suites["tuned"]["capability"].value_counts().reindex(matrix.index.get_level_values(0)).values
#     )
# matrix.style.format(dict.fromkeys(matrix.columns[1:], "{:.0%}"), na_rep="") if suites else "no suites"

# %% [markdown]
# ### Whether it ships
#
# Thresholds turn the figures into a decision. None is set by default; a team sets its own, demands with `not_worse_than_base` that training
# has spoilt nothing, and names in `compare_to` the reports of the model that it has accepted last. These comparisons are paired, on the questions
# that both have answered, rephrased and unseen ones apart, and on the suites' items, by an exact sign test on those that only one of the two
# has passed. They are some twenty; so that an equal model is seldom refused by chance, worse means a p-value below 0.01, not 0.05.


# %%
GATE_P = 0.01
JUDGED_GROUPS = ("test/rephrased", "test/unseen")


def paired_with(accepted_dir: str, config: Config) -> tuple[dict[str, pd.DataFrame], list[MetricSpec]]:
    """Test questions that both models answered, by group, with the accepted one as `base`, and the metrics that compare them."""
    accepted, own = load_predictions(str(folder_of(accepted_dir))), load_predictions(config.reports_dir)
    own = own.query("split == 'test'").drop(columns=["base_answer", "base_cut", "base_nll"])
    columns = {f"tuned_{part}": f"base_{part}" for part in ("answer", "cut", "nll")}
    theirs = accepted[["question", "reference", "novelty", "answer_tokens", *columns]].rename(columns=columns)
    theirs = theirs.drop_duplicates(["question", "reference", "novelty"])
    frame = own.merge(theirs, on=["question", "reference", "novelty"], suffixes=("", "_accepted"))
    groups = {f"test/{novelty}": group for novelty, group in frame.groupby("novelty")}
    shared = len(groups.get("test/rephrased", ()))
    if shared < 20:
        raise ArcivaError(
            f"{accepted_dir} shares {shared} rephrased test questions with this run, expected 20 or more; name reports on the same data and seed"
        )
    same_tokens = bool((frame["answer_tokens"] == frame["answer_tokens_accepted"]).all())
    comparable = [s for s in METRICS if s.better != "neither" and (s.name != "perplexity" or same_tokens)]
    return groups, comparable


def sign_test(gained: int, lost: int) -> float:
    """Exact two-sided p-value in (0, 1] of so many items gained and lost, if each were as likely as the other."""
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))


def worse_metrics(scores: dict, group: str, against: str) -> list[str]:
    """A sentence for each metric of a group that is worse than `against`, beyond chance."""
    found = []
    for spec in METRICS:
        if spec.better == "neither" or spec.name not in scores:
            continue
        then, now = (scores[spec.name][who]["value"] for who in ("base", "tuned"))
        chance = scores[spec.name]["paired"]["p_value"]
        if (now < then if spec.better == "higher" else now > then) and chance < GATE_P:
            found.append(f"{spec.name} on {group} went from {then:.3g} to {now:.3g} (p {chance:.3f}) against {against}")
    return found


def worse_suites(before: pd.DataFrame, after: pd.DataFrame, against: str) -> list[str]:
    """The same for the share of passed items of each suite."""
    found, shared = [], side_by_side(before, after)
    if not len(shared):
        raise ArcivaError(f"{against} and this run share no suite items; expected reports on the suites of today")
    for suite, items in shared.groupby("suite"):
        then, now = items["base_passed"].astype(bool), items["tuned_passed"].astype(bool)
        gained, lost = int((now & ~then).sum()), int((then & ~now).sum())
        chance = sign_test(gained, lost)
        if lost > gained and chance < GATE_P:
            found.append(
                f"{suite} went from {then.mean():.1%} to {now.mean():.1%} passed (p {chance:.3f}) against {against}"
            )
    return found


# %%
def report_of_adapter(config: Config, *, missing_ok: bool = False) -> dict | None:
    """The report on the adapter in `output_dir`, or on whichever it judges where none is there; another adapter's counts as none."""
    report, adapter = load_report(config.reports_dir, missing_ok=missing_ok), adapter_fingerprint(config.output_dir)
    if report and adapter and report.get("adapter") != adapter:
        if missing_ok:
            return None
        raise ArcivaError(
            f"the report in {config.reports_dir} judges another adapter than {config.output_dir} holds; "
            "run the evaluate stage, or name the other adapter's output_dir"
        )
    return report


def below(asked: dict[str, float], reached: dict[str, float]) -> list[str]:
    """A sentence for each threshold that is not reached."""
    return [
        f"{name.removeprefix('min_')} is {reached[name]:.3g}, below {least:g}"
        for name, least in asked.items()
        if name in reached and not reached[name] >= least
    ]


def reached_on_suites(tuned: pd.DataFrame) -> dict[str, float]:
    """What the thresholds on suites are compared with."""
    summary = hallucination_summary(tuned)
    return {f"min_{name}": summary[name] for name in ("checklists", "balanced_accuracy")}


def behind_accepted(config: Config) -> list[str]:
    """Where this model is worse than the accepted one."""
    accepted, own = (load_suite_results(str(d)) for d in (folder_of(config.compare_to), Path(config.reports_dir)))
    if accepted and not own:
        raise ArcivaError(
            f"no suite results in {config.reports_dir}, expected them because {config.compare_to} has some; evaluate with data/suites"
        )
    groups, comparable = paired_with(config.compare_to, config)
    found = []
    for group, frame in groups.items():
        draws = resample(int(clusters_of(frame).max()) + 1, config.seed)
        scores = {spec.name: compare(frame, spec, draws) for spec in comparable}
        found += worse_metrics(scores, group, config.compare_to)
    return found + (worse_suites(accepted["tuned"], own["tuned"], config.compare_to) if accepted else [])


def behind_base(config: Config, report: dict) -> list[str]:
    """Where training has made the model worse than its base."""
    groups = [group for group in JUDGED_GROUPS if group in report["groups"]]
    found = [sentence for group in groups for sentence in worse_metrics(report["groups"][group], group, "its base")]
    suites = load_suite_results(config.reports_dir)
    return found + (worse_suites(suites["base"], suites["tuned"], "its base") if suites else [])


def is_gated(config: Config) -> bool:
    """Whether anything decides on acceptance."""
    return bool(thresholds(config) or config.compare_to or config.not_worse_than_base)


def shortfalls(config: Config) -> list[str]:
    """Why the evaluated model must not ship, one sentence each; an empty list accepts it."""
    if not is_gated(config):
        return []
    asked, report = thresholds(config), report_of_adapter(config)
    scores = report["groups"].get("test/rephrased")
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
        reached |= reached_on_suites(suites["tuned"])
    found = below(asked, reached)
    found += behind_base(config, report) if config.not_worse_than_base else []
    return found + (behind_accepted(config) if config.compare_to else [])


def refuse_shortfalls(config: Config) -> None:
    """End the run with one sentence where a threshold is missed."""
    if found := shortfalls(config):
        raise ArcivaError(
            f"not accepted: {'; '.join(found)}; see {config.reports_dir}, then train longer, or on more, or lower the threshold"
        )


# %% tags=["active-ipynb"]
# refuse_shortfalls(config)
# print("accepted by every threshold" if is_gated(config) else "no threshold is set")

# %% [markdown]
# ## 7. Interactive Dashboard
#
# Figures say how good the model is; the worst answers say why. Scoring and showing are kept apart: `rate_generations` adds the
# metrics of section 5 per answer, the rest only displays.


# %%
METRIC_LABELS = {  # label, better direction and digits of each metric, in the order shown
    "rouge_l": ("ROUGE-L", "higher", 2),
    "chrf": ("chrF", "higher", 1),
    "bleu": ("BLEU", "higher", 1),
    "exact_match": ("Exact match", "higher", 2),
    "perplexity": ("Perplexity", "lower", 2),
    "bits_per_byte": ("Bits per byte", "lower", 2),
    "cut_off": ("Cut off", "lower", 2),
    "answer_words": ("Answer length in words", "neither", 1),
}


def rate_generations(predictions: pd.DataFrame) -> pd.DataFrame:
    """The predictions with every metric of each answer, as `base_<metric>` and `tuned_<metric>`; BLEU is at sentence level."""
    rated = predictions.copy()
    reference_bytes = rated["reference"].str.encode("utf-8").str.len()
    for who in ("base", "tuned"):
        pairs = list(zip(rated[f"{who}_answer"], rated["reference"], strict=True))
        rated[f"{who}_rouge_l"] = [rouge_l(p, r) for p, r in pairs]
        rated[f"{who}_chrf"] = [CHRF.sentence_score(p, [r]).score for p, r in pairs]
        rated[f"{who}_bleu"] = [SENTENCE_BLEU.sentence_score(p, [r]).score for p, r in pairs]
        rated[f"{who}_exact_match"] = [exact_match(p, r) for p, r in pairs]
        rated[f"{who}_perplexity"] = np.exp(np.minimum(700.0, rated[f"{who}_nll"] / rated["answer_tokens"]))
        rated[f"{who}_bits_per_byte"] = rated[f"{who}_nll"] / math.log(2) / reference_bytes
        rated[f"{who}_cut_off"] = rated[f"{who}_cut"].astype(float)
        rated[f"{who}_answer_words"] = rated[f"{who}_answer"].str.split().str.len()
    return rated


def best_and_worst(rated: pd.DataFrame, metric: str = "tuned_rouge_l", count: int = 5) -> pd.DataFrame:
    """The `count` best and worst answers of each split and novelty by one metric, best first."""
    lower_is_better = METRIC_LABELS[metric.split("_", 1)[1]][1] == "lower"
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
# last table of this section stands in for them.


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
            print(f"{min(25, len(chosen))} of {len(chosen)} matching rows")
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
# The page is one HTML file with its data inside: it opens offline, in a mail, and below in Jupyter and Colab. Its template
# lies in the repository; a notebook without it writes the CSV alone and says so. Answers are hostile input: nothing of them
# reaches the page unescaped, the page's policy allows its own script only, and the notebook shows it in a sandbox.


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
    shown = [x for x in data["summary"] if x.get("by", "split") == "split"]
    summary = [[*(x[c] for c in columns[:3]), x["base"]["value"], x["tuned"]["value"]] for x in shown]
    caption = f"The first {min(len(rows), NOSCRIPT_ROWS)} of {len(rows)} answers, shortened; scripts are off."
    answers = html_table(caption, PAGE_COLUMNS, [[r.get(c) for c in PAGE_COLUMNS] for r in rows[:NOSCRIPT_ROWS]])
    parts = {"TITLE": html.escape(data["title"]), "TABLE": html_table("Summary", columns, summary) + answers}
    # The browser runs this one script and no other, whatever an answer may contain: its hash stands in the page's policy.
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    parts["HASH"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # One pass, so that a placeholder within the data stays text.
    pattern = r"<!--ARCIVA_(TITLE|TABLE|HASH)-->|/\*ARCIVA_DATA\*/"
    return re.sub(pattern, lambda match: parts[match[1]] if match[1] else script_json(data), template)


# %%
ITEM_FACTS = "id suite capability type language prompt gold expect held_out twin same_as fact_ids".split()
ITEM_RESULTS = "answer passed reasons unsupported unsupported_claims".split()


def suite_rows(suites: dict[str, pd.DataFrame]) -> list[dict]:
    """Suite items with base and tuned results side by side; the answer that passes stands as their reference."""
    joined = suites["tuned"].reindex(columns=ITEM_FACTS).rename(columns={"gold": "reference"})
    for who in ("base", "tuned"):
        results = suites[who].set_index("id").reindex(columns=ITEM_RESULTS).dropna(axis=1, how="all")
        joined = joined.join(results.add_prefix(f"{who}_"), on="id")
    return joined.to_dict("records")


def summary_lines(groups: dict[str, dict], by: str) -> list[dict]:
    """One line per group and metric: its figures, and the slice `by` that the group belongs to."""
    return [
        {"by": by, "group": group, "questions": s["questions"], "clusters": s["clusters"], "metric": name, **s[name]}
        for group, s in groups.items()
        for name in METRIC_LABELS
    ]


def dashboard_data(rated: pd.DataFrame, report: dict, suites: dict[str, pd.DataFrame] | None = None) -> dict:
    """What the page shows: figures with intervals, metrics, rows, the suites where they ran, and which adapter is judged."""
    summary = summary_lines(report["groups"], "split")
    for column, values in report["by"].items():
        flat = {f"{value}, {novelty}": s for value, novelties in values.items() for novelty, s in novelties.items()}
        summary += summary_lines(flat, column)
    metrics = {**METRIC_LABELS, **({"unsupported": ("Unsupported claims", "lower", 0)} if suites else {})}
    nano = is_nano(report["config"]["base_model"])
    figures = suite_scores(suites["base"], suites["tuned"]) if suites else None
    return {
        "title": "Arciva assistant: base beside tuned",
        "generated": report["created"],
        "adapter": report.get("adapter"),
        "note": "Nano base: this page proves the pipeline, not the assistant." if nano else None,
        "summary": summary,
        "metrics": [
            {"name": n, "label": label, "better": better, "digits": d} for n, (label, better, d) in metrics.items()
        ],
        "suites": {"figures": figures, "items": suite_rows(suites)} if suites else None,
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


def show_dashboard(path: str | Path, height: int = 800):
    """The page at `path` in a frame of the notebook, `height` pixels high: it needs no network, and no other file later.

    The sandbox lets its scripts and downloads work but gives it no origin: it reaches neither the notebook nor its cookies.
    """
    from IPython.display import HTML

    if not Path(path).is_file():
        print(f"no {path}: the page needs the repository's template, tools/dashboard_template.html")
        return None
    # In single quotes, for the page's data is full of double ones.
    quoted = Path(path).read_text(encoding="utf-8").replace("&", "&amp;").replace("'", "&#39;")
    style = f"width:100%;height:{height}px;border:1px solid #8886;resize:vertical"
    frame = f"<iframe title='Dashboard' sandbox='allow-scripts allow-downloads' style='{style}' srcdoc='{quoted}'>"
    return HTML(f"<div>{frame}</iframe></div>")


# %% tags=["active-ipynb"]
# rated = write_dashboard(predictions, report, config.reports_dir, suites=suites)
# chosen = best_and_worst(rated, "tuned_rouge_l", count=4)
# show_table(chosen[SHOWN])

# %% [markdown]
# Run the next cell to have the whole page here, to sort, filter, search and label. A notebook that travels does not carry it: it would
# make up most of the file, and GitHub removes frames. The committed one shows a picture of it instead; `reports/dashboard.html`, which the
# run wrote, is the same page to open or to send. Labels given within the notebook last until the cell is run again: export them first.

# %% tags=["active-ipynb"]
# show_dashboard(Path(config.reports_dir) / "dashboard.html")

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
    the scales of all blocks of a tensor: every piece is read before the first goes back. Where there is a GPU, the base was quantised
    there, so that is where it is done again.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pieces = (piece.to(device, dtype).contiguous() for piece in pieces)
    quantised = [bnb.functional.quantize_4bit(piece, quant_type="nf4") for piece in pieces]
    absmax = torch.cat([state.absmax for _, state in quantised])
    offset = absmax.mean()
    scales, scale_state = bnb.functional.quantize_blockwise(absmax - offset, blocksize=256)
    absmax = (bnb.functional.dequantize_blockwise(scales, scale_state) + offset).float()
    parts = absmax.split([state.absmax.numel() for _, state in quantised])
    for (packed, state), part in zip(quantised, parts, strict=True):
        state.absmax = part
        yield bnb.functional.dequantize_4bit(packed, state).float().cpu()


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
        tokenizer = load_tokenizer(config.output_dir)
        tokenizer.save_pretrained(folder)
        # What ends an answer here; a base's own end of text is never written after one.
        ends = {"eos_token_id": stop_token_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
        GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ends).save_pretrained(folder)
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


def unverified(config: Config) -> Config:
    """The same run with its merge in a hidden folder beside `merged_dir`, which it takes over once it is verified."""
    place = Path(config.merged_dir)
    return replace(config, merged_dir=str(place.with_name(f".{place.name}.unverified")))


# %% tags=["active-ipynb"]
# started = time.perf_counter()
# merged_folder = merge_adapter(unverified(config))
# print(f"merged in {time.perf_counter() - started:.1f} s")
# print(*sorted(f"{p.stat().st_size / 2**10:10,.1f} KiB  {p}" for p in merged_folder.iterdir()), sep="\n")

# %% [markdown]
# A merge must be checked before it replaces an earlier one. The merged folder is loaded the way a user would, without peft or
# bitsandbytes, and answers held-out questions beside the live adapter model: the largest difference between their next-token
# distributions, the share of equal greedy answers, and both perplexities. Only then does it get its name, with the figures in its manifest.


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

Intervals are 95 % bootstrap intervals over families of facts. *Rephrased*: the facts were in training, the wording was not. *Unseen*: the facts were not.

## The merge

{merge}

Trained on data with fingerprint `{data}`; every setting and package version stands in `manifest.json`.
"""


def write_model_card(config: Config, report: dict | None, *, name: str | None = None) -> None:
    """The Hub card beside the merged weights, written from the manifest and the report; `name` is what the folder will be called."""
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
        folder=name or Path(config.merged_dir).name,
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
# merged_model, merged_tokenizer = load_merged_model(unverified(config), hardware)
# verification = compare_models(live, measure_model(merged_model, merged_tokenizer, rows, config, hardware))
# pd.Series(verification, name="merged against live adapter").to_frame()

# %% [markdown]
# Equal answers should be near 100 %, and both perplexities, of rephrased and unseen questions together, the same to three digits; what is
# left is fp16 rounding, which can tip a near-tie between two tokens. The card and the manifest record the figures.


# %%
def markdown_table(report: dict | None) -> str:
    """The report's main table in Markdown."""
    if report is None:
        return "Not evaluated yet."
    frame = report_table(report).reset_index()
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns), *lines])


def refuse_difference(verification: dict, config: Config) -> None:
    """End with an error where the merged model is another than the one that was judged.

    Rounding to fp16 moves the mean loss by less than a thousandth; 0.02 nats would be a mistake. Merged into the original weights
    it is another model on purpose, and only its figures are kept.
    """
    before, after = verification["perplexity_adapter"], verification["perplexity_merged"]
    if config.merge_base == "dequantized" and abs(math.log(after / before)) > 0.02:
        raise ArcivaError(
            f"the merged model's perplexity is {after:.3f}, the adapter's {before:.3f}, expected the same; it stays in "
            f"{unverified(config).merged_dir}, and {config.merged_dir} as it was: ship the adapter with its base instead"
        )


def publish_merged(config: Config, verification: dict, report: dict | None) -> Path:
    """Give the verified merge its name, with the comparison and the held-out figures in its manifest and on its model card."""
    refuse_difference(verification, config)
    candidate = unverified(config)
    record_in_manifest(candidate.merged_dir, verification=verification, metrics=report["groups"] if report else None)
    write_model_card(candidate, report, name=Path(config.merged_dir).name)
    check_replaceable(Path(config.merged_dir))
    take_place(Path(candidate.merged_dir), Path(config.merged_dir))
    return Path(config.merged_dir)


# %% tags=["active-ipynb"]
# publish_merged(config, verification, report)
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
    if {"train", "dashboard"} <= set(stages) and "evaluate" not in stages:
        raise ArcivaError("a dashboard of the newly trained adapter needs its evaluation; add the evaluate stage")
    hardware, written, model = detect_hardware(), {}, None
    check_writable(config)
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
        record_in_manifest(config.output_dir, metrics=report["groups"])
        print(report_table(report).to_string())
        written["report"] = Path(config.reports_dir) / "metrics.json"
        if items := load_suites():
            save_suites(
                run_suites(model, tokenizer, items, knowledge_vocabulary(examples), config, hardware),
                config.reports_dir,
                adapter_fingerprint(config.output_dir),
            )
            written["suites"] = Path(config.reports_dir) / "suites.json"
    if "dashboard" in stages:
        predictions, report = load_predictions(config.reports_dir), report_of_adapter(config)
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
        merge_adapter(unverified(config))
        merged = measure_model(*load_merged_model(unverified(config), hardware), rows, config, hardware)
        report = report_of_adapter(config, missing_ok=True)
        written["merged model"] = publish_merged(config, compare_models(live, merged), report)
    return written


# %%
# safetensors, and torch.save when it can write no more, say in words only that space is wanting.
NO_SPACE = re.compile(
    r"\(os error 28\)|PytorchStreamWriter failed writing|inline_container.* unexpected pos|iostream error"
)


def disk_full(error: Exception) -> bool:
    """Whether a write failed for want of space."""
    return getattr(error, "errno", None) == errno.ENOSPC or bool(NO_SPACE.search(str(error)))


def run_main(run: Callable[[], dict[str, Path]]) -> int:
    """Exit code of a script's run: 0 with a summary, 2 after one sentence on what to put right, 143 or 130 when interrupted."""
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
    except KeyboardInterrupt:
        print("stopped by the keyboard; the same command goes on from the last complete checkpoint", file=sys.stderr)
        return 130
    except torch.cuda.OutOfMemoryError:
        print(
            "error: the GPU ran out of memory; lower micro_batch_pairs or max_length, or set USE_DEBUG_MODEL",
            file=sys.stderr,
        )
        return 2
    except (OSError, SafetensorError, RuntimeError) as error:
        if not disk_full(error):
            raise
        print("error: the disk is full; free some space, and the same command goes on", file=sys.stderr)
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
