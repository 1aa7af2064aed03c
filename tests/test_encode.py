"""What encode and encode_timestamps take, and what they do about clips that cannot be embedded."""

import io
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import DATA, TINY, random_model

import m2d_embed
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.m2d import M2D

FILES = sorted((DATA / "digits").iterdir())[:3]
NAMES = [str(file) for file in FILES]


@pytest.fixture(scope="module")
def model() -> M2D:
    return random_model(TINY)


@pytest.fixture(scope="module")
def expected(model) -> np.ndarray:
    return model.encode(FILES)


def series() -> Any:
    return pytest.importorskip("pandas").Series(NAMES, index=[7, 7, 3])


def arrow() -> Any:
    return pytest.importorskip("pyarrow")


#: The same three paths in everything that holds a list.
COLUMNS: dict[str, Callable[[], Any]] = {
    "array": lambda: np.array(NAMES),
    "array of objects": lambda: np.array(NAMES, dtype=object),
    "array of paths": lambda: np.array(FILES, dtype=object),
    "array of bytes": lambda: np.array([os.fsencode(name) for name in NAMES]),
    "tuple": lambda: tuple(FILES),
    "generator": lambda: (name for name in NAMES),
    "series": series,
    "series of objects": lambda: series().astype(object),
    "series of strings": lambda: series().astype("string[pyarrow]"),
    "categories": lambda: series().astype("category"),
    "column of a frame": lambda: series().to_frame("file")["file"],
    "to_numpy": lambda: series().to_numpy(),
    "arrow": lambda: arrow().array(NAMES),
    "arrow, in chunks": lambda: arrow().chunked_array([NAMES[:1], NAMES[1:]]),
}


@pytest.mark.parametrize("make", COLUMNS.values(), ids=COLUMNS)
def test_lists_of_paths(model, expected, make):
    assert np.array_equal(model.encode(make()), expected)
    for found, wanted in zip(model.encode_timestamps(make()), model.encode_timestamps(FILES), strict=True):
        assert torch.equal(found.embeddings, wanted.embeddings)


def test_a_single_path_in_an_array_of_no_dimensions(model, expected):
    assert model.encode(np.array(NAMES[0])).shape == (160,)
    assert np.abs(model.encode(NAMES[0]) - expected[0]).max() <= 1e-5


def test_a_table_is_refused_with_what_to_do(model):
    for table in (np.array(NAMES)[:, None], series().to_frame("file"), np.array([FILES], dtype=object)):
        with pytest.raises(AudioError, match=r"table of shape .* one column of it"):
            model.encode(table)


def test_an_array_of_waveforms_of_any_lengths(model, noise):
    clips = np.empty(2, dtype=object)
    clips[:] = [noise(0.7)[0].numpy(), noise(1.1)[0].numpy()]
    assert np.array_equal(model.encode(clips), model.encode(list(clips)))


def test_missing_values_are_named(model):
    with pytest.raises(AudioError, match=r"clips\[1\]: a clip is a path.*not float"):
        model.encode(np.array([NAMES[0], np.nan], dtype=object))


def test_whole_numbers_of_numpy(model, noise, expected):
    assert np.array_equal(model.encode(FILES, batch_size=np.int64(32)), expected)
    audio = noise(1.0)[0]
    resampled = model.encode(audio, sample_rate=np.int64(8000))
    assert np.array_equal(resampled, model.encode(audio, sample_rate=8000))
    assert torch.equal(model(audio[None], sample_rate=np.int32(8000)), model(audio[None], sample_rate=8000))
    assert torch.equal(model.intermediates(audio[None], np.arange(1))[0], model.intermediates(audio[None], [0])[0])
    for wrong in (True, 32.0, "32", 0):
        with pytest.raises(ConfigError, match="batch_size"):
            model.encode(FILES, batch_size=wrong)


def test_nothing_gives_no_rows(model):
    for nothing in ([], np.array([], dtype=str), ()):
        assert model.encode(nothing).shape == (0, 160)
        assert model.encode(nothing, output="torch", normalize_embeddings=True).shape == (0, 160)
        assert model.encode_timestamps(nothing) == []


@pytest.mark.parametrize("samples", [16_000, 1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_a_hear_batch_of_no_sounds(model, samples, dtype):
    nothing = torch.zeros(0, samples, dtype=dtype)
    scenes = m2d_embed.get_scene_embeddings(nothing, model)
    assert scenes.shape == (0, 160) and scenes.dtype == torch.float32
    embeddings, timestamps = m2d_embed.get_timestamp_embeddings(nothing, model)
    one = m2d_embed.get_timestamp_embeddings(torch.zeros(1, max(1, samples), dtype=dtype), model)[0]
    assert embeddings.shape == (0, *one.shape[1:])
    assert timestamps.shape == embeddings.shape[:2]


def test_normalised_embeddings(model, expected):
    found = model.encode(FILES, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    single = model.encode(FILES[0], normalize_embeddings=True, output="torch")
    assert single.norm().item() == pytest.approx(1, abs=1e-6)
    timed = model.encode_timestamps(FILES[0], normalize_embeddings=True)
    torch.testing.assert_close(timed.embeddings.norm(dim=-1), torch.ones(len(timed.timestamps)))


@pytest.fixture
def broken(tmp_path, noise) -> list[object]:
    """A good clip between bad ones, whose faults are found when they are looked at and when they are read."""
    (tmp_path / "empty.wav").write_bytes(b"")
    with_nan = noise(1.0)[0].numpy()
    with_nan[5000] = np.nan
    return [tmp_path / "missing.wav", FILES[0], with_nan, tmp_path / "empty.wav", 3.0]


def test_skipped_clips_keep_their_rows_and_are_named(model, broken, expected, caplog):
    with caplog.at_level(logging.WARNING, logger="m2d_embed"):
        found = model.encode(broken, on_error="skip")
    assert np.isnan(found).all(axis=1).tolist() == [True, False, True, True, True]
    assert np.abs(found[1] - expected[0]).max() <= 1e-5
    said = sorted(caplog.messages)
    assert len(said) == 4 and all(message.startswith("skipped: ") for message in said)
    for name in ("missing.wav: no such file", "clips[2]: sample 5000 is NaN", "empty.wav", "clips[4]"):
        assert any(name in message for message in said), name


def test_skipped_clips_have_no_timestamps(model, broken):
    found = model.encode_timestamps(broken, on_error="skip", normalize_embeddings=True)
    assert [len(timed.timestamps) > 0 for timed in found] == [False, True, False, False, False]
    assert found[0].embeddings.shape == (0, model.timestamp_embedding_size)


def test_a_single_clip_may_be_skipped_too(model, tmp_path):
    assert np.isnan(model.encode(tmp_path / "missing.wav", on_error="skip")).all()
    assert len(model.encode_timestamps(tmp_path / "missing.wav", on_error="skip").timestamps) == 0


def test_errors_are_raised_unless_they_are_to_be_skipped(model, broken):
    for clips in (broken, broken[2:3]):
        with pytest.raises(AudioError):
            model.encode(clips)
    for encode in (model.encode, model.encode_timestamps):
        with pytest.raises(ConfigError, match='on_error is "raise" or "skip"'):
            encode(FILES, on_error="ignore")


def test_folders_of_paths_that_are_no_strings(model, expected):
    class Entry:
        def __init__(self, path: Path):
            self.path = path

        def __fspath__(self) -> str:
            return str(self.path)

    assert np.array_equal(model.encode([Entry(file) for file in FILES]), expected)


# --- sound in memory --------------------------------------------------------------------------------------------------


class Decoder:
    """What torchcodec's ``AudioDecoder`` has of what is used of it."""

    def __init__(self, samples: torch.Tensor, rate: int):
        self.samples, self.rate = samples, rate

    def get_all_samples(self) -> Any:
        return types.SimpleNamespace(data=self.samples, sample_rate=self.rate)


def in_memory() -> dict[str, Any]:
    """The first file, in whatever else holds a sound."""
    samples, rate = soundfile.read(FILES[0], dtype="float32", always_2d=True)
    content = FILES[0].read_bytes()
    return {
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "file in memory": io.BytesIO(content),
        "array of datasets": {"path": None, "array": samples.mean(1), "sampling_rate": rate},
        "rate of numpy": {"array": samples.T, "sampling_rate": np.int64(rate)},
        "encoded, of datasets": {"bytes": content, "path": "a.opus"},
        "decoder": Decoder(torch.from_numpy(samples.T), rate),
    }


@pytest.mark.parametrize("kind", in_memory())
def test_sound_in_memory(model, expected, kind):
    """Alone, in a list beside others, and in an array of objects."""
    assert np.abs(model.encode(in_memory()[kind]) - expected[0]).max() <= 1e-5
    assert np.abs(model.encode([FILES[1], in_memory()[kind]]) - expected[[1, 0]]).max() <= 1e-5
    boxed = np.empty(2, dtype=object)
    boxed[0], boxed[1] = in_memory()[kind], str(FILES[2])
    assert np.abs(model.encode(boxed) - expected[[0, 2]]).max() <= 1e-5
    assert isinstance(model.encode_timestamps(in_memory()[kind]), m2d_embed.m2d.Timestamps)


def test_an_open_file(model, expected):
    with FILES[0].open("rb") as file:
        assert np.abs(model.encode(file) - expected[0]).max() <= 1e-5
        assert np.abs(model.encode([file, file]) - expected[[0, 0]]).max() <= 1e-5


def test_a_mapping_of_something_else_is_one_bad_clip(model):
    with pytest.raises(AudioError, match=r"clips\[0\]"):
        model.encode({"file": NAMES[0]})
    assert np.isnan(model.encode([{"array": None}, b"not a sound", FILES[0]], on_error="skip")).all(1).tolist() == [
        True,
        True,
        False,
    ]


def test_scikit_learn_takes_them_too(expected, model, tmp_path):
    pytest.importorskip("sklearn")
    from m2d_embed.adapters.sklearn import M2DFeatures

    model.save_pretrained(tmp_path)
    found = M2DFeatures(tmp_path, device="cpu").fit_transform([in_memory()["bytes"], in_memory()["decoder"]])
    assert np.abs(found - expected[[0, 0]]).max() <= 1e-5
