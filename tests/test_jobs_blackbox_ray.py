"""``embed_dataset`` as its users meet it: lost and torn parts, replaced sounds, other settings, other readers."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TINY, random_model
from interruptions import write_clips
from test_cli import run as run_here
from test_jobs_blackbox import CHANGES, DAMAGE, REPLACED, TOLD, changed_model

from m2d_embed.errors import ConfigError
from m2d_embed.jobs.embed import Summary
from m2d_embed.jobs.on_ray import Actors, embed_dataset
from m2d_embed.m2d import M2D

pytest.importorskip("ray", reason="needs the extra 'ray'")

_BAD = 3
_GOOD = 29


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        import ray

        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    random_model(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def clips(tmp_path) -> list[Path]:
    return write_clips(tmp_path / "in", 30, bad=[_BAD], seed=2)


@pytest.fixture
def embed(cluster, tmp_path, model, clips) -> Callable[..., Summary]:
    """Embed the clips into ``results/out``, six in a part."""
    (tmp_path / "results").mkdir()

    def call(**options: object) -> Summary:
        given = {"model": str(model), "clips_per_part": 6, "actors": Actors(number=1)} | options
        return embed_dataset(tmp_path / "in", tmp_path / "results" / "out", **given)

    return call


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "results" / "out"


def parts_of(out: Path) -> list[Path]:
    return sorted(out.glob("*.parquet"))


def assert_right(out: Path, clips: list[Path], model: Path) -> None:
    """Every clip once, with its embedding, and the bad one with its error."""
    rows = [row for part in parts_of(out) for row in pq.read_table(part).to_pylist()]
    assert sorted(row["file"] for row in rows) == [str(file) for file in clips]
    by_name = {row["file"]: row for row in rows}
    bad = by_name.pop(str(clips[_BAD]))
    assert bad["embedding"] is None
    assert "not audio" in bad["error"]
    got = np.array([row["embedding"] for row in by_name.values()])
    assert np.abs(got - M2D.from_pretrained(model).encode(list(by_name))).max() <= 1e-5


def test_damaged_parts_are_made_again_and_told(embed, out, clips, model, caplog):
    assert embed().embedded == _GOOD
    for damage, part in zip(DAMAGE.values(), parts_of(out), strict=False):  # one part stays whole
        damage(part)
    caplog.clear()
    again = embed()
    assert again.embedded + again.resumed == _GOOD
    assert 5 <= again.resumed <= 6
    assert_right(out, clips, model)
    assert any(word in caplog.text.lower() for word in TOLD)


def test_damaged_records_are_made_again(embed, out, clips, model):
    """Whatever of the job's own files a power cut has torn, but for what says which job it is."""
    assert embed().embedded == _GOOD
    records = [file for file in out.rglob("*") if file.is_file() and file.suffix != ".parquet" and "part" in file.name]
    assert records
    for file in records[::2]:
        os.truncate(file, file.stat().st_size // 2)
    again = embed()
    assert again.embedded + again.resumed == _GOOD
    assert again.embedded
    assert_right(out, clips, model)


def test_sounds_that_were_replaced_since_are_embedded_again(embed, out, clips, model):
    assert embed().embedded == _GOOD
    for number, replace in enumerate(REPLACED):
        replace(clips[number], clips[number + 20])
    again = embed()
    assert 3 <= again.embedded < _GOOD
    assert_right(out, clips, model)


def test_a_folder_of_another_model_is_refused(embed, tmp_path, model):
    embed()
    for change in CHANGES[:2]:
        other = changed_model(model, tmp_path / next(iter(change)), **change)
        with pytest.raises(ConfigError, match=f"settings|{next(iter(change))}"):
            embed(model=str(other))


def test_times_are_kept_in_double_precision(embed, out):
    embed(kind="timestamps")
    assert {str(pq.read_schema(part).field("timestamp_ms").type) for part in parts_of(out)} == {"double"}


def by_pyarrow(out: Path) -> int:
    import pyarrow.dataset

    return pyarrow.dataset.dataset(out, format="parquet").count_rows()


def by_pandas(out: Path) -> int:
    return len(pytest.importorskip("pandas").read_parquet(out))


def by_polars(out: Path) -> int:
    return pytest.importorskip("polars").read_parquet(out).height


def by_duckdb(out: Path) -> int:
    duckdb = pytest.importorskip("duckdb")
    return duckdb.sql(f"SELECT count(*) FROM '{out}/*.parquet'").fetchone()[0]


def test_every_reader_opens_the_folder(embed, out):
    embed()
    for reader in (by_pyarrow, by_pandas, by_polars, by_duckdb):
        try:
            assert reader(out) == 30, reader
        except pytest.skip.Exception:
            continue


def test_similar_takes_the_folder_and_a_part_of_it(embed, out, clips, model):
    embed()
    query = shutil.copy(clips[0], out.parent / "query.wav")
    options = ["--model", model, "--device", "cpu", "-k", 100]
    with_error = next(part for part in parts_of(out) if pq.read_table(part)["error"].null_count < 6)
    for among, count in ((out, _GOOD), (with_error, 5)):
        done = run_here("similar", query, among, *options)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == count
        assert all(-1 <= float(line.split()[0]) <= 1 for line in lines)
        assert str(clips[_BAD]) not in done.stdout
