"""The table of --profile."""

import re
import threading
import time

import pytest

from m2d_embed.runtime import profiling
from m2d_embed.runtime.profiling import DECODING, ENCODER, OPENING, WAITING, WRITING, Profile, Stopwatch, peak_memory


def a_profile(monkeypatch, wall: float = 10.0, **seconds: float) -> Profile:
    profile = Profile()
    profile.seconds.update({getattr(profiling, name): value for name, value in seconds.items()})
    monkeypatch.setattr(profile, "wall_seconds", lambda: wall)
    return profile


def test_a_table(monkeypatch):
    profile = a_profile(monkeypatch, WAITING=1.0, ENCODER=8.0, WRITING=0.5, DECODING=3.0)
    profile.count_audio(100.0)
    for windows in (4, 4, 1):
        profile.count_batch(windows, room=4)
    lines = profile.table(threads=2).splitlines()
    assert lines[0] == "10.000 s for 100.0 s of audio, 10 x real time"
    rows = [re.split(r" {2,}", line.strip()) for line in lines[1:6]]
    assert rows[:4] == [
        ["waiting for decoding", "1.000 s", "10 %"],
        ["encoder", "8.000 s", "80 %"],
        ["writing results", "0.500 s", "5 %"],
        ["the rest", "0.500 s", "5 %"],
    ]
    assert rows[4] == ["decoding", "3.000 s, in 2 threads besides"]
    assert lines[6] == "3 batches, on average 75 % full (4 windows)"
    assert lines[-1] == "limited by the model"


def test_a_short_run_shows_its_stages(monkeypatch):
    """And leaves out what took next to nothing of it."""
    table = a_profile(monkeypatch, wall=0.04, ENCODER=0.004, WRITING=0.0001).table(threads=0)
    assert re.search(r"encoder +0\.004 s +10 %", table)
    assert "writing results" not in table


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ({"WAITING": 3.0, "ENCODER": 6.0}, "decoding: try more --workers"),
        ({"WAITING": 1.0, "ENCODER": 6.0}, "the model"),
        ({"WAITING": 1.0, "DEVICE": 5.0, "WRITING": 3.0}, "the model"),
        ({"ENCODER": 2.0, "WRITING": 6.0}, "writing results"),
        ({"ENCODER": 2.0, "OPENING": 6.0}, "opening files"),
    ],
)
def test_what_limits_it(monkeypatch, seconds, limit):
    assert f"limited by {limit}" in a_profile(monkeypatch, **seconds).table(1)


def test_nothing_done():
    assert "limited by" in Profile().table(1)


def test_threads_are_added_up():
    profile = Profile()

    def work() -> None:
        with profile.stage(DECODING):
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert profile.seconds[DECODING] >= 0.2


def test_a_stage_that_fails_counts():
    profile = Profile()
    with pytest.raises(ValueError, match="no"), profile.stage(OPENING):
        time.sleep(0.01)
        raise ValueError("no")
    assert profile.seconds[OPENING] >= 0.01


def test_a_stopwatch_that_does_not_listen():
    stopwatch = Stopwatch()
    with stopwatch.stage(ENCODER), stopwatch.stage(WRITING):
        stopwatch.count_batch(1, 1)
        stopwatch.count_audio(1.0)
    assert stopwatch.stage(ENCODER) is stopwatch.stage(WAITING)  # nothing is made anew


def test_peak_memory_is_plausible():
    peak = peak_memory()
    assert peak is None or 50 << 20 < peak < 1 << 40
