"""Networks in the state of trained ones, and images for them: what the tests of architectures share."""

import timm
import torch
from torch import Tensor, nn

import model

SIZE = (64, 128)  # height and width; every network's last map keeps more than one position
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def build(name: str, size: tuple[int, int] = SIZE, **kwargs) -> nn.Module:
    """Our model for images of that size, where the model cares."""
    is_fixed = timm.get_pretrained_cfg(name).fixed_input_size
    return model.create_model(name, **({"img_size": size} if is_fixed else {}), **kwargs)


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
