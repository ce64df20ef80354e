"""Pages as a browser shows them: Chromium, run without a screen."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from run.errors import InputError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
# no screen, no sandbox (which root may not have), nothing from the network
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND")
TIMEOUT_S = 120


def find_chromium() -> str | None:
    """The first Chromium on the PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def chromium(page: Path, *flags: str) -> bytes:
    """What Chromium prints of a page, opened with a profile of its own. InputError where there is none, or it fails."""
    program = find_chromium()
    if program is None:
        raise InputError(f"no Chromium on the PATH ({', '.join(NAMES)}): install one, such as Debian's package chromium")
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
        try:
            return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True).stdout
        except (subprocess.SubprocessError, OSError) as error:
            raise InputError(f"{program} could not open {page} ({error})") from error


def picture(page: Path, out: Path, *, width: int, height: int, is_dark: bool = False) -> None:
    """Write the top of a page, `width` x `height` pixels, as a PNG. InputError as `chromium`, and where there is no page."""
    if not page.is_file():
        raise InputError(f"{page}: there is no such page")
    scheme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    chromium(page, f"--window-size={width},{height}", scheme, f"--screenshot={out.resolve()}")
    if not out.is_file():
        raise InputError(f"Chromium drew nothing of {page} into {out}: is the folder there, and may it be written?")
