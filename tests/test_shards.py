"""WebDataset shards: local, over HTTP, shuffled and split, resumed, and broken in every way."""

import dataclasses
import http.server
import io
import itertools
import json
import tarfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY

from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.pretrain import shards as shards_module
from m2d_embed.pretrain.datasets import (
    Batch,
    BatchSpec,
    DataConfig,
    find_labels,
    loader,
    measure_stats,
    open_dataset,
)
from m2d_embed.pretrain.masking import MaskingConfig
from m2d_embed.pretrain.shards import ShardDataset, find_shards, read_shard

RATE = 16_000
SHARDS, PER_SHARD = 4, 5


def encoded(samples: np.ndarray, kind: str = "FLAC") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format=kind)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def members_of(shard: int) -> dict[str, bytes]:
    """Five samples, each a ramp of its own slope, with everything a sample may have."""
    members = {}
    for number in range(PER_SHARD):
        key = f"audio/{shard}-{number}"
        ramp = np.linspace(0, 1, 20_000 + 1_000 * number) * (0.1 + 0.04 * (PER_SHARD * shard + number))
        members[f"{key}.flac"] = encoded(ramp)
        members[f"{key}.json"] = json.dumps({"labels": [f"shard{shard}"], "caption": "from json"}).encode()
        if number % 2:
            members[f"{key}.txt"] = f"caption {number}\n".encode()
        members[f"{key}.npy"] = npy(np.full((80, 3), shard, np.float32))
    return members


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        write_tar(folder / f"s-{shard:03d}.tar", members_of(shard))
    return folder


def open_shards(source, **fields) -> ShardDataset:
    known = {f.name for f in dataclasses.fields(BatchSpec)}
    rest = {name: fields.pop(name) for name in list(fields) if name in known}
    dataset = open_dataset(BatchSpec(DataConfig(str(source), **fields), TINY, MaskingConfig(), **rest))
    assert isinstance(dataset, ShardDataset)
    return dataset


def take(dataset, count: int, *arguments, **options) -> list[Batch]:
    return list(itertools.islice(loader(dataset, *arguments, **options), count))


def short(names) -> list[str]:
    return [name.rpartition("/")[2] for name in names]


EVERYTHING = [f"{shard}-{number}" for shard in range(SHARDS) for number in range(PER_SHARD)]


def assert_same(left: Batch, right: Batch) -> None:
    for name in ("audio", "order", "valid_frames"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert left.names == right.names


# --- finding -------------------------------------------------------------------------------------------------------


def test_patterns(folder):
    everything = [str(folder / f"s-{i:03d}.tar") for i in range(SHARDS)]
    assert find_shards(str(folder / "*.tar")) == everything
    assert find_shards(str(folder / "s-{000..003}.tar")) == everything
    assert find_shards(str(folder / "s-{000,002}.tar")) == everything[::2]
    assert find_shards(everything[1]) == everything[1:2]
    assert find_shards("https://x.org/{a,b}.tar http://y.org/c.tar?v=1") == [
        "https://x.org/a.tar",
        "https://x.org/b.tar",
        "http://y.org/c.tar?v=1",
    ]


def test_shards_that_are_not_there(folder):
    with pytest.raises(ConfigError, match=r"s-009\.tar: no such shard"):
        find_shards(str(folder / "s-{003,009}.tar"))
    with pytest.raises(ConfigError, match=r"names .*s-001\.tar twice"):
        find_shards(str(folder / "s-00{1,1}.tar"))
    with pytest.raises(ConfigError, match="s3: is not read"):
        find_shards("https://x.org/a.tar s3://b/c.tar")


def test_nothing_is_run(tmp_path, monkeypatch):
    """webdataset itself would run this command."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="pipe: is not read"):
        open_shards("pipe:touch owned; cat x.tar")
    assert not list(tmp_path.iterdir())


# --- contents ------------------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_sample_once_in_new_order(folder):
    names = [short(batch.names) for batch in take(open_shards(folder / "*.tar"), 3, 20, workers=0)]
    assert all(sorted(epoch) == sorted(EVERYTHING) for epoch in names)
    assert names[0] != names[1] != names[2]
    assert names[0] != EVERYTHING
    assert names != [short(b.names) for b in take(open_shards(folder / "*.tar", seed=1), 3, 20, workers=0)]


def test_a_small_buffer_shuffles_too(folder, monkeypatch):
    monkeypatch.setattr(shards_module, "_BUFFER", 3)
    names = short(take(open_shards(folder / "*.tar"), 1, 20, workers=0)[0].names)
    assert sorted(names) == sorted(EVERYTHING)
    assert names != EVERYTHING


def test_a_single_shard_is_in_new_order_each_epoch(folder):
    names = [short(batch.names) for batch in take(open_shards(folder / "s-001.tar"), 3, PER_SHARD, workers=0)]
    assert all(sorted(epoch) == EVERYTHING[PER_SHARD : 2 * PER_SHARD] for epoch in names)
    assert names[0] != names[1] or names[1] != names[2]


def test_what_is_in_a_batch(folder):
    dataset = open_shards(
        folder / "*.tar", labels=tuple(f"shard{i}" for i in range(SHARDS)), captions=True, features=True
    )
    (batch,) = take(dataset, 1, 20, workers=0)
    shards = [int(name[0]) for name in short(batch.names)]
    numbers = [int(name[2]) for name in short(batch.names)]
    assert batch.audio.shape == (20, 63 * 160)
    assert batch.order.shape == (20, 20)
    assert batch.labels.argmax(dim=1).tolist() == shards
    assert batch.labels.sum(dim=1).tolist() == [1] * 20
    assert batch.captions == [f"caption {n}" if n % 2 else "from json" for n in numbers]
    assert batch.features.tolist() == [[[shard] * 3] * 4 for shard in shards]
    # Each sample is a ramp: its slope tells it, its first value the place of the crop.
    slopes = batch.audio.diff(dim=1).mean(dim=1).numpy() * (20_000 + 1_000 * np.array(numbers) - 1)
    np.testing.assert_allclose(slopes, 0.1 + 0.04 * (5 * np.array(shards) + np.array(numbers)), atol=0.001)
    assert len(set(batch.audio[:, 0].tolist())) > 10
    assert find_labels(str(folder / "*.tar")) == tuple(f"shard{i}" for i in range(SHARDS))


def test_noise_and_stats(folder, tmp_path):
    soundfile.write(tmp_path / "n.wav", np.full(20_000, 0.25), RATE)
    fields = {"norm_crops": 30, "workers": 0}
    dataset = open_shards(folder / "*.tar", noise=str(tmp_path), **fields)
    assert take(dataset, 1, 4, workers=0)[0].noise_audio.eq(0.25).all()
    assert measure_stats(dataset) == measure_stats(open_shards(folder / "*.tar", **fields))


def test_compressed_and_odd_members(tmp_path):
    ramp = encoded(np.linspace(0, 1, 20_000))
    path = write_tar(
        tmp_path / "a.tar.gz",
        {
            "../../out.FLAC": ramp,
            "__meta__/x.json": b"{}",
            "README": b"x",
            "b.seg.wav": encoded(np.zeros(9_000), "WAV"),
        },
        "w:gz",
    )
    batch = take(open_shards(path), 1, 2, workers=0)[0]
    assert sorted(name.rpartition(":")[2] for name in batch.names) == ["../../out", "b"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.tar.gz"]


# --- splitting and resuming ----------------------------------------------------------------------------------------


def test_streams_share_the_shards(folder):
    """Two processes of two workers: four streams, each with one shard an epoch."""
    dataset = open_shards(folder / "*.tar")
    batches = [take(dataset, 4, 5, rank, 2, workers=2) for rank in range(2)]
    for rank in range(2):
        assert all(len({name[0] for name in short(batch.names)}) == 1 for batch in batches[rank])
    first = Counter(name for rank in range(2) for batch in batches[rank][:2] for name in short(batch.names))
    assert first == Counter(EVERYTHING)
    starts = {tuple(order.tolist()) for rank in range(2) for batch in batches[rank] for order in batch.order}
    assert len(starts) == 40  # no two streams draw the same masks


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_goes_on_where_it_was(folder, workers):
    dataset = open_shards(folder / "*.tar")
    expected = take(dataset, 24, 3, workers=workers)
    for step, accumulation in ((1, 1), (2, 1), (5, 1), (7, 3), (10, 2)):  # the last are in the third epoch
        resumed = take(dataset, 3, 3, workers=workers, accumulation=accumulation, first_step=step)
        for mine, other in zip(resumed, expected[accumulation * step :], strict=False):
            assert_same(mine, other)


def test_the_way_to_where_it_was_decodes_nothing(folder, monkeypatch):
    decoded, opened = [], []
    read_crop, open_shard = shards_module.read_crop, shards_module._open_shard
    monkeypatch.setattr(shards_module, "read_crop", lambda *a: (decoded.append(a[-1]), read_crop(*a))[1])
    monkeypatch.setattr(shards_module, "_open_shard", lambda shard: (opened.append(shard), open_shard(shard))[1])
    take(open_shards(folder / "*.tar"), 1, 5, first_step=403, workers=0)  # a hundred epochs and three quarters
    assert len(decoded) == 5
    assert len(opened) <= 2 * SHARDS


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine has cores
def test_workers_are_no_more_than_shards(folder):
    dataset = open_shards(folder / "s-00{0,1,2}.tar")
    assert (dataset.check_workers(8, 1), dataset.check_workers(2, 3), dataset.check_workers(0, 1)) == (3, 1, 0)
    assert {name[0] for b in take(dataset, 3, 5, workers=8) for name in short(b.names)} == set("012")
    with pytest.raises(ConfigError, match="3 shards cannot be shared by 4 processes; use fewer processes, or cut"):
        loader(dataset, 2, rank=0, world_size=4)


# --- HTTP ----------------------------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the folder; breaks connections off, and refuses, as told by the server."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.requests.append((self.path, begin))
        if server.answers:
            self.send_error(server.answers.pop(0))
            return
        file = server.folder / self.path.strip("/").partition("?")[0]
        if not file.exists():
            self.send_error(404)
            return
        content = file.read_bytes()
        if not server.ranges:
            begin = 0
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        end = begin + server.piece if server.piece else len(content)
        self.wfile.write(content[begin:end])
        self.close_connection = end < len(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(shards_module, "_FIRST_PAUSE", 0.001)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests, server.answers, server.piece, server.ranges = folder, [], [], 0, True
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_shards_over_http(folder, server):
    remote = take(open_shards(f"{server.address}/s-{{000..003}}.tar?download=1"), 5, 7, workers=0)
    local = take(open_shards(folder / "s-{000..003}.tar"), 5, 7, workers=0)
    for mine, other in zip(remote, local, strict=True):
        assert torch.equal(mine.audio, other.audio)
        assert short(mine.names) == short(other.names)
    workers = take(open_shards(f"{server.address}/s-{{000..003}}.tar?download=1"), 3, 7, workers=1)
    for mine, other in zip(workers, remote, strict=False):
        assert_same(mine, other)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up(folder, server, ranges):
    server.ranges = ranges
    if ranges:
        server.piece = 20_000
    else:
        # Without ranges the server begins anew each time, so only the first answer may be cut short.
        server.answers = [503, 429]
    samples = list(read_shard(f"{server.address}/s-001.tar"))
    assert [sample["flac"] for sample in samples] == [s["flac"] for s in read_shard(str(folder / "s-001.tar"))]
    assert len(server.requests) > 2


def test_a_server_without_ranges_is_read_from_the_beginning(folder, server):
    server.ranges, server.piece = False, 30_000
    web = shards_module._WebFile(f"{server.address}/s-001.tar")
    content = (folder / "s-001.tar").read_bytes()
    got = web.read(20_000)
    web._response.close()
    web._response = None  # as after a broken connection
    server.piece = 0
    assert got + io.BufferedReader(web).read() == content
    assert [begin for _, begin in server.requests] == [0, len(got)]


def test_what_a_server_may_answer(server):
    with pytest.raises(AudioError, match=r"/none\.tar: the server answered 404 \(Not Found\)"):
        list(read_shard(f"{server.address}/none.tar"))
    assert len(server.requests) == 1
    server.answers = [500] * 9
    with pytest.raises(AudioError, match=r"the server answered 500"):
        list(read_shard(f"{server.address}/s-000.tar"))
    assert len(server.requests) == 1 + 5
    with pytest.raises(AudioError, match=r"a\.tar: cannot be read \(.*refused"):
        list(read_shard("http://127.0.0.1:9/a.tar"))


def test_an_error_of_a_worker_arrives_as_it_is(server):
    for workers in (0, 2):
        with pytest.raises(AudioError, match=rf"^{server.address}/x[ab]\.tar: the server answered 404"):
            take(open_shards(f"{server.address}/x{{a,b}}.tar"), 1, 2, workers=workers)


# --- broken shards and samples -------------------------------------------------------------------------------------


def test_shards_that_are_damaged(folder, tmp_path):
    content = (folder / "s-000.tar").read_bytes()
    for name, broken in (("text", b"not a tar file" * 100), ("cut", content[: len(content) // 2]), ("empty", b"")):
        (tmp_path / f"{name}.tar").write_bytes(broken)
        with pytest.raises(AudioError, match=rf"{name}\.tar: not a tar file, or damaged or truncated \([^@]*\)\.$"):
            list(read_shard(str(tmp_path / f"{name}.tar")))
    with pytest.raises(AudioError, match=r"a\.tar: cannot be read \(No such file"):
        list(read_shard(str(tmp_path / "a.tar")))
    doubled = write_tar(tmp_path / "doubled.tar", {"a.wav": b"1"})
    with tarfile.open(doubled, "a") as archive:
        archive.addfile(tarfile.TarInfo("a.wav"))
    with pytest.raises(AudioError, match=r"doubled\.tar: a\.wav: duplicate file name"):
        list(read_shard(str(doubled)))
    write_tar(tmp_path / "none.tar", {"README": b""})
    with pytest.raises(AudioError, match=r"none\.tar: no samples in these shards"):
        take(open_shards(tmp_path / "none.tar"), 1, 1, workers=0)


GOOD = encoded(np.linspace(0, 1, 20_000))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"bad.flac": b"not audio", "bad.txt": b"x", "bad.npy": npy(np.ones((9, 2)))}, "not audio that can be read"),
        ({"bad.json": b"{}"}, r"one audio file expected in a sample, not none"),
        ({"bad.a.flac": GOOD, "bad.b.flac": GOOD}, r"not 2 \(a\.flac, b\.flac\)"),
        ({"bad.flac": GOOD, "bad.json": b"{", "bad.npy": npy(np.ones((9, 2)))}, "its .json or .txt cannot be read"),
        ({"bad.flac": GOOD, "bad.json": b"[1]"}, "its .json must be like"),
        ({"bad.flac": GOOD, "bad.json": b'{"labels": "dog"}'}, "labels in its .json must be a list of words"),
        ({"bad.flac": GOOD, "bad.json": b'{"caption": 3}'}, "the caption in its .json must be text, not 3"),
        ({"bad.flac": GOOD}, "has no caption, neither in a .json nor as a .txt"),
        ({"bad.flac": GOOD, "bad.txt": b"x"}, "has no features, a member .npy"),
        ({"bad.flac": GOOD, "bad.txt": b"\xff", "bad.npy": npy(np.ones((9, 2)))}, "its .json or .txt cannot be read"),
        ({"bad.flac": GOOD, "bad.txt": b"x", "bad.npy": npy(np.array([{}], dtype=object))}, "npy: .*allow_pickle"),
        ({"bad.flac": GOOD, "bad.txt": b"x", "bad.npy": b"PK"}, "npy: these features cannot be read"),
    ],
)
def test_bad_samples_are_replaced_and_named(tmp_path, members, message):
    good = {"1.flac": GOOD, "1.txt": b"one", "1.npy": npy(np.ones((9, 2)))}
    path = write_tar(tmp_path / "a.tar", {**good, **members, **{f"2{k[1:]}": v for k, v in good.items()}})
    dataset = open_shards(path, labels=("dog",), captions=True, features=True)
    batches = take(dataset, 2, 3, workers=0)
    for batch in batches:
        assert len(batch) == 3
        assert set(batch.names) <= {f"{path}:1", f"{path}:2"}
    bad = {name: reason for batch in batches for name, reason in batch.bad.items()}
    assert list(bad) == [f"{path}:bad"]
    with pytest.raises(AudioError, match=f":bad.*{message}"):
        raise AudioError(bad[f"{path}:bad"])


def test_bad_samples_do_not_shift_what_comes_after(tmp_path):
    """Going on after a bad sample finds the same samples as the run that met it."""
    members = {f"{i}.flac": GOOD if i % 3 else b"bad" for i in range(12)}
    dataset = open_shards(write_tar(tmp_path / "a.tar", members))
    expected = take(dataset, 8, 3, workers=0)
    assert any(batch.bad for batch in expected[:2])
    for mine, other in zip(take(dataset, 4, 3, workers=0, first_step=3), expected[3:], strict=False):
        assert_same(mine, other)


def test_a_label_that_was_not_given(folder):
    for workers in (0, 1):
        with pytest.raises(ConfigError, match=r"^.*s-00.\.tar:audio/.*: its label 'shard.' is not one of the 1 given"):
            take(open_shards(folder / "*.tar", labels=("shard9",)), 1, 4, workers=workers)
