"""A crop has the samples of the same stretch of the whole file, for every format, rate and place."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from conftest import DATA

from m2d_embed.audio.clips import load_audio
from m2d_embed.errors import AudioError
from m2d_embed.pretrain.crops import fit, read_crop

RATE = 16_000
LENGTH = 20_000


class Draw:
    """In place of a random generator: says which of the possible places is taken."""

    def __init__(self, share: float):
        self.share = share

    def integers(self, stop: int) -> int:
        return round(self.share * (stop - 1))


def crop_at(file, share: float, length: int = LENGTH, name: str = "clip"):
    return read_crop(file, RATE, length, Draw(share), name)


@pytest.fixture(scope="module")
def music() -> np.ndarray:
    """Seven seconds of chords and noise at 48 kHz, stereo."""
    times = np.arange(7 * 48_000) / 48_000
    rng = np.random.default_rng(0)
    left = sum(np.sin(2 * np.pi * f * times * (1 + 0.1 * times)) for f in (110, 523, 2_001)) / 6
    return np.stack([left + 0.05 * rng.standard_normal(len(times)), 0.3 * np.roll(left, 999)], axis=1)


def write(folder: Path, music: np.ndarray, suffix: str, subtype: str, rate: int) -> Path:
    path = folder / f"clip{suffix}"
    soundfile.write(path, soxr.resample(music, 48_000, rate), rate, subtype=subtype)
    return path


@pytest.mark.parametrize(
    ("suffix", "subtype", "rate"),
    [
        (".wav", "PCM_16", 16_000),
        (".wav", "PCM_24", 8_000),
        (".wav", "FLOAT", 11_025),
        (".flac", "PCM_24", 44_100),
        (".flac", "PCM_16", 32_000),
        (".ogg", "VORBIS", 44_100),
        (".ogg", "VORBIS", 22_050),
        (".opus", "OPUS", 48_000),
        (".opus", "OPUS", 16_000),
        (".mp3", "MPEG_LAYER_III", 44_100),
        (".mp3", "MPEG_LAYER_III", 16_000),
        (".wav", "FLOAT", 44_101),
    ],
)
def test_a_crop_equals_the_stretch_of_the_whole(tmp_path, music, suffix, subtype, rate):
    if suffix == ".opus":
        path = write(tmp_path, music, ".ogg", subtype, rate).rename(tmp_path / "clip.opus")
    else:
        path = write(tmp_path, music, suffix, subtype, rate)
    whole = load_audio(path, RATE)
    for share in (0, 0.003, 0.41, 0.777, 1):
        crop = crop_at(path, share)
        start = round(crop.start_seconds * RATE)
        assert crop.samples.dtype == np.float32
        assert crop.samples.shape == (LENGTH,)
        np.testing.assert_allclose(crop.samples, whole[start : start + LENGTH], atol=1e-5)
    assert abs(start + LENGTH - len(whole)) <= 1  # the last place is the end of the file
    assert abs(crop.clip_seconds - 7) < 0.01


def test_a_crop_of_bytes_is_that_of_the_file(tmp_path, music):
    path = write(tmp_path, music, ".mp3", "MPEG_LAYER_III", 44_100)
    stream = io.BytesIO(path.read_bytes())
    np.testing.assert_array_equal(crop_at(stream, 0.3).samples, crop_at(path, 0.3).samples)


def test_places_are_drawn_from_the_whole_file(tmp_path):
    soundfile.write(tmp_path / "ramp.wav", np.arange(50_000) / 50_000, RATE, subtype="FLOAT")
    rng = np.random.default_rng(0)
    starts = [read_crop(tmp_path / "ramp.wav", RATE, 10_000, rng, "ramp").start_seconds * RATE for _ in range(400)]
    counts, _ = np.histogram(starts, bins=4, range=(0, 40_000))
    assert counts.min() > 70
    crop = read_crop(tmp_path / "ramp.wav", RATE, 10_000, np.random.default_rng(1), "ramp")
    np.testing.assert_allclose(crop.samples[0] * 50_000, crop.start_seconds * RATE, atol=0.01)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
def test_a_short_clip_is_read_whole(tmp_path, rate):
    samples = 0.1 * np.random.default_rng(0).standard_normal(rate // 3)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    crop = crop_at(tmp_path / "a.wav", 1.0)
    np.testing.assert_array_equal(crop.samples, load_audio(tmp_path / "a.wav", RATE))
    assert crop.start_seconds == 0
    assert crop.clip_seconds == (rate // 3) / rate


def test_a_single_sample_is_a_clip(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.25]), 48_000, subtype="FLOAT")
    assert crop_at(tmp_path / "a.wav", 0).samples.tolist() == [0.25]


@pytest.mark.parametrize("length", [5_000, 16_000, 16_001])
def test_a_clip_of_about_the_length_of_the_crop(tmp_path, length):
    soundfile.write(tmp_path / "a.wav", np.zeros(44_100), 44_100)
    assert crop_at(tmp_path / "a.wav", 1.0, length).samples.shape == (min(length, 16_000),)


def test_real_clips():
    crop = crop_at(DATA / "sounds" / "bell.oga", 0.0, length=4_000)
    assert 0.01 < np.abs(crop.samples).max() <= 1.5


# --- bad files -----------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    for name, message in (
        ("text", "not audio that can be read"),
        ("empty", "the file is empty"),
        ("no", "no such file"),
    ):
        with pytest.raises(AudioError, match=rf"{name}\.wav: {message}"):
            crop_at(tmp_path / f"{name}.wav", 0)
    with pytest.raises(AudioError, match=r"a\.tar:7: not audio"):
        crop_at(io.BytesIO(b"not audio at all"), 0, name="a.tar:7")
    with pytest.raises(AudioError, match=r"a\.tar:7: the file is empty"):
        crop_at(io.BytesIO(b""), 0, name="a.tar:7")


def test_a_truncated_file(tmp_path, music):
    for suffix, subtype in ((".wav", "PCM_16"), (".flac", "PCM_16")):
        path = write(tmp_path, music, suffix, subtype, 44_100)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(AudioError, match=r"clip: .*truncated"):
            crop_at(path, 1.0)


def test_samples_that_are_not_finite(tmp_path):
    samples = np.zeros(40_000, np.float32)
    samples[30_000] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"clip, from sample 20000 on: sample 10000 is NaN"):
        crop_at(tmp_path / "nan.wav", 1.0)
    assert crop_at(tmp_path / "nan.wav", 0.0).samples.shape == (LENGTH,)  # the stretch without it is good
    samples[30_000] = 1e20
    soundfile.write(tmp_path / "loud.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"1e\+20; audio lies in"):
        crop_at(tmp_path / "loud.wav", 1.0)


def test_a_file_without_samples(tmp_path):
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", 0
    )
    (tmp_path / "none.wav").write_bytes(header)
    with pytest.raises(AudioError, match="the clip is empty"):
        crop_at(tmp_path / "none.wav", 0)


# --- short crops ---------------------------------------------------------------------------------------------------


def test_fit():
    samples = np.array([1, 2, 3], np.float32)
    repeated, valid = fit(samples, 7, "repeat")
    assert (repeated.tolist(), valid) == ([1, 2, 3, 1, 2, 3, 1], 7)
    padded, valid = fit(samples, 5, "pad")
    assert (padded.tolist(), valid) == ([1, 2, 3, 0, 0], 3)
    for how in ("repeat", "pad"):
        same, valid = fit(samples, 3, how)
        assert (same.tolist(), valid, same.dtype) == ([1, 2, 3], 3, np.float32)
