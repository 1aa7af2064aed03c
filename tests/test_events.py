"""Tables of events: a row an event, times in seconds."""

import shutil

import pytest
from conftest import DATA

from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.labelled.events import Event, is_event_table, read_events

DIGIT = DATA / "digits" / "3_theo_0.opus"
HEADER = "file,label,onset,offset,split"
ROWS = (
    "a.opus,three,0.25,0.5,train",
    "a.opus,bell,0.1,0.2,train",
    "b.opus,,,,train",
    "c.opus,bell,0,0.125,test",
    "c.opus,three,0.1,0.3,test",
)


@pytest.fixture
def table(tmp_path):
    def write(*rows, header=HEADER):
        for name in "abc":
            shutil.copy(DIGIT, tmp_path / f"{name}.opus")
        path = tmp_path / "events.csv"
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return path

    return write


def test_events_by_clip_and_onset(table):
    path = table(*ROWS)
    assert is_event_table(path)
    found = read_events(path)
    assert [file.name for file in found.clips.files] == ["a.opus", "b.opus", "c.opus"] and len(found) == 3
    assert found.clips.label_names == ("bell", "three")
    assert found.events[0] == (Event(0, 0.1, 0.2), Event(1, 0.25, 0.5))
    assert found.events[1] == ()
    assert found.events[2] == (Event(0, 0.0, 0.125), Event(1, 0.1, 0.3))
    assert found.clips.multi_label
    assert found.clips.labels.tolist() == [[True, True], [False, False], [True, True]]
    assert found.clips.folds.tolist() == [-1, -1, 0]


def test_folds_are_drawn_without_any(table):
    rows = [row.rsplit(",", 1)[0] for row in (ROWS[0], ROWS[1], ROWS[3], ROWS[4])]
    found = read_events(table(*rows, header="file,label,onset,offset"))
    assert sorted(found.clips.folds.tolist()) == [0, 1]


def test_other_tables_are_not_of_events(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("file,label\na.wav,dog\n")
    assert not is_event_table(path)
    assert not is_event_table(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("c.opus,bell,0.5,0.5,test", "line 7: an event from 0.5 to 0.5 s"),
        ("c.opus,bell,-1,0.5,test", "an event from -1 to 0.5 s"),
        ("c.opus,bell,0.5,inf,test", "an event from 0.5 to inf s"),
        ("c.opus,bell,nan,1,test", "an event from nan to 1 s"),
        ("c.opus,bell,0.5,1 s,test", "'1 s' are not times in seconds"),
        ("c.opus,bell,0.5,,test", "line 7: the column 'offset' is empty"),
        ("c.opus,,0.5,1,test", "line 7: the column 'label' is empty"),
        (",bell,0.5,1,test", "line 7: the column 'file' is empty"),
        ("c.opus,bell,0.5,1,train", "line 7: c.opus was in another fold"),
        ("c.opus,dog,0.5,1,test", "all clips of 'dog' are in the same test part"),
    ],
)
def test_what_is_wrong_is_said(table, row, message):
    with pytest.raises(ConfigError, match=message):
        read_events(table(*ROWS, row))


def test_missing_things_are_named(table):
    with pytest.raises(AudioError, match=r"1 of 4 files are missing: .*d\.opus"):
        read_events(table(*ROWS, "d.opus,bell,0,1,train"))
    with pytest.raises(ConfigError, match="'offset' is missing"):
        read_events(table("a.opus,bell,0", header="file,label,onset"))
    with pytest.raises(ConfigError, match="no row has an event"):
        read_events(table("a.opus,,,,train", "b.opus,,,,test"))
