"""Folders and manifests as sources, and the table that holds their items."""

import pickle
from pathlib import Path

import pytest
from conftest import DATA

from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.pretrain.sources import Item, ItemTable, is_shards, read_source


def manifest(folder: Path, text: str) -> str:
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return str(folder / "list.csv")


# --- sources -------------------------------------------------------------------------------------------------------


def test_a_folder_is_searched():
    items = read_source(str(DATA))
    assert {item.file.suffix for item in items} == {".opus", ".oga"}
    assert items == [Item(file) for file in sorted(DATA.rglob("*.o[pg]*"))]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(AudioError, match="no such file or folder"):
        read_source(str(tmp_path / "nowhere"))


def test_a_manifest_with_every_column(tmp_path):
    source = manifest(
        tmp_path,
        "\ufefffile,note,weight,labels,caption,features\n"
        'a.wav,x,2.5,dog; bark;,"a dog, far away",f/a.npy\n'
        "/abs/b.wav,,0,,,\n",
    )
    assert read_source(source) == [
        Item(tmp_path / "a.wav", 2.5, ("dog", "bark"), "a dog, far away", tmp_path / "f" / "a.npy"),
        Item(Path("/abs/b.wav"), 0.0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\na.wav\n", r"list\.csv: the manifest lacks the column 'file'; it has \['path'\]"),
        ("file\n", r"list\.csv: the manifest has no rows"),
        ("", "lacks the column 'file'"),
        ("file,weight\na.wav,1\nb.wav,-1\n", r"list\.csv, line 3: the column 'weight' is '-1'"),
        ("file,weight\na.wav,heavy\n", "line 2: the column 'weight' is 'heavy'"),
        ("file,weight\na.wav,nan\n", "line 2: the column 'weight'"),
        ("file,weight\na.wav,inf\n", "line 2: the column 'weight'"),
        ("file,weight\n ,1\n", "line 2: the column 'file' is empty"),
        ("file,caption\na.wav,a dog, far away\n", "line 2: 2 columns expected"),
        ("file,caption\na.wav\n", "line 2: 2 columns expected"),
        ("file,labels,labels\na.wav,x,y\n", "columns with the same name: labels"),
    ],
)
def test_faults_of_a_manifest_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_source(manifest(tmp_path, text))


def test_a_manifest_that_is_missing_or_not_text(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.csv: this manifest cannot be read"):
        read_source(str(tmp_path / "nowhere.csv"))
    (tmp_path / "latin.csv").write_bytes("file\ncaf\xe9.wav\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.csv: not a CSV file in UTF-8"):
        read_source(str(tmp_path / "latin.csv"))


@pytest.mark.parametrize(
    "name", ["a.tar", "d/x-{000..010}.tar", "*.TAR", "b.tar.gz", "https://x.org/a.tar?x=1", "a b.tar"]
)
def test_shards_are_told_by_their_names(name):
    assert is_shards(name)


@pytest.mark.parametrize("name", ["folder", "list.csv", "C:\\audio", "tar", "a.tar/b"])
def test_other_names_are_no_shards(name):
    assert not is_shards(name)


@pytest.mark.parametrize("name", ["pipe:cat a.tar", "s3://bucket/a.tar", "gs://b/a.tar", "file:///a.tar"])
def test_addresses_of_other_kinds_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name.partition(':')[0]}: is not read"):
        is_shards(name)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_gives_its_items_back():
    items = [
        Item(Path("a b/ü.wav"), 0.5, ("x", "y"), "caption", Path("f.npy")),
        Item(Path("b.wav")),
        Item(Path("caf\udce9.wav"), 3.0),
    ]
    table = pickle.loads(pickle.dumps(ItemTable(items)))
    assert list(table) == items
    assert table[-1] == items[-1]
    assert table[1:] == items[1:]
    with pytest.raises(IndexError):
        table[3]
