"""Files to vectors on disk: formats, order, bad files, resuming, atomic writes, a full disk."""

import errno
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import DATA, TINY, assert_same_npz, random_model
from typer.testing import CliRunner

from m2d_embed.cli import app
from m2d_embed.config import FeatureConfig
from m2d_embed.errors import ConfigError
from m2d_embed.jobs import embed as module
from m2d_embed.jobs import store as store_module
from m2d_embed.jobs.embed import embed_files
from m2d_embed.jobs.outputs import read_scenes
from m2d_embed.runtime.batching import Pipeline
from m2d_embed.runtime.profiling import DECODING, ENCODER, OPENING, WRITING, Profile

FILES = sorted(DATA.glob("*/*.o*"))


@pytest.fixture
def model():
    return random_model(TINY)


def contents(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_scenes_keep_the_files_order(tmp_path, model, suffix):
    files = FILES[::-1]
    summary = embed_files(model, files, tmp_path / f"out.{suffix}")
    assert (summary.embedded, summary.resumed, summary.failed) == (len(files), 0, {})
    names, embeddings, settings = read_scenes(tmp_path / f"out.{suffix}")
    assert names == [str(file) for file in files]
    assert np.abs(embeddings - model.encode(files)).max() <= 1e-5
    assert settings["model"] == TINY.name
    assert contents(tmp_path) == {f"out.{suffix}"}


def test_timestamps_as_parquet(tmp_path, model):
    model.features = FeatureConfig(hop_ms=40)
    embed_files(model, FILES, tmp_path / "out.parquet", "timestamps")
    table = pq.read_table(tmp_path / "out.parquet")
    expected = model.encode_timestamps(FILES)
    assert table["file"].to_pylist() == [str(f) for f, e in zip(FILES, expected, strict=True) for _ in e.timestamps]
    assert table["timestamp_ms"].to_pylist() == [t for e in expected for t in e.timestamps.tolist()]
    stacked = np.concatenate([e.embeddings.numpy() for e in expected])
    assert np.abs(np.array(table["embedding"].to_pylist()) - stacked).max() <= 1e-5
    with pytest.raises(ConfigError, match="holds timestamps"):
        read_scenes(tmp_path / "out.parquet")


def test_timestamps_as_npz(tmp_path, model):
    embed_files(model, FILES, tmp_path / "out.npz", "timestamps")
    held = np.load(tmp_path / "out.npz")
    for i, expected in enumerate(model.encode_timestamps(FILES)):
        rows = slice(held["offsets"][i], held["offsets"][i + 1])
        assert np.abs(held["embeddings"][rows] - expected.embeddings.numpy()).max() <= 1e-5
        assert held["timestamps"][rows].tolist() == expected.timestamps.tolist()
    assert held["offsets"][-1] == len(held["embeddings"])


def test_one_npy_a_clip(tmp_path, model):
    embed_files(model, FILES, tmp_path / "out")
    for file, expected in zip(FILES, model.encode(FILES), strict=True):
        got = np.load(tmp_path / "out" / file.parent.name / f"{file.name}.npy")
        assert np.abs(got - expected).max() <= 1e-5
    embed_files(model, FILES[:1], tmp_path / "timed", "timestamps")
    (expected,) = model.encode_timestamps(FILES[:1])
    assert np.load(tmp_path / "timed" / f"{FILES[0].name}.times.npy").tolist() == expected.timestamps.tolist()
    assert np.load(tmp_path / "timed" / f"{FILES[0].name}.npy").shape == expected.embeddings.shape


def test_nothing_is_written_outside_the_folder(tmp_path, model, monkeypatch):
    for place in ("a", "b/c"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(FILES[0], tmp_path / place / "x.opus")
    monkeypatch.chdir(tmp_path / "b")
    embed_files(model, [Path("../a/x.opus"), Path("c/x.opus")], Path("out"))
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.npy")} == {
        "b/out/a/x.opus.npy",
        "b/out/b/c/x.opus.npy",
    }


@pytest.mark.parametrize("output", ["out.npz", "out.parquet", "out"])
def test_bad_files_are_skipped_and_the_rest_kept(tmp_path, model, output):
    (tmp_path / "bad.wav").write_text("not audio")
    files = [FILES[0], tmp_path / "bad.wav", FILES[1], tmp_path / "missing.wav"]
    seen = []
    summary = embed_files(model, files, tmp_path / output, on_progress=lambda file, error: seen.append((file, error)))
    assert set(summary.failed) == {files[1], files[3]}
    assert "not audio" in str(summary.failed[files[1]])
    assert {file for file, error in seen if error} == {files[1], files[3]}
    assert len(seen) == 4
    if output != "out":
        assert read_scenes(tmp_path / output)[0] == [str(FILES[0]), str(FILES[1])]


def test_a_sound_that_went_bad_leaves_no_vector_of_before(tmp_path, model):
    file = Path(shutil.copy(FILES[0], tmp_path / "a.opus"))
    embed_files(model, [file, FILES[1]], tmp_path / "out", "timestamps")
    assert len(list((tmp_path / "out").rglob("a.opus*"))) == 2
    file.write_text("not audio")
    assert set(embed_files(model, [file, FILES[1]], tmp_path / "out", "timestamps").failed) == {file}
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 2
    assert not list((tmp_path / "out").rglob("a.opus*"))


def test_a_folder_takes_no_second_sound_of_a_name(tmp_path, model):
    """Of a later run: ``..`` is left out of places, so that both would be ``a/x.opus.npy``."""
    for place in ("in/x", "a", "in/a"):
        (tmp_path / place).mkdir(parents=True)
    files = [Path(shutil.copy(FILES[n], tmp_path / place / "x.opus")) for n, place in enumerate(("a", "in/a"))]
    first = [Path(shutil.copy(FILES[2], tmp_path / "in" / "x" / "b.opus")), files[1]]
    embed_files(model, first, tmp_path / "out")
    before = np.load(tmp_path / "out" / "a" / "x.opus.npy")
    with pytest.raises(ConfigError, match=r"would both be .*x\.opus\.npy"):
        embed_files(model, [files[0]], tmp_path / "out")
    assert np.array_equal(np.load(tmp_path / "out" / "a" / "x.opus.npy"), before)


def test_a_folder_refuses_a_name_that_gets_too_long(tmp_path, model):
    file = Path(shutil.copy(FILES[0], tmp_path / ("n" * 248 + ".opus")))
    with pytest.raises(ConfigError, match=r"is too long for a name; take a \.parquet or \.npz"):
        embed_files(model, [file], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.json"))  # nothing that a run with other files would have to agree with
    embed_files(model, [FILES[0]], tmp_path / "out")
    embed_files(model, [file], tmp_path / "out.npz")
    assert read_scenes(tmp_path / "out.npz").names == [str(file)]


def test_nothing_is_written_if_every_file_is_bad(tmp_path, model):
    (tmp_path / "bad.wav").write_text("not audio")
    embed_files(model, [tmp_path / "bad.wav"], tmp_path / "out.npz")
    assert contents(tmp_path) == {"bad.wav"}


class Killed(BaseException):
    """As sudden as a signal: no handler of the package catches it."""


def kill_after(count: int):
    def on_progress(file, error):
        nonlocal count
        count -= 1
        if count == 0:
            raise Killed

    return on_progress


@pytest.mark.parametrize("output", ["out.npz", "out.parquet", "out"])
@pytest.mark.parametrize("kind", ["scene", "timestamps"])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, model, monkeypatch, output, kind):
    monkeypatch.setattr(module, "_SECONDS_A_PART", 0.0)
    with pytest.raises(Killed):
        embed_files(model, FILES, tmp_path / output, kind, batch_size=2, on_progress=kill_after(5))
    if output != "out":
        assert not (tmp_path / output).exists()
    encoded = []
    summary = embed_files(model, FILES, tmp_path / output, kind, on_progress=lambda file, error: encoded.append(file))
    assert summary.resumed == 5
    assert len(encoded) == len(FILES) - 5
    embed_files(model, FILES, tmp_path / f"whole{Path(output).suffix}", kind)
    if output == "out.npz":
        assert_same_npz(tmp_path / "out.npz", tmp_path / "whole.npz")
    elif output == "out.parquet":
        resumed, whole = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("out", "whole"))
        assert resumed["file"] == whole["file"]
        assert resumed.schema == whole.schema
    else:
        assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.npy")} == {
            p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.npy")
        }
        assert not list((tmp_path / "out").rglob(".*"))
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_changed_since_is_embedded_again(tmp_path, model, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_A_PART", 0.0)
    file = tmp_path / "a.opus"
    shutil.copy(FILES[0], file)
    with pytest.raises(Killed):
        embed_files(model, [file, FILES[1]], tmp_path / "out.npz", batch_size=1, on_progress=kill_after(2))
    shutil.copy(FILES[2], file)
    summary = embed_files(model, [file, FILES[1]], tmp_path / "out.npz")
    assert summary.resumed == 1
    _, embeddings, _ = read_scenes(tmp_path / "out.npz")
    assert np.abs(embeddings[0] - model.encode(FILES[2])).max() <= 1e-5


def test_other_settings_do_not_mix(tmp_path, model, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_A_PART", 0.0)
    for output in ("out.npz", "out"):
        with pytest.raises(Killed):
            embed_files(model, FILES, tmp_path / output, batch_size=2, on_progress=kill_after(3))
        model.features = FeatureConfig(flat=True)
        with pytest.raises(ConfigError, match="flat=False, now True"):
            embed_files(model, FILES, tmp_path / output)
        other = random_model(TINY, seed=1)
        with pytest.raises(ConfigError, match="fingerprint="):
            embed_files(other, FILES, tmp_path / output)
        embed_files(model, FILES, tmp_path / output, overwrite=True)
        model.features = FeatureConfig()
    assert read_scenes(tmp_path / "out.npz")[1].shape == (len(FILES), 32)
    assert np.load(next((tmp_path / "out").rglob("*.npy"))).shape == (32,)


def test_outputs_are_not_replaced_unasked(tmp_path, model):
    embed_files(model, FILES[:1], tmp_path / "out.npz")
    with pytest.raises(ConfigError, match=r"out\.npz exists"):
        embed_files(model, FILES[:2], tmp_path / "out.npz")
    embed_files(model, FILES[:2], tmp_path / "out.npz", overwrite=True)
    assert len(read_scenes(tmp_path / "out.npz")[0]) == 2


@pytest.mark.parametrize(("output", "message"), [("out.csv", "unknown kind"), ("no/where.npz", "does not exist")])
def test_impossible_outputs(tmp_path, model, output, message):
    with pytest.raises(ConfigError, match=message):
        embed_files(model, FILES[:1], tmp_path / output)


def test_a_full_disk_keeps_what_was_done(tmp_path, model, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_A_PART", 0.0)
    write, calls = store_module.write_array, []

    def full_after_three(stream, pieces):
        calls.append(1)
        if len(calls) > 3:
            stream.write(b"the first bytes still fit")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(stream, pieces)

    monkeypatch.setattr(store_module, "write_array", full_after_three)
    with pytest.raises(OSError, match="No space left"):
        embed_files(model, FILES, tmp_path / "out.npz", batch_size=1)
    assert contents(tmp_path) == {"out.npz.partial"}
    assert not [p for p in (tmp_path / "out.npz.partial").iterdir() if p.name.startswith(".")]  # no half-written file
    monkeypatch.setattr(store_module, "write_array", write)
    assert embed_files(model, FILES, tmp_path / "out.npz").resumed == 3


def test_reading_back_something_else(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.parquet").write_text("not parquet")
    for name, message in [("other.npz", "not embeddings"), ("text.parquet", "not embeddings"), ("no.npz", "no such")]:
        with pytest.raises(ConfigError, match=message):
            read_scenes(tmp_path / name)


@pytest.mark.parametrize("clips_at_a_time", [1, 5, 2048])
def test_any_number_of_files_at_a_time(tmp_path, model, monkeypatch, clips_at_a_time):
    monkeypatch.setattr(module, "_CLIPS_AT_A_TIME", clips_at_a_time)
    summary = embed_files(model, [*FILES, tmp_path / "no.wav"], tmp_path / "out.npz")
    assert summary.embedded == len(FILES)
    assert list(summary.failed) == [tmp_path / "no.wav"]
    assert np.abs(read_scenes(tmp_path / "out.npz")[1] - model.encode(FILES)).max() <= 1e-5


def test_an_interruption_ends_the_threads(tmp_path, model, monkeypatch):
    monkeypatch.setattr(module, "_CLIPS_AT_A_TIME", 2)
    before = set(threading.enumerate())
    with pytest.raises(Killed):
        embed_files(model, FILES, tmp_path / "out.npz", on_progress=kill_after(1), pipeline=Pipeline(4))
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert set(threading.enumerate()) <= before


def test_a_profile_of_files(tmp_path, model):
    profile = Profile()
    embed_files(model, FILES, tmp_path / "out.npz", pipeline=Pipeline(2, profile))
    assert min(profile.seconds[name] for name in (OPENING, DECODING, ENCODER, WRITING)) > 0
    assert sum(profile.seconds.values()) - profile.seconds[DECODING] <= profile.wall_seconds()
    assert profile.windows >= len(FILES)


@pytest.mark.parametrize(("workers", "where"), [("0", "while waited for"), ("2", "in 2 threads besides")])
def test_the_profile_of_a_command(tmp_path, model, workers, where):
    model.save_pretrained(tmp_path / "model")
    command = [
        "embed",
        str(DATA),
        "-o",
        str(tmp_path / "out.npz"),
        "--model",
        str(tmp_path / "model"),
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, [*command, "--workers", workers, "--profile"])
    assert result.exit_code == 0
    for expected in (f"{len(FILES)} clips", "x real time", "encoder", where, "batches", "limited by"):
        assert expected in result.stdout
    quiet = CliRunner().invoke(app, [*command, "--overwrite"])
    assert "limited by" not in quiet.stdout
    assert CliRunner().invoke(app, [*command, "--workers", "-1"]).exit_code == 2


_PEAK_OF_TIMESTAMPS = """
import sys
from pathlib import Path
from m2d_embed import embed_files
from m2d_embed.m2d import M2D
from m2d_embed.runtime.profiling import peak_memory
model = M2D.from_pretrained(sys.argv[1])
embed_files(model, [Path(sys.argv[2])], Path(sys.argv[3]), "timestamps")
print(peak_memory() / 2**20)
"""


def test_long_timestamps_are_not_held_many_times(tmp_path):
    """Half an hour of wide timestamps: their own size twice at most, the second time in the file that is read back."""
    config = replace(TINY, embed_dim=256, depth=1)
    random_model(config).save_pretrained(tmp_path / "model")
    minute = (0.2 * np.random.default_rng(0).standard_normal(60 * 16_000)).astype(np.float32)
    peaks = {}
    for minutes in (2, 30):
        wav, out = tmp_path / f"{minutes}.wav", tmp_path / f"{minutes}.npz"
        with soundfile.SoundFile(wav, "w", 16_000, 1) as file:
            for _ in range(minutes):
                file.write(minute)
        command = [sys.executable, "-c", _PEAK_OF_TIMESTAMPS, *map(str, (tmp_path / "model", wav, out))]
        peaks[minutes] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows, width = np.load(tmp_path / "30.npz")["embeddings"].shape
    assert (rows, width) == (30 * 60 * 1000 // 160, 5 * 256)
    assert peaks[30] - peaks[2] < 2 * rows * width * 4 / 2**20  # MB


def test_settings_are_stored(tmp_path, model):
    embed_files(model, FILES[:1], tmp_path / "out.npz")
    settings = json.loads(str(np.load(tmp_path / "out.npz")["settings"]))
    assert settings["dim"] == 160
    assert settings["dtype"] == "float32"
