"""LSNet's aggregation: every form against its definition, and what each costs."""

import importlib.util
import sys

import pytest
import torch

from model.ska import ska, ska_lean, ska_unfold
from tests.conftest import run_command


def ska_by_definition(x, w):
    batch, chs, height, width = x.shape
    out = torch.zeros_like(x)
    for c in range(chs):
        for i in range(height):
            for j in range(width):
                for k in range(9):
                    y, z = i + k // 3 - 1, j + k % 3 - 1
                    if 0 <= y < height and 0 <= z < width:
                        out[:, c, i, j] += x[:, c, y, z] * w[:, c % w.shape[1], k, i, j]
    return out


def inputs(batch=2, chs=6, groups=3, height=4, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, chs, height, width, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(batch, groups, 9, height, width, generator=generator).to(dtype).requires_grad_()
    return x, w


@pytest.mark.parametrize("form", [ska_unfold, ska_lean, ska])
def test_forms_follow_the_definition(form):
    x, w = inputs()
    torch.testing.assert_close(form(x, w), ska_by_definition(x, w))
    assert torch.autograd.gradcheck(form, (x, w))


def test_result_has_the_memory_format_of_the_input():
    x, w = inputs()
    assert ska(x, w).is_contiguous()
    out = ska(x.contiguous(memory_format=torch.channels_last), w)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, ska(x, w))


def test_mixed_precision_computes_in_the_wider_type():
    x, w = inputs(dtype=torch.float32)
    out = ska(x.bfloat16(), w)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, ska(x.bfloat16().float(), w))


def test_lean_form_keeps_less_for_backward():
    def kept_bytes(form) -> int:
        kept = {}
        x, w = inputs(chs=16, groups=2, height=16, width=16)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
            form(x, w)
        return sum(kept.values())

    assert kept_bytes(ska_lean) < kept_bytes(ska_unfold) / 3


@pytest.mark.filterwarnings("ignore:`torch.jit.(trace|trace_method)` is deprecated:FutureWarning")
def test_exported_graphs_hold_plain_operators():
    x, w = (tensor.detach() for tensor in inputs())

    class Module(torch.nn.Module):
        def forward(self, x, w):
            return ska(x, w)

    assert "im2col" in str(torch.jit.trace(Module(), (x, w)).inlined_graph)
    graph = torch.export.export(Module(), (x, w)).graph
    assert "im2col" in str(graph)
    assert max(node.meta["val"].ndim for node in graph.nodes if "val" in node.meta) == 5  # Core ML takes no more


if importlib.util.find_spec("triton"):

    def test_triton_kernels_agree_in_its_interpreter():
        result = run_command("-m", "tests.triton_check", "cpu", TRITON_INTERPRET="1")
        assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_triton_kernels_agree_on_a_gpu():
    result = run_command("-m", "tests.triton_check", "cuda")
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_cuda_takes_the_triton_kernel():
    x, w = (tensor.detach().float().cuda() for tensor in inputs())
    torch.testing.assert_close(ska(x, w), ska_unfold(x, w), rtol=1e-4, atol=1e-4)
    assert "model.ska_triton" in sys.modules
