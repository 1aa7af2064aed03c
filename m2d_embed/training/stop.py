"""An orderly end of a training run that is told to stop."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class Stop:
    """Notes SIGTERM and SIGINT, so that the loop can save and leave.

    Before the loop there is nothing to save, and they interrupt at once. In the loop a second SIGINT does, too, but for
    several processes: torchrun passes on what the terminal has sent already.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.wait_for_step = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        insisting = self.wanted and number == signal.SIGINT and int(os.environ.get("WORLD_SIZE", "1")) == 1
        if not self.wait_for_step or insisting:
            raise KeyboardInterrupt
        if not self.wanted:
            os.write(2, b"stopping after this step\n")  # print may be what was interrupted
        self.wanted = True
