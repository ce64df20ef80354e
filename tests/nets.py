"""Networks in the state of trained ones, and images for them: what the tests of architectures share."""

import timm
import torch
from torch import Tensor, nn

import model

SIZE = (64, 128)  # height and width; every network's last map keeps more than one position
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


FEW = {"depths": (1, 1, 1, 1)}
FEW_BLOCKS = {  # what leaves a network of a kind few blocks, or narrow ones
    "convnext_femto_downsample_a": FEW,
    "convnext_femto_downsample_b": FEW,
    "lsnet_t": {"depths": (0, 1, 2, 2)},
    "lsnet_t_distill": {"depths": (0, 1, 2, 2)},
    "mlla_nano_baseline": FEW,
    "mlla_nano_recconv": FEW,
    "mlla_nano_recattn": FEW,
    "mlla_nano_recattn_simple": FEW,
    "recnext_a0": FEW,
    "recnext_m0": FEW,
    "recnext_t": {"depths": (0, 1, 1, 2)},
    "recnext_t_share_channel": {"depths": (0, 1, 1, 5)},
    "repnext_m0": FEW,
    "repnext_m0e": FEW,
    "rexnetv1": {"depth_mult": 0.5},
    "rexnetv1_lite": {"multiplier": 0.5},
    "repvit_m0_6": {"blocks": ((40, 1, 1), (40, 0, 1), (80, 0, 2), (160, 1, 2), (320, 0, 2), (320, 1, 1))},
}


def build(name: str, size: tuple[int, int] = SIZE, **kwargs) -> nn.Module:
    """Our model for images of that size, where the model cares."""
    is_fixed = timm.get_pretrained_cfg(name).fixed_input_size
    return model.create_model(name, **({"img_size": size} if is_fixed else {}), **kwargs)


def build_few(name: str, size: tuple[int, int] = SIZE, **kwargs) -> nn.Module:
    """The same with few blocks, where that can be told."""
    return build(name, size, **FEW_BLOCKS.get(name, {}), **kwargs)


@torch.no_grad()
def randomise(net: nn.Module) -> nn.Module:
    """Statistics and weights as after training: no BatchNorm is an identity, no branch is switched off."""
    generator = torch.Generator().manual_seed(0)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator).to(like)

    for module in net.modules():
        if isinstance(module, BATCH_NORMS):
            module.weight.copy_(uniform(module.weight, 0.5, 1.5))
            module.bias.copy_(uniform(module.bias, -0.3, 0.3))
            module.running_mean.copy_(uniform(module.running_mean, -0.3, 0.3))
            module.running_var.copy_(uniform(module.running_var, 0.5, 2.0))
    for name, parameter in net.named_parameters():
        if name.endswith("attention_biases"):
            parameter.copy_(uniform(parameter, -1, 1))
    return net


def images(batch_size: int = 2, size: tuple[int, int] = SIZE, dtype: torch.dtype = torch.float32, in_chans: int = 3) -> Tensor:
    return torch.randn(batch_size, in_chans, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def relative_error(out: Tensor, reference: Tensor) -> float:
    return ((out - reference).abs().max() / reference.abs().max()).item()
