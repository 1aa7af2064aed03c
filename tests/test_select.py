"""One manifest of some clips of others."""

import csv
import json
from collections import Counter

import pytest

from benchmarks.pretraining import select
from benchmarks.pretraining.targets import read_rows


def write(manifest, rows):
    with manifest.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def rows_of(package, kind, count):
    return [{"file": f"audio/{package}/{kind}-{n}.flac", "kind": kind, "package": package} for n in range(count)]


@pytest.fixture
def corpus(tmp_path):
    """Clips of a package, and of a repository."""
    rows = [*rows_of("debian-music", "music", 300), *rows_of("debian-music", "speech", 20)]
    return write(tmp_path / "manifest.csv", [*rows, *rows_of("owner/name", "effects", 10)])


@pytest.fixture
def with_scenes(corpus):
    """Those of the repository and scenes."""
    rows = [*rows_of("owner/name", "effects", 10), *rows_of("scenes", "effects", 5)]
    return write(corpus.with_name("with-scenes.csv"), rows)


def test_joins_manifests_in_order(corpus, with_scenes, tmp_path, capsys):
    select.main(tmp_path / "all.csv", [corpus, with_scenes])
    assert read_rows(tmp_path / "all.csv") == read_rows(corpus) + rows_of("scenes", "effects", 5)
    assert capsys.readouterr().out == "335 of 335 clips\n"


@pytest.mark.parametrize(
    ("source", "packages"),
    [("debian", {"debian-music": 320}), ("github", {"owner/name": 10}), ("scenes", {"scenes": 5})],
)
def test_of_one_source(corpus, with_scenes, tmp_path, source, packages):
    select.main(tmp_path / "some.csv", [corpus, with_scenes], source=select.Source(source))
    assert Counter(row["package"] for row in read_rows(tmp_path / "some.csv")) == packages


def test_a_part_of_a_kind(corpus, tmp_path):
    select.main(tmp_path / "thinned.csv", [corpus], one_in=["music=3"])
    kept = read_rows(tmp_path / "thinned.csv")
    counts = Counter(row["kind"] for row in kept)
    assert 70 < counts.pop("music") < 130
    assert counts == {"speech": 20, "effects": 10}

    more = write(corpus, [*rows_of("another", "music", 50), *read_rows(corpus)])
    select.main(tmp_path / "later.csv", [more], one_in=["music=3"])
    assert [row for row in read_rows(tmp_path / "later.csv") if row["package"] != "another"] == kept


def test_without_what_overlaps(corpus, tmp_path):
    first, second, *others = read_rows(corpus)
    report = tmp_path / "overlap.json"
    found = {"same name": [str(tmp_path / first["file"])], "same sound": [{"corpus": str(tmp_path / second["file"])}]}
    report.write_text(json.dumps(found))
    select.main(tmp_path / "used.csv", [corpus], without=report)
    assert read_rows(tmp_path / "used.csv") == others


@pytest.mark.parametrize("given", ["music", "music=0", "music=-1", "music=half", "noise=2"])
def test_what_is_not_a_part(corpus, tmp_path, given):
    with pytest.raises(SystemExit, match=rf"--one-in {given}: write KIND=NUMBER, of effects, music, speech"):
        select.main(tmp_path / "out.csv", [corpus], one_in=[given])
    assert not (tmp_path / "out.csv").exists()


def test_files_stay_relative_to_their_folder(corpus, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(SystemExit, match=r"must be in the folder of"):
        select.main(tmp_path / "elsewhere" / "out.csv", [corpus])


def test_does_not_write_over_what_it_reads(corpus):
    before = corpus.read_text()
    with pytest.raises(SystemExit, match=r"would be lost"):
        select.main(corpus, [corpus], one_in=["music=3"])
    assert corpus.read_text() == before


def test_nothing_left(corpus, tmp_path):
    with pytest.raises(SystemExit, match=r"no clip is left"):
        select.main(tmp_path / "out.csv", [corpus], source=select.Source.SCENES)


def test_other_columns(corpus, tmp_path):
    other = write(tmp_path / "other.csv", [{"file": "x.flac", "kind": "music", "package": "p", "weight": "1"}])
    with pytest.raises(SystemExit, match=r"different columns"):
        select.main(tmp_path / "out.csv", [corpus, other])
