"""Reading ahead: a fixed order, errors with their clip, a bounded amount, threads that end."""

import threading
import time
from contextlib import closing

import numpy as np
import pytest

from m2d_embed.errors import AudioError
from m2d_embed.runtime.prefetch import read_ahead
from m2d_embed.runtime.profiling import DECODING, WAITING, Profile, Stopwatch

SILENT = Stopwatch()


def piece(clip: int, number: int, length: int = 10) -> np.ndarray:
    return np.full(length, 1000 * clip + number, np.float32)


def pieces_of(counts, delays=None):
    """A reader of clips with so many pieces each; a negative count is a clip that fails after so many."""

    def read(clip):
        for number in range(abs(counts[clip])):
            time.sleep(0 if delays is None else delays[clip])
            yield piece(clip, number)
        if counts[clip] < 0:
            raise AudioError(f"clip {clip} is bad")

    return read


def events(iterator):
    """What was yielded, arrays by their first value."""
    named = []
    for clip, item in iterator:
        named.append((clip, item[0] if isinstance(item, np.ndarray) else None if item is None else str(item)))
    return named


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "m2d-decode"]


def assert_threads_end() -> None:
    for thread in decoders():
        thread.join(5)
    assert not decoders()


@pytest.mark.parametrize("threads", [0, 1])
def test_one_clip_after_the_other(threads):
    got = events(read_ahead(3, pieces_of([2, -1, 0]), threads, 1000, SILENT))
    assert got == [(0, 0), (0, 1), (0, None), (1, 1000), (1, "clip 1 is bad"), (2, None)]


def test_clips_take_turns():
    got = events(read_ahead(3, pieces_of([3, 1, 2]), 2, 1000, SILENT))
    assert got == [(0, 0), (1, 1000), (0, 1), (1, None), (0, 2), (2, 2000), (0, None), (2, 2001), (2, None)]


@pytest.mark.parametrize("samples_ahead", [1, 25, 10_000])
@pytest.mark.parametrize("threads", [2, 3, 9])
def test_the_order_depends_on_nothing_else(threads, samples_ahead):
    """Whoever is slow, and however little may wait: the same order, and no deadlock."""
    generator = np.random.default_rng(threads)
    counts = [*generator.integers(-4, 9, 40)]
    expected = events(read_ahead(40, pieces_of(counts), threads, 10_000, SILENT))
    for _ in range(3):
        delays = generator.choice([0, 0, 0.0005], 40)
        assert events(read_ahead(40, pieces_of(counts, delays), threads, samples_ahead, SILENT)) == expected
    assert_threads_end()


@pytest.mark.parametrize(("threads", "samples_ahead"), [(1, 100), (3, 100), (3, 1)])
def test_no_more_than_so_much_is_read_ahead(threads, samples_ahead):
    produced = 0
    lock = threading.Lock()

    def read(clip):
        nonlocal produced
        for number in range(50):
            with lock:
                produced += 10
            yield piece(clip, number)

    taken = most = 0
    with closing(read_ahead(6, read, threads, samples_ahead, SILENT)) as items:
        for _, item in items:
            if isinstance(item, np.ndarray):
                taken += 10
                time.sleep(0.001)  # the threads could run far ahead meanwhile
                most = max(most, produced - taken)
    assert taken == 6 * 50 * 10
    assert most <= samples_ahead + 2 * 10 * threads  # one that waits for room and one in its reader's hands, a thread


def test_something_is_read_ahead():
    begun = threading.Event()

    def read(clip):
        yield piece(clip, 0)
        if clip == 2:
            begun.set()

    with closing(read_ahead(3, read, 1, 1000, SILENT)) as items:
        next(items)
        assert begun.wait(5)  # though only the first clip has been asked for


def test_what_was_taken_makes_room():
    produced = 0

    def read(clip):
        nonlocal produced
        for number in range(100):
            produced += 1
            yield piece(clip, number)

    with closing(read_ahead(1, read, 1, 100, SILENT)) as items:
        for _ in range(50):
            next(items)
        deadline = time.monotonic() + 5
        while produced < 60 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert produced >= 60


@pytest.mark.parametrize("threads", [0, 2])
def test_other_exceptions_are_raised(threads):
    def read(clip):
        yield piece(clip, 0)
        raise MemoryError("too long")

    with pytest.raises(MemoryError, match="too long"):
        events(read_ahead(2, read, threads, 1000, SILENT))
    assert_threads_end()


@pytest.mark.parametrize("stop_after", [0, 1, 5])
def test_threads_end_when_nobody_listens_any_more(stop_after):
    closed = []

    def read(clip):
        try:
            while True:
                yield piece(clip, 0)
        finally:
            closed.append(clip)

    items = read_ahead(100, read, 3, 50, SILENT)
    for _ in range(stop_after):
        next(items)
    assert len(decoders()) == (3 if stop_after else 0)
    items.close()
    assert not decoders()
    assert sorted(closed) == ([0, 1, 2] if stop_after else [])


def test_threads_end_with_an_exception_of_the_consumer():
    with pytest.raises(KeyboardInterrupt):
        for _ in read_ahead(100, pieces_of([100] * 100), 2, 50, SILENT):
            raise KeyboardInterrupt
    assert_threads_end()


@pytest.mark.parametrize("threads", [0, 1])
def test_time_is_told(threads):
    profile = Profile()
    events(read_ahead(2, pieces_of([2, 2], [0.01, 0.01]), threads, 1000, profile))
    assert profile.seconds[DECODING] >= 0.04
    assert profile.seconds[WAITING] >= 0.02
