"""Embedding with Ray Data on a small local cluster: what is written, resuming, lost workers and a lost caller."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import DATA, TINY, random_model

import m2d_embed.jobs.on_ray as module
from m2d_embed.audio.clips import load_audio
from m2d_embed.config import FeatureConfig
from m2d_embed.errors import AudioError, ConfigError, M2DEmbedError, UnsupportedError
from m2d_embed.jobs.embed import Summary
from m2d_embed.jobs.on_ray import Actors, embed_dataset
from m2d_embed.jobs.outputs import read_scenes
from m2d_embed.jobs.settings import job_settings
from m2d_embed.jobs.store import Entry, PartStore, stamp_of

pytest.importorskip("ray", reason="needs the extra 'ray'")
pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="finds Ray's processes in /proc")

FILES = sorted(DATA.glob("*/*.o*"))
ONE = Actors(number=1)


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        import ray

        context = ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
        yield context
        ray.shutdown()


@pytest.fixture(scope="module")
def model():
    return random_model(TINY)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The name of the model."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


def rows_of(folder: Path) -> dict[str, dict]:
    """Rows by file; fails if a file is there twice."""
    rows = pq.read_table(folder).to_pylist()
    by_file = {row["file"]: row for row in rows}
    assert len(by_file) == len(rows)
    return by_file


def assert_complete(folder: Path, files: list[Path], model) -> None:
    rows = rows_of(folder)
    assert rows.keys() == {str(file) for file in files}
    got = np.array([rows[str(file)]["embedding"] for file in files])
    assert np.abs(got - model.encode(files)).max() <= 1e-5


def copies(folder: Path, count: int) -> list[Path]:
    """Many clips, of different content."""
    folder.mkdir()
    samples = load_audio(FILES[0], 16_000)
    for i in range(count):
        soundfile.write(folder / f"{i:03}.wav", np.roll(samples, 97 * i), 16_000)
    return sorted(folder.iterdir())


def is_ours(pid: int) -> bool:
    """Whether a process descends from this one."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def actors_at_work() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"MapBatches(_Embedder)" in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue  # it has ended meanwhile
    return [pid for pid in found if is_ours(pid)]


def wait_until_actors_are_gone() -> None:
    deadline = time.monotonic() + 60
    while actors_at_work():
        assert time.monotonic() < deadline, "an actor lives on"
        time.sleep(0.1)


def test_files(cluster, model, saved, tmp_path):
    """The whole life of an output: made, found done, after a change, with other settings."""
    files = copies(tmp_path / "in", 12)
    files[3].write_text("not audio")
    out = tmp_path / "out"
    made = embed_dataset(tmp_path / "in", out, saved, clips_per_part=5, actors=ONE)
    assert (made.embedded, made.resumed, set(made.failed)) == (11, 0, {files[3]})
    assert "not audio that can be read" in str(made.failed[files[3]])
    rows = rows_of(out)
    assert rows.keys() == {str(file) for file in files}
    assert rows[str(files[3])]["embedding"] is None
    assert "not audio" in rows[str(files[3])]["error"]
    good = [file for file in files if file != files[3]]
    assert all(rows[str(file)]["error"] is None for file in good)
    assert np.abs(np.array([rows[str(f)]["embedding"] for f in good]) - model.encode(good)).max() <= 1e-5
    written = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert len(written) == 4  # for one actor to be done with one after the other
    schema = pq.read_schema(out / min(written))
    assert json.loads(schema.metadata[b"m2d_embed"]) == job_settings(model, "scene") | {"root": str(Path.cwd())}
    assert schema.names == ["file", "embedding", "error"]

    found = embed_dataset([tmp_path / "in"], out, saved, actors=ONE)
    assert (found.embedded, found.resumed, set(found.failed)) == (0, 11, {files[3]})
    with pytest.raises(AudioError, match="not audio"):
        embed_dataset([tmp_path / "in"], out, saved, actors=ONE, on_error="raise")
    with pytest.raises(ConfigError, match="kind='scene', now 'timestamps'"):
        embed_dataset(files, out, saved, kind="timestamps", actors=ONE)
    with pytest.raises(ConfigError, match="which is not among the files"):
        embed_dataset(files[1:], out, saved, actors=ONE)
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")} == written

    shutil.copy(FILES[1], files[3])
    new = tmp_path / "in" / "new.wav"
    shutil.copy(FILES[2], new)
    changed = embed_dataset(tmp_path / "in", out, saved, clips_per_part=5, actors=ONE)
    assert (changed.embedded + changed.resumed, changed.failed) == (13, {})
    assert changed.resumed == 9  # three parts
    assert_complete(out, [*files, new], model)
    names, embeddings, _ = read_scenes(out)
    assert np.abs(embeddings - model.encode(names)).max() <= 1e-5

    import pandas
    import ray

    assert len(pandas.read_parquet(out)) == 13
    assert ray.data.read_parquet(str(out)).count() == 13


def test_a_dataset_of_samples_keeps_its_columns(cluster, model, saved, tmp_path):
    import ray

    samples = [load_audio(file, 16_000) for file in FILES[:5]]
    rows = [
        {"audio": s, "sample_rate": 16_000, "label": label, "n": i}
        for i, (s, label) in enumerate(zip(samples, "abcde", strict=True))
    ]
    rows[2]["audio"] = np.full(400, np.nan, np.float32)
    dataset = ray.data.from_items(rows, override_num_blocks=2)
    features = FeatureConfig(hop_ms=40)
    out = tmp_path / "out"
    arguments = (dataset, out, saved)
    settings = {"kind": "timestamps", "features": features, "clips_per_part": 2, "actors": ONE}
    made = embed_dataset(*arguments, **settings)
    assert (made.embedded, made.resumed, len(made.failed)) == (4, 0, 1)
    assert "NaN" in str(*made.failed.values())
    table = pq.read_table(out).sort_by([("n", "ascending"), ("timestamp_ms", "ascending")])
    assert table.column_names == ["sample_rate", "label", "n", "timestamp_ms", "embedding", "error"]
    tuned = random_model(TINY, features=features)
    for i, label in enumerate("abcde"):
        part = table.filter(pc.equal(table["n"], i))
        assert set(part["label"].to_pylist()) == {label}
        if i == 2:
            assert part["embedding"].to_pylist() == part["timestamp_ms"].to_pylist() == [None]
            continue
        (expected,) = tuned.encode_timestamps([samples[i]])
        assert part["timestamp_ms"].to_pylist() == expected.timestamps.tolist()
        assert np.abs(np.array(part["embedding"].to_pylist()) - expected.embeddings.numpy()).max() <= 1e-5

    found = embed_dataset(*arguments, **settings)
    assert (found.embedded, found.resumed, len(found.failed)) == (0, 4, 1)
    with pytest.raises(ConfigError, match="clips_per_part=2, now 3"):
        embed_dataset(*arguments, **settings | {"clips_per_part": 3})
    with pytest.raises(ConfigError, match="did not give this time"):
        embed_dataset(dataset.limit(2), *arguments[1:], **settings)
    with pytest.raises(ConfigError, match="needs a column 'file' or 'audio'; it has x"):
        embed_dataset(ray.data.from_items([{"x": 1}]), tmp_path / "other", saved, actors=ONE)
    with pytest.raises(ConfigError, match="'error' already"):
        embed_dataset(ray.data.from_items([{"file": "a", "error": ""}]), tmp_path / "other", saved, actors=ONE)


def test_the_first_bad_clip_ends_the_run_if_asked_for(cluster, model, saved, tmp_path):
    files = copies(tmp_path / "in", 60)
    files[0].write_text("not audio")
    out = tmp_path / "out"
    with pytest.raises(AudioError, match=r"000\.wav: not audio"):
        embed_dataset(files, out, saved, clips_per_part=1, actors=ONE, on_error="raise")
    wait_until_actors_are_gone()
    assert len(list(out.glob("*.parquet"))) < 60
    shutil.copy(FILES[1], files[0])
    done = embed_dataset(files, out, saved, clips_per_part=1, actors=ONE, on_error="raise")
    assert done.embedded + done.resumed == 60
    assert_complete(out, files, model)


def test_rows_that_are_there_twice(cluster, saved, tmp_path):
    import ray

    dataset = ray.data.from_items([{"file": str(FILES[0])}] * 2, override_num_blocks=2)
    with pytest.raises(ConfigError, match="the same rows twice"):
        embed_dataset(dataset, tmp_path / "out", saved, clips_per_part=1, actors=ONE)


CALL = """
import sys, ray
from m2d_embed.jobs.on_ray import Actors, embed_dataset
ray.init(address=sys.argv[1], log_to_driver=False, include_dashboard=False)
embed_dataset(sys.argv[2], sys.argv[3], sys.argv[4], clips_per_part=1, actors=Actors(number=1))
"""


def start_call(cluster, *arguments) -> subprocess.Popen:
    """Another process that calls ``embed_dataset`` on this cluster."""
    command = [sys.executable, "-c", CALL, cluster.address_info["gcs_address"], *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_parts(out: Path, is_running: Callable[[], bool]) -> None:
    while len(list(out.glob("_m2d_embed/part-*.json"))) < 3:
        assert is_running(), "finished before it could be disturbed"
        time.sleep(0.01)


def test_a_lost_worker_is_replaced(cluster, model, saved, tmp_path):
    files = copies(tmp_path / "in", 80)
    wait_until_actors_are_gone()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(embed_dataset, files, tmp_path / "out", saved, clips_per_part=1, actors=ONE)
        wait_for_parts(tmp_path / "out", lambda: not call.done())
        (actor,) = actors_at_work()
        os.kill(actor, signal.SIGKILL)
        assert not call.done()
        assert call.result(timeout=120) == Summary(embedded=80, resumed=0, failed={})
    assert_complete(tmp_path / "out", files, model)


def test_a_lost_caller_goes_on(cluster, model, saved, tmp_path):
    files = copies(tmp_path / "in", 80)
    process = start_call(cluster, tmp_path / "in", tmp_path / "out", saved)
    wait_for_parts(tmp_path / "out", lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = embed_dataset(tmp_path / "in", tmp_path / "out", saved, actors=ONE)
    assert done.resumed >= 3
    assert done.embedded > 0
    assert done.embedded + done.resumed == 80
    assert_complete(tmp_path / "out", files, model)


def test_what_cannot_be(cluster, saved, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    out = tmp_path / "out"
    cases = [
        ((FILES, tmp_path / "taken"), {}, ConfigError, "holds other things"),
        ((FILES, tmp_path / "taken" / "notes.txt"), {}, ConfigError, "is a file"),
        ((FILES, tmp_path / "no" / "out"), {}, ConfigError, "does not exist"),
        ((FILES, "s3://bucket/out"), {}, UnsupportedError, "URLs are not supported"),
        (([tmp_path / "no.wav"], out), {}, AudioError, "no such file"),
        ((FILES, out), {"actors": Actors(gpus=64)}, ConfigError, "no machine has cpus=1 and gpus=64"),
        ((FILES, out), {"model": "m2d_vit_bsae"}, M2DEmbedError, "known model"),
        ((FILES, out), {"dtype": "fp8"}, ConfigError, "dtype"),
        ((FILES, out), {"on_error": "skip"}, ConfigError, "on_error"),
        ((FILES, out), {"kind": "scenes"}, ConfigError, "kind is"),
        ((FILES, out), {"clips_per_part": 0}, ConfigError, "clips_per_part"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            embed_dataset(*arguments, **{"model": saved, "actors": ONE} | options)
    for wrong in ({"number": 0}, {"cpus": 0}, {"gpus": -1}):
        with pytest.raises(ConfigError):
            Actors(**wrong)


def an_actor(saved, folder: Path, **job) -> module._Embedder:
    """An actor in this process."""
    (folder / "_m2d_embed").mkdir(parents=True, exist_ok=True)
    settings = {"kind": "scene", "features": FeatureConfig(), "dtype": None, "batch_size": 8, "actors": ONE} | job
    made = module._Job(folder, saved, run="now", root=str(Path.cwd()), **settings)
    return module._Embedder(replace(made, settings=job_settings(made.load_model(), made.kind)))


def said_by(actor, batch) -> dict:
    return json.loads(actor(pa.table(batch))["done"][0].as_py())


def recorded_of(actor, part):
    return PartStore(actor.job.output / "_m2d_embed", actor.job.output, data=actor.job.output).record(part)


def test_rows_of_a_part_keep_their_order(saved, tmp_path):
    (tmp_path / "bad.wav").write_text("not audio")
    files = [str(file) for file in (FILES[6], tmp_path / "bad.wav", FILES[0], FILES[8])]
    actor = an_actor(saved, tmp_path / "out")
    part = said_by(actor, {"file": files, "label": ["a", "b", None, "d"]})["part"]
    entries = recorded_of(actor, part).entries
    assert [entry.key for entry in entries] == files
    assert [bool(entry.error) for entry in entries] == [False, True, False, False]
    assert [entry.stamp for entry in entries] == [stamp_of(file) for file in files]
    table = pq.read_table(tmp_path / "out" / f"{part}.parquet")
    assert table["file"].to_pylist() == files
    assert table["label"].to_pylist() == ["a", "b", None, "d"]
    embeddings = table["embedding"].to_pylist()
    assert embeddings.pop(1) is None
    assert np.abs(np.array(embeddings) - actor.model.encode([files[0], *files[2:]])).max() <= 1e-5


def test_a_part_that_is_there_is_not_made_again(saved, tmp_path):
    actor = an_actor(saved, tmp_path)
    batch = {"file": [str(file) for file in FILES[:2]]}
    first = said_by(actor, batch)
    written = (tmp_path / f"{first['part']}.parquet").stat()
    assert said_by(actor, batch) == first
    assert (tmp_path / f"{first['part']}.parquet").stat() == written
    assert {p.name for p in (tmp_path / "_m2d_embed").iterdir()} == {f"{first['part']}.json"}


def test_long_timestamps_are_written_as_they_come(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BYTES_A_WRITE", 2000)
    actor = an_actor(saved, tmp_path, kind="timestamps")
    (tmp_path / "bad.wav").write_text("not audio")
    files = [str(file) for file in [*FILES, tmp_path / "bad.wav"]]
    said_by(actor, {"file": files})
    (part,) = tmp_path.glob("*.parquet")
    assert pq.ParquetFile(part).num_row_groups > 3
    table = pq.read_table(part)
    assert set(table["file"].to_pylist()) == set(files)
    for file, expected in zip(FILES, actor.model.encode_timestamps(FILES), strict=True):
        mine = table.filter(pc.equal(table["file"], str(file)))
        assert mine["timestamp_ms"].to_pylist() == expected.timestamps.tolist()
        assert np.abs(np.array(mine["embedding"].to_pylist()) - expected.embeddings.numpy()).max() <= 1e-5


def test_a_full_disk_is_told(saved, tmp_path, monkeypatch):
    def write(*arguments):
        raise OSError(28, "No space left on device")

    actor = an_actor(saved, tmp_path)
    monkeypatch.setattr(actor, "_write", write)
    assert "No space left on device; what is done is kept" in said_by(actor, {"file": [str(FILES[0])]})["error"]


def test_clips_that_cost_worker_after_worker_are_given_up(saved, tmp_path, monkeypatch):
    class Lost(BaseException):
        pass

    def lose(*arguments):
        raise Lost

    actor = an_actor(saved, tmp_path)
    batch = {"file": [str(FILES[0])]}
    with monkeypatch.context() as patch:
        patch.setattr(actor, "_write", lose)
        for _ in range(4):
            with pytest.raises(Lost):
                actor(pa.table(batch))
    error = said_by(actor, batch)["error"]
    assert "4 workers were lost" in error
    assert str(FILES[0]) in error


def test_another_model_of_the_same_name_is_refused(saved, tmp_path):
    actor = an_actor(saved, tmp_path)
    random_model(TINY, seed=1).save_pretrained(tmp_path / "other")
    other = module._Embedder(replace(actor.job, model=str(tmp_path / "other")))
    assert "not the same model on every machine (fingerprint)" in said_by(other, {"file": [str(FILES[0])]})["error"]
    assert not list(tmp_path.glob("*.parquet"))


def test_names_that_cannot_be_written_down(tmp_path):
    bad = tmp_path / os.fsdecode(b"\xff.wav")
    shutil.copy(FILES[0], bad)
    with pytest.raises(AudioError, match="not valid UTF-8"):
        embed_dataset([bad], tmp_path / "out")


def test_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UnsupportedError, match=r"m2d-embed\[ray\]"):
        embed_dataset(FILES, tmp_path / "out")


def test_halves_of_a_killed_run_are_removed(tmp_path):
    """A part without a record would be there twice; and nobody else may write meanwhile."""
    folder = module._OutputFolder(tmp_path / "out", "run")
    with folder.store.claim():
        folder.begin({"kind": "scene"}, overwrite=False)
        for name in ("part-a.parquet", "part-b.parquet", "_m2d_embed/.part-c.parquet.0123456789ab.partial"):
            (folder.path / name).write_text("{}")
        folder.store.commit("part-a", [Entry("a", 1)], [folder.path / "part-a.parquet"])
        folder.begin({"kind": "scene"}, overwrite=False)
        again = module._OutputFolder(folder.path, "other")
        with pytest.raises(ConfigError, match="another run is at work"), again.store.claim():
            pass
    assert {p.name for p in folder.path.iterdir()} == {"part-a.parquet", "_m2d_embed"}
    assert not list(folder.store.folder.glob(".*.partial"))
    with folder.store.claim():
        folder.begin({"kind": "timestamps"}, overwrite=True)
    assert {p.name for p in folder.path.iterdir()} == {"_m2d_embed"}


def test_parts_are_told_apart_by_all_that_is_in_their_rows():
    def digest(**columns):
        return module._Batch(pa.table(columns), 16_000, "").digest

    file = str(FILES[0])
    assert digest(file=[file], label=["a"]) == digest(file=[file], label=["a"])
    assert digest(file=[file], label=["a"]) != digest(file=[file], label=["b"])
    assert digest(file=[file]) != digest(file=[str(FILES[1])])
    long = [[0.0] * 2000, [0.0] * 1999 + [1.0]]
    assert digest(audio=long[:1]) != digest(audio=long[1:])
    assert digest(audio=long[:1], sample_rate=[8000]) != digest(audio=long[:1], sample_rate=[16_000])
