"""What the processes that read data do first."""

from __future__ import annotations

import signal

import torch


def start_worker(number: int = 0) -> None:
    """Leave Ctrl-C and SIGTERM, which reach a whole process group, to the main process; compute with one thread."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    torch.set_num_threads(1)
