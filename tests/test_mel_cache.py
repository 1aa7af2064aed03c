"""The cache of log-mels: its numbers, going on after a stop, and what it refuses."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import DATA, TINY

from m2d_embed.audio import load_audio
from m2d_embed.errors import AudioError, ConfigError, TrainingError
from m2d_embed.frontend import LogMel
from m2d_embed.pretrain import mel_cache
from m2d_embed.pretrain.mel_cache import MelCache, build_cache
from m2d_embed.pretrain.sources import Item

RAW = LogMel(dataclasses.replace(TINY, norm_stats=(0.0, 1.0)))


@pytest.fixture
def items(tmp_path) -> list[Item]:
    """Eight real clips, one that is not audio and one that is not there."""
    files = []
    for number, file in enumerate(sorted(DATA.rglob("*.o[pg]*"))[:8]):
        files.append(tmp_path / "audio" / f"{number}{file.suffix}")
        files[-1].parent.mkdir(exist_ok=True)
        shutil.copy(file, files[-1])
    broken = tmp_path / "audio" / "broken.wav"
    broken.write_text("not audio")
    return [Item(file) for file in [*files[:3], broken, *files[3:], tmp_path / "audio" / "missing.wav"]]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(mel_cache, "_PART_FILES", 4)


def log_mel_of(file: Path) -> np.ndarray:
    return RAW(torch.from_numpy(load_audio(file, TINY.sample_rate))[None])[0, 0].numpy()


def test_the_cache_holds_the_log_mels(tmp_path, items):
    cache = build_cache(tmp_path / "cache", items, TINY, workers=0)
    assert len(cache) == len(items) == 10
    rng = np.random.default_rng(0)
    for index, item in enumerate(items):
        if str(item.file) in cache.unreadable:
            continue
        expected = log_mel_of(item.file)
        crop = cache.crop(index, 10**6, rng)
        assert crop.log_mel.dtype == np.float16
        assert crop.log_mel.shape == expected.shape
        np.testing.assert_allclose(crop.log_mel, expected, atol=0.01)
        assert (crop.start_seconds, crop.clip_seconds) == (0, pytest.approx(expected.shape[1] / 100))


def test_crops_are_stretches_from_everywhere(tmp_path, items):
    cache = build_cache(tmp_path / "cache", items[:1], TINY, workers=0)
    expected = log_mel_of(items[0].file)
    starts = set()
    rng = np.random.default_rng(0)
    for _ in range(400):
        crop = cache.crop(0, expected.shape[1] - 5, rng)
        start = round(crop.start_seconds * 100)
        starts.add(start)
        np.testing.assert_allclose(crop.log_mel, expected[:, start : start + expected.shape[1] - 5], atol=0.01)
    assert starts == set(range(6))


def test_bad_files_are_named(tmp_path, items):
    cache = build_cache(tmp_path / "cache", items, TINY, workers=0)
    assert {Path(name).name for name in cache.unreadable} == {"broken.wav", "missing.wav"}
    assert "not audio that can be read" in cache.unreadable[str(items[3].file)]
    for index, message in ((3, r"broken\.wav: not audio"), (9, r"missing\.wav: no such file")):
        with pytest.raises(AudioError, match=message):
            cache.crop(index, 64, np.random.default_rng(0))


def test_a_file_that_turns_out_bad_late_leaves_no_frames(tmp_path, items):
    samples = 0.1 * np.random.default_rng(0).standard_normal(600_000).astype(np.float32)
    samples[-1] = np.nan
    soundfile.write(tmp_path / "late.wav", samples, 16_000, subtype="FLOAT")
    late = Item(tmp_path / "late.wav")
    cache = build_cache(tmp_path / "cache", [items[0], late, items[1], late], TINY, workers=0)
    assert list(cache.unreadable) == [str(late.file)]
    crop = cache.crop(2, 10**6, np.random.default_rng(0))
    np.testing.assert_allclose(crop.log_mel, log_mel_of(items[1].file), atol=0.01)
    frames = sum(log_mel_of(item.file).shape[1] for item in items[:2])
    part = tmp_path / "cache" / "part-00000.npy"
    assert np.load(part).shape == (frames, 80)
    assert part.stat().st_size == 128 + frames * 80 * 2


def test_workers_build_the_same_cache(tmp_path, items):
    progress = []
    build_cache(tmp_path / "one", items, TINY, workers=0)
    build_cache(tmp_path / "two", items, TINY, workers=2, on_progress=lambda *counts: progress.append(counts))
    for file in (tmp_path / "one").glob("part-*"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert progress[0] == (0, 10)
    assert progress[-1] == (10, 10)
    assert progress == sorted(progress)


def test_a_stopped_build_goes_on(tmp_path, items, monkeypatch):
    """Killed in the second part: the first is kept, the rest is redone."""
    complete = build_cache(tmp_path / "complete", items, TINY, workers=0)
    append = mel_cache._append

    def die(stream, path, *rest):
        if path == str(items[6].file):
            stream.flush()
            raise KeyboardInterrupt
        return append(stream, path, *rest)

    monkeypatch.setattr(mel_cache, "_append", die)
    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        build_cache(folder, items, TINY, workers=0)
    assert sorted(f.name for f in folder.iterdir() if f.name.startswith("part")) == [
        "part-00000.json",
        "part-00000.npy",
        "part-00001.npy.partial",
    ]
    read = []
    monkeypatch.setattr(mel_cache, "_append", lambda *a: (read.append(a[1]), append(*a))[1])
    progress = []
    cache = build_cache(folder, items, TINY, workers=0, on_progress=lambda *counts: progress.append(counts))
    assert read == [str(item.file) for item in items[4:]]
    assert progress == [(4, 10), (8, 10), (10, 10)]
    for index in (0, 5, 6, 8):
        mine, other = (c.crop(index, 50, np.random.default_rng(1)).log_mel for c in (cache, complete))
        np.testing.assert_array_equal(mine, other)
    assert not list(folder.glob("*.partial"))


def test_a_process_that_is_killed(tmp_path, items, monkeypatch):
    monkeypatch.setattr(mel_cache, "start_worker", os.abort)
    with pytest.raises(TrainingError, match=r"cache: a process that built this cache ended early.*run it again"):
        build_cache(tmp_path / "cache", items, TINY, workers=2)


def test_a_finished_cache_is_not_computed_again(tmp_path, items, monkeypatch):
    build_cache(tmp_path / "cache", items, TINY, workers=0)
    monkeypatch.setattr(mel_cache, "_append", None)
    build_cache(tmp_path / "cache", items, TINY, workers=0)


def test_files_that_come_after_are_added(tmp_path, items, monkeypatch):
    """Only the part that had room is computed again, and it is so too if the process was killed before it began."""
    complete = build_cache(tmp_path / "complete", items, TINY, workers=0)
    folder = tmp_path / "cache"
    build_cache(folder, items[:6], TINY, workers=0)
    append = mel_cache._append

    def die(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(mel_cache, "_append", die)
    with pytest.raises(KeyboardInterrupt):
        build_cache(folder, items, TINY, workers=0)
    read = []
    monkeypatch.setattr(mel_cache, "_append", lambda *a: (read.append(a[1]), append(*a))[1])
    cache = build_cache(folder, items, TINY, workers=0)
    assert read == [str(item.file) for item in items[4:]]
    assert cache.unreadable == complete.unreadable
    assert len(cache) == 10
    for index in (0, 4, 6, 8):
        mine, other = (c.crop(index, 50, np.random.default_rng(1)).log_mel for c in (cache, complete))
        np.testing.assert_array_equal(mine, other)


def test_a_cache_reaches_workers_without_its_content(tmp_path, items):
    cache = build_cache(tmp_path / "cache", items, TINY, workers=0)
    expected = cache.crop(0, 30, np.random.default_rng(0))
    pickled = pickle.dumps(cache)
    assert len(pickled) < 5_000
    again: MelCache = pickle.loads(pickled)
    np.testing.assert_array_equal(again.crop(0, 30, np.random.default_rng(0)).log_mel, expected.log_mel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hop_length": 100}, "another front end: hop_length is 160 there, and 100 here"),
        ({"f_min": 20.0}, "another front end: f_min is 50.0 there, and 20.0 here"),
        ({"input_size": (64, 64)}, "another front end: mels is 80 there, and 64 here"),
    ],
)
def test_a_cache_of_another_front_end(tmp_path, items, change, message):
    build_cache(tmp_path / "cache", items[:2], TINY, workers=0)
    with pytest.raises(ConfigError, match=rf"cache: this cache is of {message}; choose another folder .*, or delete"):
        build_cache(tmp_path / "cache", items[:2], dataclasses.replace(TINY, **change), workers=0)


def test_another_window_uses_the_same_cache(tmp_path, items):
    build_cache(tmp_path / "cache", items[:2], TINY, workers=0)
    build_cache(tmp_path / "cache", items[:2], dataclasses.replace(TINY, input_size=(80, 208)), workers=0)


def test_a_cache_of_other_files(tmp_path, items):
    folder = tmp_path / "cache"
    build_cache(folder, items, TINY, workers=0)
    with pytest.raises(ConfigError, match="of other files: 10 there, and 9 here"):
        build_cache(folder, items[:-1], TINY, workers=0)
    with pytest.raises(ConfigError, match=r"in another order: .*0\.opus there where .*1\.opus is here"):
        build_cache(folder, [items[1], items[0], *items[2:]], TINY, workers=0)
    os.utime(items[2].file, (0, 0))
    with pytest.raises(ConfigError, match=r"another version of .*2\.opus"):
        build_cache(folder, items, TINY, workers=0)


def test_a_folder_of_something_else(tmp_path, items):
    with pytest.raises(ConfigError, match=r"audio: holds files, but no cache\.json"):
        build_cache(tmp_path / "audio", items, TINY, workers=0)
    with pytest.raises(ConfigError, match="cannot be written here"):
        build_cache(items[0].file / "cache", items, TINY, workers=0)


def test_a_damaged_index(tmp_path, items):
    folder = tmp_path / "cache"
    build_cache(folder, items, TINY, workers=0)
    (folder / "part-00001.json").write_text("{")
    with pytest.raises(ConfigError, match=r"part-00001\.json: this file of the cache cannot be read"):
        build_cache(folder, items, TINY, workers=0)
    (folder / "cache.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigError, match="format 99, not 1"):
        build_cache(folder, items, TINY, workers=0)


def test_a_script_without_a_main_guard_is_told(tmp_path, items):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from m2d_embed.config import ModelConfig\n"
        "from m2d_embed.pretrain import mel_cache\n"
        "from m2d_embed.pretrain.sources import Item\n"
        "mel_cache._PART_FILES = 4\n"
        f"items = [Item(file) for file in sorted(Path({str(items[0].file.parent)!r}).iterdir())]\n"
        f"mel_cache.build_cache(Path({str(tmp_path / 'cache')!r}), items, ModelConfig(), workers=2)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert 'starts training under if __name__ == "__main__"' in done.stderr.splitlines()[-1]
