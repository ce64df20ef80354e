"""ExecuTorch programs for phones: fused networks with XNNPACK's kernels, for single images of one size.

The package `executorch` writes them and runs them here, on the same XNNPACK that phones run."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from deployment import formats
from deployment.verify import Format, Opened, make_noise
from deployment.weights import Trained
from run.errors import InputError, first_line

MAGIC = b"ET"  # of a program's file, from its fifth byte on


def require():
    """The package; InputError with the cure where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that it imports, on each other
        try:
            import executorch.runtime
        except ImportError as error:
            raise InputError("this needs the package executorch: pip install -r requirements-executorch.txt") from error
    return executorch.runtime


@torch.no_grad()
def write_program(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
    """Convolutions, products and what lies between them go to XNNPACK; what it has no kernels for, to ExecuTorch's portable ones."""
    require()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # likewise
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = torch.export.export(formats.prepared(trained, dtype), (make_noise(trained, 1),))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        calls = [str(node.target) for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
        path.write_bytes(lowered.to_executorch().buffer)
    portable = sorted({name for name in calls if name.startswith("aten.")})
    return {"xnnpack_parts": sum("executorch_call_delegate" in name for name in calls), "operators_outside_xnnpack": portable}


def open_program(path: Path, trained: Trained) -> Opened:
    runtime = require()
    if path.read_bytes()[4:6] != MAGIC:
        raise InputError("it is no ExecuTorch program: write it again")
    try:
        program = runtime.Runtime.get().load_program(path)
        method = program.load_method("forward")
    except Exception as error:  # the runtime raises kinds of its own
        raise InputError(f"it is no complete ExecuTorch program ({first_line(error)}): write it again") from error

    def run(images: Tensor) -> Tensor:
        (out,) = method.execute([images.contiguous()])
        return out.clone()  # the program's own memory, which the next call overwrites

    return Opened(run=run, tensors={}, faults=[], unchecked=["its stored weights, which XNNPACK has packed: images alone"], takes_batches=False)


def set_threads(count: int) -> None:
    """Have programs run on `count` threads from now on; InputError where the package does not do so."""
    require()
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(count)
    if portable_lib._threadpool_get_thread_count() != count:
        raise InputError(f"this build of executorch runs on {portable_lib._threadpool_get_thread_count()} threads, not on {count}: give --threads so")


PROGRAM = Format("ExecuTorch", {"XNNPACK": write_program}, open_program)
