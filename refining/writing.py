"""The result as a checkpoint like any other, which says what it was made from."""

from pathlib import Path

from torch import Tensor

from run import checkpoint
from run.disk import writing
from run.errors import InputError
from run.watch import require_finite_weights


def require_free(path: str) -> Path:
    """The path, in a folder that is there then. InputError where something lies there already."""
    out = Path(path).expanduser()
    if out.exists():
        raise InputError(f"--output {path} is there already", "name another file")
    with writing(f"--output {path}", "name another file"):
        out.parent.mkdir(parents=True, exist_ok=True)
    return out


def write(out: Path, state: dict[str, Tensor], like: dict, *, made_from: dict) -> None:
    """Write the weights with what the checkpoint `like` says of recipe, classes and images. It holds no run to continue, but what else a
    checkpoint is good for it is: evaluation, fine-tuning, export.

    InputError where a weight is not finite. `made_from`: `what` it is, in words, whether it was made from EMA weights (`use_ema`), and plain values
    that say from which."""
    require_finite_weights(state, where=f"{out} was not written", cure="look at --input, and at how images are normalised")
    kept = {name: like[name] for name in ("args", "run", *checkpoint.COMPARED_FACTS) if name in like}
    which = "model_ema" if made_from["use_ema"] else "model"
    checkpoint.save({"model": state, "which": which, **kept, "made_from": made_from}, out.parent, [out.name])


def origin(saved: dict) -> dict:
    """What `made_from` says of a checkpoint that was made so itself."""
    return {"made_from": saved["made_from"]} if "made_from" in saved else {}
