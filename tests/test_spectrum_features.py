"""Offline targets from a fine spectrum: what a band hears, and the files of a corpus."""

import csv

import numpy as np
import pytest
import soundfile

from benchmarks.pretraining import spectrum_features
from benchmarks.pretraining.spectrum_features import BANDS, around, bands, prominence


def tone(frequency, seconds=2.0, rate=16_000):
    return (0.1 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def test_bands_are_means_over_neighbouring_bins():
    weights = bands()
    assert weights.shape == (BANDS, 2049)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert (weights >= 0).all()
    centres = (weights * np.arange(2049)).sum(axis=1) * 16_000 / 4096
    np.testing.assert_allclose(centres, 32.703 * 2 ** (np.arange(BANDS) / 36), rtol=0.01)


@pytest.mark.parametrize("note", [33, 45, 69, 93])  # semitones, of which 24 is C1 at 32.7 Hz
def test_a_tone_stands_out_in_its_band_however_loud(note):
    noise = np.random.default_rng(0).standard_normal(32_000).astype(np.float32) / 100
    audio = tone(440 * 2 ** ((note - 69) / 12)) + noise
    loud, quiet = prominence(audio), prominence(audio * np.float32(0.2))
    assert abs(int(loud[10].argmax()) - 3 * (note - 24)) <= 1
    assert quiet[10].argmax() == loud[10].argmax()
    assert quiet[10].max() == pytest.approx(loud[10].max(), rel=0.1)


def test_silence_has_nothing_that_stands_out():
    assert prominence(np.zeros(16_000, np.float32)).max() < 1e-3


def test_means_around_the_times_of_the_frames():
    spectra = np.arange(25, dtype=np.float32)[:, None].repeat(3, axis=1)  # one every 80 ms
    found = around(spectra, 1.92, 480.0)
    assert found.shape == (4, 3)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found[:, 0], [3, 9, 15, 21])
    assert around(spectra[:2], 0.1, 480.0).tolist() == [[0.5] * 3]


def test_files_of_any_length_and_a_manifest(tmp_path):
    rows = ["file,seconds,kind"]
    for number, seconds in enumerate((0.1, 1.0, 5.0)):
        soundfile.write(tmp_path / f"{number}.wav", tone(220, seconds), 16_000)
        rows.append(f"{number}.wav,{seconds},music")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    spectrum_features.main(tmp_path / "manifest.csv", tmp_path / "spectrum", hop=480.0, workers=2)
    made = list(csv.DictReader((tmp_path / "spectrum" / "manifest.csv").open()))
    features = [np.load(tmp_path / "spectrum" / row["features"]) for row in made]
    assert [f.shape for f in features] == [(1, BANDS), (2, BANDS), (10, BANDS)]
    first = tmp_path / "spectrum" / made[0]["features"]
    before = first.stat().st_mtime_ns
    spectrum_features.main(tmp_path / "manifest.csv", tmp_path / "spectrum", hop=480.0, workers=1)
    assert first.stat().st_mtime_ns == before  # what is there is kept
