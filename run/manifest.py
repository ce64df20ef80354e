"""What stored teacher labels say of themselves, as far as a run must know before its settings are complete. Imports no torch."""

import json
from pathlib import Path

from run.errors import InputError

LABELS_MANIFEST = "manifest.json"


_CANARY = {"position": int, "pixels": int | None, "erased": list | None, "mixing": list}  # without pixels where the image was damaged


def _is_canary(drawn) -> bool:
    return isinstance(drawn, dict) and drawn.keys() == _CANARY.keys() and all(isinstance(drawn[name], kind) for name, kind in _CANARY.items())


def read_manifest(folder: str | Path) -> dict | None:
    """What the labels stored in `folder` were made for; None where there are none. InputError where the file is damaged."""
    path = Path(folder).expanduser() / LABELS_MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if all(
            isinstance(manifest[part], kind)
            for part, kind in (("format", str), ("settings", dict), ("fingerprint", dict), ("canary", list), ("versions", dict))
        ) and all(_is_canary(drawn) for drawn in manifest["canary"]):
            return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): choose another --teacher-labels folder") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path} is damaged: restore it from a copy, or store labels anew in another --teacher-labels folder")
