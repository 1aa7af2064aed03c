"""Building a corpus from git repositories: tiny ones are made here, and git takes them for those of GitHub."""

import csv
import io
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from m2d_embed.cli import app
from m2d_embed.pretrain.corpus import KINDS, CorpusError, build_repositories, read_repository_list
from m2d_embed.pretrain.corpus.manifest import write_manifest

pytest.importorskip("av", reason="needs the extra pretrain")
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def sound(frequency=440.0, seconds=0.5):
    file = io.BytesIO()
    samples = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * 16_000)) / 16_000)
    soundfile.write(file, samples, 16_000, format="WAV")
    return file.getvalue()


class Host:
    """Where repositories lie, and the corpus built from them."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.out, self.lines = folder / "host", folder / "corpus", []
        config = folder / "gitconfig"
        config.write_text(
            f'[url "file://{self.folder}/"]\n  insteadOf = https://github.com/\n'
            "[user]\n  name = A\n  email = a@x.org\n[init]\n  defaultBranch = main\n"
        )
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))

    def git(self, tree, *arguments):
        done = subprocess.run(["git", *arguments], cwd=tree, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def add(self, name, files):
        tree = self.folder / f"{name}.git"
        new = not tree.exists()
        tree.mkdir(parents=True, exist_ok=True)
        if new:
            self.git(tree, "init", "-q")
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(content)
        self.git(tree, "add", ".")
        self.git(tree, "commit", "-q", "-m", "sounds")
        return self.git(tree, "rev-parse", "HEAD")

    def list(self, *rows):
        file = self.folder.parent / "list.tsv"
        file.write_text("# comment\n" + "".join("\t".join(row) + "\n" for row in rows))
        return file

    def build(self, *rows, workers=1):
        return build_repositories(self.out, read_repository_list(self.list(*rows)), workers)

    def rows(self):
        with (self.out / "manifest.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))


@pytest.fixture
def host(tmp_path, monkeypatch):
    return Host(tmp_path, monkeypatch)


def test_a_repository_becomes_a_corpus_at_the_commit_that_is_named(host):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as inside:
        inside.writestr("bark.wav", sound(500))
    first = host.add(
        "a-b/C.d",
        {
            "LICENSE": b"CC0",
            "beds/LICENSE.txt": b"by \xff someone",
            "animals/cow.wav": sound(300),
            "animals/dogs.zip": archive.getvalue(),
            "beds/sea.wav": sound(200),
            "music/song.wav": sound(400),
        },
    )
    host.add("a-b/C.d", {"animals/cow.wav": sound(700), "animals/new.wav": sound(800)})
    summary = host.build(
        ("a-b/C.d", first, r"^animals/.*\.(wav|zip)$", "effects", "CC0-1.0", "LICENSE"),
        ("a-b/C.d", first, "^beds/", "ambience", "CC-BY-4.0", "LICENSE, beds/LICENSE.txt"),
    )
    assert [(row["member"], row["kind"], row["licence"]) for row in host.rows()] == [
        ("animals/cow.wav", "effects", "CC0-1.0"),
        ("animals/dogs.zip/bark.wav", "effects", "CC0-1.0"),
        ("beds/sea.wav", "ambience", "CC-BY-4.0"),
    ]
    assert {(row["package"], row["version"]) for row in host.rows()} == {("a-b/C.d", first)}
    assert host.rows()[0]["file"] == "audio/a-b+C.d/animals_cow.wav-000.flac"
    for row, frequency in zip(host.rows(), (300, 500, 200), strict=True):
        samples, rate = soundfile.read(host.out / row["file"])
        assert np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples) == pytest.approx(frequency, abs=2)
    assert summary.done == ("a-b/C.d",) and not summary.failed and not summary.undecodable
    statement = (host.out / "copyright" / "a-b+C.d.txt").read_text()
    assert statement == "LICENSE:\n\nCC0\n\nbeds/LICENSE.txt:\n\nby � someone\n"
    assert sorted(path.name for path in host.out.iterdir()) == sorted(
        [".lock", "audio", "copyright", "done", "manifest.csv", "packages", "work"]
    )


def test_links_and_submodules_are_not_followed(host, tmp_path):
    (tmp_path / "secret.wav").write_bytes(sound(900))
    tree = host.folder / "a/b.git"
    host.add("a/b", {"LICENSE": b"CC0", "x.wav": sound()})
    (tree / "link.wav").symlink_to(tmp_path / "secret.wav")
    commit = host.add("a/b", {})
    host.build(("a/b", commit, "wav", "effects", "CC0-1.0", "LICENSE"))
    assert [row["member"] for row in host.rows()] == ["x.wav"]


def test_what_is_there_is_neither_fetched_nor_made_again_until_the_list_changes(host):
    commit = host.add("a/b", {"LICENSE": b"CC0", "x.wav": sound(300), "y.wav": sound(400)})
    row = ("a/b", commit, "x", "effects", "CC0-1.0", "LICENSE")
    host.build(row)
    [made] = (host.out / "audio").rglob("*.flac")
    before = made.stat().st_mtime_ns
    (host.folder / "a").rename(host.folder / "away")
    host.build(row)
    assert made.stat().st_mtime_ns == before
    host.build(("a/b", commit, "x|y", "ambience", "CC0-1.0", "LICENSE"))
    assert [(row["member"], row["kind"]) for row in host.rows()] == [("x.wav", "ambience"), ("y.wav", "ambience")]


def test_what_a_package_has_stays_with_the_package(host):
    """Whatever the names: upper case sorts before lower."""
    commit = host.add("AA/bb", {"LICENSE": b"CC0", "x.wav": sound(300), "y.wav": sound(400)})
    row = ("AA/bb", commit, "wav", "effects", "CC0-1.0", "LICENSE")
    host.build(row)
    record = (host.out / "done" / "AA+bb.json").read_text()
    as_package = record.replace('"AA/bb"', '"game-data"').replace("audio/AA+bb", "audio/game-data")
    (host.out / "done" / "game-data.json").write_text(as_package)
    shutil.copytree(host.out / "audio" / "AA+bb", host.out / "audio" / "game-data")
    summary = write_manifest(host.out)
    assert summary.duplicates == 2
    assert [row["package"] for row in host.rows()] == ["game-data"] * 2
    assert host.build(row).duplicates == 2 and [row["package"] for row in host.rows()] == ["game-data"] * 2


def test_a_repository_that_fails_is_named_and_the_others_are_made(host):
    good = host.add("a/good", {"LICENSE": b"CC0", "x.wav": sound(300), "broken.wav": b"RIFF    WAVEno"})
    host.add("a/older", {"LICENSE": b"CC0", "x.wav": sound(400)})
    rows = [
        ("a/absent", good, "x", "effects", "CC0-1.0", "LICENSE"),
        ("a/good", good, "wav", "effects", "CC0-1.0", "LICENSE"),
        ("a/older", "0" * 40, "x", "effects", "CC0-1.0", "LICENSE"),
    ]
    summary = host.build(*rows, workers=2)
    assert summary.done == ("a/good",) and list(summary.undecodable) == ["a/good: broken.wav"]
    assert summary.failed.keys() == {"a/absent", "a/older"}
    assert "could not fetch" in summary.failed["a/absent"] and "a/absent.git" in summary.failed["a/absent"]
    assert "could not fetch 0000" in summary.failed["a/older"]


@pytest.mark.parametrize(
    ("under", "licence_file", "message"),
    [("no such place", "LICENSE", "'no such place'"), ("x.wav", "COPYING", "COPYING")],
)
def test_a_list_that_does_not_fit_a_repository(host, under, licence_file, message):
    commit = host.add("a/b", {"LICENSE": b"CC0", "x.wav": sound()})
    failed = host.build(("a/b", commit, under, "effects", "CC0-1.0", licence_file)).failed
    assert message in failed["a/b"]
    assert not (host.out / "done").exists() and not host.rows()


def test_the_command_and_its_exit_status(host):
    commit = host.add("a/b", {"LICENSE": b"CC0", "x.wav": sound()})
    row = ("a/b", commit, "x", "effects", "CC0-1.0", "LICENSE")
    call = ["corpus", "github", "--out", str(host.out), "--workers", "1", "--repositories"]
    result = CliRunner().invoke(app, [*call, str(host.list(row))])
    assert result.exit_code == 0, result.output
    assert "from 1 sources" in result.output
    result = CliRunner().invoke(app, [*call, str(host.list(row, ("a/c", *row[1:])))])
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a/b\t{c}\tx\teffects\tCC0", "6 columns"),
        ("a/b\t{c}\tx\teffects\t\tLICENSE", "6 columns"),
        ("../b\t{c}\tx\teffects\tCC0\tLICENSE", "OWNER/NAME"),
        ("a/..\t{c}\tx\teffects\tCC0\tLICENSE", "OWNER/NAME"),
        ("-a/b\t{c}\tx\teffects\tCC0\tLICENSE", "OWNER/NAME"),
        ("a/b\tmain\tx\teffects\tCC0\tLICENSE", "40 hexadecimal"),
        ("a/b\t{c}\t(x\teffects\tCC0\tLICENSE", "regular expression"),
        ("a/b\t{c}\tx\tbirds\tCC0\tLICENSE", "none of the kinds"),
        ("# nothing", "no repository"),
        ("a/b\t{c}\tx\teffects\tCC0\tLICENSE\na/b\t{d}\ty\teffects\tCC0\tLICENSE", "line 2: a/b has another commit"),
    ],
)
def test_lists_that_cannot_be(tmp_path, line, message):
    file = tmp_path / "list.tsv"
    file.write_text(line.format(c="0" * 40, d="1" * 40))
    with pytest.raises(CorpusError, match=r"list\.tsv") as caught:
        read_repository_list(file)
    assert message in str(caught.value)


def test_the_list_that_comes_with_the_package():
    repositories = read_repository_list()
    assert len({repository.package for repository in repositories}) == len(repositories) > 20
    assert all(part.licence and part.kind in KINDS for r in repositories for part in r.parts)
    assert not any(word in r.package.lower() for r in repositories for word in ("esc-50", "emodb", "spoken-digit"))


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match="git was not found"):
        build_repositories(tmp_path / "corpus", [])
