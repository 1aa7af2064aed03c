"""Which files are taken from folders, patterns, tables and lists, and what is said of the others."""

import io
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from m2d_embed.audio import formats
from m2d_embed.audio.find import find_audio
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.labelled import inputs as module
from m2d_embed.labelled.clips import read_labelled
from m2d_embed.labelled.inputs import find_inputs
from m2d_embed.pretrain.crops import read_crop


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def names(files: list[Path], folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in files]


@pytest.fixture
def without_av(monkeypatch):
    monkeypatch.setattr(formats, "has_av", lambda: False)


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    touch(tmp_path, "a.wav", "._a.wav", ".Trashes/b.wav", "__MACOSX/c.wav", "sub/.x/d.wav", "sub/e.W64", "sub/._f.mp3")
    assert names(find_audio([tmp_path]), tmp_path) == ["a.wav", "sub/e.W64"]
    assert names(find_audio([tmp_path / "**" / "*.wav"]), tmp_path) == ["a.wav"]
    for named in ("._a.wav", ".Trashes", ".Trashes/*.wav", "._*.wav", "__MACOSX"):
        assert len(find_audio([tmp_path / named])) == 1


def test_a_hidden_folder_that_is_named_is_searched(tmp_path):
    touch(tmp_path, ".cache/sounds/a.wav")
    assert len(find_audio([tmp_path / ".cache"])) == 1
    assert len(find_audio([tmp_path / ".cache" / "*" / "*.wav"])) == 1


def test_hidden_folders_are_no_labels(tmp_path):
    touch(tmp_path, *(f"{label}/{i}.wav" for label in ("cat", "dog") for i in range(5)))
    touch(tmp_path, "cat/._0.wav", "__MACOSX/cat/._0.wav", ".Trashes/dog/1.wav", "._loose.wav")
    clips = read_labelled(tmp_path)
    assert clips.label_names == ("cat", "dog") and len(clips) == 10


def test_what_only_ffmpeg_reads_is_taken_or_named(tmp_path, caplog, monkeypatch):
    touch(tmp_path, "a.wav", "b.m4a", "sub/c.M4A", "d.webm", "e.txt")
    assert names(find_audio([tmp_path]), tmp_path) == ["a.wav", "b.m4a", "d.webm", "sub/c.M4A"]
    monkeypatch.setattr(formats, "has_av", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert names(find_audio([tmp_path]), tmp_path) == ["a.wav"]
    assert caplog.messages == [
        "3 files with other endings left out (.m4a 2, .webm 1); pip install 'm2d-embed[av]' reads them."
    ]


def test_a_folder_of_nothing_but_these(tmp_path, without_av):
    touch(tmp_path, "b.m4a")
    with pytest.raises(
        AudioError, match=r"no audio files .* 1 file with other endings left out \(\.m4a 1\); pip install"
    ):
        find_audio([tmp_path])


def test_one_warning_for_all_labels(tmp_path, without_av, caplog):
    touch(tmp_path, *(f"{label}/{i}.wav" for label in ("cat", "dog") for i in range(5)), "cat/x.m4a", "dog/y.m4a")
    assert len(read_labelled(tmp_path)) == 10
    assert [m for m in caplog.messages if "left out" in m] == [
        "2 files with other endings left out (.m4a 2); pip install 'm2d-embed[av]' reads them."
    ]


# --- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["a.wav\nsub/b.wav\n", "a.wav\r\n\r\nsub/b.wav", "\ufeffa.wav\nsub/b.wav", "a.wav\0sub/b.wav\0"]
)
def test_lists(tmp_path, monkeypatch, content):
    touch(tmp_path, "a.wav", "sub/b.wav")
    (tmp_path / "list.txt").write_text(content, newline="", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert find_inputs([], Path("list.txt")) == [Path("a.wav"), Path("sub/b.wav")]
    monkeypatch.setattr(module.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
    assert find_inputs([], Path("-")) == [Path("a.wav"), Path("sub/b.wav")]
    monkeypatch.chdir(tmp_path / "sub")
    assert names(find_inputs([], tmp_path / "list.txt"), tmp_path) == ["a.wav", "sub/b.wav"]  # beside the list


def test_tables(tmp_path):
    touch(tmp_path, "a.wav", "audio/b.wav", "c.wav")
    (tmp_path / "t.csv").write_text("label,file\nx,a.wav\ny,b.wav\nz,a.wav\nz,missing.wav\n")
    for found in (find_inputs([tmp_path / "t.csv"]), find_inputs([], tmp_path / "t.csv")):
        assert names(found, tmp_path) == ["a.wav", "audio/b.wav", "missing.wav"]
    both = find_inputs([tmp_path / "c.wav", tmp_path / "a.wav"], tmp_path / "t.csv")
    assert names(both, tmp_path) == ["c.wav", "a.wav", "audio/b.wav", "missing.wav"]


def test_names_of_any_bytes_in_a_list(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9\xe2\x80\xa8.wav"
    Path(os.fsdecode(name)).write_bytes(b"")
    (tmp_path / "list.txt").write_bytes(name + b"\n")
    assert [os.fsencode(file) for file in find_inputs([], tmp_path / "list.txt")] == [name]


def test_bad_lists(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "other.csv").write_text("path\na.wav\n")
    (tmp_path / "gap.csv").write_text("file,label\n,x\n")
    for inputs, listing, message in (
        ([], None, "Name sound files"),
        ([], "empty.txt", "the list names no files"),
        ([], "nowhere.txt", "this list cannot be read"),
        (["other.csv"], None, "the column 'file' is missing"),
        (["gap.csv"], None, "line 2: the column 'file' is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_inputs([tmp_path / name for name in inputs], listing and tmp_path / listing)
    with pytest.raises(ConfigError, match="--list -"):
        find_inputs([Path("-")])


@pytest.mark.skipif(os.sep != "/", reason="backslashes separate folders there")
def test_a_hint_at_backslashes(tmp_path):
    (tmp_path / "t.csv").write_text("file,label\naudio\\x.wav,a\naudio\\y.wav,b\n")
    with pytest.raises(AudioError, match=r"2 of 2 files are missing: .*x\.wav.* has backslashes; here .* by /"):
        read_labelled(tmp_path / "t.csv")
    with pytest.raises(AudioError, match=r"no such file.* has backslashes"):
        read_crop(tmp_path / "audio\\x.wav", 16_000, 10, None, "x")
    with pytest.raises(AudioError, match=r"no such file or folder.* has backslashes"):
        find_audio([tmp_path / "audio\\x.wav"])
