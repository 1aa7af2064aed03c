"""Folders and manifests as sources, and the order their items come in."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA

from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.pretrain.sources import (
    Item,
    ItemOrder,
    ItemTable,
    Purpose,
    is_shards,
    order_of_epoch,
    read_source,
    rng_at,
)


def manifest(folder: Path, text: str) -> str:
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return str(folder / "list.csv")


# --- random numbers ------------------------------------------------------------------------------------------------


def test_random_numbers_are_keyed_by_seed_position_and_purpose():
    draws = {
        tuple(rng_at(seed, position, purpose).random(4))
        for seed in (0, 1, 1 << 63)
        for position in (0, 1, 1 << 40)
        for purpose in Purpose
    }
    assert len(draws) == 3 * 3 * len(Purpose)
    np.testing.assert_array_equal(rng_at(3, 5, Purpose.CROP).random(100), rng_at(3, 5, Purpose.CROP).random(100))


def test_neighbouring_positions_do_not_overlap():
    first, second = (rng_at(0, position, Purpose.MASK).integers(1 << 60, size=2000) for position in (7, 8))
    assert not set(first) & set(second)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


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


# --- tables and orders ---------------------------------------------------------------------------------------------


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


def test_items_of_equal_weight_come_once_an_epoch():
    order = ItemOrder(np.full(50, 2.0), seed=1)
    epochs = [[order.item_at(epoch * 50 + i) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [ItemOrder(np.ones(50), seed=2).item_at(i) for i in range(50)]


def test_an_order_can_be_asked_for_any_position_in_any_order():
    order = ItemOrder(np.ones(7), seed=0)
    forwards = {position: order.item_at(position) for position in range(70)}
    fresh = pickle.loads(pickle.dumps(ItemOrder(np.ones(7), seed=0)))
    assert {position: fresh.item_at(position) for position in reversed(range(70))} == forwards


def test_items_are_drawn_by_weight():
    weights = np.array([0.0, 1.0, 2.0, 0.5, 0.0] * 20)
    counts = Counter(int(i) for epoch in range(40) for i in order_of_epoch(weights, 0, epoch))
    share = weights * len(weights) / weights.sum() * 40
    assert all(abs(counts[i] - expected) <= 12 for i, expected in enumerate(share))
    assert counts.keys() == set(np.flatnonzero(weights))
    order = order_of_epoch(weights, 0, 0)
    assert len(order) == len(weights)
    assert (np.diff(order) < 0).any()


def test_single_draws_follow_the_weights():
    order = ItemOrder(np.array([0.0, 3.0, 1.0, 0.0]), seed=0)
    rng = np.random.default_rng(0)
    counts = Counter(order.draw(rng) for _ in range(2000))
    assert counts.keys() == {1, 2}
    assert abs(counts[1] / 2000 - 0.75) < 0.05


def test_weights_that_are_all_zero():
    with pytest.raises(ConfigError, match="add up to nothing"):
        ItemOrder(np.zeros(3), seed=0)
    with pytest.raises(ConfigError, match="no items"):
        ItemOrder(np.zeros(0), seed=0)
