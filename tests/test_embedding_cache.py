"""Embeddings kept on disk: what is found again, and what is not."""

import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, TINY, random_model

from m2d_embed.audio.clips import Clip
from m2d_embed.config import FeatureConfig
from m2d_embed.errors import AudioError
from m2d_embed.evaluate import embedding_cache
from m2d_embed.evaluate.embedding_cache import default_cache, embed_cached, hash_files
from m2d_embed.jobs.settings import fingerprint
from m2d_embed.jobs.store import Entry, PartStore


@pytest.fixture
def clips(tmp_path) -> list[Path]:
    (tmp_path / "clips").mkdir()
    return [Path(shutil.copy(file, tmp_path / "clips")) for file in sorted((DATA / "digits").glob("*.opus"))]


@pytest.fixture
def embedded(monkeypatch):
    """The files that were really embedded."""
    seen = []

    def spy(model, clips, features, batch_size):
        seen.extend(clip.name for clip in clips if isinstance(clip, Clip))
        return encode(model, clips, features, batch_size)

    encode = embedding_cache.encode_scenes
    monkeypatch.setattr(embedding_cache, "encode_scenes", spy)
    return seen


def embed(model, files, cache):
    return embed_cached(model, files, hash_files(files), cache=cache)


def shards(cache):
    return sorted(cache.glob("*/*.npy"))


def test_second_time_nothing_is_embedded(tiny, clips, tmp_path, embedded):
    first = embed(tiny, clips, tmp_path / "cache")
    assert len(embedded) == 6 and first.dtype == np.float32
    assert np.abs(first - tiny.encode(clips)).max() <= 1e-5
    second = embed(tiny, clips[::-1], tmp_path / "cache")
    assert len(embedded) == 6
    assert np.array_equal(second, first[::-1])
    assert {file.suffix for file in (tmp_path / "cache").rglob("*") if file.is_file()} == {".npy", ".json"}


def test_a_renamed_file_is_found_and_a_changed_one_is_not(tiny, clips, tmp_path, embedded):
    first = embed(tiny, clips, tmp_path / "cache")
    moved = [file.rename(file.with_name(f"new-{file.name}")) for file in clips]
    shutil.copy(moved[1], moved[0])
    second = embed(tiny, moved, tmp_path / "cache")
    assert len(embedded) == 6
    assert np.array_equal(second[0], first[1]) and np.array_equal(second[1:], first[1:])
    shutil.copy(DATA / "sounds" / "bell.oga", moved[3])
    third = embed(tiny, moved, tmp_path / "cache")
    assert embedded[6:] == [str(moved[3])]
    assert not np.array_equal(third[3], second[3])


def test_files_of_the_same_content_are_embedded_once(tiny, clips, tmp_path, embedded):
    copy = Path(shutil.copy(clips[0], tmp_path / "copy.opus"))
    result = embed(tiny, [*clips, copy], tmp_path / "cache")
    assert len(embedded) == 6 and np.array_equal(result[0], result[6])


def test_what_a_model_is_known_by(tiny):
    def model_key(model):
        return fingerprint(model, "scene")

    key = model_key(tiny)
    assert key == model_key(random_model(TINY))
    assert key != model_key(random_model(TINY, seed=1))
    assert key != model_key(random_model(TINY, features=FeatureConfig(flat=True)))
    assert key != model_key(random_model(TINY, features=FeatureConfig(layers=(1,))))
    assert key == model_key(random_model(TINY, features=FeatureConfig(hop_ms=40)))  # of timestamps only
    assert key != model_key(random_model(TINY).set_dtype(torch.bfloat16))
    other = random_model(TINY)
    with torch.no_grad():
        list(other.parameters())[-1].view(-1)[-1] += 1e-3
    assert key != model_key(other)


def test_another_model_is_embedded_anew(tiny, clips, tmp_path, embedded):
    first = embed(tiny, clips, tmp_path / "cache")
    second = embed(random_model(TINY, seed=1), clips, tmp_path / "cache")
    assert len(embedded) == 12 and not np.allclose(first, second)


@pytest.mark.parametrize("harm", ["cut", "bit", "text", "empty", "other"])
def test_damaged_shards_are_embedded_again(tiny, clips, tmp_path, embedded, caplog, harm):
    cache = tmp_path / "cache"
    first = embed(tiny, clips, cache)
    (shard,) = shards(cache)
    content = shard.read_bytes()
    if harm == "other":
        content = content.replace(b"<f4", b"<i4")
    damaged = {
        "cut": content[:-9],
        "bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "text": b"text",
        "empty": b"",
        "other": content,
    }
    shard.write_bytes(damaged[harm])
    with caplog.at_level(logging.WARNING, "m2d_embed"):
        assert np.allclose(embed(tiny, clips, cache), first, atol=1e-6)
    assert len(embedded) == 12
    assert f"lost or damaged, so 6 results are made anew ({shard.name})" in caplog.text
    assert len(list(cache.glob("*/*.json"))) == 1
    assert np.allclose(embed(tiny, clips, cache), first, atol=1e-6)
    assert len(embedded) == 12


def test_a_shard_every_few_hundred_clips(tiny, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_cache, "_CLIPS_A_PART", 4)
    embed(tiny, clips, tmp_path / "cache")
    assert len(shards(tmp_path / "cache")) == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_keeps_what_it_embedded(tmp_path, how):
    random_model(TINY).save_pretrained(tmp_path / "model")
    code = f"""
import time
from pathlib import Path
from m2d_embed.m2d import M2D
from m2d_embed.evaluate import embedding_cache as c
encode = c.encode_scenes
def slowly(*args):
    for i, result in enumerate(encode(*args)):
        if i == 5:
            print("five", flush=True)
            time.sleep(60)
        yield result
c.encode_scenes, c._CLIPS_A_PART = slowly, 3
files = sorted(Path({str(DATA)!r}).rglob("*.o*"))
model = M2D.from_pretrained({str(tmp_path / "model")!r})
c.embed_cached(model, files, c.hash_files(files), batch_size=1, cache=Path({str(tmp_path / "cache")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"five\n"
    process.send_signal(how)
    process.communicate(timeout=60)
    kept = 0
    for shard in shards(tmp_path / "cache"):
        kept += len(np.load(shard))
    assert kept == (3 if how == signal.SIGKILL else 5)


def test_several_runs_at_once(tiny, clips, tmp_path):
    results = []
    models = [random_model(TINY) for _ in range(3)]
    threads = [
        threading.Thread(target=lambda model: results.append(embed(model, clips, tmp_path / "cache")), args=[model])
        for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(np.allclose(result, results[0], atol=1e-6) for result in results)
    assert np.allclose(embed(tiny, clips, tmp_path / "cache"), results[0], atol=1e-6)


def test_bad_files_are_all_named_and_the_others_kept(tiny, clips, tmp_path, embedded):
    bad = [tmp_path / "text.wav", tmp_path / "cut.opus", tmp_path / "again.wav"]
    bad[0].write_text("text")
    bad[1].write_bytes(clips[0].read_bytes()[:300])
    bad[2].write_text("text")
    with pytest.raises(AudioError, match="3 of 9 files cannot be embedded:") as error:
        embed(tiny, [*clips, *bad], tmp_path / "cache")
    for file in bad:
        assert str(file) in str(error.value)
    before = len(embedded)
    embed(tiny, clips, tmp_path / "cache")
    assert len(embedded) == before
    with pytest.raises(AudioError, match="3 of 9 files cannot be embedded:"):  # those in the cache count, too
        embed(tiny, [*clips, *bad], tmp_path / "cache")
    with pytest.raises(AudioError, match=r"1 of 2 files cannot be embedded:\n  .*gone.wav: cannot be opened"):
        hash_files([clips[0], tmp_path / "gone.wav"])


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tiny, clips, tmp_path, caplog):
    (tmp_path / "cache").touch()
    with caplog.at_level(logging.WARNING, "m2d_embed"):
        result = embed(tiny, clips, tmp_path / "cache")
    assert result.shape == (6, tiny.scene_embedding_size)
    assert "embeddings cannot be kept there" in caplog.text


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("M2D_EMBED_CACHE", str(tmp_path))
    assert default_cache() == tmp_path / "embeddings"
    monkeypatch.delenv("M2D_EMBED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "m2d-embed" / "embeddings"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "m2d-embed" / "embeddings"


def test_many_shards_are_read_soon(tiny, clips, tmp_path):
    folder = tmp_path / "cache" / fingerprint(tiny, "scene")
    folder.mkdir(parents=True)
    store = PartStore(folder, folder)
    for i in range(200):
        rows = np.zeros((20, tiny.scene_embedding_size), np.float32)
        store.add([Entry(f"{i}-{j}", 1) for j in range(20)], {"embeddings": [rows]})
    started = time.process_time()
    embed(tiny, clips, tmp_path / "cache")
    assert time.process_time() - started < 5
