"""Where the time of a run goes: seconds for each stage, over all threads. Costs nothing where nobody asks for it."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

OPENING = "opening files"
WAITING = "waiting for decoding"
DECODING = "decoding"  # in the threads that read ahead, so beside the others
LOG_MEL = "log-mel"
ENCODER = "encoder"
DEVICE = "waiting for the device"
WRITING = "writing results"

_IN_ORDER = (OPENING, WAITING, LOG_MEL, ENCODER, DEVICE, WRITING)
_MUCH_WAITING = 0.2  # of the run's time
_NEXT_TO_NOTHING = 0.005  # of it
_MEGABYTE = 1 << 20
_NOTHING: AbstractContextManager[None] = nullcontext()


class Stopwatch:
    """What a run tells about itself. This one does not listen; ``Profile`` does."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Take the time of a ``with`` block."""
        return _NOTHING

    def count_batch(self, windows: int, room: int) -> None:
        """Count a batch that goes to the encoder, of so many windows where there was room for so many."""

    def count_audio(self, seconds: float) -> None:
        """Count the length of a clip that was read to its end."""


class Profile(Stopwatch):
    """Adds up what a run tells, from any thread.

    Attributes:
        seconds: in each stage; several threads may be in one stage at a time.
        batches, windows: how many were encoded.
        room: for how many windows there was room in these batches.
        audio_seconds: length of all clips that were read.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.batches = 0
        self.windows = 0
        self.room = 0
        self.audio_seconds = 0.0
        self._lock = threading.Lock()
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of a ``with`` block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] += time.perf_counter() - started

    def count_batch(self, windows: int, room: int) -> None:
        """Count a batch that goes to the encoder, of so many windows where there was room for so many."""
        self.batches += 1
        self.windows += windows
        self.room += room

    def count_audio(self, seconds: float) -> None:
        """Count the length of a clip that was read to its end."""
        self.audio_seconds += seconds

    def wall_seconds(self) -> float:
        """Seconds since this profile was made."""
        return time.perf_counter() - self._started

    def table(self, threads: int) -> str:
        """The result in words and numbers, of a run with so many threads that decoded."""
        wall = self.wall_seconds()
        stages = [(name, self.seconds[name]) for name in _IN_ORDER if self.seconds[name] >= _NEXT_TO_NOTHING * wall]
        stages.append(("the rest", max(0.0, wall - sum(seconds for _, seconds in stages))))
        lines = [f"{wall:.3f} s for {self.audio_seconds:.1f} s of audio, {self.audio_seconds / wall:.0f} x real time"]
        lines += [f"  {name:<24}{seconds:>9.3f} s {100 * seconds / wall:>4.0f} %" for name, seconds in stages]
        if self.seconds[DECODING]:
            where = f"in {threads} thread{'s' if threads > 1 else ''} besides" if threads else "while waited for"
            lines.append(f"  {DECODING:<24}{self.seconds[DECODING]:>9.3f} s, {where}")
        if self.batches:
            fill, full = 100 * self.windows / self.room, self.room / self.batches
            lines.append(f"{self.batches} batches, on average {fill:.0f} % full ({full:.0f} windows)")
        peak = peak_memory()
        if peak is not None:
            lines.append(f"peak memory {peak / _MEGABYTE:.0f} MB")
        lines.append(f"limited by {self._limit(wall)}")
        return "\n".join(lines)

    def _limit(self, wall: float) -> str:
        if self.seconds[WAITING] > _MUCH_WAITING * wall:
            return "decoding: try more --workers (one file is decoded by one of them)"
        model = self.seconds[ENCODER] + self.seconds[DEVICE] + self.seconds[LOG_MEL]
        others = {name: self.seconds[name] for name in (OPENING, WRITING)}
        slowest = max(others, key=lambda name: others[name])
        return slowest if others[slowest] > model else "the model"


def peak_memory() -> int | None:
    """The most memory this process has had so far, in bytes; None where the system does not tell."""
    try:  # on Linux getrusage counts in the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
