"""Building a corpus from git repositories: tiny ones are made here, and git takes them for those of GitHub."""

import csv
import io
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import soundfile
import yaml
from typer.testing import CliRunner

from benchmarks.corpus import KINDS, CorpusError, build_repositories, read_repository_list
from benchmarks.corpus.__main__ import app
from benchmarks.corpus.manifest import write_manifest

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

    def list(self, *repositories):
        file = self.folder.parent / "list.yaml"
        file.write_text("# comment\n" + yaml.safe_dump(repositories))
        return file

    def build(self, *repositories, workers=1):
        return build_repositories(self.out, read_repository_list(self.list(*repositories)), workers)

    def rows(self):
        with (self.out / "manifest.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))


def listed(name, commit, *sounds, licence_files=("LICENSE",)):
    """A row of a list; effects of CC0 in the whole repository unless ``sounds`` say otherwise."""
    everything = {"folder": "", "kind": "effects", "licence": "CC0-1.0"}
    parts = [everything | part for part in sounds or [{}]]
    return {"repository": name, "commit": commit, "licence_files": list(licence_files), "sounds": parts}


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
            "animals/calves/calf.wav": sound(350),
            "animals/pig.ogg": sound(450),
            "animals/dogs.zip": archive.getvalue(),
            "beds/sea.wav": sound(200),
            "music/song.wav": sound(400),
        },
    )
    host.add("a-b/C.d", {"animals/cow.wav": sound(700), "animals/new.wav": sound(800)})
    animals = {"folder": "animals", "only": ["*.wav", "*.zip"], "without": ["calves/*"]}
    beds = {"folder": "beds", "kind": "ambience", "licence": "CC-BY-4.0"}
    files = ["LICENSE", "beds/LICENSE.txt"]
    summary = host.build(listed("a-b/C.d", first, animals, beds, licence_files=files))
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
    host.build(listed("a/b", commit))
    assert [row["member"] for row in host.rows()] == ["x.wav"]


def test_what_is_there_is_neither_fetched_nor_made_again_until_the_list_changes(host):
    commit = host.add("a/b", {"LICENSE": b"CC0", "x.wav": sound(300), "y.wav": sound(400)})
    row = listed("a/b", commit, {"only": ["x.wav"]})
    host.build(row)
    [made] = (host.out / "audio").rglob("*.flac")
    before = made.stat().st_mtime_ns
    (host.folder / "a").rename(host.folder / "away")
    host.build(row)
    assert made.stat().st_mtime_ns == before
    host.build(listed("a/b", commit, {"kind": "ambience"}))
    assert [(row["member"], row["kind"]) for row in host.rows()] == [("x.wav", "ambience"), ("y.wav", "ambience")]


def test_what_a_package_has_stays_with_the_package(host):
    """Whatever the names: upper case sorts before lower."""
    commit = host.add("AA/bb", {"LICENSE": b"CC0", "x.wav": sound(300), "y.wav": sound(400)})
    row = listed("AA/bb", commit)
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
    rows = [listed("a/absent", good), listed("a/good", good), listed("a/older", "0" * 40)]
    summary = host.build(*rows, workers=2)
    assert summary.done == ("a/good",) and list(summary.undecodable) == ["a/good: broken.wav"]
    assert summary.failed.keys() == {"a/absent", "a/older"}
    assert "could not fetch" in summary.failed["a/absent"] and "a/absent.git" in summary.failed["a/absent"]
    assert "could not fetch 0000" in summary.failed["a/older"]


@pytest.mark.parametrize(
    ("sounds", "licence_file", "message"),
    [
        ({"folder": "no such place"}, "LICENSE", "folder 'no such place' has no file *"),
        ({"only": ["*.ogg", "*.mp3"]}, "LICENSE", "folder '' has no file *.ogg or *.mp3"),
        ({}, "COPYING", "COPYING"),
    ],
)
def test_a_list_that_does_not_fit_a_repository(host, sounds, licence_file, message):
    commit = host.add("a/b", {"LICENSE": b"CC0", "x.wav": sound()})
    failed = host.build(listed("a/b", commit, sounds, licence_files=[licence_file])).failed
    assert message in failed["a/b"]
    assert not (host.out / "done").exists() and not host.rows()


def test_the_command_and_its_exit_status(host):
    commit = host.add("a/b", {"LICENSE": b"CC0", "x.wav": sound()})
    row = listed("a/b", commit)
    call = ["github", "--out", str(host.out), "--workers", "1", "--repositories"]
    result = CliRunner().invoke(app, [*call, str(host.list(row))])
    assert result.exit_code == 0, result.output
    assert "from 1 sources" in result.output
    result = CliRunner().invoke(app, [*call, str(host.list(row, listed("a/c", commit)))])
    assert result.exit_code == 1


C = "0" * 40


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a/b", "a mapping of repository, commit, licence_files, sounds is expected"),
        ({"repository": "a/b"}, "key 'commit' is missing"),
        (listed("../b", C), "OWNER/NAME"),
        (listed("a/..", C), "OWNER/NAME"),
        (listed("-a/b", C), "OWNER/NAME"),
        (listed("a/b", "main"), "40 hexadecimal"),
        (listed("a/b", 10), "'commit' must be str"),
        (listed("a/b", C, licence_files=[]), "no file is named that states the licences"),
        (listed("a/b", C) | {"sounds": []}, "no sounds are named"),
        (listed("a/b", C, {"kind": "birds"}), "'kind' must be Literal"),
        (listed("a/b", C, {"licence": " "}), "licence is empty"),
        (listed("a/b", C, {"folder": "/etc"}), "folder '/etc' is not in the repository"),
        (listed("a/b", C, {"folder": "x/../.."}), "is not in the repository"),
        (listed("a/b", C, {"only": "*.wav"}), "'only' must be tuple"),
        (listed("a/b", C, {"pattern": "*.wav"}), "unknown key 'pattern'"),
    ],
)
def test_rows_that_cannot_be(tmp_path, row, message):
    file = tmp_path / "list.yaml"
    file.write_text(yaml.safe_dump([listed("a/good", C), row]))
    with pytest.raises(CorpusError, match=r"list\.yaml, repository 2: ") as caught:
        read_repository_list(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing", "a list of repositories is expected"),
        ("a/b: {}", "a list of repositories is expected"),
        ("[a", "not valid YAML"),
        (yaml.safe_dump([listed("a/b", C), listed("a/c", C), listed("a/b", C)]), "a/b is named twice"),
    ],
)
def test_lists_that_cannot_be(tmp_path, text, message):
    file = tmp_path / "list.yaml"
    file.write_text(text)
    with pytest.raises(CorpusError, match=r"list\.yaml: ") as caught:
        read_repository_list(file)
    assert message in str(caught.value)


def test_the_list_that_comes_with_the_package():
    repositories = read_repository_list()
    assert len({repository.package for repository in repositories}) == len(repositories) > 20
    assert all(part.licence and part.kind in KINDS for r in repositories for part in r.sounds)
    assert not any(word in r.package.lower() for r in repositories for word in ("esc-50", "emodb", "spoken-digit"))


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match="git was not found"):
        build_repositories(tmp_path / "corpus", [])
