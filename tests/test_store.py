"""PartStore: what is there after a kill, what is verified, who may work, and with how many open files."""

import ctypes
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from m2d_embed import files
from m2d_embed.errors import ConfigError
from m2d_embed.files import atomic_write, write_json
from m2d_embed.jobs import arrays
from m2d_embed.jobs import index as index_module
from m2d_embed.jobs import store as module
from m2d_embed.jobs.arrays import ArrayReader
from m2d_embed.jobs.index import ABSENT, Index, hashes_of
from m2d_embed.jobs.outputs import _blocks
from m2d_embed.jobs.store import (
    BusyError,
    Entry,
    Located,
    PartStore,
    Record,
    key_of,
    stamp_of,
)

SETTINGS = {"model": "tiny", "fingerprint": "f00"}


def opened(folder, settings=SETTINGS):
    store = PartStore(folder, folder)
    folder.mkdir(exist_ok=True)
    store.open(settings)
    return store


def rows_like(number, rows=1):
    """Rows that tell which result they are of."""
    return np.full((rows, 3), number, np.float32) + np.arange(rows, dtype=np.float32)[:, None] / 1000


def add(store, *numbers, rows=1):
    store.add([Entry(f"k{n}", rows, (n, 1, 1)) for n in numbers], {"x": [rows_like(n, rows) for n in numbers]})


def contents(folder):
    return {file.name for file in folder.iterdir()}


def values(store, *numbers):
    with closing(ArrayReader()) as reader:
        return store.read("x", store.locate(f"k{n}" for n in numbers), reader)[:, 0].tolist()


def test_results_are_found_by_another_process(tmp_path):
    add(opened(tmp_path / "s"), 3, 1)
    add(opened(tmp_path / "s"), 2)
    store = opened(tmp_path / "s")
    assert values(store, 1, 2, 3) == [1, 2, 3]
    assert store.done("k3", (3, 1, 1))
    assert not store.done("k3", (3, 2, 1))
    assert not store.done("k3")
    assert not store.done("k4", (4, 1, 1))


def test_the_last_result_of_a_key_counts(tmp_path):
    store = opened(tmp_path / "s")
    add(store, 1)
    store.add([Entry("k1", 1, (9, 9, 9))], {"x": [rows_like(7)]})
    for seen in (store, opened(tmp_path / "s")):
        assert values(seen, 1) == [7]
        assert seen.done("k1", (9, 9, 9)) and not seen.done("k1", (1, 1, 1))


def test_the_last_result_counts_whatever_the_clocks_say(tmp_path, monkeypatch):
    add(opened(tmp_path / "s"), 1)
    monkeypatch.setattr(module.time, "time_ns", lambda: 1)  # a machine whose clock is behind
    opened(tmp_path / "s").add([Entry("k1", 1, (2, 2, 2))], {"x": [rows_like(5)]})
    assert values(opened(tmp_path / "s"), 1) == [5]


def test_only_what_others_have_made_since_is_read_again(tmp_path, caplog):
    mine, other = opened(tmp_path / "s"), opened(tmp_path / "s")
    add(mine, 1)
    mine.check()
    add(other, 2)
    for file in (tmp_path / "s").glob("*.npy"):
        harm(file, "bit")
    mine.check(known=mine.refresh())
    assert mine.has("k1") and not mine.has("k2")
    assert caplog.text.count("lost or damaged") == 1


def test_errors_are_kept_with_their_stamp(tmp_path):
    opened(tmp_path / "s").add([Entry("bad", 0, (1, 2, 3), "not audio"), Entry("k1", 1)], {"x": [rows_like(1)]})
    store = opened(tmp_path / "s")
    assert store.error_of("bad") == "not audio" and not store.attempted("bad", (1, 2, 4))
    assert store.attempted("bad", (1, 2, 3)) and not store.done("bad", (1, 2, 3))
    assert values(store, 1) == [1]


def harm(file, how):
    content = file.read_bytes()
    if how == "lost":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-5])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        at = len(content) - 5
        file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])


@pytest.mark.parametrize("how", ["lost", "cut", "empty", "bit"])
@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_lost_and_damaged_parts_do_not_count(tmp_path, caplog, how, suffix):
    store = opened(tmp_path / "s")
    add(store, 1, 2)
    first = {file.stem.partition(".")[0] for file in (tmp_path / "s").glob("part-*")}.pop()
    add(store, 3)
    harm(next((tmp_path / "s").glob(f"{first}*{suffix}")), how)
    again = opened(tmp_path / "s")
    again.check()
    assert [again.has(f"k{n}") for n in (1, 2, 3)] == [False, False, True]
    if (how, suffix) != ("lost", ".json"):
        assert "damaged" in caplog.text
    again.remove_unfinished()
    assert len(list((tmp_path / "s").glob("part-*"))) == 2  # those of the good one
    add(again, 1, 2)
    assert values(again, 3, 2, 1) == [3, 2, 1]


def test_only_the_parts_of_some_keys_are_read(tmp_path, monkeypatch):
    store = opened(tmp_path / "s")
    add(store, 1, 2)
    add(store, 3)
    read = []
    monkeypatch.setattr(module, "_size_and_crc", lambda file: read.append(file))
    store.check(["k2", "unknown"])
    assert len(read) == 1 and not store.has("k2") and store.has("k3")


def test_results_with_files_of_their_own_are_lost_alone(tmp_path):
    """As in a folder of results."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "b"):
        (out / name).write_text(name)
    store = PartStore(out / "store", out, data=out)
    store.folder.mkdir()
    store.open(SETTINGS)
    entries = [Entry("ka", 1, files=("a",)), Entry("kb", 1, files=("b",))]
    store.commit(store.new_name(), entries, [out / "a", out / "b"])
    (out / "b").unlink()
    store.check()
    assert store.has("ka") and not store.has("kb")
    (out / "b").write_text("new")
    store.commit(store.new_name(), [Entry("kb", 1, files=("b",))], [out / "b"])
    again = PartStore(out / "store", out, data=out)
    again.open(SETTINGS)
    again.check()  # the older record of b is of another content, but does not count any more
    assert again.has("ka") and again.has("kb")


def test_other_settings_are_refused(tmp_path):
    opened(tmp_path / "s", SETTINGS | {"_root": "here"})
    assert PartStore(tmp_path / "s", tmp_path).open(SETTINGS | {"_root": "there"})["_root"] == "here"
    for other in (SETTINGS | {"fingerprint": "f01"}, SETTINGS | {"new": 1}, {"model": "tiny"}):
        with pytest.raises(ConfigError, match="other settings"):
            opened(tmp_path / "s", other)
    for damaged in ("{", "{}", "[1]", ""):
        (tmp_path / "s" / "settings.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"settings\.json: damaged"):
            opened(tmp_path / "s")


def test_parts_of_unknown_settings_do_not_count(tmp_path):
    """As where a store was removed halfway: a run of other settings finds nothing of it."""
    add(opened(tmp_path / "s"), 1)
    (tmp_path / "s" / "settings.json").unlink()
    assert not opened(tmp_path / "s", SETTINGS | {"fingerprint": "f01"}).has("k1")
    assert contents(tmp_path / "s") == {"settings.json"}


def test_records_are_removed_before_anything_else(tmp_path, monkeypatch):
    store = opened(tmp_path / "s")
    add(store, 1)
    monkeypatch.setattr(module, "rmtree", lambda folder, ignore_errors: None)  # killed before it has begun
    store.remove()
    assert not [name for name in contents(tmp_path / "s") if name.endswith(".json")]


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "poetry.lock").touch()
    with pytest.raises(ConfigError, match=r"holds other things, e\.g\. poetry\.lock"):
        opened(tmp_path / "s")


def test_half_written_files_are_removed(tmp_path):
    store = opened(tmp_path / "s")
    add(store, 1)
    for name in ("part-77.x.npy", ".part-78.x.npy.0123456789ab.partial"):
        (tmp_path / "s" / name).touch()
    again = opened(tmp_path / "s")
    again.remove_unfinished()
    assert values(again, 1) == [1]
    assert len(list((tmp_path / "s").iterdir())) == 3


def test_who_may_work(tmp_path):
    mine, other = PartStore(tmp_path / "s", Path("out.npz")), PartStore(tmp_path / "s", Path("out.npz"))

    def refused(store, *share):
        with pytest.raises(BusyError, match=r"out\.npz: another run is at work on this"), store.claim(*share):
            pass

    with mine.claim():
        refused(other)
        refused(other, "1-of-2")
        with pytest.raises(BusyError):
            other.claim().__enter__()
    with mine.claim("1-of-2"):
        refused(other, "1-of-2")
        refused(other)
        with other.claim("2-of-2"):
            assert other.any_at_work("2-of-2")
        assert not mine.any_at_work("1-of-2")
    with other.claim():
        assert not other.any_at_work("all")


def test_a_store_that_is_removed_while_others_wait_for_its_lock(tmp_path):
    """Nobody is left with the lock of a file that has no name any more."""
    inside, most, errors = [], [], []

    def work():
        store = PartStore(tmp_path / "s", tmp_path)
        try:
            for _ in range(20):
                with store.exclusively():
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
                    store.remove()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(most) == 80 and max(most) == 1


def test_a_killed_process_leaves_no_claim(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from m2d_embed.jobs.store import PartStore\n"
        f"store = PartStore(Path({str(tmp_path / 's')!r}), Path('out'))\n"
        "with store.claim():\n    print('claimed', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"claimed\n"
    store = PartStore(tmp_path / "s", tmp_path)
    with pytest.raises(BusyError), store.claim():
        pass
    process.kill()
    process.wait()
    with store.claim():
        pass


def test_results_in_any_order_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_MOST_OPEN", 2)
    store = opened(tmp_path / "s")
    for part in range(30):
        add(store, *range(10 * part, 10 * part + 10), rows=2)
    order = np.random.default_rng(0).permutation(300).tolist()
    located = store.locate(f"k{n}" for n in order)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 6, limits[1]))
    try:
        with closing(ArrayReader()) as reader:
            whole = store.read("x", located, reader)
            some = store.read("x", Located(*(column[7:9] for column in located)), reader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert np.array_equal(whole, np.concatenate([rows_like(n, 2) for n in order]))
    assert np.array_equal(some, whole[14:18])


@pytest.mark.parametrize("most_rows", [1, 2, 3, 5, 7, 100])
def test_outputs_are_written_in_blocks(most_rows):
    located = Located(np.array([5, 6, 7, 8]), np.array([100, 200, 300, 400]), np.array([5, 1, 0, 4]))
    rows = []
    for first, block in _blocks(located, most_rows):
        assert 0 < block.rows.sum() <= most_rows
        for part, start, length in zip(*(column.tolist() for column in block), strict=True):
            assert part == located.parts[first]
            rows += [(part, start + i) for i in range(length)]
            first += 1
    assert rows == [(p, f + i) for p, f, n in zip(*(c.tolist() for c in located), strict=True) for i in range(n)]


def test_an_index_of_many_keys():
    """As a dictionary, whatever is set in whatever order."""
    index, expected = Index(), {}
    rng = np.random.default_rng(0)
    for _ in range(20):
        keys = [f"k{n}" for n in rng.integers(3000, size=500)]
        numbers = rng.integers(1 << 40, size=500)
        if rng.random() < 0.5:
            index.set_many(hashes_of(keys), numbers)
            expected |= dict(zip(keys, numbers.tolist(), strict=True))
        for key in (f"k{n}" for n in rng.integers(3000, size=100)):
            index.set(key, ABSENT)
            expected.pop(key, None)
        for key in (f"k{n}" for n in rng.integers(3000, size=100)):
            index.set(key, len(expected))
            expected[key] = len(expected)
        some = [f"k{n}" for n in range(0, 3000, 7)]
        assert [index.get(key) for key in some] == [expected.get(key, ABSENT) for key in some]
        if rng.random() < 0.5:
            assert index.find(some).tolist() == [expected.get(key, ABSENT) for key in some]
    assert Index().find(["a"]).tolist() == [ABSENT] and Index().get("a") == ABSENT


def test_hashes_that_end_in_zeros(monkeypatch):
    """numpy drops zeros at the end of its strings."""
    hashes = {"a": b"x" * 16, "b": b"x" * 15 + b"\0", "c": b"x" + b"\0" * 15, "d": b"\0" * 16, "e": b"y" * 16}
    monkeypatch.setattr(index_module, "_hash", hashes.__getitem__)
    index = Index()
    index.set_many(hashes_of("abcd"), np.arange(4))
    assert [index.get(key) for key in "abcde"] == index.find("abcde").tolist() == [0, 1, 2, 3, ABSENT]


def test_a_part_that_shrinks_is_no_silent_zero(tmp_path):
    store = opened(tmp_path / "s")
    add(store, 1, rows=4)
    harm(next((tmp_path / "s").glob("*.npy")), "cut")
    with pytest.raises(OSError, match="shorter than recorded"):
        values(store, 1)


def test_results_that_are_not_there_are_no_others(tmp_path):
    store = opened(tmp_path / "s")
    add(store, 1, 2)
    for ask in (lambda: store.locate(["k1", "k3"]), lambda: store.error_of("k3")):
        with pytest.raises(KeyError):
            ask()


@pytest.mark.parametrize("name", ["../precious", "/precious", "a/../../precious"])
def test_a_record_reaches_no_files_elsewhere(tmp_path, name):
    """One that came with somebody's folder must not make --overwrite remove other files."""
    (tmp_path / "precious").touch()
    store = opened(tmp_path / "s")
    record = Record("run", 1, [Entry("k", 1)], {name: (0, 0)})
    (tmp_path / "s" / "part-1.json").write_bytes(module._encode_record(record))
    assert store.record("part-1") is None
    store.forget_everything()
    assert (tmp_path / "precious").exists()
    assert not (tmp_path / "s" / "part-1.json").exists()


def test_stamps(tmp_path):
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_text("old")
    other.write_text("new")
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    before = stamp_of(file)
    shutil.copy2(other, file)  # the same size, time and inode: nobody can tell
    assert stamp_of(file) == before
    other.replace(file)  # the same size and time
    assert stamp_of(file) != before
    assert stamp_of(tmp_path / "no") == stamp_of("\0") == (-2, 0, 0)
    assert key_of("x/../a") == str(Path.cwd() / "a")


# --- atomic_write -----------------------------------------------------------------------------------------------------


def test_a_file_is_there_when_it_is_whole(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"ä": 1})
    assert json.loads(file.read_text(encoding="utf-8")) == {"ä": 1}
    with pytest.raises(RuntimeError), atomic_write(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert json.loads(file.read_text(encoding="utf-8")) == {"ä": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_name_that_is_no_utf_8_is_written(tmp_path):
    names = {"files": [os.fsdecode(b"/caf\xe9.wav"), "ä.wav"]}
    write_json(tmp_path / "a.json", names)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == names


def test_the_longest_name_is_written(tmp_path):
    write_json(tmp_path / ("a" * 255), 1)
    assert contents(tmp_path) == {"a" * 255}


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files, "sync", lambda path: done.append((path.name, (tmp_path / "a").exists())))
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("x")
    assert [(name.startswith("."), there) for name, there in done] == [(True, False), (False, True)]


def test_two_writers_do_not_disturb_each_other(tmp_path):
    with atomic_write(tmp_path / "a") as one, atomic_write(tmp_path / "a") as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 1


def test_others_may_read_it_as_usual(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "a") as partial:
        partial.unlink()
        partial.touch(mode=0o600)  # as some libraries do
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("count", [2, files._MANY])
def test_many_files_are_there_when_all_are_whole(tmp_path, count):
    within = tmp_path / "within"
    names = [tmp_path / f"folder {number % 2}" / f"{number}.npy" for number in range(count)]
    for name in names[:2]:
        name.parent.mkdir()
    within.mkdir()

    def write(text):
        for name in names:
            new_file(name).write_text(text)

    with pytest.raises(RuntimeError), files.atomic_writes(within) as new_file:
        write("half")
        raise RuntimeError
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with files.atomic_writes(within) as new_file:
        write("whole")
        assert not any(name.exists() for name in names)
    assert [name.read_text() for name in names] == ["whole"] * count
    assert not [*within.iterdir()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere files are written to the disk one by one")
def test_many_files_that_do_not_get_to_the_disk_have_no_names(tmp_path, monkeypatch):
    class Failing:
        @staticmethod
        def syncfs(descriptor):
            assert Path(f"/proc/self/fd/{descriptor}").resolve().parent == tmp_path
            ctypes.set_errno(errno.EIO)
            return -1

    monkeypatch.setattr(files, "_LIBC", Failing)
    with pytest.raises(OSError, match="Input/output error"), files.atomic_writes(tmp_path) as new_file:
        for number in range(files._MANY):
            new_file(tmp_path / str(number)).write_text("x")
    assert not [*tmp_path.iterdir()]
