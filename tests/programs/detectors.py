"""A detector's step by one process and by two that share it: prints, as JSON, the largest relative differences for each detector."""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import distributed as dist

from detection import networks
from run.norms import synchronised
from utils import Rank, wrap_distributed

NUM_IMAGES, SIZE = 4, (64, 64)
DETECTORS = (("mask_rcnn", "recnext_m0"), ("retinanet", "recnext_m0"))


def objects(i: int) -> dict[str, torch.Tensor]:
    """More objects in later images, so that the halves' counts differ."""
    boxes = torch.tensor([[4.0 + 6 * j, 8.0, 30.0 + 8 * j, 40.0] for j in range(i)]).view(-1, 4)
    masks = torch.zeros(i, *SIZE, dtype=torch.uint8)
    masks[:, 8:40, 8:32] = 1
    return {"boxes": boxes, "labels": torch.arange(i) % 3, "masks": masks}


def step(index: int, world_size: int) -> list[dict]:
    """Losses' mean over processes, gradients and running statistics after one process's part of the step."""
    results = []
    for detector, backbone in DETECTORS:
        torch.manual_seed(0)
        net = networks.build(detector, backbone, 3, channels=8, rois_per_image=8).double().float()
        if world_size > 1:
            net = synchronised(net, torch.device("cpu"))
        wrapped = wrap_distributed(net, Rank(index, world_size, index, world_size, torch.device("cpu")), accum_steps=1)
        images = torch.randn(NUM_IMAGES, 3, *SIZE, generator=torch.Generator().manual_seed(1))
        mine = range(index * NUM_IMAGES // world_size, (index + 1) * NUM_IMAGES // world_size)
        losses = wrapped(images[mine.start : mine.stop], [SIZE] * len(mine), [objects(i) for i in mine], [(i, i) for i in mine])
        loss = networks.total(losses)
        loss.backward()
        value = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(value)
        gradient = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
        statistics = torch.cat([buffer.flatten() for name, buffer in net.named_buffers() if "running" in name])
        results.append({"loss": value / world_size, "gradient": gradient, "statistics": statistics})
    return results


def two_processes(folder: str) -> list[dict]:
    children = []
    for index in range(2):
        child = os.fork()
        if child == 0:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=2)
            results = step(index, 2)
            if index == 0:
                torch.save(results, f"{folder}/results.pth")
            dist.barrier()
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"processes ended with {codes}")
    return torch.load(f"{folder}/results.pth")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shared = two_processes(folder)
    alone = step(0, 1)
    differences = [{name: ((a[name] - b[name]).abs().max() / b[name].abs().max()).item() for name in b} for a, b in zip(shared, alone, strict=True)]
    json.dump(differences, sys.stdout)
