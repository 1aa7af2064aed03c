"""Offline targets: windows around the times that the features stand for, and one file of features a clip."""

import csv

import numpy as np
import pytest
import soundfile

from benchmarks.pretraining import yamnet_features
from benchmarks.pretraining.targets import todo

HOP = 7680.0


class Loudness:
    """Stands in for YAMNet: the "embedding" of a window is its sum and its length."""

    def set_tensor(self, index, window):
        self.window = window

    def invoke(self):
        self.said = np.array([[self.window.sum(), self.window.shape[1]]], np.float32)

    def get_tensor(self, index):
        return self.said


@pytest.fixture
def loudness(monkeypatch):
    monkeypatch.setattr(yamnet_features, "interpreter", lambda model: (Loudness(), 0, 1))


@pytest.mark.parametrize("samples", [1, 4000, 7680, 30_000])
def test_windows_lie_around_the_times_of_their_frames(samples):
    audio = np.ones(samples, np.float32)
    found = list(yamnet_features.windows(audio, HOP))
    assert len(found) == max(1, round(samples / HOP))
    for j, window in enumerate(found):
        start = (j + 0.5) * HOP - 7800
        heard = min(start + 15_600, samples) - max(start, 0)
        assert window.shape == (15_600,)
        assert window.sum() == pytest.approx(heard, abs=1)


def test_features_of_a_clip(loudness, tmp_path):
    found = yamnet_features.embed(np.ones(23_040, np.float32), tmp_path, HOP)
    assert found.dtype == np.float16
    assert found[:, 1].tolist() == [15_600] * 3
    assert found[1, 0] > found[0, 0]


def test_files_and_manifest(loudness, tmp_path, monkeypatch):
    class Here:
        """A pool of this process, where the stand-in is."""

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

        def imap_unordered(self, function, jobs, chunksize):
            return map(function, jobs)

    monkeypatch.setattr(
        yamnet_features, "get_context", lambda method: type("Context", (), {"Pool": lambda s, n: Here()})()
    )
    corpus, output = tmp_path / "corpus", tmp_path / "features"
    (corpus / "audio").mkdir(parents=True)
    for name in ("a", "b"):
        soundfile.write(corpus / "audio" / f"{name}.wav", np.zeros(16_000), 16_000)
    (corpus / "manifest.csv").write_text("file,seconds,kind\naudio/a.wav,1,music\naudio/b.wav,1,speech\n")
    yamnet_features.main(corpus / "manifest.csv", tmp_path / "yamnet.tflite", output, hop=480.0, processes=1)
    rows = list(csv.DictReader((output / "manifest.csv").open()))
    assert [row["kind"] for row in rows] == ["music", "speech"]
    for row in rows:
        assert (output / row["file"]).resolve().exists()
        assert np.load(output / row["features"]).shape == (2, 2)
    before = (output / rows[0]["features"]).stat().st_mtime_ns
    (output / rows[1]["features"]).unlink()
    yamnet_features.main(corpus / "manifest.csv", tmp_path / "yamnet.tflite", output, hop=480.0, processes=1)
    assert (output / rows[0]["features"]).stat().st_mtime_ns == before
    assert (output / rows[1]["features"]).exists()


@pytest.mark.parametrize("file", ["/corpus/audio/a.wav", "../corpus/audio/a.wav", "audio/../../a.wav"])
def test_features_are_written_into_their_folder_alone(file, tmp_path):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"file,seconds\n{file},1\n")
    with pytest.raises(SystemExit, match=r"a\.wav: the files of a manifest must lie below it"):
        todo(manifest, tmp_path / "features")
