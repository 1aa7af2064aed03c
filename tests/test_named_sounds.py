"""Labels out of the names of a corpus's instruments."""

import csv

import pytest

from benchmarks.pretraining import named_sounds


def row(package, member, kind="instrument"):
    return {"file": f"audio/{member}.flac", "kind": kind, "package": package, "member": f"share/kit/{member}"}


@pytest.mark.parametrize(
    ("package", "member", "named"),
    [
        ("fluid-soundfont-gm", "0054-Slap Bass D3.wav", ("D", "slap")),
        ("fluid-soundfont-gm", "0006-Alto F#6(L).wav", ("F#", "alto")),
        ("timgm6mb-soundfont", "0492-Aahs Eb2.wav", ("D#", "aahs")),
        ("timgm6mb-soundfont", "0492-Aahs Cb3.wav", ("B", "aahs")),
        ("musescore-general-soundfont-lossless", "2142-VlnsPzz_G2_v2_r2L.wav", ("G", "vlnspzz")),
        ("minuet-data", "0546-Trumpet-D5.wav", ("D", "trumpet")),
        ("minuet-data", "0546-Trumpet-D9.wav", None),  # too high
        ("fluid-soundfont-gm", "0766-Ride2(L).wav", None),
        ("hydrogen-drumkits", "0054-Slap Bass D3.wav", None),
    ],
)
def test_notes_of_soundfonts(package, member, named):
    assert named_sounds.note(row(package, member)) == named


@pytest.mark.parametrize(
    ("package", "member", "named"),
    [
        ("hydrogen-data", "808_Kick_Long.flac", ("kick", "share/kit")),
        ("avldrums.lv2-soundfont", "0098-57-ZildjianK17Cras-1.wav", ("crash", "share/kit")),
        ("hydrogen-drumkits", "beats_06-11.flac", None),
        ("minuet-data", "Snare.wav", None),
    ],
)
def test_parts_of_drum_kits(package, member, named):
    assert named_sounds.drum(row(package, member)) == named


def test_labelled_files_whose_folds_share_no_instrument(tmp_path):
    clips = [
        row("minuet-data", f"{n:04}-{name}-{note}.wav") for n, name in enumerate("abcdefgh") for note in ("C4", "E4")
    ]
    clips += [row("hydrogen-data", "Kick.wav"), row("minuet-data", "0001-Harp-C4.wav", kind="music")]
    with (tmp_path / "manifest.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, clips[0])
        writer.writeheader()
        writer.writerows(clips)
    named_sounds.main(tmp_path / "manifest.csv", tmp_path / "named")
    notes = list(csv.DictReader((tmp_path / "named" / "notes.csv").open()))
    assert [r["label"] for r in notes] == ["C", "E"] * 8
    assert len({r["fold"] for r in notes}) > 1
    assert all(a["fold"] == b["fold"] for a, b in zip(notes[::2], notes[1::2], strict=True))
    assert notes[0]["file"] == str((tmp_path / "audio" / "0000-a-C4.wav.flac").resolve())
    assert len(list(csv.DictReader((tmp_path / "named" / "drums.csv").open()))) == 1
