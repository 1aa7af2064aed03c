"""encode(): the result for a clip never depends on the others; long clips stream in bounded memory."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import DATA, TINY, random_model

from m2d_embed.audio.clips import load_audio
from m2d_embed.config import FeatureConfig
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.runtime import batching
from m2d_embed.runtime.batching import Pipeline, encode_scenes, encode_timestamps
from m2d_embed.runtime.profiling import DECODING, ENCODER, LOG_MEL, Profile
from m2d_embed.runtime.transfer import PlainLink

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


@pytest.mark.parametrize("pooling", ["mean", "mean_std"])
def test_encode_agrees_with_scene(bundled, pooling):
    clips = mixed_clips()
    bundled.features = FeatureConfig(scene_pooling=pooling)
    try:
        with torch.no_grad():
            expected = torch.cat([bundled.scene(torch.from_numpy(clip)[None]) for clip in clips])
        assert np.abs(bundled.encode(clips) - expected.numpy()).max() <= 1e-5
    finally:
        bundled.features = FeatureConfig()


@pytest.mark.parametrize(("batch_size", "waiting"), [(1, 1), (2, 1), (3, 8), (64, 8)])
def test_any_batch_size_and_any_patience(monkeypatch, batch_size, waiting):
    monkeypatch.setattr("m2d_embed.runtime.batching._MAX_BUFFERED_BATCHES", waiting)
    model = random_model(TINY)
    clips = [clip[: 5 * RATE] for clip in mixed_clips()]
    expected = np.stack([model.encode(clip) for clip in clips])
    assert np.abs(model.encode(clips, batch_size=batch_size) - expected).max() <= 1e-5


def test_a_call_has_no_more_windows_than_the_model_takes(monkeypatch):
    """On a CPU that bounds memory, whatever the batch size."""
    model = random_model(TINY)
    sizes, window_frames = [], model.window_frames
    monkeypatch.setattr(model, "window_frames", lambda x, f: (sizes.append(len(x)), window_frames(x, f))[1])
    clips = [0.1 * np.random.default_rng(i).standard_normal(6_400).astype(np.float32) for i in range(20)]
    expected = model.encode(clips)
    monkeypatch.setattr("m2d_embed.model.network._CPU_ACTIVATIONS", 3 * 15 * 128)  # three windows of 48 frames
    found = model.encode(clips)
    assert sizes == [20, 3, 3, 3, 3, 3, 3, 2]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    profile, opened = Profile(), list(model.open_clips(clips, RATE, raise_errors=True))
    list(encode_scenes(model, opened, model.features, 32, Pipeline(stopwatch=profile)))
    assert (profile.batches, profile.windows, profile.room) == (7, 20, 21)


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


def scenes_of(model, clips, batch_size=4, **options):
    """Scene embeddings in the clips' order, errors as text."""
    opened = list(model.open_clips(clips))
    with torch.no_grad():
        return dict(encode_scenes(model, opened, model.features, batch_size, Pipeline(**options)))


def bad_late(seconds: float = 60.0) -> np.ndarray:
    """A clip whose last sample is bad: seen after windows of it have been encoded."""
    clip = np.zeros(round(seconds * RATE), np.float32)
    clip[-1] = np.nan
    return clip


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_change_nothing(tiny, tmp_path, threads):
    (tmp_path / "bad.wav").write_text("text")
    clips = [*FILES, *mixed_clips(), tmp_path / "bad.wav", bad_late()]
    expected, got = scenes_of(tiny, clips, decode_threads=0), scenes_of(tiny, clips, decode_threads=threads)
    assert sorted(got) == sorted(expected) == list(range(len(clips)))
    for index, scene in expected.items():
        if isinstance(scene, AudioError):
            assert str(got[index]) == str(scene)
        else:
            assert (got[index] - scene).abs().max() <= 1e-6
    assert {index for index, scene in got.items() if isinstance(scene, AudioError)} == {len(clips) - 2, len(clips) - 1}


def test_a_run_can_be_repeated_to_the_bit(tiny):
    clips = [*FILES, *mixed_clips()]
    first, second = (scenes_of(tiny, clips, decode_threads=3) for _ in range(2))
    assert list(first) == list(second)
    assert all(torch.equal(first[i], second[i]) for i in first)


@pytest.mark.parametrize("threads", [-1, 1.5, "2"])
def test_impossible_numbers_of_threads(threads):
    with pytest.raises(ConfigError, match="decode_threads"):
        Pipeline(decode_threads=threads)


def test_threads_by_the_machine(monkeypatch):
    for cores, cpu, gpu in [(1, 1, 1), (2, 1, 1), (16, 4, 8)]:
        monkeypatch.setattr(batching, "usable_cores", lambda cores=cores: cores)
        assert Pipeline().threads_for(torch.device("cpu")) == cpu
        assert Pipeline().threads_for(torch.device("cuda")) == gpu
    assert Pipeline(decode_threads=5).threads_for(torch.device("cpu")) == 5


class LateLink(PlainLink):
    """Stands in for a GPU: what is brought back arrives, over NaN, only when it is waited for."""

    max_in_flight = 2

    def __init__(self, device):
        super().__init__(device)
        self.under_way = self.most_under_way = 0

    def download(self, tensor):
        host = torch.full_like(tensor, torch.nan)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)

        def wait():
            self.under_way -= 1
            return host.copy_(tensor)

        return wait


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("threads", [0, 2])
def test_every_clip_has_one_result(tiny, batch_size, threads):
    clips = list(tiny.open_clips([*mixed_clips(), bad_late(8.0), *FILES, FILES[0].with_name("missing.wav")]))
    with torch.no_grad():
        found = [i for i, _ in encode_scenes(tiny, clips, tiny.features, batch_size, Pipeline(threads))]
    assert sorted(found) == list(range(len(clips)))


@pytest.mark.parametrize("frames_a_call", [300, 2000, 10**9])
@pytest.mark.parametrize("hop_ms", [None, 40.0])
def test_as_on_a_gpu(tiny, monkeypatch, hop_ms, frames_a_call):
    """The log-mel of many clips in one call, results two batches late; and clips that turn out bad meanwhile."""
    tiny.features = FeatureConfig(hop_ms=hop_ms)
    clips = [*(clip[: 10 * RATE] for clip in mixed_clips()), bad_late(8.0), *FILES, bad_late(0.001)]
    opened = list(tiny.open_clips(clips))
    links = []
    with torch.no_grad():
        expected = dict(encode_timestamps(tiny, opened, tiny.features, 4))
        monkeypatch.setattr(batching, "link_to", lambda device: links.append(LateLink(device)) or links[-1])
        monkeypatch.setattr(batching, "_frames_a_call", lambda device: frames_a_call)
        late = dict(encode_timestamps(tiny, opened, tiny.features, 4, Pipeline(decode_threads=2)))
        scenes = dict(encode_scenes(tiny, opened, tiny.features, 4, Pipeline(decode_threads=2)))
    assert [link.most_under_way for link in links] == [3, 3]
    assert len(late) == len(scenes) == len(clips)
    for index, result in expected.items():
        if isinstance(result, AudioError):
            assert str(late[index]) == str(scenes[index]) == str(result)
            continue
        assert torch.equal(late[index].timestamps, result.timestamps)
        assert (late[index].embeddings - result.embeddings).abs().max() <= 2e-6
        if hop_ms is None:
            assert (scenes[index] - tiny.scene(torch.from_numpy(as_array(clips[index]))[None])[0]).abs().max() <= 1e-5


def test_a_clip_longer_than_it_seemed(tiny, noise):
    """Its header is wrong, or it is very long: the tensor of its columns grows."""
    clip = noise(30.0)[0]
    with torch.no_grad():
        expected = tiny.timestamps(clip[None])
        (opened,) = tiny.open_clips([clip])
        wrong = replace(opened, seconds=1.0)
        ((_, got),) = encode_timestamps(tiny, [wrong], tiny.features, 4)
    assert torch.equal(got.timestamps, expected.timestamps[0])
    assert (got.embeddings - expected.embeddings[0]).abs().max() <= 1e-5


def as_array(clip) -> np.ndarray:
    return clip if isinstance(clip, np.ndarray) else load_audio(clip, RATE)


def test_a_profile_of_a_run(tiny):
    profile = Profile()
    clips = [*FILES, bad_late()]
    scenes_of(tiny, clips, batch_size=4, decode_threads=1, stopwatch=profile)
    lengths = [len(load_audio(file, RATE)) / RATE for file in FILES]
    assert profile.audio_seconds == pytest.approx(sum(lengths))
    assert profile.batches >= profile.windows / 4 >= len(FILES) / 4
    assert min(profile.seconds[name] for name in (DECODING, LOG_MEL, ENCODER)) > 0


def test_gradients_are_not_kept(tiny):
    assert not tiny.encode(FILES[:1], output="torch").requires_grad


_PEAK_MEMORY = """
import sys
from m2d_embed.m2d import M2D
from m2d_embed.runtime.profiling import peak_memory
model = M2D.from_pretrained(sys.argv[1])
encoded = model.encode(sys.argv[2])
print(peak_memory() / 2**20)
"""


def test_an_hour_streams_in_bounded_memory(tmp_path):
    """An hour at 44.1 kHz from disk: the numbers of the whole, in the memory that two minutes take."""
    rate, minutes = 44_100, {"short": 2, "hour": 60}
    minute = (0.2 * np.random.default_rng(0).standard_normal(60 * rate)).astype(np.float32)
    model = random_model(replace(TINY, scene_pooling="mean_std"))
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
