"""Long jobs as their users meet them: two at once, lost and torn files, replaced sounds, other settings, full disks."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import DATA, TINY, random_model
from interruptions import (
    OPEN_FILES,
    Clip,
    assert_same,
    command,
    end_of,
    kill_at_work,
    leftovers,
    read_output,
    shorten_parts,
    start,
    wait_for_changes,
    write_clips,
)
from interruptions import run as run_process
from test_cli import Result
from test_cli import run as run_here

from m2d_embed.jobs.embed import embed_files
from m2d_embed.m2d import M2D

OUTPUTS = ["out.parquet", "out.npz", "out"]
EARLIER = "by an earlier run"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    random_model(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model) -> M2D:
    return M2D.from_pretrained(model)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    return write_clips(tmp_path_factory.mktemp("clips") / "in", 60)


@pytest.fixture
def out(tmp_path) -> Path:
    """Where outputs go, and nothing else."""
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def given(model) -> list[object]:
    """Options of all runs: small batches, so that clips are done one after the other."""
    return ["--model", model, "--device", "cpu", "--batch-size", "4"]


@pytest.fixture
def embed(given) -> Callable[..., Result]:
    return lambda *arguments: run_here("embed", *given, *arguments)


@pytest.fixture
def expected(clips, loaded) -> list[Clip]:
    return rows_of(loaded, clips)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, clips, given) -> Callable[[str, Path], None]:
    """``unfinished(name, folder)``: what a run into that output left when it was killed half-way, in this folder."""
    made: dict[str, Path] = {}

    def put(name: str, folder: Path) -> None:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("unfinished")
            interrupt(clips[0].parent, made[name] / name, given)
        shutil.copytree(made[name], folder, dirs_exist_ok=True)

    return put


def interrupt(source: object, output: Path, given: list[object]) -> None:
    """A run with small parts, killed when it has written some."""
    arguments = command("embed", source, "-o", output, *given, part_seconds=0)
    assert kill_at_work(arguments, output.parent, changes=25).status == -signal.SIGKILL


def rows_of(model: M2D, files: list[Path], names: list[str] | None = None) -> list[Clip]:
    """What an output has to hold of these files."""
    scenes = model.encode(files)
    return [Clip(name, scene[None], None) for name, scene in zip(names or list(map(str, files)), scenes, strict=True)]


def as_in(output: Path, expected: list[Clip]) -> list[Clip]:
    """The same with the names that ``read_output`` finds in a folder of ``.npy``."""
    if output.suffix:
        return expected
    return [Clip(Path(clip.name).name, clip.embeddings, clip.times) for clip in expected]


def changed_model(model: Path, folder: Path, **values: object) -> Path:
    """A copy of a model with other values in its ``config.json``, and the same weights."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    assert values.keys() <= config.keys()
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def says(result: Result, text: str = "") -> str:
    """All that a run has told, in lower case."""
    assert "Traceback" not in result.stderr
    return f"{result.stdout}\n{result.stderr}\n{text}".lower()


# --- two at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"), [*((name, []) for name in OUTPUTS), ("out.parquet", ["--overwrite"]), ("out", ["--overwrite"])]
)
def test_a_run_into_an_output_that_another_works_on_is_refused(clips, out, given, embed, expected, name, more):
    first = start(command("embed", clips[0].parent, "-o", out / name, *given, part_seconds=0))
    assert wait_for_changes(first, out, 20)
    first.send_signal(signal.SIGSTOP)
    try:
        second = embed(clips[0].parent, "-o", out / name, *more)
    finally:
        first.send_signal(signal.SIGCONT)
    ended = end_of(first)
    assert second.returncode not in (0, 1)
    assert "another" in says(second)
    assert ended.status == 0, ended
    assert_same(read_output(out / name), as_in(out / name, expected))
    assert leftovers(out) == set()


def test_runs_that_are_started_together(clips, out, given, expected):
    """One does the work, whichever; the others say why they do not."""
    arguments = command("embed", clips[0].parent, "-o", out / "out.parquet", *given, part_seconds=0)
    ended = [end_of(process) for process in [start(arguments) for _ in range(3)]]
    assert sorted(one.status for one in ended) == [0, 2, 2], ended
    assert all("another" in one.err.lower() or "exists" in one.err for one in ended if one.status)
    assert_same(read_output(out / "out.parquet"), expected)
    assert leftovers(out) == set()


# --- many parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTPUTS[:2])
def test_more_parts_than_files_may_be_open(tmp_path, out, given, loaded, name):
    files = write_clips(tmp_path / "in", 2 * OPEN_FILES)
    arguments = command("embed", tmp_path / "in", "-o", out / name, *given, part_seconds=0)
    ended = run_process(arguments, open_files=OPEN_FILES)
    assert ended.status == 0, ended.err
    assert_same(read_output(out / name), rows_of(loaded, files))


@pytest.mark.slow
def test_a_cache_of_log_mels_of_more_parts_than_files_may_be_open(tmp_path):
    write_clips(tmp_path / "in", 64 * OPEN_FILES)
    arguments = command(
        *("pretrain", "debug", f"data.source={tmp_path / 'in'}", f"data.cache={tmp_path / 'cache'}"),
        *("training.steps=60", f"output={tmp_path / 'run'}"),
    )
    ended = run_process(arguments, open_files=2 * OPEN_FILES)
    assert ended.status == 0, ended.err
    assert len(list((tmp_path / "cache").rglob("*.npy"))) < 2 * OPEN_FILES  # else the limit proves nothing


# --- lost and torn files ----------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    """Other bits in four bytes, one of which is the first of a number."""
    content = bytearray(file.read_bytes())
    for place in range(len(content) * 3 // 4, len(content) * 3 // 4 + 4):
        content[place] ^= 0x40
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "lost": Path.unlink,
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "flipped": flip,
}
TOLD = ("damage", "lost", "torn", "missing", "again", "incomplete", "corrupt", "not whole", "gone")


def kept_files(folder: Path) -> list[list[Path]]:
    """What an unfinished run has kept of single results, by the endings of names: first what there is most of."""
    kinds: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.stat().st_size and re.search(r"\d", file.name.replace("m2d", "")):
            kinds.setdefault("".join(file.suffixes), []).append(file)
    return sorted(kinds.values(), key=lambda files: -sum(file.stat().st_size for file in files))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", ["embeddings", "records"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_damaged_part_is_made_again_and_told(clips, out, embed, expected, unfinished, caplog, name, which, damage):
    """As after a power cut."""
    unfinished(name, out)
    kinds = kept_files(out)
    damaged = [files[len(files) // 2] for files in (kinds[:1] if which == "embeddings" else kinds[1:])]
    for file in damaged:
        DAMAGE[damage](file)
    done = embed(clips[0].parent, "-o", out / name)
    assert done.returncode == 0, done.stderr
    assert_same(read_output(out / name), as_in(out / name, expected))
    assert EARLIER in done.stdout  # not all of it anew
    told = any(word in says(done, caplog.text) for word in TOLD)
    assert told or not damaged or (which, damage) == ("records", "lost")  # nobody knows of what has no record
    assert leftovers(out) == set()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", OUTPUTS[:2])
def test_a_damaged_shard_is_made_again(clips, out, embed, expected, name, damage):
    assert embed(clips[0].parent, "-o", out / name, "--shard", "1/2").returncode == 0
    largest = max((file for file in out.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    DAMAGE[damage](largest)
    for shard in ("2/2", "1/2"):  # whoever notices; the first must not make an output of what is there
        if not (out / name).exists():
            assert "Traceback" not in embed(clips[0].parent, "-o", out / name, "--shard", shard).stderr
    assert_same(read_output(out / name), expected)
    assert leftovers(out) == set()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_of_the_cache_of_log_mels_is_made_again(tmp_path, caplog, damage):
    write_clips(tmp_path / "in", 8)
    arguments = ["pretrain", "debug", f"data.source={tmp_path / 'in'}", f"data.cache={tmp_path / 'cache'}"]
    arguments += ["training.steps=2", "data.workers=0"]
    assert run_here(*arguments, f"output={tmp_path / 'one'}").returncode == 0
    (whole,) = (file for file in (tmp_path / "cache").rglob("*.npy"))
    content = whole.read_bytes()
    DAMAGE[damage](whole)
    done = run_here(*arguments, f"output={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert content in [file.read_bytes() for file in (tmp_path / "cache").rglob("*.npy")]
    assert any(word in says(done, caplog.text) for word in TOLD)


@pytest.mark.parametrize("name", OUTPUTS[:2])
def test_a_run_that_is_killed_when_its_output_is_there(tmp_path, out, given, embed, loaded, name):
    """Before it has cleared away what it is made of: the next run does that."""
    files = write_clips(tmp_path / "in", 200)
    process = start(command("embed", tmp_path / "in", "-o", out / name, *given, part_seconds=0))
    while not (out / name).exists() and process.poll() is None:
        pass
    process.kill()
    assert end_of(process).status in (-signal.SIGKILL, 0)
    again = embed(tmp_path / "in", "-o", out / name)
    assert again.returncode == 0 or "exists" in says(again)
    assert_same(read_output(out / name), rows_of(loaded, files))
    assert leftovers(out) == set()


# --- sounds that change -----------------------------------------------------------------------------------------------


def replace_newer(file: Path, other: Path) -> None:
    shutil.copy(other, file)


def replace_older(file: Path, other: Path) -> None:
    """``cp -p``, ``rsync -a``, ``unzip``."""
    shutil.copyfile(other, file)
    os.utime(file, (1e9, 1e9))


def replace_unseen(file: Path, other: Path) -> None:
    """Another file of the same size and time: only its inode tells."""
    status = file.stat()
    new = file.with_name("new")
    shutil.copyfile(other, new)
    assert new.stat().st_size == status.st_size
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(file)


REPLACED = [replace_newer, replace_older, replace_unseen]


@pytest.fixture
def own_clips(tmp_path) -> list[Path]:
    """Clips that a test may change; the first, the sixth ... are of one length."""
    return [file for file in write_clips(tmp_path / "in", 60, seed=1) if not file.name.endswith("new")]


@pytest.mark.parametrize("replace", REPLACED)
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_sound_that_was_replaced_since_is_embedded_again(
    tmp_path, own_clips, out, given, embed, loaded, name, replace
):
    interrupt(tmp_path / "in", out / name, given)
    other = tmp_path / "other.wav"
    for file in own_clips[:12:4]:  # all of one rate
        shutil.copyfile(own_clips[own_clips.index(file) + 20], other)
        replace(file, other)
    done = embed(tmp_path / "in", "-o", out / name)
    assert done.returncode == 0, done.stderr
    assert EARLIER in done.stdout
    assert_same(read_output(out / name), as_in(out / name, rows_of(loaded, own_clips)))


@pytest.mark.parametrize("replace", REPLACED)
def test_a_sound_that_was_replaced_after_a_finished_run_into_a_folder(tmp_path, own_clips, out, embed, loaded, replace):
    files = [Path(file) for file in own_clips[:8]]
    assert embed(*files, "-o", out / "out").returncode == 0
    replace(files[0], own_clips[20])
    done = embed(*files, "-o", out / "out")
    assert done.stdout.startswith(f"8 clips (7 {EARLIER}")
    assert_same(read_output(out / "out"), as_in(out / "out", rows_of(loaded, files)))


@pytest.mark.parametrize("replace", REPLACED)
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_sound_that_was_replaced_between_shards(tmp_path, own_clips, out, embed, loaded, name, replace):
    assert embed(tmp_path / "in", "-o", out / name, "--shard", "1/2").returncode == 0
    for file in own_clips[:8:4]:
        replace(file, own_clips[own_clips.index(file) + 20])
    for shard in ("1/2", "2/2"):
        assert embed(tmp_path / "in", "-o", out / name, "--shard", shard).returncode == 0
    assert_same(read_output(out / name), as_in(out / name, rows_of(loaded, own_clips)))


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_sound_that_is_deleted_once_it_is_read(own_clips, out, loaded, name):
    expected = rows_of(loaded, own_clips)

    def delete(file: Path, error: object) -> None:
        file.unlink()

    done = embed_files(loaded, own_clips, out / name, on_progress=delete)
    assert (done.embedded, done.failed) == (60, {})
    assert_same(read_output(out / name), as_in(out / name, expected))


class Killed(BaseException):
    """As sudden as a signal: no handler of the package catches it."""


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_sound_that_changes_between_reading_and_recording(own_clips, out, loaded, monkeypatch, name):
    """What counts is the file as it was when it was read."""
    seen: list[Path] = []

    def disturb(file: Path, error: object) -> None:
        seen.append(file)
        if len(seen) == 10:
            replace_newer(seen[0], own_clips[own_clips.index(seen[0]) - 20])
            shorten_parts(0, monkeypatch.setattr)
        if len(seen) == 30:
            raise Killed

    with pytest.raises(Killed):
        embed_files(loaded, own_clips, out / name, batch_size=2, on_progress=disturb)
    done = embed_files(loaded, own_clips, out / name)
    assert 0 < done.resumed < 30
    assert_same(read_output(out / name), as_in(out / name, rows_of(loaded, own_clips)))


# --- settings ---------------------------------------------------------------------------------------------------------

CHANGES = [{"norm_stats": [-5.0, 3.0]}, {"f_max": 7000.0}, {"hop_length": 200}, {"n_fft": 512}, {"norm_eps": 1e-3}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_run_is_not_taken_up_with_another_model(tmp_path, clips, out, embed, model, unfinished, name, change):
    unfinished(name, out)
    other = changed_model(model, tmp_path / "other", **change)
    refused = embed(clips[0].parent, "-o", out / name, "--model", other)
    assert refused.returncode == 2
    assert "settings" in says(refused) or next(iter(change)) in says(refused)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_shards_of_different_models_are_not_put_together(tmp_path, clips, out, embed, model, change):
    assert embed(clips[0].parent, "-o", out / "out.parquet", "--shard", "1/2").returncode == 0
    other = changed_model(model, tmp_path / "other", **change)
    refused = embed(clips[0].parent, "-o", out / "out.parquet", "--shard", "2/2", "--model", other)
    assert refused.returncode == 2
    assert "settings" in says(refused) or next(iter(change)) in says(refused)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("name", OUTPUTS[:2])
def test_similar_refuses_an_index_of_another_model(tmp_path, clips, out, embed, model, name, change):
    other = changed_model(model, tmp_path / "other", **change)
    embed(*clips[:4], "-o", out / name)
    refused = run_here("similar", clips[0], out / name, "--model", other, "--device", "cpu")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "settings" in says(refused) or next(iter(change)) in says(refused)


# --- names and places -------------------------------------------------------------------------------------------------


def test_outputs_stay_where_they_are_when_a_folder_is_added(tmp_path, clips, out, embed):
    for folder, files in (("a", clips[:3]), ("b", clips[3:6])):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for file in files:
            shutil.copy(file, tmp_path / "in" / folder)
    assert embed(tmp_path / "in" / "a", "-o", out / "out").returncode == 0
    before = {file: file.stat().st_mtime_ns for file in (out / "out").rglob("*.npy")}
    done = embed(tmp_path / "in" / "a", tmp_path / "in" / "b", "-o", out / "out")
    assert done.stdout.startswith(f"6 clips (3 {EARLIER})")
    after = {file: file.stat().st_mtime_ns for file in (out / "out").rglob("*.npy")}
    assert len(before) == 3
    assert len(after) == 6
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    ("places", "kind"),
    [(["a/x.wav", "b/x.wav"], "scene"), (["x.wav", "x.wav.times"], "timestamps"), (["x.wav", "x.wav.npy"], "scene")],
)
def test_no_two_sounds_go_into_one_file(tmp_path, clips, out, embed, loaded, places, kind):
    files = [tmp_path / "in" / place for place in places]
    for file, clip in zip(files, clips, strict=False):
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, file)
    done = embed(*files, "-o", out / "out", "--kind", kind)
    if done.returncode == 0:
        held = [np.load(file) for file in (out / "out").rglob("*.npy")]
        for file in files:
            wanted = (
                [loaded.encode(file)] if kind == "scene" else [np.asarray(a) for a in loaded.encode_timestamps(file)]
            )
            for array in wanted:
                assert any(a.shape == array.shape and np.abs(a - array).max() <= 1e-5 for a in held), file
    else:
        assert done.returncode == 2
        assert all(file.name in done.stderr for file in files)
        assert not list(out.rglob("*.npy"))


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_not_kept_for_sounds_that_are_all_bad(tmp_path, clips, out, embed, name):
    sound = tmp_path / "x.wav"
    shutil.copy(clips[0], sound)
    assert embed(sound, "-o", out / name).returncode == 0
    sound.write_text("not audio")
    done = embed(sound, "-o", out / name, "--overwrite")
    assert done.returncode == 1
    assert "x.wav" in done.stderr
    assert not (out / name).exists() or read_output(out / name) == []
    assert leftovers(out) == set()


def test_a_run_is_taken_up_from_another_folder(tmp_path, own_clips, out, given, loaded, monkeypatch):
    (tmp_path / "below").mkdir()
    for name in OUTPUTS:
        first = start(command("embed", "in", "-o", f"results/{name}", *given, part_seconds=0), cwd=tmp_path)
        assert wait_for_changes(first, out, 25)
        first.kill()
        assert end_of(first).status == -signal.SIGKILL
        monkeypatch.chdir(tmp_path / "below")
        done = run_here("embed", "../in", "-o", f"../results/{name}", *given)
        assert done.returncode == 0, done.stderr
        assert EARLIER in done.stdout
        got = [Clip(Path(clip.name).name, clip.embeddings, None) for clip in read_output(out / name)]
        assert_same(got, rows_of(loaded, own_clips, [file.name for file in own_clips]))


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch) -> None:
    for name in list(os.environ):
        if name.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "ROLE_NAME": "default",
    "ROLE_RANK": "1",
    "ROLE_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
}


@pytest.mark.parametrize(
    "variables", [{"RANK": "0", "WORLD_SIZE": "4"}, {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "pod-0"}]
)
def test_a_rank_that_happens_to_be_there_is_no_share(clips, out, embed, expected, no_launcher, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = embed(clips[0].parent, "-o", out / "out.parquet")
    assert done.returncode == 0
    assert_same(read_output(out / "out.parquet"), expected)


def test_torchrun_gives_each_process_its_share(clips, out, embed, no_launcher, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    done = embed(clips[0].parent, "-o", out / "out.parquet")
    assert "shard 2/4: 1" in done.stdout
    assert not (out / "out.parquet").exists()


def test_a_share_by_the_environment_if_asked_for(clips, out, embed, expected, no_launcher, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        done = embed(clips[0].parent, "-o", out / "out.parquet", "--shard", "auto")
        assert done.returncode == 0, done.stderr
        assert f"shard {int(rank) + 1}/2" in done.stdout
    assert_same(read_output(out / "out.parquet"), expected)


# --- times ------------------------------------------------------------------------------------------------------------


def test_times_are_kept_in_double_precision(clips, out, embed):
    for name in OUTPUTS:
        assert embed(*clips[:3], "-o", out / name, "--kind", "timestamps").returncode == 0
        assert all(clip.times.dtype == np.float64 for clip in read_output(out / name)), name
    for shard in ("1/2", "2/2"):
        embed(*clips[:3], "-o", out / "shared.parquet", "--kind", "timestamps", "--shard", shard)
    assert pq.read_schema(out / "shared.parquet").field("timestamp_ms").type == pa.float64()


# --- similar ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def search(model) -> Callable[..., list[str]]:
    """The names of what is nearest to the first."""

    def similar(*arguments: object) -> list[str]:
        done = run_here("similar", *arguments, "--model", model, "--device", "cpu", "-k", 100, "--json")
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["file"] for line in done.stdout.splitlines()]

    return similar


@pytest.fixture
def two_indices(clips, out, embed) -> list[Path]:
    for number in (0, 1):
        embed(*clips[10 * number : 10 * number + 10], "-o", out / f"index-{number}.parquet")
    return sorted(out.glob("*.parquet"))


def test_similar_takes_several_indices_a_folder_and_a_pattern(clips, out, search, two_indices):
    alone = search(clips[0], *clips[:20])
    assert len(alone) == 19
    assert search(clips[0], *two_indices) == alone
    assert search(clips[0], out) == alone
    assert search(clips[0], out / "*.parquet") == alone


def test_similar_passes_over_rows_without_an_embedding(clips, search, two_indices):
    index = two_indices[0]
    table = pq.read_table(index)
    rows = [row | ({"embedding": None} if i == 3 else {}) for i, row in enumerate(table.to_pylist())]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), index)
    assert search(clips[0], index) == [name for name in search(clips[0], *clips[:10]) if name != str(clips[3])]


def by_pandas(file: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pandas.read_parquet(file).to_parquet(file)


def by_polars(file: Path) -> None:
    polars = pytest.importorskip("polars")
    polars.read_parquet(file).write_parquet(file)


def by_duckdb(file: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    other = file.with_name("other")
    duckdb.sql(f"COPY (SELECT * FROM '{file}') TO '{other}' (FORMAT parquet)")
    other.replace(file)


@pytest.mark.parametrize("save_again", [by_pandas, by_polars, by_duckdb])
def test_similar_says_when_the_metadata_is_gone(clips, model, two_indices, save_again):
    save_again(two_indices[0])
    refused = run_here("similar", clips[0], two_indices[0], "--model", model, "--device", "cpu")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "metadata" in says(refused)


# --- disks and signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bytes_a_file", [300, 3_000, 12_000])
@pytest.mark.parametrize("name", OUTPUTS[:2])
def test_a_disk_that_is_full(clips, out, given, embed, expected, name, bytes_a_file):
    """At the first file, in a part, or when the output is put together."""
    ended = run_process(
        command("embed", clips[0].parent, "-o", out / name, *given, part_seconds=0), file_bytes=bytes_a_file
    )
    assert ended.status == 2
    assert "Traceback" not in ended.err
    assert "try again" in ended.err
    assert not (out / name).exists()
    assert not [path for path in out.rglob("*") if path.name.endswith(".partial") and path.is_file()]
    done = embed(clips[0].parent, "-o", out / name)
    assert done.returncode == 0, done.stderr
    assert (EARLIER in done.stdout) == (bytes_a_file >= 3_000)
    assert_same(read_output(out / name), expected)
    assert leftovers(out) == set()


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[[str], Path]]:
    """``mount(options)``: a small file system of its own, where the tests may make one."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def make(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("file systems can be mounted by root only")
        return folder

    yield make
    subprocess.run(["umount", folder], capture_output=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_small_disk_that_is_given_room(tmp_path, clips, given, embed, expected, mount, name):
    disk = mount("size=64k")
    ended = run_process(command("embed", clips[0].parent, "-o", disk / name, *given, part_seconds=0))
    assert ended.status == 2, ended
    assert "Traceback" not in ended.err
    assert "no space left" in ended.err.lower()
    subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    done = embed(clips[0].parent, "-o", disk / name)
    assert done.returncode == 0, done.stderr
    assert EARLIER in done.stdout
    assert_same(read_output(disk / name), as_in(disk / name, expected))
    assert leftovers(disk) == set()


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_disk_that_cannot_be_written(clips, embed, mount, name):
    refused = embed(*clips[:2], "-o", mount("ro") / name)
    assert refused.returncode == 2
    assert "read-only" in says(refused)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_folder_that_cannot_be_written(clips, out, embed, name):
    out.chmod(0o500)
    refused = embed(*clips[:2], "-o", out / name)
    assert refused.returncode == 2
    assert "permission" in says(refused)


def start_on_a_terminal(arguments: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """A process whose standard error is a terminal, so that it shows how far it is."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))

    def heed() -> None:  # what a shell starts in the background ignores Ctrl-C, and so would all that it starts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=theirs, preexec_fn=heed)
    os.close(theirs)
    return process, ours


def wait_for_text(process: subprocess.Popen[bytes], terminal: int, pattern: bytes) -> bytes:
    shown = b""
    while not re.search(pattern, shown):
        assert process.poll() is None, f"ended before it could be disturbed: {shown!r}"
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096)
    return shown


def rest_of(terminal: int) -> None:
    """Read what is still told, so that nobody waits to tell it."""
    with suppress(OSError):  # the other end is closed
        while os.read(terminal, 4096):
            pass


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_done_is_kept_when_a_run_is_stopped(tmp_path, out, model, embed, loaded, name, sign):
    """Ctrl-C, and what schedulers send before they kill: within the first seconds, before there is a first part."""
    files = write_clips(tmp_path / "in", 400)
    options = ["--model", model, "--device", "cpu", "--batch-size", 1, "--workers", 0]
    process, terminal = start_on_a_terminal(command("embed", tmp_path / "in", "-o", out / name, *options))
    wait_for_text(process, terminal, rb"[1-9]\d*/400 ")
    process.send_signal(sign)
    rest_of(terminal)
    os.close(terminal)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 1)
    done = embed(tmp_path / "in", "-o", out / name)
    assert done.returncode == 0, done.stderr
    assert EARLIER in done.stdout
    assert_same(read_output(out / name), as_in(out / name, rows_of(loaded, files)))
    assert leftovers(out) == set()


_SAVE = "import sys; from m2d_embed.m2d import M2D; M2D.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"


def test_a_model_that_is_saved_in_place_of_another_is_one_or_the_other(tmp_path, model):
    """The disk has room for the configuration, and not for the weights."""
    target, other = tmp_path / "target", tmp_path / "other"
    shutil.copytree(model, target)
    random_model(TINY, seed=1).save_pretrained(other)
    other = changed_model(other, tmp_path / "changed", norm_stats=[-5.0, 3.0])
    ended = run_process([sys.executable, "-c", _SAVE, str(other), str(target)], file_bytes=50_000)
    assert ended.status != 0
    saved, before = M2D.from_pretrained(target), M2D.from_pretrained(model)
    assert saved.config == before.config
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), before.parameters(), strict=True))
    assert {path.name for path in target.iterdir()} == {path.name for path in model.iterdir()}


def test_real_sounds_come_out_the_same_by_every_way(out, embed, loaded):
    files = sorted(DATA.rglob("*.o*"))
    expected = rows_of(loaded, files)
    for name in OUTPUTS[:2]:
        assert embed(DATA, "-o", out / name).returncode == 0
        assert_same(read_output(out / name), expected)
    for shard in ("2/3", "1/3", "3/3"):
        embed(DATA, "-o", out / "shared.npz", "--shard", shard)
    assert_same(read_output(out / "shared.npz"), expected)
