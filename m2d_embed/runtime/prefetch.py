"""Clips read ahead of the model by threads: in a fixed order, errors with their clip, a bounded amount at a time.

soundfile and soxr let other Python threads run while they work, so threads are enough.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import numpy as np

from m2d_embed.audio.clips import Samples
from m2d_embed.errors import AudioError
from m2d_embed.runtime.profiling import DECODING, WAITING, Stopwatch

#: What is yielded for a clip, in this order: its pieces, then None at its end, or the error that ended it.
Item = Samples | AudioError | None
Reader = Callable[[int], Iterator[Samples]]

#: Clips that are handed over side by side, so that several threads can work on long ones.
_MOST_LANES = 4
_SECONDS_TO_END = 5.0


def read_ahead(
    count: int, read: Reader, threads: int, samples_ahead: int, stopwatch: Stopwatch
) -> Generator[tuple[int, Item], None, None]:
    """Read clips 0, 1, ... ``count - 1`` in threads; yield ``(clip, item)`` in an order that depends on nothing else.

    Up to four clips, and no more than there are threads, take turns; with one thread they come one after the other.
    The threads end when the iterator does, however that happens.

    Args:
        count: how many clips.
        read: yields the pieces of a clip, and raises AudioError if it is a bad one; called in the threads.
        threads: 0 reads in the caller's thread, when an item is asked for.
        samples_ahead: the threads pause while so many samples wait to be taken.
        stopwatch: told of waiting and of decoding.

    Raises:
        Exception: whatever else ``read`` raised.
    """
    if threads == 0:
        yield from _read_here(count, read, stopwatch)
        return
    lanes: deque[int] = deque()
    waiting = iter(range(count))
    with closing(_Threads(count, read, samples_ahead, stopwatch)) as readers:
        readers.start(min(threads, count))
        while True:
            while len(lanes) < min(threads, _MOST_LANES) and (clip := next(waiting, None)) is not None:
                lanes.append(clip)
            if not lanes:
                return
            with stopwatch.stage(WAITING):
                item = readers.take(lanes)
            clip = lanes.popleft()
            yield clip, item
            if isinstance(item, np.ndarray):
                lanes.append(clip)


def _read_here(count: int, read: Reader, stopwatch: Stopwatch) -> Iterator[tuple[int, Item]]:
    for clip in range(count):
        pieces = read(clip)
        item: Item = np.empty(0, np.float32)
        while isinstance(item, np.ndarray):
            with stopwatch.stage(WAITING), stopwatch.stage(DECODING):
                try:
                    item = next(pieces, None)
                except AudioError as error:
                    item = error
            yield clip, item


class _Threads:
    """Threads that each take the next clip that nobody has, and a queue for each clip.

    A thread waits while there is much to take, unless the consumer will ask for its clip next and there is nothing of
    it. There are at least as many threads as clips in turn, so each of these has a thread that may go on: the consumer
    never waits for ever.
    """

    def __init__(self, count: int, read: Reader, samples_ahead: int, stopwatch: Stopwatch):
        self._read = read
        self._samples_ahead = samples_ahead
        self._stopwatch = stopwatch
        lock = threading.Lock()
        self._arrived = threading.Condition(lock)
        self._taken = threading.Condition(lock)
        # What follows is read and written under the lock only.
        self._clips = iter(range(count))
        self._queues: dict[int, deque[Samples | BaseException | None]] = defaultdict(deque)
        self._lanes: tuple[int, ...] = ()
        self._ahead = 0
        self._closed = False
        self._threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        # Daemons: the interpreter's exit does not wait for one that hangs in a read, nor for an iterator never closed.
        self._threads = [threading.Thread(target=self._work, name="m2d-decode", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def take(self, lanes: deque[int]) -> Item:
        """The next item of the first of ``lanes``, the clips in turn."""
        with self._arrived:
            self._lanes = tuple(lanes)
            self._taken.notify_all()
            queue = self._queues[lanes[0]]
            self._arrived.wait_for(lambda: queue)
            item = queue.popleft()
            if isinstance(item, np.ndarray):
                self._ahead -= len(item)
                self._taken.notify_all()
                return item
            del self._queues[lanes[0]]
        if item is None or isinstance(item, AudioError):
            return item
        raise item

    def close(self) -> None:
        """End the threads, and wait until they have; a thread that hangs in a read is left behind."""
        with self._taken:
            self._closed = True
            self._taken.notify_all()
        for thread in self._threads:
            thread.join(_SECONDS_TO_END)

    def _work(self) -> None:
        while (clip := self._next_clip()) is not None:
            for item in self._items(clip):
                if not self._put(clip, item):
                    return

    def _next_clip(self) -> int | None:
        with self._taken:
            return None if self._closed else next(self._clips, None)

    def _items(self, clip: int) -> Iterator[Samples | BaseException | None]:
        pieces = self._read(clip)
        item: Samples | BaseException | None = None
        while True:
            with self._stopwatch.stage(DECODING):
                try:
                    item = next(pieces, None)
                except BaseException as error:  # raised where the clip is asked for
                    item = error
            yield item
            if not isinstance(item, np.ndarray):
                return

    def _put(self, clip: int, item: Samples | BaseException | None) -> bool:
        """Queue an item once there is room; False if nobody wants it any more."""
        with self._taken:
            if isinstance(item, np.ndarray):
                self._taken.wait_for(lambda: self._closed or self._has_room(clip))
                self._ahead += len(item)
            self._queues[clip].append(item)
            self._arrived.notify()
            return not self._closed

    def _has_room(self, clip: int) -> bool:
        return self._ahead < self._samples_ahead or (clip in self._lanes and not self._queues[clip])
