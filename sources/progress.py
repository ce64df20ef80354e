"""How far a long pass over images is, said now and then."""

import time
from collections.abc import Callable
from datetime import timedelta


class Progress:
    """Counts up to `total` and hands `say` a line every `every_s` seconds: how many are done, how fast, and the time left."""

    def __init__(self, total: int, say: Callable[[str], object], *, what: str = "images", every_s: float = 10.0):
        self.total, self.say, self.what, self.every_s = total, say, what, every_s
        self.num_done = 0
        self.start = self.reported = time.perf_counter()

    def add(self, count: int = 1, remark: str = "") -> None:
        """Count `count` more; `remark` goes into the line."""
        self.num_done += count
        now = time.perf_counter()
        if now - self.reported > self.every_s:
            self.reported, rate = now, self.num_done / (now - self.start)
            left = timedelta(seconds=round((self.total - self.num_done) / rate))
            remark = f"{remark}  " if remark else ""
            self.say(f"{self.num_done:,} of {self.total:,} {self.what}  {self.num_done / self.total:.1%}  {rate:,.0f} {self.what}/s  {remark}ETA {left}")
