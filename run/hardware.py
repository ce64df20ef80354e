"""Where a run computes: device, precision, layout."""

import torch

from run.errors import InputError


def pick_device(name: str, local_index: int = 0) -> torch.device:
    """The device `name` (`auto`, `cpu`, `cuda`, `cuda:1`) means here; InputError where there is no such device."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name} is no device: use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not has_gpu:
        raise InputError(f"--device {name}: torch sees no GPU here; use --device cpu, or check the driver with nvidia-smi")
    return torch.device("cuda", local_index) if name == "cuda" else device


def open_device(name: str) -> torch.device:
    """The device of that name, made the current one, for that is where compiled kernels run."""
    device = pick_device(name)
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device)
    return device


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Autocast type that `--amp` means on `device`; None for full precision."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[name]


def pick_memory_format(name: str, device: torch.device, amp_dtype: torch.dtype | None) -> torch.memory_format:
    """Layout of activations that `--memory-format` means.

    `auto` is channels-last, the faster, but for bfloat16 on a CPU: there oneDNN's channels-last weight gradient of a strided
    depthwise convolution reads uninitialised memory where the feature map is smaller than the kernel (torch 2.15)."""
    if name == "auto":
        name = "nchw" if device.type == "cpu" and amp_dtype is torch.bfloat16 else "channels_last"
    return {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}[name]


def build_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaler for `--amp`: neutral but for float16."""
    return torch.amp.GradScaler(device.type, enabled=pick_amp(amp, device) is torch.float16)
