"""A run's networks through torch.compile: compiled before the first step, and left as they are where the compiler fails."""

import contextlib
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from run.config import Config
from run.errors import first_line
from utils import Rank, any_process, log

MAX_RECOMPILES = 10_000


def any_number_compiled() -> contextlib.AbstractContextManager:
    """Context in which any number of networks that share their code is compiled; at dynamo's own limit, 8, it goes back to eager without an error."""
    return torch._dynamo.config.patch(recompile_limit=MAX_RECOMPILES, accumulated_recompile_limit=MAX_RECOMPILES)


class Compiled(nn.Module):
    """`net`, whose compiled form runs batches of the shapes that were prepared; others, as an odd last one, `net` runs as it is.

    The child has torch.compile's own name for it, which `utils.unwrap` and `checkpoint.weights` know."""

    def __init__(self, net: nn.Module, *, mode: str, backend: str):
        super().__init__()
        self._orig_mod = net
        self.settings = {"dynamic": False, "backend": backend, **({"mode": mode} if mode != "default" else {})}
        self.prepared: set[tuple[bool, torch.Size]] = set()  # whether training, and of what shape
        self.start(fullgraph=True)

    def start(self, *, fullgraph: bool) -> None:
        """Compile anew from the next call on; `fullgraph`: a graph break is an error."""
        self.compiled_forward = torch.compile(self._orig_mod.forward, fullgraph=fullgraph, **self.settings)

    def forward(self, images: Tensor):
        return self.compiled_forward(images) if (self.training, images.shape) in self.prepared else self._orig_mod(images)


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile in which networks run as such


class Compiler:
    """Hands out compiled networks, one for each network that it is given.

    `shares_memory`: they must not run at the same time, for CUDA graphs take turns in one piece of memory."""

    def __init__(self, rank: Rank, *, mode: str = "default", backend: str = "inductor"):
        self.rank, self.mode, self.backend = rank, mode, backend
        self.nets: list[Compiled] = []
        self.shares_memory = mode in CUDA_GRAPHS
        self.has_failed = False
        self.has_told_of_break = False

    def __call__(self, net: nn.Module) -> nn.Module:
        """The compiled form of `net`, always the same one."""
        found = next((one for one in self.nets if one._orig_mod is net), None)
        if found is None:
            found = Compiled(net, mode=self.mode, backend=self.backend).train(net.training)
            self.nets.append(found)
        return found

    def prepare(self, what: str, net: nn.Module, shape: tuple[int, ...], run: Callable[[], None]) -> None:
        """Compile `net` for images of that shape, by `run`, which runs it once as the run will; says how long that took.

        Where it fails in any process, one line says so, and all networks stay as they are from then on."""
        if self.has_failed:
            return
        compiled, start = self(net), time.perf_counter()
        compiled.prepared.add((net.training, torch.Size(shape)))
        error = None
        try:
            with any_number_compiled():
                self._run_whole_or_in_parts(what, compiled, run)
        except Exception as failure:  # compilers raise many kinds
            error = failure
        if any_process([error is not None], self.rank)[0]:
            self._give_up(what, error)
        else:
            log.info("compiled %s in %.1f s", what, time.perf_counter() - start)

    def _run_whole_or_in_parts(self, what: str, compiled: Compiled, run: Callable[[], None]) -> None:
        try:
            run()
        except torch._dynamo.exc.Unsupported as error:
            if not self.has_told_of_break:
                log.warning("%s is compiled in parts: the graph breaks in %s (%s)", what, _place(compiled._orig_mod, error), first_line(error))
            self.has_told_of_break = True
            compiled.start(fullgraph=False)
            run()

    def _give_up(self, what: str, error: Exception | None) -> None:
        cause = getattr(error, "inner_exception", error)
        reason = "in another process" if cause is None else f"{type(cause).__name__}: {first_line(cause)}"
        log.warning("%s cannot be compiled here (%s): the run goes on without --compile", what, reason)
        self.has_failed = True
        for net in self.nets:
            net.prepared.clear()


def _place(net: nn.Module, error: Exception) -> str:
    """Name and class of the innermost module of `net` in whose `forward` the compiler was; the line of code where it was in none."""
    frames = list(reversed(getattr(error, "real_stack", None) or []))
    for frame in frames:
        for name, module in net.named_modules():
            code = type(module).forward.__code__
            if code.co_filename == frame.filename and code.co_firstlineno <= frame.lineno <= max(line or 0 for *_, line in code.co_lines()):
                return f"{name or 'the network'} ({type(module).__name__})"
    return f"{frames[0].filename}:{frames[0].lineno}" if frames else "an unknown place"


class NoCompiler:
    """What a run without --compile has in place of a `Compiler`."""

    shares_memory = False

    def __call__(self, net: nn.Module) -> nn.Module:
        """`net` itself."""
        return net

    def prepare(self, what: str, net: nn.Module, shape: tuple[int, ...], run: Callable[[], None]) -> None:
        """Nothing to prepare."""


no_compiler = NoCompiler()


def build_compiler(cfg: Config, rank: Rank) -> Compiler | NoCompiler:
    """What the run's networks go through."""
    return Compiler(rank, mode=cfg.compile_mode) if cfg.compile else no_compiler
