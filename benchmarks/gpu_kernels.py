"""What a GPU may train with besides the module's choice: attention kernels, Liger's Triton kernels, compiled blocks.

Each is an axis of train_gpu.py. The module takes over what a measurement shows to pay within a ten-minute job, and no option before.
"""

from __future__ import annotations

import importlib.util

import torch
from transformers import AttentionInterface
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_liger_kernel_available

try:  # torch 2.10 and later
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

import arciva_assistant_poc as arciva

VARLEN = "torch_varlen"
LIGER, COMPILE = "liger", "compile"


def segment_bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Where each pair begins in the rows laid end to end, and where the last one ends: (pairs + 1,), int32."""
    known = getattr(position_ids, "segment_bounds", None)
    if known is None:
        starts = (position_ids.flatten() == 0).nonzero().flatten()
        known = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).int()
        position_ids.segment_bounds = known  # every layer asks with the same tensor, and each answer waits for the GPU
    return known


def varlen_attention(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """Attention within each pair by torch's own flash kernel; operands (batch, heads, row, size) as transformers hands them over."""
    batch, _, row, size = query.shape
    position_ids = position_ids if position_ids.shape[0] == batch else position_ids.expand(batch, row).contiguous()
    bounds, device = segment_bounds(position_ids), query.device.type
    format_ = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    flat = [x.transpose(1, 2).reshape(batch * row, x.shape[1], size).to(format_) for x in (query, key, value)]
    grouped = query.shape[1] != key.shape[1]
    causal = {"window_size": (-1, 0), "enable_gqa": grouped, "scale": scaling}
    return varlen_attn(*flat, bounds, bounds, row, row, **causal).view(batch, row, -1, size), None


if varlen_attn is not None:
    AttentionInterface.register(VARLEN, varlen_attention)


def capability(hardware: arciva.Hardware) -> tuple[int, int]:
    return torch.cuda.get_device_capability() if hardware.device == "cuda" else (0, 0)


def attention_kernels(hardware: arciva.Hardware) -> list[str]:
    """Implementations that this machine can run, the module's choice first; flash kernels need compute capability 8.0."""
    found, modern = list(dict.fromkeys((hardware.attention, "sdpa"))), capability(hardware) >= (8, 0)
    if modern and varlen_attn is not None:
        found.append(VARLEN)
    if modern and is_flash_attn_2_available():
        found.append("flash_attention_2")
    if capability(hardware)[0] == 9 and is_flash_attn_3_available():
        found.append("flash_attention_3")
    if modern and importlib.util.find_spec("triton"):
        found.append("flex_attention")
    return found


def by_position(kernel: str) -> bool:
    """Whether a kernel finds the pairs by their positions and is given all of them in one row; flash-attn does so only then."""
    return kernel == VARLEN or kernel.startswith("flash")


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
