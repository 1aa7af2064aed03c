"""Offline targets: windows around the times that the features stand for, and one file of features a clip."""

import csv
import sys
from types import ModuleType

import numpy as np
import pytest
import soundfile

from benchmarks.pretraining import probe_features, yamnet_features
from benchmarks.pretraining.targets import todo

HOP = 7680.0


class Loudness:
    """Stands in for YAMNet: the "embedding" of a window is its sum and length, a layer's activations its quarters."""

    def set_tensor(self, index, window):
        self.window = window

    def invoke(self):
        self.said = np.array([[self.window.sum(), self.window.shape[1]]], np.float32)

    def get_tensor(self, index):
        quarters = self.window.reshape(1, 2, 2, -1).astype(np.float32)
        return {1: self.said, 12: quarters, 13: -quarters}[index]


@pytest.fixture
def loudness(monkeypatch):
    monkeypatch.setattr(yamnet_features, "interpreter", lambda model, layers: (Loudness(), 0, [1, *layers]))


class Interpreter:
    """A TFLite interpreter of a model that names its tensors as YAMNet's does, fused operations after semicolons."""

    def __init__(self, model_path, num_threads, experimental_preserve_all_tensors):
        assert experimental_preserve_all_tensors

    def allocate_tensors(self):
        pass

    def get_input_details(self):
        return [{"index": 7}]

    def get_tensor_details(self):
        layers = [f"f/layer{n}/pointwise_conv/relu/Relu;f/layer{n + 1}/pointwise_conv/bn/Bn" for n in (2, 12, 13)]
        names = ["f/global_average_pooling2d/Mean", "f/global_average_pooling2d/Mean/reduction_indices", *layers]
        return [{"name": name, "index": place} for place, name in enumerate(names)]


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


def test_features_with_the_means_of_layers(loudness, tmp_path):
    audio = np.linspace(0, 1, 30_000, dtype=np.float32)
    alone = yamnet_features.embed(audio, tmp_path, HOP)
    found = yamnet_features.embed(audio, tmp_path, HOP, (13, 12))
    assert found.shape == (4, 2 + 2 * 3900) and found.dtype == np.float16
    np.testing.assert_array_equal(found[:, :2], alone)
    window = list(yamnet_features.windows(audio, HOP))[2]
    expected = window.reshape(4, 3900).mean(axis=0)
    np.testing.assert_allclose(found[2, 3902:], expected, atol=1e-3)
    np.testing.assert_allclose(found[2, 2:3902], -expected, atol=1e-3)


def test_places_in_yamnet(monkeypatch):
    litert, module = ModuleType("ai_edge_litert"), ModuleType("ai_edge_litert.interpreter")
    module.Interpreter = Interpreter
    monkeypatch.setitem(sys.modules, "ai_edge_litert", litert)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", module)
    uncached = yamnet_features.interpreter.__wrapped__
    assert uncached("yamnet.tflite", ())[1:] == (7, [0])
    assert uncached("yamnet.tflite", (13, 2))[1:] == (7, [0, 4, 2])
    with pytest.raises(SystemExit, match=r"has 0 tensors whose name ends in /layer14/pointwise_conv.*is it YAMNet"):
        uncached("yamnet.tflite", (14,))


def test_layers_that_yamnet_lacks(tmp_path):
    manifest, yamnet = tmp_path / "manifest.csv", tmp_path / "yamnet.tflite"
    with pytest.raises(SystemExit, match=r"--layer: YAMNet's are 2 to 14"):
        yamnet_features.main(manifest, yamnet, tmp_path / "features", layer=[12, 15])


def test_a_folder_has_features_of_one_kind(tmp_path):
    output = tmp_path / "features"
    yamnet_features.claim(output, 480.0, (12,))
    yamnet_features.claim(output, 480.0, (12,))
    for hop, layers in ((480.0, ()), (480.0, (12, 13)), (240.0, (12,))):
        with pytest.raises(SystemExit, match=r"has features of .*'layers': \[12\].*choose another folder"):
            yamnet_features.claim(output, hop, layers)
    earlier = tmp_path / "earlier"  # by a version that had no layers
    earlier.mkdir()
    (earlier / "manifest.csv").touch()
    with pytest.raises(SystemExit, match=r"of the embedding alone"):
        yamnet_features.claim(earlier, 480.0, (12,))
    yamnet_features.claim(earlier, 480.0, ())


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


def test_seconds_of_a_set_without_that_column(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8_000), 16_000)
    (tmp_path / "metadata.csv").write_text("file,label\na.wav,x\n")
    [job] = todo(tmp_path / "metadata.csv", tmp_path / "features")
    assert job.seconds == 0.5


@pytest.fixture
def features_of_labelled(tmp_path):
    """Of 20 clips: two values that tell nothing, then three whose means over time tell the two labels apart."""
    rng = np.random.default_rng(0)
    rows = []
    for clip in range(20):
        (tmp_path / f"{clip}.wav").touch()
        frames = rng.standard_normal((4 + clip % 3, 5)).astype(np.float16)
        frames[:, 2:] += 10 * (clip % 2)
        np.save(tmp_path / f"{clip}.npy", frames)
        rows.append(f"{clip}.wav,{'ab'[clip % 2]},{clip // 2 % 2},{clip}.npy")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(["file,label,fold,features", *rows]) + "\n")
    return manifest


def test_probes_of_features_and_their_parts(features_of_labelled, capsys):
    probe_features.main(features_of_labelled, part=[2, 3])
    first, second, joint = capsys.readouterr().out.splitlines()
    assert first.startswith("values 0 to 1: ") and float(first.split()[-2]) < 90
    assert second == "values 2 to 4: 100.0 %"
    assert joint == "values 0 to 4: 100.0 %"
    probe_features.main(features_of_labelled)
    assert capsys.readouterr().out == "values 0 to 4: 100.0 %\n"


def test_parts_that_do_not_add_up(features_of_labelled):
    with pytest.raises(SystemExit, match=r"--part: the parts have 4 values together, a frame has 5"):
        probe_features.main(features_of_labelled, part=[1, 3])


@pytest.mark.parametrize("file", ["/corpus/audio/a.wav", "../corpus/audio/a.wav", "audio/../../a.wav"])
def test_features_are_written_into_their_folder_alone(file, tmp_path):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"file,seconds\n{file},1\n")
    with pytest.raises(SystemExit, match=r"a\.wav: the files of a manifest must lie below it"):
        todo(manifest, tmp_path / "features")
