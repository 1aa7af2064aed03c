"""The cache of log-mels: its numbers, going on after a stop, and what it refuses."""

import dataclasses
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

from m2d_embed.audio.clips import load_audio
from m2d_embed.errors import AudioError, ConfigError, TrainingError
from m2d_embed.jobs import arrays
from m2d_embed.model.frontend import LogMel
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
    (part,) = (tmp_path / "cache").glob("part-*.npy")
    assert np.load(part).shape == (frames, 80)
    assert part.stat().st_size == 128 + frames * 80 * 2


def test_workers_build_the_same_cache(tmp_path, items):
    progress = []
    build_cache(tmp_path / "one", items, TINY, workers=0)
    build_cache(tmp_path / "two", items, TINY, workers=2, on_progress=lambda *counts: progress.append(counts))
    one, two = (sorted(f.read_bytes() for f in (tmp_path / n).glob("part-*.npy")) for n in ("one", "two"))
    assert one == two and len(one) == 3
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
    assert sorted(f.suffix for f in folder.iterdir() if f.name.startswith("part")) == [".json", ".npy"]
    (folder / ".part-1.frames.npy.0123456789ab.partial").touch()  # as a kill leaves it
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
    """And nothing else is computed again; also if the process was killed before it began."""
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
    assert read == [str(item.file) for item in items[6:]]
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
        ({"hop_length": 100}, "hop_length=160, now 100"),
        ({"f_min": 20.0}, "f_min=50.0, now 20.0"),
        ({"input_size": (64, 64)}, "mels=80, now 64"),
    ],
)
def test_a_cache_of_another_front_end(tmp_path, items, change, message):
    build_cache(tmp_path / "cache", items[:2], TINY, workers=0)
    with pytest.raises(ConfigError, match=rf"cache is of a run with other settings \({message}\)"):
        build_cache(tmp_path / "cache", items[:2], dataclasses.replace(TINY, **change), workers=0)


def test_another_window_uses_the_same_cache(tmp_path, items):
    build_cache(tmp_path / "cache", items[:2], TINY, workers=0)
    build_cache(tmp_path / "cache", items[:2], dataclasses.replace(TINY, input_size=(80, 208)), workers=0)


def frames_of(cache, index):
    return cache.crop(index, 10**6, np.random.default_rng(0)).log_mel


def test_fewer_files_or_another_order(tmp_path, items, monkeypatch):
    whole = build_cache(tmp_path / "cache", items, TINY, workers=0)
    monkeypatch.setattr(mel_cache, "_append", None)  # nothing is computed
    other = build_cache(tmp_path / "cache", [items[5], items[0], items[5]], TINY, workers=0)
    for mine, theirs in ((0, 5), (1, 0), (2, 5)):
        np.testing.assert_array_equal(frames_of(other, mine), frames_of(whole, theirs))


@pytest.mark.parametrize("times", [None, (0, 0)])
def test_a_file_that_changed_is_computed_anew(tmp_path, items, caplog, times):
    """Whatever its new time is: an older file may take the place of a newer one."""
    build_cache(tmp_path / "cache", items, TINY, workers=0)
    shutil.copy(items[6].file, items[2].file)
    if times:
        os.utime(items[2].file, times)
    cache = build_cache(tmp_path / "cache", items, TINY, workers=0)
    np.testing.assert_array_equal(frames_of(cache, 2), frames_of(cache, 6))
    assert "1 files have changed since" in caplog.text


@pytest.mark.parametrize("harm", ["lost", "cut", "bit", "record"])
def test_a_lost_or_damaged_part_is_computed_anew(tmp_path, items, caplog, harm):
    cache = build_cache(tmp_path / "cache", items, TINY, workers=0)
    expected = [frames_of(cache, index) for index in (0, 1, 2, 4)]
    part = min((tmp_path / "cache").glob("part-*.npy"), key=lambda file: file.stat().st_mtime_ns)
    if harm == "record":
        next((tmp_path / "cache").glob("part-*.json")).write_text("{")
    elif harm == "lost":
        part.unlink()
    else:
        content = part.read_bytes()
        part.write_bytes(content[:-7] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    again = build_cache(tmp_path / "cache", items, TINY, workers=0)
    for index, frames in zip((0, 1, 2, 4), expected, strict=True):
        np.testing.assert_array_equal(frames_of(again, index), frames)
    assert "damaged" in caplog.text
    assert len(list((tmp_path / "cache").glob("part-*.json"))) == 3


def test_many_parts_take_few_open_files(tmp_path, items, monkeypatch):
    monkeypatch.setattr(mel_cache, "_PART_FILES", 1)
    cache = build_cache(tmp_path / "cache", [*items[:3], *items[4:9]] * 2, TINY, workers=0)
    monkeypatch.setattr(arrays, "_MOST_OPEN", 3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    expected = [frames_of(cache, index) for index in range(8)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    for index, frames in enumerate(expected):
        np.testing.assert_array_equal(frames_of(cache, index + 8), frames)


def test_a_folder_of_something_else(tmp_path, items):
    with pytest.raises(ConfigError, match=r"audio: holds other things, e\.g\. 0\.opus"):
        build_cache(tmp_path / "audio", items, TINY, workers=0)
    assert all(file.suffix in (".opus", ".oga", ".wav") for file in (tmp_path / "audio").iterdir())
    with pytest.raises(ConfigError, match="cannot be written here"):
        build_cache(items[0].file / "cache", items, TINY, workers=0)


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
