"""Parts of a network that do not learn: their parameters get no gradients, and BatchNorm in them keeps the statistics that it has."""

import difflib
from collections.abc import Iterable

from torch import nn

from run.errors import Faults, InputError
from utils import unwrap


def freeze(net: nn.Module, names: Iterable[str]) -> None:
    """Take the parameters of `net` in the modules, or of the parameters, of these names out of what learns.

    InputError where a name is unknown, or nothing would be left to learn."""
    known, faults = {**dict(net.named_parameters()), **dict(net.named_modules())}, Faults()
    for name in names:
        if name in known:
            known[name].requires_grad_(False)
            continue
        close = difflib.get_close_matches(name, known, n=3)
        parts = ", ".join(part for part, _ in net.named_children())
        faults.add(f"--freeze {name}: {type(net).__name__} has no such module" + (f"; did you mean {' or '.join(close)}?" if close else f"; it has {parts}"))
    faults.refuse()
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise InputError("--freeze leaves nothing that learns", "leave out a module, mostly the classifier")


def set_train_mode(net: nn.Module, *, keeps_statistics: Iterable[str]) -> None:
    """Have the network train, but BatchNorm in the modules of these names (of parameters: nothing) use its running statistics and keep them."""
    net.train()
    modules = dict(unwrap(net).named_modules()) if keeps_statistics else {}
    for name in keeps_statistics:
        for module in modules[name].modules() if name in modules else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
