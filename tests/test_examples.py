"""The examples run, and find what they should."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import DATA

from m2d_embed.audio.clips import load_audio

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_a_spoken_digit_is_nearest_to_spoken_digits():
    found = run("search_folder.py", DATA / "digits" / "3_theo_0.opus", DATA).splitlines()
    assert len(found) == 5
    assert all("/digits/" in line for line in found)


def test_digits_are_told_from_sounds():
    pytest.importorskip("sklearn")
    assert float(run("classify_with_sklearn.py", DATA).split()[1]) > 0.9


def test_an_alarm_is_found_in_a_recording(tmp_path):
    rate = 16_000
    alarm = load_audio(DATA / "sounds" / "alarm-clock-elapsed.oga", rate)[: 2 * rate]
    speech = np.concatenate([load_audio(file, rate) for file in sorted((DATA / "digits").glob("*.opus"))])
    before, after = speech[: 6 * rate], speech[-6 * rate :]
    soundfile.write(tmp_path / "alarm.wav", alarm, rate)
    soundfile.write(tmp_path / "recording.wav", np.concatenate([before, alarm, after]), rate)
    found = [
        tuple(float(word) for word in line.split() if word[0].isdigit())
        for line in run("find_events.py", tmp_path / "alarm.wav", tmp_path / "recording.wav").splitlines()
    ]
    start, stop = len(before) / rate, (len(before) + len(alarm)) / rate
    inside = sum(max(0, min(stop, b) - max(start, a)) for a, b in found)
    assert inside > 1
    assert inside > 0.6 * sum(b - a for a, b in found)


def test_the_notebook_runs(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for cell in json.loads((ROOT / "examples" / "first_look.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["vectors"].shape == (len(names["files"]), 1920)
    assert len(names["embeddings"]) == len(names["timestamps"]) > 4
