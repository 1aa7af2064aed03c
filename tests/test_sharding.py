"""One job for several processes: shares, shards put together as one run would write them, lost and changed shards."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import DATA, TINY, assert_same_npz, random_model

from m2d_embed.cli import main
from m2d_embed.errors import ConfigError
from m2d_embed.jobs import embed, outputs
from m2d_embed.jobs.embed import embed_files
from m2d_embed.jobs.outputs import read_scenes
from m2d_embed.jobs.shards import Shard, embed_shard, local_device, shares
from m2d_embed.jobs.store import BusyError, PartStore

FILES = sorted(DATA.glob("*/*.o*"))


@pytest.fixture
def model():
    return random_model(TINY)


def take(model, files, output, shard, kind="scene"):
    """One process's part of the job."""
    return embed_shard(model, files, output, Shard.parse(shard), kind)


def contents(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_shards_are_written_as_third_of_eight():
    assert Shard.parse("3/8") == Shard(3, 8)
    for text in ("3", "3/", "0/8", "9/8", "3-8", "-1/8", "3/8/1"):
        with pytest.raises(ConfigError):
            Shard.parse(text)


def torchrun(rank, world):
    """What it puts into the environment."""
    names = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}
    return names | {"RANK": str(rank), "WORLD_SIZE": str(world)}


def test_torchrun_says_which_shard():
    assert Shard.from_environment(torchrun(2, 8)) == Shard(3, 8)
    assert Shard.from_environment(torchrun(0, 1)) is None
    assert Shard.from_environment({}) is None
    with pytest.raises(ConfigError, match="RANK=8"):
        Shard.from_environment(torchrun(8, 8))


@pytest.mark.parametrize("missing", sorted(torchrun(0, 8)))
def test_variables_that_others_set_are_no_shard(missing):
    """RANK and WORLD_SIZE of a notebook or a pod would make a plain command do a share of the work."""
    environ = torchrun(0, 8)
    del environ[missing]
    assert Shard.from_environment(environ) is None


def test_launchers_say_which_shard_if_asked():
    assert Shard.parse("auto", {"RANK": "2", "WORLD_SIZE": "8"}) == Shard(3, 8)
    assert Shard.parse("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == Shard(1, 4)
    assert Shard.parse("auto", {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}) == Shard(4, 4)
    assert Shard.parse("auto", {"RANK": "0", "WORLD_SIZE": "1"}) == Shard(1, 1)
    with pytest.raises(ConfigError, match="SLURM_PROCID"):
        Shard.parse("auto", {})
    with pytest.raises(ConfigError, match="RANK=x"):
        Shard.parse("auto", {"RANK": "x", "WORLD_SIZE": "8"})


def test_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert local_device(None, {"LOCAL_RANK": "3"}) == "cuda:3"
    assert local_device("cuda", {"LOCAL_RANK": "5"}) == "cuda:1"
    assert local_device("cpu", {"LOCAL_RANK": "3"}) == "cpu"
    assert local_device("cuda:0", {"LOCAL_RANK": "3"}) == "cuda:0"
    assert local_device(None, {}) is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert local_device(None, {"LOCAL_RANK": "3"}) is None


def test_shares_hold_every_file_once_and_are_balanced():
    generator = np.random.default_rng(0)
    sizes = generator.lognormal(10, 2, 1000).astype(int).tolist()
    dealt = shares(sizes, 8)
    assert sorted(index for share in dealt for index in share) == list(range(1000))
    assert all(share == sorted(share) for share in dealt)
    loads = [sum(sizes[i] for i in share) for share in dealt]
    assert max(loads) - min(loads) <= 0.01 * max(loads) or max(loads) == max(sizes)
    assert dealt == shares(sizes, 8)
    assert [len(share) for share in shares([0] * 16, 8)] == [2] * 8
    assert shares([5], 3) == [[0], [], []]


@pytest.mark.parametrize("output", ["out.npz", "out.parquet"])
@pytest.mark.parametrize("kind", ["scene", "timestamps"])
def test_shards_make_the_file_of_one_run(tmp_path, model, monkeypatch, output, kind):
    # So that clips run over from one block into the next.
    monkeypatch.setattr(outputs, "_BLOCK_BYTES", 5 * 4 * TINY.embed_dim * TINY.grid_size[0])
    files = FILES[::-1]
    order = ["2/3", "3/3", "1/3"]
    for shard in order[:2]:
        done = take(model, files, tmp_path / output, shard, kind)
        assert done.missing
        assert done.whole is None
        assert not (tmp_path / output).exists()
    assert contents(tmp_path) == {f"{output}.partial"}
    done = take(model, files, tmp_path / output, order[2], kind)
    assert done.missing == []
    assert done.whole.resumed == len(files)
    assert contents(tmp_path) == {output}
    embed_files(model, files, tmp_path / f"one{Path(output).suffix}", kind)
    if output == "out.npz":
        assert_same_npz(tmp_path / "out.npz", tmp_path / "one.npz")
    else:
        got, one = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("out", "one"))
        assert got.schema.equals(one.schema, check_metadata=True)
        assert pq.read_metadata(tmp_path / output).num_row_groups == -(-len(one) // 5)
        for column in set(one.column_names) - {"embedding"}:
            assert got[column] == one[column]
        assert np.abs(np.array(got["embedding"].to_pylist()) - np.array(one["embedding"].to_pylist())).max() <= 1e-5


def test_npy_files_lie_where_one_run_puts_them(tmp_path, model):
    for place in ("a", "b/c", "b/d"):
        (tmp_path / "in" / place).mkdir(parents=True)
        shutil.copy(FILES[0], tmp_path / "in" / place / "x.opus")
    files = sorted((tmp_path / "in").rglob("*.opus"))
    for shard in ("1/2", "2/2"):
        done = take(model, files, tmp_path / "out", shard)
    assert done.whole.resumed == 3
    embed_files(model, files, tmp_path / "one")
    placed = [sorted(p.relative_to(tmp_path / o) for p in (tmp_path / o).rglob("*.npy")) for o in ("out", "one")]
    assert placed[0] == placed[1]
    assert {p.suffix for p in (tmp_path / "out" / "_m2d_embed").iterdir()} == {".json", ".lock"}
    assert contents(tmp_path) == {"in", "out", "one"}


def test_bad_files_of_all_shards_are_told_at_the_end(tmp_path, model):
    bad = [tmp_path / f"bad{i}.wav" for i in range(2)]
    for i, file in enumerate(bad):
        file.write_text("not audio" * (i + 1))
    files = [bad[0], FILES[0], bad[1], FILES[1]]
    found, ends = {}, []
    for number in range(1, 7):  # more shards than files: two have nothing to do, two nothing to write
        done = take(model, files, tmp_path / "out.parquet", f"{number}/6")
        found |= done.share.failed
        ends += [done.whole] if done.whole else []
    assert set(found) == set(bad)
    assert all(set(end.failed) == set(bad) for end in ends)
    assert "not audio" in str(ends[0].failed[bad[0]])
    assert read_scenes(tmp_path / "out.parquet")[0] == [str(FILES[0]), str(FILES[1])]


def test_nothing_is_written_if_every_file_is_bad(tmp_path, model):
    bad = [tmp_path / "bad1.wav", tmp_path / "bad2.wav"]
    for file in bad:
        file.write_text("not audio")
    for shard in ("1/2", "2/2"):
        done = take(model, bad, tmp_path / "out.npz", shard)
    assert set(done.whole.failed) == set(bad)
    assert contents(tmp_path) == {"bad1.wav", "bad2.wav"}


def results_of(output, files):
    """Which of these files have results in the store of an unfinished job."""
    store = PartStore(output.with_name(f"{output.name}.partial"), output)
    store.refresh()
    return [file for file in files if store.has(str(file))]


def test_a_finished_shard_is_not_made_again_unless_its_audio_changed(tmp_path, model):
    files = [Path(shutil.copy(file, tmp_path / file.name)) for file in FILES[:4]]
    output = tmp_path / "out.npz"
    share = take(model, files, output, "1/2").share
    again = take(model, files, output, "1/2").share
    assert (share.embedded, again.embedded, again.resumed) == (2, 0, 2)
    mine = results_of(output, files)
    shutil.copy(FILES[5], mine[0])  # another size, yet it stays in its shard
    changed = take(model, files, output, "1/2").share
    assert (changed.embedded, changed.resumed) == (1, 1)
    assert results_of(output, files) == mine
    take(model, files, output, "2/2")
    names, embeddings, _ = read_scenes(output)
    assert np.abs(embeddings - model.encode(names)).max() <= 1e-5


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_results_that_were_deleted_are_made_again(tmp_path, model, suffix):
    output = tmp_path / "out.npz"
    take(model, FILES, output, "1/2")
    next((tmp_path / "out.npz.partial").glob(f"part-*{suffix}")).unlink()
    assert take(model, FILES, output, "2/2").missing == [1]
    assert take(model, FILES, output, "1/2").share.embedded > 0
    assert read_scenes(output).names == [str(file) for file in FILES]


def test_a_job_goes_on_with_another_number_of_shards(tmp_path, model):
    output = tmp_path / "out.npz"
    embedded = [take(model, FILES, output, shard).share.embedded for shard in ("1/3", "2/3", "1/2", "2/2")]
    assert sum(embedded) == len(FILES)
    assert min(embedded[:2]) > 0
    assert contents(tmp_path) == {"out.npz"}


class Killed(BaseException):
    """As sudden as a signal: no handler of the package catches it."""


def test_killed_while_putting_together(tmp_path, model, monkeypatch):
    """Before the output is there, and after it, while shards are removed; any shard's command goes on."""
    output = tmp_path / "out.parquet"
    take(model, FILES, output, "1/2")
    with monkeypatch.context() as patch:
        patch.setattr(embed, "write_output", lambda *arguments: raise_(Killed))
        with pytest.raises(Killed):
            take(model, FILES, output, "2/2")
    assert not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(PartStore, "remove", lambda store: raise_(Killed))
        with pytest.raises(Killed):
            take(model, FILES, output, "1/2")
    assert output.exists()
    done = take(model, FILES, output, "2/2")
    assert (done.whole.resumed, done.whole.failed) == (len(FILES), {})
    assert contents(tmp_path) == {"out.parquet"}


def raise_(error):
    raise error


def test_a_finished_job_is_left_as_it_is(tmp_path, model):
    output = tmp_path / "out.npz"
    for shard in ("1/2", "2/2"):
        take(model, FILES[:4], output, shard)
    before = output.stat()
    assert take(model, FILES[:4], output, "1/2").whole.resumed == 4
    assert set(take(model, FILES[:5], output, "1/2").whole.failed) == {FILES[4]}
    assert output.stat() == before
    with pytest.raises(ConfigError, match="exists and holds other files"):
        take(model, FILES[1:4], output, "1/2")
    with pytest.raises(ConfigError, match="fingerprint="):
        take(random_model(TINY, seed=1), FILES[:4], output, "1/2")
    output.write_text("something else")
    with pytest.raises(ConfigError, match="not of this job"):
        take(model, FILES[:4], output, "1/2")


@pytest.mark.parametrize("by_shards", [True, False])
def test_a_finished_job_whose_audio_changed_is_told(tmp_path, model, by_shards):
    files = [Path(shutil.copy(file, tmp_path / file.name)) for file in FILES[:2]]
    output = tmp_path / "out.npz"
    if by_shards:
        for shard in ("1/2", "2/2"):
            take(model, files, output, shard)
    else:
        embed_files(model, files, output)
    assert take(model, files[::-1], output, "1/2").whole.resumed == 2  # in whatever order they are named
    shutil.copy(FILES[5], files[0])
    with pytest.raises(ConfigError, match=r"out\.npz exists, and files have changed since"):
        take(model, files, output, "1/2")


def test_shards_of_a_folder_find_it_whole(tmp_path, model):
    for shard in ("1/2", "2/2"):
        take(model, FILES, tmp_path / "out", shard)
    for shard in ("1/2", "2/2"):
        again = take(model, FILES, tmp_path / "out", shard)
        assert (again.share.embedded, again.whole.resumed) == (0, len(FILES))


@pytest.mark.parametrize("damaged", ["", "{", "{}", '{"files": ["/a.wav"], "sizes": []}'])
def test_a_damaged_plan_is_made_again(tmp_path, model, damaged):
    output = tmp_path / "out.npz"
    take(model, FILES, output, "1/2")
    next((tmp_path / "out.npz.partial").glob("*.plan")).write_text(damaged)
    assert take(model, FILES, output, "2/2").whole.resumed == len(FILES)


def test_a_part_that_was_damaged_while_others_worked_is_made_again(tmp_path, model):
    output = tmp_path / "out.npz"

    def damage(file, error):
        if not list((tmp_path / "out.npz.partial").glob("part-*.npy")):
            take(random_model(TINY), FILES, output, "1/2")
            part = next((tmp_path / "out.npz.partial").glob("part-*.npy"))
            part.write_bytes(part.read_bytes()[:-1] + b"?")

    assert embed_shard(model, FILES, output, Shard.parse("2/2"), on_progress=damage).missing == [1]
    assert take(model, FILES, output, "1/2").whole.resumed == len(FILES)


def test_processes_that_disagree_are_refused(tmp_path, model):
    output = tmp_path / "out.parquet"
    take(model, FILES, output, "1/2")
    with pytest.raises(ConfigError, match="other files"):
        take(model, FILES[1:], output, "2/2")
    with pytest.raises(ConfigError, match="another order"):
        take(model, FILES[::-1], output, "2/2")
    with pytest.raises(ConfigError, match="kind='scene', now 'timestamps'"):
        take(model, FILES, output, "2/2", "timestamps")
    with pytest.raises(ConfigError, match="fingerprint="):
        take(random_model(TINY, seed=1), FILES, output, "2/2")


def test_two_processes_do_not_work_on_one_shard(tmp_path, model):
    output = tmp_path / "out.parquet"
    take(model, FILES, output, "1/2")
    with PartStore(tmp_path / "out.parquet.partial", output).claim("2-of-2"):
        with pytest.raises(BusyError, match="another run is at work on this"):
            take(model, FILES, output, "2/2")
        with pytest.raises(BusyError, match="another run is at work on this"):
            embed_files(model, FILES, output)  # which would do the whole of it
        assert take(model, FILES, output, "1/2").missing == [2]
    assert take(model, FILES, output, "2/2").whole


def test_shards_do_not_work_beside_a_run_without_them(tmp_path, model):
    output = tmp_path / "out.parquet"
    with PartStore(tmp_path / "out.parquet.partial", output).claim(), pytest.raises(BusyError):
        take(model, FILES, output, "1/2")


def test_the_last_process_at_work_makes_the_output(tmp_path, model):
    """Two that end at the same time: the first leaves it to the other, even if all is done."""
    output = tmp_path / "out.npz"
    take(model, FILES, output, "1/2")
    with PartStore(tmp_path / "out.npz.partial", output).claim("1-of-2"):
        done = take(model, FILES, output, "2/2")
        assert (done.missing, done.whole, output.exists()) == ([], None, False)
    assert take(model, FILES, output, "1/2").whole.resumed == len(FILES)


@pytest.mark.parametrize(("output", "message"), [("o.csv", "unknown kind"), ("no/o.npz", "does not exist")])
def test_impossible_outputs_leave_nothing_behind(tmp_path, model, output, message):
    with pytest.raises(ConfigError, match=message):
        take(model, FILES, tmp_path / output, "1/2")
    assert contents(tmp_path) == set()


def embed_command(monkeypatch, capsys, *arguments):
    """The exit status of ``m2d-embed embed``, and what it prints."""
    monkeypatch.setattr(sys, "argv", ["m2d-embed", "embed", *map(str, arguments)])
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr()


def test_the_command_takes_a_shard(tmp_path, monkeypatch, capsys):
    run = partial(embed_command, monkeypatch, capsys, DATA, "-o", tmp_path / "o.npz")
    status, shown = run("--shard", "1/2")
    assert status == 0
    assert shown.out.startswith("shard 1/2: 7 clips")
    assert "not done yet: 2" in shown.out
    (plan,) = (tmp_path / "o.npz.partial").glob("*.plan")
    assert json.loads(plan.read_text())["files"] == [str(f) for f in FILES]
    assert "does not exist" in run("--shard", "3/2")[1].err
    assert "--overwrite" in run("--shard", "2/2", "--overwrite")[1].err
    status, shown = run("--shard", "2/2")
    assert status == 0
    assert "12 clips" in shown.out
    assert contents(tmp_path) == {"o.npz"}


def test_torchrun_is_told_of_bad_files_by_the_last_process_alone(tmp_path, monkeypatch, capsys):
    """It stops all processes when one fails; so the first may not."""
    bad = [tmp_path / "bad1.wav", tmp_path / "bad2.wav"]
    for file in bad:
        file.write_text("not audio" * 100_000)  # the largest two: one for each process
    run = partial(embed_command, monkeypatch, capsys, DATA, *bad, "-o", tmp_path / "o.npz")
    for name, value in torchrun(0, 2).items():
        monkeypatch.setenv(name, value)
    status, shown = run()
    assert status == 0
    assert shown.err.count("not audio that can be read") == 1
    monkeypatch.setenv("RANK", "1")
    status, shown = run()
    assert status == 1
    assert shown.err.count("not audio that can be read") == 2
    assert "2 files could not be embedded" in shown.err
    monkeypatch.delenv("RANK")
    (tmp_path / "o.npz").unlink()
    assert run("--shard", "1/2")[0] == 1


@pytest.mark.slow  # torch is imported three times over
def test_torchrun(tmp_path):
    (tmp_path / "bad.wav").write_text("not audio")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "m2d_embed", "embed", str(DATA), str(tmp_path / "bad.wav"), "-o", str(tmp_path / "out.parquet")]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    assert result.returncode == 1, result.stderr
    assert "bad.wav: not audio that can be read" in result.stderr
    assert "12 clips" in result.stdout
    assert read_scenes(tmp_path / "out.parquet")[0] == [str(file) for file in FILES]
    assert contents(tmp_path) == {"bad.wav", "out.parquet"}
