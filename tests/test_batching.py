"""encode(): the result for a clip never depends on the others; long clips stream in bounded memory."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import DATA, TINY, random_model

from m2d_embed.audio import load_audio
from m2d_embed.config import FeatureConfig
from m2d_embed.errors import AudioError, ConfigError

RATE = 16_000
FILES = sorted(DATA.glob("*/*.o*"))


def mixed_clips() -> list[np.ndarray]:
    """From 30 ms to 2 min, in no order of length."""
    generator = np.random.default_rng(0)
    seconds = [0.5, 120.0, 0.03, 3.04, 10.0, 0.16, 6.08, 1.07, 61.3, 0.03, 2.9, 0.64, 0.65, 30.0]
    return [(0.2 * generator.standard_normal(round(s * RATE))).astype(np.float32) for s in seconds]


def test_results_do_not_depend_on_the_batch(bundled):
    clips = mixed_clips()
    together = bundled.encode(clips, batch_size=16)
    alone = np.stack([bundled.encode(clip, batch_size=1) for clip in clips])
    assert np.abs(together - alone).max() <= 1e-5
    shuffled = np.random.default_rng(1).permutation(len(clips))
    again = bundled.encode([clips[i] for i in shuffled], batch_size=5)
    assert np.abs(again - together[shuffled]).max() <= 1e-5


@pytest.mark.parametrize("hop_ms", [None, 40.0])
def test_timestamps_do_not_depend_on_the_batch(bundled, hop_ms):
    bundled.features = FeatureConfig(hop_ms=hop_ms)
    try:
        clips = [clip[: 20 * RATE] for clip in mixed_clips()]
        together = bundled.encode_timestamps(clips, batch_size=16)
        for clip, got in zip(clips, together, strict=True):
            with torch.no_grad():
                expected = bundled.timestamps(torch.from_numpy(clip)[None])
            assert torch.equal(got.timestamps, expected.timestamps[0])
            assert (got.embeddings - expected.embeddings[0]).abs().max() <= 1e-5
    finally:
        bundled.features = FeatureConfig()


def test_encode_agrees_with_scene(bundled):
    clips = mixed_clips()
    with torch.no_grad():
        expected = torch.cat([bundled.scene(torch.from_numpy(clip)[None]) for clip in clips])
    assert np.abs(bundled.encode(clips) - expected.numpy()).max() <= 1e-5


@pytest.mark.parametrize(("batch_size", "waiting"), [(1, 1), (2, 1), (3, 8), (64, 8)])
def test_any_batch_size_and_any_patience(monkeypatch, batch_size, waiting):
    monkeypatch.setattr("m2d_embed.batching._MAX_WAITING_BATCHES", waiting)
    model = random_model(TINY)
    clips = [clip[: 5 * RATE] for clip in mixed_clips()]
    expected = np.stack([model.encode(clip) for clip in clips])
    assert np.abs(model.encode(clips, batch_size=batch_size) - expected).max() <= 1e-5


def test_paths_arrays_and_tensors_mix(tiny):
    array, _ = soundfile.read(FILES[0], dtype="float32")
    encoded = tiny.encode([FILES[0], str(FILES[0]), array, torch.from_numpy(array), array[None]])
    assert encoded.shape == (5, 160)
    assert encoded.dtype == np.float32
    assert np.abs(encoded - encoded[0]).max() <= 1e-5


def test_order_progress_and_output(tiny, capsys):
    as_numpy = tiny.encode(FILES, show_progress_bar=True)
    assert f"{len(FILES)}/{len(FILES)}" in capsys.readouterr().err
    as_torch = tiny.encode(FILES, output="torch")
    assert isinstance(as_torch, torch.Tensor)
    assert np.array_equal(as_numpy, as_torch.numpy())
    for file, row in zip(FILES, as_numpy, strict=True):
        assert np.abs(tiny.encode(file) - row).max() <= 1e-5
    assert capsys.readouterr().err == ""


def test_arrays_of_another_rate_are_resampled_when_told(tiny):
    file = DATA / "sounds" / "complete.oga"
    array, rate = soundfile.read(file, dtype="float32")
    assert rate == 44_100
    assert np.abs(tiny.encode(array.T[None], sample_rate=rate)[0] - tiny.encode(file)).max() <= 1e-5
    assert np.abs(tiny.encode(array.T[None])[0] - tiny.encode(file)).max() > 1e-3


def test_an_array_that_may_be_one_clip_or_several(tiny):
    with pytest.raises(AudioError, match=r"\(2, 1000\) may be one clip of several channels or several clips"):
        tiny.encode(np.zeros((2, 1000), np.float32))


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None])
def test_impossible_batch_sizes(tiny, batch_size):
    with pytest.raises(ConfigError, match="batch_size"):
        tiny.encode(FILES[:1], batch_size=batch_size)


def test_impossible_output(tiny):
    with pytest.raises(ConfigError, match="numpy"):
        tiny.encode(FILES[:1], output="list")


@pytest.mark.filterwarnings("error")
def test_a_read_only_array_is_read_without_a_warning(tiny):
    array = np.zeros(1000, np.float32)
    array.flags.writeable = False
    assert tiny.encode(array).shape == (160,)


def test_no_clips(tiny):
    assert tiny.encode([]).shape == (0, 160)
    assert tiny.encode_timestamps([]) == []


def test_silence_and_one_sample(tiny):
    encoded = tiny.encode([np.zeros(RATE, np.float32), np.zeros(1, np.float32), np.full(1, 0.5, np.float32)])
    assert np.isfinite(encoded).all()
    (embeddings, times) = tiny.encode_timestamps([np.full(1, 0.5, np.float32)])[0]
    assert embeddings.shape == (1, 160)
    assert 0 <= times.item() <= 1000 / RATE


def test_a_bad_clip_is_named(tiny, tmp_path):
    (tmp_path / "x.wav").write_text("text")
    with pytest.raises(AudioError, match=r"x\.wav"):
        tiny.encode([FILES[0], tmp_path / "x.wav"])
    with pytest.raises(AudioError, match=r"clips\[1\]"):
        tiny.encode([np.zeros(100, np.float32), np.zeros(0, np.float32)])
    late = np.zeros(30 * RATE, np.float32)
    late[-1] = np.nan  # seen only after windows of this clip have been encoded
    with pytest.raises(AudioError, match=r"clips\[0\]: sample 479999"):
        tiny.encode([late, np.zeros(100, np.float32)], batch_size=2)


def test_gradients_are_not_kept(tiny):
    assert not tiny.encode(FILES[:1], output="torch").requires_grad


_PEAK_MEMORY = """
import resource, sys
from m2d_embed.model import M2D
model = M2D.from_pretrained(sys.argv[1])
encoded = model.encode(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_an_hour_streams_in_bounded_memory(tmp_path):
    """An hour at 44.1 kHz from disk: the numbers of the whole, in the memory that two minutes take."""
    rate, minutes = 44_100, {"short": 2, "hour": 60}
    minute = (0.2 * np.random.default_rng(0).standard_normal(60 * rate)).astype(np.float32)
    model = random_model(TINY)
    model.save_pretrained(tmp_path / "model")
    peaks = {}
    for name, count in minutes.items():
        with soundfile.SoundFile(tmp_path / f"{name}.flac", "w", rate, 1) as file:
            for _ in range(count):
                file.write(minute)
        command = [sys.executable, "-c", _PEAK_MEMORY, str(tmp_path / "model"), str(tmp_path / f"{name}.flac")]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peaks["hour"] < peaks["short"] + 50  # MB; the samples alone take 220 MB in one piece

    samples = load_audio(tmp_path / "hour.flac", RATE)
    with torch.no_grad():
        whole = model.scene(torch.from_numpy(samples)[None])[0]
    assert np.abs(model.encode(tmp_path / "hour.flac") - whole.numpy()).max() <= 1e-5
