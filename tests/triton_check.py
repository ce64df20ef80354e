"""SKA's Triton kernels against the unfold form, on a device or in Triton's interpreter, which must be chosen before Triton is imported.

TRITON_INTERPRET=1 python -m tests.triton_check cpu"""

import sys

import torch

from model.ska import ska_unfold
from model.ska_triton import ska_triton


def check(device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, memory_format: torch.memory_format) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).contiguous(memory_format=memory_format).requires_grad_()

    for memory_format in (torch.contiguous_format, torch.channels_last):
        for chs, groups, height, width in ((16, 4, 5, 7), (24, 3, 1, 9), (8, 8, 6, 17)):
            x = draw(2, chs, height, width, memory_format=memory_format)
            w = draw(2, 9 * groups, height, width, memory_format=memory_format)
            grad = draw(2, chs, height, width, memory_format=torch.contiguous_format)
            results = []
            for form in (ska_unfold, ska_triton):
                out = form(x, w.reshape(2, groups, 9, height, width))
                results.append((out, *torch.autograd.grad(out, (x, w), grad)))
            for value, reference in zip(*results, strict=True):
                torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    check(sys.argv[1])
