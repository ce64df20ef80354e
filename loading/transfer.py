"""Batches and small tensors on the way to a device, which the host does not wait for."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values`, which are on the CPU, on `device`; a GPU fetches them when it gets there."""
    return values.to(device) if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for work beside the current one's."""
    return torch.cuda.Stream(device)


def at_once(function: Callable):
    """As `beside`, but before anything else is done."""
    result = function()
    return lambda: result


def beside(device: torch.device, function: Callable):
    """Run `function`; what returns its result, for use on the current stream. On a GPU it runs on a stream of its own until that is called.

    It may use what the current stream has made so far, and must not change what that goes on to use."""
    if device.type != "cuda":
        return at_once(function)
    side, current = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result, is_there = function(), side.record_event()

    def join():
        return _arrived((result,), is_there, (), device)[0]

    return join


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that batches reach `device` on; each would keep freed memory of its own."""
    return torch.cuda.Stream(device)


def prefetched(batches: Iterator, to_device: Callable, device: torch.device) -> Iterator:
    """`to_device(batch)` of each batch; on a GPU of the next one, on a stream of its own, while the last is in use."""
    if device.type != "cuda":
        yield from map(to_device, batches)
        return
    stream = _copy_stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved, is_there = to_device(batch), stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = moved, is_there, batch  # the source must live until it is copied
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(moved: tuple, is_there: torch.cuda.Event, source: tuple, device: torch.device) -> tuple:
    """The batch `moved`, for use on the current stream once it is there."""
    current = torch.cuda.current_stream(device)
    current.wait_event(is_there)
    for tensor in _tensors(moved):
        if tensor.is_cuda:
            tensor.record_stream(current)
    return moved


def _tensors(values: tuple) -> Iterator[Tensor]:
    """The tensors among the values, and in tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
