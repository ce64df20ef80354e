"""What a folder of teacher labels holds, and whether it is whole."""

from pathlib import Path

from distillation.store import LabelStore
from run.errors import InputError
from run.manifest import LABELS_MANIFEST, read_manifest


def open_store(folder: Path, fingerprint: dict) -> LabelStore:
    """The store that its fingerprint describes. InputError where that says too little."""
    names = ("plan.num_positions", "plan.group_size", "teacher.num_classes", "labels.topk")
    wrong = [f"{name} is {fingerprint.get(name)}" for name in names if not _is_count(fingerprint.get(name), may_lack=name == "labels.topk")]
    num_positions, group_size, num_classes, num_top = map(fingerprint.get, names)
    if wrong or num_positions % group_size:
        wrong = wrong or [f"plan.num_positions {num_positions} is no multiple of plan.group_size {group_size}"]
        raise InputError(f"{folder / LABELS_MANIFEST} is damaged ({'; '.join(wrong)}): restore it from a copy")
    return LabelStore(folder, num_positions=num_positions, num_groups=num_positions // group_size, width=2 * min(num_top or 0, num_classes) + 1)


def _is_count(value, *, may_lack: bool) -> bool:
    return (may_lack and value is None) or (isinstance(value, int) and value > 0)


def describe_epoch(store: LabelStore, epoch: int) -> tuple[str, bool]:
    """A line of the table, and whether the epoch is sound."""
    try:
        page = store.read(epoch)
    except InputError as error:
        return f"{epoch:>6}  DAMAGED  {error}", False
    if page is None:
        return f"{epoch:>6}  absent: a run was stopped while it wrote these files; the next one replaces them", True
    num_filled, num_agree = int(page.is_filled.sum()), int(page.checks["num_agree"].sum())
    is_complete = num_filled == store.num_positions
    state = "complete" if is_complete else f"{store.num_positions - num_filled} missing"
    agreement = f"{100 * num_agree / num_filled:6.2f} %" if num_filled else "-"
    return f"{epoch:>6}{num_filled:>12}{state:>18}{'ok':>10}{agreement:>12}", True


def inspect(folder: Path) -> bool:
    """Print what is there; whether all of it is sound."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} holds no teacher labels: there is no {LABELS_MANIFEST}")
    store = open_store(folder, manifest["fingerprint"])
    print(f"{folder}: {manifest['format']}")
    for part in ("settings", "fingerprint", "versions"):
        for name, value in manifest[part].items():
            print(f"  {name if part == 'fingerprint' else f'{part}.{name}'}: {value}")
    print(f"\n{'epoch':>6}{'labels':>12}{'of ' + str(store.num_positions):>18}{'checksum':>10}{'agreement':>12}")
    is_sound = True
    epochs = store.epochs()
    for epoch in epochs:
        line, is_epoch_sound = describe_epoch(store, epoch)
        print(line)
        is_sound &= is_epoch_sound
    print(f"{len(epochs)} epochs, {store.num_bytes / 1e6:.2f} MB each when complete" + ("" if is_sound else "; something is DAMAGED"))
    return is_sound
