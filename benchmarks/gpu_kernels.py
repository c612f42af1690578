"""What a GPU may train with: attention kernels, Liger's Triton kernels, compiled blocks.

Each is an axis of train_gpu.py. The module takes over what a measurement shows to pay within a ten-minute job, and no option before.
"""

from __future__ import annotations

import importlib.util

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_liger_kernel_available

import arciva_assistant_poc as arciva

LIGER, COMPILE = "liger", "compile"


def training_with(hardware: arciva.Hardware, kernel: str, *, liger: bool) -> arciva.Hardware:
    """The hardware, but with this attention kernel in packed rows, and Liger's kernels or not, whatever the module chooses."""
    chosen = type("Chosen", (arciva.Hardware,), {"packed_attention": kernel, "liger": liger})
    return chosen(**vars(hardware))


def capability(hardware: arciva.Hardware) -> tuple[int, int]:
    return torch.cuda.get_device_capability() if hardware.device == "cuda" else (0, 0)


def attention_kernels(hardware: arciva.Hardware) -> list[str]:
    """Implementations that this machine can run, the module's choice first; flash kernels need compute capability 8.0."""
    found, modern = list(dict.fromkeys((hardware.packed_attention, "sdpa"))), capability(hardware) >= (8, 0)
    if modern and is_flash_attn_2_available():
        found.append("flash_attention_2")
    if capability(hardware)[0] == 9 and is_flash_attn_3_available():
        found.append("flash_attention_3")
    if modern and importlib.util.find_spec("triton"):
        found.append("flex_attention")
    return found


def by_position(kernel: str) -> bool:
    """Whether a kernel is given all pairs in one row, whose length costs flash-attn nothing."""
    return kernel.startswith("flash")


def extras_present(hardware: arciva.Hardware) -> list[str]:
    """Further options that can run here."""
    triton = hardware.device == "cuda" and importlib.util.find_spec("triton") is not None
    return [LIGER] * (triton and is_liger_kernel_available()) + [COMPILE] * triton


def compile_blocks(model) -> None:
    """Every block compiled for itself; all are alike and share the code."""
    for layer in arciva.unwrap(model).model.layers:
        layer.compile(dynamic=True)  # rows differ in width from step to step
