"""Building a corpus from Debian packages: tiny ones are built here, and a stand-in for `apt-get` copies them."""

import csv
import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import filelock
import numpy as np
import pytest
import soundfile

from benchmarks.corpus import CorpusError, build_debian, kind_of, read_package_list
from benchmarks.corpus.containers import deb_entries
from benchmarks.corpus.convert import read_sound, segment_names
from benchmarks.corpus.licences import Licences
from benchmarks.corpus.members import Member, Unreadable, audio_members, what_is
from m2d_embed.errors import AudioError

pytest.importorskip("av", reason="needs the extra pretrain")

DEP5 = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: game

Files: *
Copyright: 2020 Someone
License: GPL-2+

Files: data/music/* src/one.ogg
Copyright: 2021 A Composer
License: CC-BY-SA-3.0
 Long text of the licence.
 .
 Files: not-a-field

Files: data/music/special.ogg
Copyright: 2021 Another
License: CC0-1.0

Files: music/*
Copyright: 2021 A Third
License: Artistic

Files: debian/* debian/sounds/*
Copyright: 2022 A Maintainer
License: MIT

License: GPL-2+
 On Debian systems ...
"""

#: What stands in for apt-get: it knows the packages of a JSON file, and copies them.
APT_GET = """\
#!{python}
import json, shutil, sys
index = json.load(open({index!r}))
command, *names = sys.argv[1:]
assert command == "download"
open({log!r}, "a").write(" ".join(names) + "\\n")
status = 0
for name in [n.split("=")[0] for n in names if n != "--print-uris"]:
    if name not in index:
        print(f"E: Unable to locate package {{name}}", file=sys.stderr)
        status = 100
    elif "--print-uris" in names:
        file, sha256 = index[name]
        base = file.rsplit("/", 1)[1]
        print(f"'http://archive.example/{{base}}' {{base}} 1234 SHA256:{{sha256}}")
    else:
        shutil.copy(index[name][0], ".")
sys.exit(status)
"""


def tone(seconds=0.5, frequency=440.0, rate=16_000, gain=0.5):
    return (gain * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples, rate=16_000, **settings):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **settings})
    return file.getvalue()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def soundfont(samples, rate=16_000):
    """An sf2 of (name, content, kind): int16 arrays or, for kind & 16, the bytes of an Ogg file."""
    waves, headers = b"", b""
    for name, content, kind in samples:
        start = len(waves) if kind & 16 else len(waves) // 2
        waves += content if kind & 16 else content.astype("<i2").tobytes()
        end = len(waves) if kind & 16 else len(waves) // 2
        headers += struct.pack("<20s5IBbHH", name.encode(), start, end, 0, 0, rate, 60, 0, 0, kind)
    headers += struct.pack("<20s5IBbHH", b"EOS", 0, 0, 0, 0, 0, 0, 0, 0, 0)

    def chunk(name, content):
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    body = chunk(b"LIST", b"INFO" + chunk(b"INAM", b"odd"))
    body += chunk(b"LIST", b"sdta" + chunk(b"smpl", waves)) + chunk(b"LIST", b"pdta" + chunk(b"shdr", headers))
    return chunk(b"RIFF", b"sfbk" + body)


def qt_resource(files):
    """A version 3 resource of (folder, name, content, is compressed), one level of folders."""
    names, data, tree = b"", b"", []

    def name(text):
        nonlocal names
        offset = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return offset

    tree.append(struct.pack(">IHIIQ", 0, 2, len(files), 1, 0))
    for number, (folder, *_) in enumerate(files):
        tree.append(struct.pack(">IHIIQ", name(folder), 2, 1, 1 + len(files) + number, 0))
    for _, file, content, compressed in files:
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if compressed else content
        tree.append(struct.pack(">IHHHIQ", name(file), int(compressed), 0, 0, len(data), 0))
        data += struct.pack(">I", len(stored)) + stored
    nodes = b"".join(tree)
    return struct.pack(">4s5I", b"qres", 3, 24, 24 + len(nodes), 24 + len(nodes) + len(data), 0) + nodes + data + names


def quake_pak(files):
    body, directory = b"", b""
    for name, content in files.items():
        directory += struct.pack("<56sII", name.encode(), 12 + len(body), len(content))
        body += content
    return struct.pack("<4sII", b"PACK", 12 + len(body), len(directory)) + body + directory


class Archive:
    """An archive of packages made in a test, and the corpus built from it."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.out, self.log = folder / "archive", folder / "corpus", folder / "apt.log"
        self.index = {}
        programs = folder / "programs"
        for made in (self.folder, programs):
            made.mkdir()
        program = programs / "apt-get"
        index_file = folder / "index.json"
        program.write_text(APT_GET.format(python=sys.executable, index=str(index_file), log=str(self.log)))
        program.chmod(0o755)
        self._index_file = index_file
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def add(self, package, members, version="1.0-1", copyright_text=DEP5):
        tree = self.folder / package
        members = {**members, f"usr/share/doc/{package}/copyright": copyright_text.encode()}
        for path, content in members.items():
            file = tree / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (tree / "DEBIAN").mkdir()
        control = (
            f"Package: {package}\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@x.org>\nDescription: x\n"
        )
        (tree / "DEBIAN" / "control").write_text(control)
        deb = self.folder / f"{package}_{version.replace(':', '%3a')}_all.deb"
        command = ["dpkg-deb", "-Znone", "--root-owner-group", "--build", tree, deb]
        subprocess.run(command, check=True, capture_output=True)
        self.register(package, deb)
        return deb

    def register(self, package, deb, sha256=None):
        self.index[package] = (str(deb), sha256 or hashlib.sha256(deb.read_bytes()).hexdigest())
        self._index_file.write_text(json.dumps(self.index))

    def build(self, *packages, workers=1):
        self.messages = []
        return build_debian(self.out, packages, workers, lambda *message: self.messages.append(message))

    def rows(self):
        with (self.out / "manifest.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))

    def members(self):
        return sorted({row["member"].rsplit("/", 1)[1] for row in self.rows()})

    def downloads(self):
        return [line for line in self.log.read_text().splitlines() if "=" in line]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    return Archive(tmp_path, monkeypatch)


def found_in(deb, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return [
        (m.path, m.file.read_bytes()) if isinstance(m, Member) else m
        for m in audio_members(deb_entries(deb), scratch)
        if isinstance(m, Unreadable) or m.format != "copyright"
    ]


def test_a_package_becomes_16_khz_flac_with_a_manifest(archive):
    stereo = np.stack([tone(61, 300, 44_100), tone(61, 300, 44_100)], axis=1)
    archive.add(
        "game-data",
        {
            "usr/share/games/game/data/music/long one.flac": encoded(stereo, 44_100, format="FLAC"),
            "usr/share/games/game/sounds/hit.wav": encoded(tone(0.25, 500, 8_000), 8_000),
            "usr/share/games/game/readme.txt": b"text",
        },
        version="2:1.5+x-1",
    )
    summary = archive.build("game-data")
    rows = archive.rows()
    assert [row["member"].rsplit("/", 1)[1] for row in rows] == ["long one.flac"] * 3 + ["hit.wav"]
    for row in rows:
        info = soundfile.info(archive.out / row["file"])
        assert (info.samplerate, info.channels, info.format, info.subtype) == (16_000, 1, "FLAC", "PCM_16")
        assert info.frames / 16_000 == pytest.approx(float(row["seconds"]), abs=1e-3)
    assert float(rows[0]["seconds"]) == pytest.approx(61 / 3, abs=0.01)
    assert {row["version"] for row in rows} == {"2:1.5+x-1"}
    assert [row["kind"] for row in rows] == ["music"] * 3 + ["effects"]
    assert [row["licence"] for row in rows] == ["CC-BY-SA-3.0"] * 3 + ["GPL-2+"]
    assert rows[0]["file"] == "audio/game-data/usr_share_games_game_data_music_long_one.flac-000.flac"
    assert summary.hours["music"] == pytest.approx(61 / 3600, rel=1e-3)
    assert summary.hours["effects"] == pytest.approx(0.25 / 3600, rel=1e-3)
    assert summary.done == ("game-data",) and not (summary.missing or summary.failed or summary.undecodable)
    assert (archive.out / "copyright" / "game-data.txt").read_text() == DEP5
    samples, _ = soundfile.read(archive.out / rows[0]["file"])
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.05)
    spectrum = np.abs(np.fft.rfft(samples[:16_000]))
    assert spectrum.argmax() == 300  # Hz


def test_archives_inside_archives_are_read_and_nothing_escapes(archive, tmp_path):
    outside = tmp_path / "x.wav"
    sounds = [encoded(tone(0.3, 200 + 100 * i)) for i in range(6)]
    evil_tar = io.BytesIO()
    with tarfile.open(fileobj=evil_tar, mode="w:gz") as tar:
        for name, content in {"../../../../x.wav": sounds[0], str(outside): sounds[1]}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    inner = zipped({"sound/in.wav": sounds[2], "../../x.wav": sounds[3]})
    archive.add(
        "game-data",
        {
            "usr/lib/kit.h2drumkit": evil_tar.getvalue(),
            "usr/lib/outer.pk3": zipped({"inner.zip": inner, "noise.txt": b"no"}),
            "usr/lib/pak0.pak": quake_pak({"sound/quake.wav": sounds[4]}),
            "usr/lib/noending": sounds[5],
        },
    )
    before = set(tmp_path.rglob("*.wav"))
    summary = archive.build("game-data")
    assert not summary.undecodable
    assert {row["member"] for row in archive.rows()} == {
        "usr/lib/kit.h2drumkit/../../../../x.wav",
        f"usr/lib/kit.h2drumkit/{outside}",
        "usr/lib/outer.pk3/inner.zip/sound/in.wav",
        "usr/lib/outer.pk3/inner.zip/../../x.wav",
        "usr/lib/pak0.pak/sound/quake.wav",
        "usr/lib/noending",
    }
    assert set(tmp_path.rglob("*.wav")) == before
    folder = archive.out / "audio" / "game-data"
    assert all(file.parent == folder for file in archive.out.rglob("*.flac"))
    assert len(list(folder.iterdir())) == 6


def test_soundfont_samples_keep_their_rate_and_halves_of_a_stereo_sample_count_once(archive):
    pcm = [(32_767 * tone(s, f, 8_000)).astype(np.int16) for s, f in [(0.5, 300), (0.4, 400), (0.4, 401), (0.05, 500)]]
    kinds = [1, 4, 2, 1]
    font = [(f"sample {i}", p, k) for i, (p, k) in enumerate(zip(pcm, kinds, strict=True))]
    archive.add("piano-soundfont", {"usr/share/piano.sf2": soundfont(font, 8_000)})
    summary = archive.build("piano-soundfont")
    rows = archive.rows()
    assert [row["member"] for row in rows] == [
        "usr/share/piano.sf2/0000-sample 0.wav",
        "usr/share/piano.sf2/0001-sample 1.wav",
    ]
    assert [float(row["seconds"]) for row in rows] == [0.5, 0.4]
    assert {row["kind"] for row in rows} == {"instrument"}
    assert summary.too_short == 1
    for row, frequency in zip(rows, (300, 400), strict=True):
        samples, rate = soundfile.read(archive.out / row["file"])
        assert np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples) == pytest.approx(frequency, abs=1)


def test_compressed_soundfonts_and_qt_resources(archive, tmp_path):
    vorbis = encoded(tone(0.5, 300), format="OGG")
    stored, compressed = encoded(tone(0.5, 350)), encoded(tone(0.5, 450))
    resource = qt_resource([("voices", "über.wav", stored, False), ("music", "two.wav", compressed, True)])
    deb = archive.add("game-data", {"usr/a.sf3": soundfont([("v", vorbis, 17)]), "usr/b.rcc": resource})
    assert found_in(deb, tmp_path) == [
        ("usr/a.sf3/0000-v.ogg", vorbis),
        ("usr/b.rcc/voices/über.wav", stored),
        ("usr/b.rcc/music/two.wav", compressed),
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pk3", b"PK\3\4 nothing behind it", "File is not a zip file"),
        ("a.sf2", b"RIFF\x04\0\0\0sfbk", "without samples"),
        ("a.rcc", b"qres\0\0\0\3" + b"\xff" * 16, "unpack_from"),
        ("a.pak", struct.pack("<4sII", b"PACK", 12, 64) + struct.pack("<56sII", b"x.wav", 0, 9999), "beyond the end"),
        ("a.tar.gz", b"\x1f\x8b\x08 no gzip", "damaged"),
    ],
)
def test_a_damaged_archive_is_named_and_the_rest_is_taken(archive, name, content, reason):
    archive.add("game-data", {f"usr/1/{name}": content, "usr/2/good.wav": encoded(tone())})
    summary = archive.build("game-data")
    assert list(summary.undecodable) == [f"game-data: usr/1/{name}"]
    assert reason in summary.undecodable[f"game-data: usr/1/{name}"]
    assert archive.members() == ["good.wav"]


def test_one_bad_member_does_not_end_its_zip(archive):
    content = bytearray(zipped({"a.wav": encoded(tone(0.5, 300)), "b.wav": encoded(tone(0.5, 400))}))
    content[3000] ^= 0xFF  # inside a.wav, stored: its checksum is wrong now
    archive.add("game-data", {"usr/a.zip": bytes(content)})
    summary = archive.build("game-data")
    assert list(summary.undecodable) == ["game-data: usr/a.zip/a.wav"]
    assert "CRC" in summary.undecodable["game-data: usr/a.zip/a.wav"]
    assert archive.members() == ["b.wav"]


def test_endless_nesting_stops(archive, tmp_path):
    content = encoded(tone())
    for _ in range(6):
        content = zipped({"in.zip": content})
    deb = archive.add("game-data", {"usr/a.zip": content})
    (found,) = found_in(deb, tmp_path)
    assert isinstance(found, Unreadable) and "3 deep" in found.reason


def test_silence_short_and_undecodable_members_are_counted(archive):
    archive.add(
        "game-data",
        {
            "usr/silent.wav": encoded(np.zeros(16_000)),
            "usr/short.wav": encoded(tone(0.09)),
            "usr/half.wav": encoded(np.concatenate([np.zeros(20 * 16_000), tone(20)])),
            "usr/text.wav": b"this is not audio",
            "usr/nan.wav": encoded(np.full(16_000, np.nan), subtype="FLOAT"),
        },
    )
    summary = archive.build("game-data")
    assert (summary.silent, summary.too_short) == (2, 1)
    assert sorted(summary.undecodable) == ["game-data: usr/nan.wav", "game-data: usr/text.wav"]
    assert "NaN" in summary.undecodable["game-data: usr/nan.wav"]
    assert "scratch" not in str(summary.undecodable)
    assert [row["member"] for row in archive.rows()] == ["usr/half.wav"]


def test_duplicates_are_dropped_within_and_across_packages(archive):
    one, two = encoded(tone(1, 300)), tone(1, 400)
    archive.add("a-game", {"usr/x/one.wav": one, "usr/y/same.wav": one, "usr/x/two.ogg": encoded(two, format="OGG")})
    pcm, _ = soundfile.read(io.BytesIO(one), dtype="int16")
    archive.add("b-game", {"usr/z/again.flac": encoded(pcm, format="FLAC")})
    # the same sound in another format, once beside it and once in a package of its own
    archive.add("c-sounds-ogg", {"usr/ogg/two.ogg": encoded(two, format="OGG"), "usr/q.wav": encoded(tone(1, 500))})
    archive.add("c-sounds-wav", {"usr/wav/two.wav": encoded(two), "usr/q.flac": encoded(tone(2, 600), format="FLAC")})
    names = ("b-game", "c-sounds-wav", "c-sounds-ogg", "a-game")
    summary = archive.build(*names)
    kept = [row["member"] for row in archive.rows()]
    assert kept == ["usr/x/one.wav", "usr/x/two.ogg", "usr/q.wav", "usr/q.flac"]
    assert summary.duplicates == 4
    files = sorted(str(file.relative_to(archive.out)) for file in archive.out.rglob("*.flac"))
    assert files == sorted(row["file"] for row in archive.rows())
    before = (archive.out / "manifest.csv").read_bytes()
    again = archive.build(*names)
    assert (archive.out / "manifest.csv").read_bytes() == before
    assert again == summary


def test_loud_audio_neither_wraps_nor_clips(tmp_path):
    file = tmp_path / "loud"
    file.write_bytes(encoded(tone(1, 300, gain=4.0), subtype="FLOAT"))
    (segment,) = read_sound(file, "wav").segments
    assert segment.max() == 32_767 and segment.min() == -32_767
    reference = 32_767 * tone(1, 300, gain=1.0)
    assert np.abs(segment - reference).max() < 40


@pytest.mark.parametrize(("codec", "rate"), [("g722", 16_000), ("wav", 8_000)])
def test_ffmpeg_decodes_what_libsndfile_does_not(tmp_path, codec, rate):
    import av

    file = tmp_path / "sound"
    with av.open(str(file), "w", format=codec) as container:
        stream = container.add_stream({"g722": "g722", "wav": "adpcm_ima_wav"}[codec], rate=rate)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray((32_767 * tone(1, 300, rate))[None].astype(np.int16), "s16", "mono")
        frame.rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (segment,) = read_sound(file, codec).segments
    assert len(segment) == pytest.approx(16_000, abs=1200)
    bins = np.abs(np.fft.rfft(segment))
    assert bins.argmax() * 16_000 / len(segment) == pytest.approx(300, abs=2)


def test_undecodable_audio_says_what_both_decoders_said(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"RIFF....WAVEnonsense")
    with pytest.raises(AudioError, match=r"not audio.*FFmpeg cannot decode it"):
        read_sound(file, "wav")


@pytest.mark.parametrize(("lacking", "is_taken"), [(104, True), (4_000, False)])
def test_a_file_may_lack_a_tiny_rest_but_no_more(tmp_path, lacking, is_taken):
    content = bytearray(encoded(tone(2, 300), format="FLAC"))
    total = int.from_bytes(content[21:26], "big")  # the number of samples, after four bits of something else
    content[21:26] = (total + lacking).to_bytes(5, "big")
    file = tmp_path / "sound"
    file.write_bytes(content)
    if is_taken:
        assert read_sound(file, "flac").seconds == pytest.approx(2, abs=0.05)
    else:
        with pytest.raises(AudioError, match="truncated"):
            read_sound(file, "ogg")  # FFmpeg, that would not mind, is told a wrong format


def test_what_a_member_is_tells_its_first_bytes():
    assert what_is("music/title", b"OggS....") == "ogg"
    assert what_is("a.ogg", b"RIFF....WAVE") == "wav"
    assert what_is("a.g722", b"\x01\x02") == "g722"
    assert what_is("a.pak", b"PACK") == "pak" and what_is("objects.pack", b"PACK") is None
    assert what_is("usr/share/doc/x/copyright", b"Format:") == "copyright"
    for other in ("a.mid", "a.mod", "a.xm", "a.txt", "a.gz"):
        assert what_is(other, b"MThd") is None


def test_file_names_are_safe_and_differ():
    taken = set()
    paths = ["a b.wav", "a_b.wav", "A_b.wav", "../../x", "x" * 500, "y" + "x" * 500, "\n/é", "..", "-rf"]
    names = [next(segment_names(path, 1, taken)) for path in paths]
    assert len({name.lower() for name in names}) == len(paths)
    assert names[0] == "a_b.wav-000.flac" and names[3] == "x-000.flac"
    for name in names:
        assert len(name) < 150 and name.isascii() and "/" not in name and name[0] not in ".-_"


def test_a_rerun_goes_on_where_a_killed_run_was(archive):
    archive.add("a-game", {"usr/a.wav": encoded(tone(1, 300))})
    archive.add("b-game", {"usr/b.wav": encoded(tone(1, 400))})
    first = archive.build("a-game", "b-game")
    assert len(archive.downloads()) == 2
    before = (archive.out / "manifest.csv").read_bytes()
    stamp = next((archive.out / "audio" / "a-game").iterdir()).stat().st_mtime_ns
    # as a run killed in the middle of b-game leaves it
    (archive.out / "done" / "b-game.json").unlink()
    half = archive.out / "work" / "b-game" / "audio"
    half.mkdir(parents=True)
    (half / "rubbish.flac").write_bytes(b"half")
    (archive.out / "audio" / "b-game" / "stale.flac").write_bytes(b"old")
    assert archive.build("a-game", "b-game") == first
    assert [message for message, *_ in archive.messages] == [
        "1 were done before, 0 are missing",
        "b-game: 0.00 h",
    ]
    assert len(archive.downloads()) == 2, "a verified download is not repeated"
    assert (archive.out / "manifest.csv").read_bytes() == before
    assert next((archive.out / "audio" / "a-game").iterdir()).stat().st_mtime_ns == stamp
    assert [file.name for file in (archive.out / "audio" / "b-game").iterdir()] == ["usr_b.wav-000.flac"]
    assert not list((archive.out / "work").iterdir())


def test_a_new_version_is_made_again(archive):
    archive.add("a-game", {"usr/a.wav": encoded(tone(1, 300))})
    archive.build("a-game")
    shutil.rmtree(archive.folder / "a-game")
    archive.add("a-game", {"usr/new.wav": encoded(tone(1, 300))}, version="1.1-1")
    archive.build("a-game")
    assert [(row["member"], row["version"]) for row in archive.rows()] == [("usr/new.wav", "1.1-1")]
    assert [file.name for file in archive.out.rglob("*.flac")] == ["usr_new.wav-000.flac"]


def test_sounds_that_vanished_are_made_again(archive):
    archive.add("a-game", {"usr/a.wav": encoded(tone(1, 300))})
    archive.build("a-game")
    next(archive.out.rglob("*.flac")).unlink()
    summary = archive.build("a-game")
    assert "vanished" in summary.failed["a-game"] and summary.done == () and not archive.rows()
    assert archive.build("a-game").done == ("a-game",)
    assert archive.members() == ["a.wav"]


def test_missing_broken_and_wrong_packages_are_named(archive):
    archive.add("good", {"usr/a.wav": encoded(tone())})
    broken = archive.folder / "broken_1_all.deb"
    broken.write_bytes(b"!<arch>\nnothing")
    archive.register("broken", broken)
    truncated = archive.add("truncated", {"usr/a.wav": encoded(tone(5, 333)), "usr/b.wav": encoded(tone(5, 444))})
    truncated.write_bytes(truncated.read_bytes()[:100_000])
    archive.register("truncated", truncated)
    wrong = archive.add("wrong", {"usr/b.wav": encoded(tone(1, 700))})
    archive.register("wrong", wrong, sha256="0" * 64)
    summary = archive.build("gone", "broken", "truncated", "wrong", "good")
    assert summary.done == ("good",) and archive.members() == ["a.wav"]
    assert summary.missing == {"gone": "Unable to locate package gone"}
    assert sorted(summary.failed) == ["broken", "truncated", "wrong"]
    assert "not a Debian package" in summary.failed["broken"]
    assert "not a Debian package" in summary.failed["truncated"]
    assert "0000" in summary.failed["wrong"] and "http://archive.example/wrong" in summary.failed["wrong"]
    assert not (archive.out / "packages" / "wrong_1.0-1_all.deb").exists()
    assert not list((archive.out / "audio").glob("[!g]*"))


def test_a_damaged_download_is_fetched_again(archive):
    deb = archive.add("good", {"usr/a.wav": encoded(tone())})
    (archive.out / "packages").mkdir(parents=True)
    (archive.out / "packages" / deb.name).write_bytes(deb.read_bytes()[:500])
    assert archive.build("good").done == ("good",)


def test_workers_make_the_same_corpus(archive, tmp_path):
    same = encoded(tone(1, 300))
    for name in ("a-game", "b-game", "c-game"):
        archive.add(name, {"usr/same.wav": same, f"usr/{name}.wav": encoded(tone(1, 300 + 50 * ord(name[0])))})
    archive.build("c-game", "b-game", "a-game", workers=2)
    parallel = (archive.out / "manifest.csv").read_bytes()
    assert len(archive.rows()) == 4
    archive.out = tmp_path / "other"
    archive.build("a-game", "b-game", "c-game")
    assert (archive.out / "manifest.csv").read_bytes() == parallel


def test_the_manifest_is_a_source_for_pre_training(archive):
    sources = pytest.importorskip("m2d_embed.pretrain.sources")
    archive.add("a-game", {"usr/a.zip": zipped({'odd, "name"\nž.wav': encoded(tone(1, 300))})})
    archive.build("a-game")
    (item,) = sources.read_source(str(archive.out / "manifest.csv"))
    assert Path(item.file).is_file()


def test_errors_before_anything_is_done(archive, monkeypatch, tmp_path):
    archive.add("good", {})
    with pytest.raises(CorpusError, match="apt-get update"):
        archive.build("gone")
    with pytest.raises(CorpusError, match="'--evil' is not the name"):
        archive.build("--evil")
    with pytest.raises(CorpusError, match="no package is named"):
        archive.build()
    with pytest.raises(CorpusError, match="workers=0"):
        archive.build("good", workers=0)
    with filelock.FileLock(archive.out / ".lock"), pytest.raises(CorpusError, match="another process"):
        archive.build("good")
    (archive.out / "done").mkdir()
    (archive.out / "done" / "good.json").write_text("{")
    with pytest.raises(CorpusError, match=r"good\.json"):
        archive.build("good")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match="apt-get was not found"):
        archive.build("good")


def test_package_lists(tmp_path):
    built_in = read_package_list()
    assert len(built_in) == len(set(built_in)) > 90 and "hydrogen-data" in built_in
    file = tmp_path / "list"
    file.write_text("# mine\nb-game\ta note\n\na-game\nb-game\n")
    assert read_package_list(file) == ["b-game", "a-game"]
    for content, problem in [("", "no package"), ("../x\n", "not the name"), ("a_b\n", "not the name")]:
        file.write_text(content)
        with pytest.raises(CorpusError, match=problem):
            read_package_list(file)
    with pytest.raises(CorpusError, match="cannot be read"):
        read_package_list(tmp_path / "none")


@pytest.mark.parametrize(
    ("member", "licence"),
    [
        ("usr/share/games/game/sounds/x.wav", "GPL-2+"),
        ("usr/share/games/game/data/music/sub/a.ogg", "CC-BY-SA-3.0"),
        ("usr/share/games/game/music/a.ogg", "Artistic"),
        ("usr/share/music/data/a.ogg", "Artistic"),
        ("usr/share/games/game/music/special.ogg", "CC0-1.0"),
        ("usr/share/games/game/special.ogg", "CC0-1.0"),
        ("usr/share/other/one.ogg", "CC-BY-SA-3.0"),
        ("usr/share/other/notone.ogg", "GPL-2+"),
        ("usr/share/game.zip/data/music/a.ogg", "CC-BY-SA-3.0"),
    ],
)
def test_licences_of_members(member, licence):
    assert Licences(DEP5).of(member) == licence
    assert Licences(DEP5.replace("\n", "\r\n")).of(member) == licence


def test_licences_where_no_pattern_fits_or_there_are_none():
    without_star = DEP5.replace("Files: *\n", "Files: src/*\n")
    assert Licences(without_star).of("usr/x.wav") == "GPL-2+ / CC-BY-SA-3.0 / CC0-1.0 / Artistic / MIT"
    assert Licences("This package was debianised by hand.\nLicense: GPL").of("usr/x.wav") == "see copyright"
    assert Licences("").of("usr/x.wav") == "see copyright"


@pytest.mark.parametrize(
    ("package", "path", "kind"),
    [
        ("fluid-soundfont-gm", "usr/share/sounds/sf2/FluidR3_GM.sf2/1329-Wind.wav", "instrument"),
        ("asterisk-core-sounds-en-g722", "usr/share/asterisk/sounds/en/vm-intro.g722", "speech"),
        ("warzone2100-music", "usr/share/games/warzone2100/music/a.opus", "music"),
        ("hyperrogue-music", "usr/share/hyperrogue/hr3-caves.ogg", "music"),
        ("0ad-data", "usr/share/games/0ad/public.zip/audio/ambient/weather/windstorm_11.ogg", "ambience"),
        ("0ad-data", "usr/share/games/0ad/public.zip/audio/music/Ambient_Song.ogg", "music"),
        ("0ad-data", "usr/share/games/0ad/public.zip/audio/voice/greek/civ/civ_male_yes_1.ogg", "speech"),
        ("0ad-data", "usr/share/games/0ad/public.zip/audio/attack/weapon/swordhit.ogg", "effects"),
        ("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps/food/apple_desc_ru.ogg", "speech"),
        ("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps/vehicles/train.ogg", "effects"),
        ("xmoto-data", "usr/share/games/xmoto/Textures/Musics/foxrun.ogg", "music"),
        ("game-data", "usr/share/game/sound/MenuTheme.ogg", "music"),
        ("game-data", "usr/share/game/sound/vo_pain-02.wv", "speech"),
        ("game-data", "usr/share/game/sound/musician/volley.wav", "effects"),
        ("warzone2100-data", "usr/share/warzone2100/base.wz/audio/tutorial/tut25.ogg", "speech"),
        ("warzone2100-data", "usr/share/warzone2100/base.wz/audio/sfx/weapons/rocket.ogg", "effects"),
        ("klettres-data", "usr/share/klettres/da/alpha/a-0.ogg", "speech"),
        ("qabcs-data", "usr/share/qabcs/abcs/en/sounds/words/frog.ogg", "speech"),
        ("qabcs-data", "usr/share/qabcs/abcs/all/noises/frog.ogg", "effects"),
        ("minuet-data", "usr/share/minuet/soundfonts/GeneralUser-v1.47.sf2/12-Flute.wav", "instrument"),
        ("exadrums", "usr/share/exadrums/HiHat.wav", "instrument"),
    ],
)
def test_kinds(package, path, kind):
    assert kind_of(package, path) == kind
