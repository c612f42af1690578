"""The peers' training: TRL's `SFTTrainer` on the pairs that ours trains on, as its users run it.

`padded` is the common recipe: batches of four, padded to the longest, cut at 512 tokens, loss on every token. `bfd` is the best TRL has:
pairs packed into rows of a fixed length with positions that restart, loss on the answers alone. Model, adapter, pairs per step and
learning rate are ours, and both multiply in the same 16-bit format under autocast. Around that each keeps its own formats: ours holds
adapters, norms and the residual stream in fp32; TRL casts the adapters of a 4-bit base to bf16, and norms and residual stream stay
in the format the base was loaded in. What TRL adds on its own (its entropy and accuracy per step) stays on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import datasets
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback

import arciva_assistant_poc as arciva

PADDED_BATCH, PADDED_LENGTH = 4, 512
GENERATION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)  # ChatML with the marks by which TRL finds the answers


class StepClock(TrainerCallback):
    """Seconds of the optimiser steps after `skip` with the loading of their batches, without evaluation and saving; GPU peak of all steps.

    `cold_seconds` are those until the first `skip` steps were done: what compiling costs shows there.
    """

    def __init__(self, skip: int = 1, limit: int | None = None):
        self.skip, self.limit, self.steps, self.seconds, self.losses, self.norms = skip, limit, 0, 0.0, [], []
        self.last, self.began, self.cold_seconds, self.gpu_peak = None, None, 0.0, 0

    def mark(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = self.mark()

    def on_step_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        now = self.mark()
        if self.last is not None and state.global_step > self.skip:
            self.steps, self.seconds = self.steps + 1, self.seconds + now - self.last
        if torch.cuda.is_available():
            self.gpu_peak = max(self.gpu_peak, torch.cuda.max_memory_allocated())
        if self.began is not None and state.global_step == self.skip:
            self.cold_seconds = now - self.began
        self.last = now
        if self.limit and state.global_step >= self.limit + self.skip:
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        self.last = self.mark()
        if state.global_step == 0:  # ours evaluates the base before its first step
            self.began = self.last

    def on_save(self, args, state, control, **kwargs):
        self.last = self.mark()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs.get("grad_norm", 0.0)))


class As16Bit(arciva.Hardware):
    """Hardware that loads what is not quantised in its compute format, as `from_pretrained(dtype=...)` does."""

    @property
    def load_dtype(self) -> torch.dtype:
        return self.dtype


def load_formats(hardware: arciva.Hardware) -> list[str]:
    """Formats in which a peer's user may load the base; the faster one is the peer."""
    formats = [str(hardware.dtype).removeprefix("torch.")]
    return formats if hardware.dtype == hardware.load_dtype else [*formats, "float32"]


def conversations(tokenizer, dataset: datasets.Dataset) -> datasets.Dataset:
    """The pairs as TRL takes them, with the system prompt that ours puts before them."""
    rows = [{"messages": arciva.with_system_prompt(tokenizer, row["messages"])} for row in dataset]
    return datasets.Dataset.from_list(rows)


def as_peers_load(model, attention: str = "sdpa"):
    """The model as transformers and peft leave it: norms in the format of the embeddings, peft's own casts, none of our hooks."""
    model.set_attn_implementation(attention)
    loaded = arciva.unwrap(model).get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name:
            parameter.data = parameter.data.to(loaded)
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", "") == arciva.__name__:
                del module._forward_hooks[key]
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = True
    return model


@contextlib.contextmanager
def in_fp32(model):
    """All but the 4-bit weights in fp32, their values as they are: a held-out loss then measures the training, not the evaluation."""
    formats = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    for parameter in formats:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in formats.items():
            parameter.data = parameter.data.to(dtype)


def trl_trainer(
    model,
    tokenizer,
    dataset: datasets.Dataset,
    config: arciva.Config,
    hardware: arciva.Hardware,
    folder: str,
    *,
    row_tokens: int | None = None,
    attention: str = "sdpa",
    gradient_checkpointing: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
):
    """An `SFTTrainer` of a model with its adapter: the common recipe, or packed rows of `row_tokens`.

    A step holds `config.pairs_per_step` pairs; packed, as many rows as hold about that many. One row per pass: TRL lays several end
    to end, and so does a longer row.
    """
    from trl import SFTConfig, SFTTrainer

    lengths = [len(arciva.encode(tokenizer, row["messages"]).input_ids) for row in dataset]
    packed = row_tokens is not None
    pairs_per_row = row_tokens / (sum(lengths) / len(lengths)) if packed else 1
    batch = 1 if packed else PADDED_BATCH
    settings = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=max(1, round(config.pairs_per_step / pairs_per_row / batch)),
        packing=packed,
        max_length=row_tokens if packed else PADDED_LENGTH,
        assistant_only_loss=packed,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=hardware.dtype == torch.bfloat16,
        fp16=hardware.dtype == torch.float16,
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=hardware.device == "cpu",
        dataloader_pin_memory=hardware.device == "cuda",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
    )
    if packed:
        tokenizer.chat_template = GENERATION_TEMPLATE
    with contextlib.redirect_stdout(None):
        trainer = SFTTrainer(
            model=as_peers_load(model, attention),
            args=settings,
            train_dataset=conversations(tokenizer, dataset),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
    if (
        hardware.dtype == torch.float16
    ):  # the loss scaler cannot unscale TRL's bf16 adapters (peft's troubleshooting page)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer
