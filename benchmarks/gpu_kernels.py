"""What a GPU may train with besides the module's choice: attention kernels, Liger's Triton kernels, compiled blocks.

Each is an axis of train_gpu.py. The module takes over what a measurement shows to pay within a ten-minute job, and no option before.
"""

from __future__ import annotations

import importlib.util

import torch
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_liger_kernel_available

import arciva_assistant_poc as arciva

LIGER, COMPILE = "liger", "compile"


def attending_by(kernel: str, hardware: arciva.Hardware) -> arciva.Hardware:
    """The hardware, but with another attention kernel than the module chooses for packed rows."""
    chosen = type("Attending", (arciva.Hardware,), {"packed_attention": kernel})
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
    """Whether a kernel is given all pairs in one row: transformers reads flash-attn's boundaries only from one."""
    return kernel.startswith("flash")


def extras_present(hardware: arciva.Hardware) -> list[str]:
    """Further options that can run here."""
    triton = hardware.device == "cuda" and importlib.util.find_spec("triton") is not None
    return [LIGER] * (triton and is_liger_kernel_available()) + [COMPILE] * triton


def apply_extras(model, extras: list[str]):
    """The base model with Liger's norms, rotation and MLP, or with every block compiled."""
    if LIGER in extras:
        # Not its fused head and loss: ours runs the head on supervised positions alone.
        chosen = {"rope": True, "rms_norm": True, "swiglu": True}
        apply_liger_kernel(model, {**chosen, "cross_entropy": False, "fused_linear_cross_entropy": False})
    if COMPILE in extras:
        for layer in arciva.unwrap(model).model.layers:
            layer.compile(dynamic=True)  # rows differ in width from step to step
    return model
