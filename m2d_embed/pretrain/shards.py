"""WebDataset shards: tar files, local or on a web server, read from beginning to end and never unpacked.

A sample is the members that share a name up to its first dot: one audio file, and if need be a ``.json``
(``{"labels": [...], "caption": "..."}``), a ``.txt`` (the caption) and a ``.npy`` (frame features). The library
webdataset reads and groups the members; shards are opened and members decoded here, as its openers run shell commands
and its decoders unpickle.

Each data worker of each process reads shards of its own, a *stream*. What a stream yields is decided by the seed, its
number and the number of streams.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import braceexpand
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from webdataset import tariterators

from m2d_embed.audio.formats import AUDIO_SUFFIXES, AV_SUFFIXES
from m2d_embed.errors import AudioError, ConfigError, M2DEmbedError
from m2d_embed.pretrain.batches import Batch, BatchBuilder, BatchSpec, Sample, read_features
from m2d_embed.pretrain.crops import read_crop
from m2d_embed.pretrain.datasets import ClipSource
from m2d_embed.pretrain.sources import is_shards
from m2d_embed.training.sampling import Purpose, rng_at

#: Samples, as they are in the tar, that each worker keeps to draw the next one from.
_BUFFER = 256
_TRIES = 10
_CONNECTIONS = 5
_TIMEOUT = 60.0  # seconds without a byte
_FIRST_PAUSE = 1.0  # seconds before a second connection; doubled each time

#: The members of one sample by their endings; ``__key__`` and ``__url__`` say where it is from.
Members = dict[str, Any]


def find_shards(source: str) -> list[str]:
    """Shards of a ``.tar`` file, of a glob or brace pattern, or of http(s) addresses separated by spaces.

    Braces are expanded as a shell does, ``shard-{000..127}.tar``, in addresses too.

    Raises:
        ConfigError: if there are none, one is not there, or an address is of a kind that is not read.
    """
    parts = source.split() if "://" in source else [source]
    shards = [shard for part in parts for name in braceexpand.braceexpand(part) for shard in _expand(name)]
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise ConfigError(f"{source}: names {twice} twice.")
    return shards


def _expand(name: str) -> list[str]:
    if not is_shards(name):
        raise ConfigError(f"{name}: is not a .tar file; shards are .tar, .tar.gz or .tgz.")
    if "://" in name or Path(name).is_file():
        return [name]
    files = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    if not files:
        raise ConfigError(f"{name}: no such shard.")
    return files


def labels_of_shards(shards: Sequence[str]) -> set[str]:
    """Labels of all samples; reads every shard from beginning to end.

    Raises:
        AudioError: if a shard cannot be read.
    """
    return {label for shard in shards for members in read_shard(shard) for label in _labels_of(members)}


def _labels_of(members: Members) -> tuple[str, ...]:
    try:
        return _described(members, _name_of(members))[0]
    except AudioError:
        return ()  # counted as bad when it is trained on


class ShardDataset(IterableDataset[Batch]):
    """Batches of crops of the samples in shards, without end.

    Args:
        shards: from ``find_shards``.
        spec: what is in a batch.
        noise: what background noise is taken from, or None.
    """

    def __init__(self, shards: Sequence[str], spec: BatchSpec, noise: ClipSource | None = None):
        self.shards = tuple(shards)
        self.spec = spec
        self.noise = noise
        self._builder = BatchBuilder(spec)

    def plain(self) -> ShardDataset:
        """The same crops without noise, labels, captions and features."""
        return ShardDataset(self.shards, self.spec.plain())

    def check_workers(self, workers: int, world_size: int) -> int:
        """``workers``, or as many of them as have a shard each.

        Raises:
            ConfigError: if there are fewer shards than processes.
        """
        if len(self.shards) < world_size:
            raise ConfigError(
                f"{self.spec.data.source}: {len(self.shards)} shards cannot be shared by {world_size} processes; "
                "use fewer processes, or cut the data into more shards."
            )
        return min(workers, len(self.shards) // world_size)

    def stream(self, batch_size: int, rank: int, world_size: int, workers: int, skip: int = 0) -> ShardStream:
        """The batches of one process.

        Args:
            batch_size: clips in a batch.
            rank: number of the process.
            world_size: number of processes.
            workers: data workers of each process.
            skip: batches of this process that were taken earlier; their shards are read, but nothing is decoded.
        """
        return ShardStream(self, batch_size, rank, world_size, workers, skip)

    def __iter__(self) -> Iterator[Batch]:
        raise ConfigError("ShardDataset is not iterated itself; use loader(dataset, ...) or dataset.stream(...).")

    def build(self, positions: Sequence[int], drawn: Sequence[_Drawn]) -> Batch:
        """The batch of some positions, given the samples drawn for them."""
        bad: dict[str, str] = {}
        samples = [self._read_first(place, at, bad) for place, at in zip(positions, drawn, strict=True)]
        noise = None if self.noise is None else [self.noise.noise_at(position, bad) for position in positions]
        return self._builder.build(positions, samples, noise, bad)

    def _read_first(self, position: int, drawn: _Drawn, bad: dict[str, str]) -> Sample:
        """Read a sample, or if it is bad another of the buffer."""
        rng = rng_at(self.spec.seed, position, Purpose.REPLACE)
        others = (drawn.others[int(rng.integers(len(drawn.others)))] for _ in range(_TRIES if drawn.others else 0))
        reason = ""
        for members in itertools.chain([drawn.members], others):
            name = _name_of(members)
            try:
                return self._read(members, name, rng_at(self.spec.seed, position, Purpose.CROP))
            except AudioError as error:
                reason = bad[name] = str(error)
        raise AudioError(f"Several samples of the shards, one after the other, cannot be read; the last: {reason}")

    def _read(self, members: Members, name: str, rng: np.random.Generator) -> Sample:
        spec = self.spec
        endings = _sounds_among(members)
        if len(endings) != 1:
            found = f"{len(endings)} ({', '.join(endings)})" if endings else "none"
            raise AudioError(f"{name}: one audio file expected in a sample, not {found}; names are alike up to a dot.")
        labels, caption = _described(members, name) if spec.labels or spec.captions else ((), "")
        if spec.captions and not caption:
            raise AudioError(f"{name}: has no caption, neither in a .json nor as a .txt.")
        if spec.features and "npy" not in members:
            raise AudioError(f"{name}: has no features, a member .npy.")
        audio = io.BytesIO(members[endings[0]])
        crop = read_crop(audio, spec.model.sample_rate, spec.num_samples, rng, name)
        features = None
        if spec.features:
            features = read_features(io.BytesIO(members["npy"]), f"{name}.npy", crop, spec)
        return Sample(name, crop, labels, caption, features)


def _sounds_among(members: Members) -> list[str]:
    """The endings of the audio files of a sample; of what FFmpeg alone reads, videos too, if there is no other."""
    suffixes = {ending: PurePosixPath(f"a.{ending}").suffix for ending in members}
    return [e for e in members if suffixes[e] in AUDIO_SUFFIXES] or [e for e in members if suffixes[e] in AV_SUFFIXES]


@dataclass(frozen=True)
class _Drawn:
    """A sample drawn from the buffer, and those that were left in it."""

    members: Members
    others: list[Members]


class ShardStream(IterableDataset[Batch | M2DEmbedError]):
    """The batches of one process; each of its workers yields every so many-th. Errors are yielded, and end it."""

    def __init__(self, dataset: ShardDataset, batch_size: int, rank: int, world_size: int, workers: int, skip: int):
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.skip = skip

    def __iter__(self) -> Iterator[Batch | M2DEmbedError]:
        info = get_worker_info()
        # The loader asks worker 0 first, so that one goes on with the stream whose turn it is.
        worker = ((info.id if info else 0) + self.skip) % self.workers
        taken = len(range(worker, self.skip, self.workers))  # batches that this stream has given
        try:
            yield from self._batches(self.rank * self.workers + worker, taken)
        except M2DEmbedError as error:
            yield error

    def _batches(self, stream: int, taken: int) -> Iterator[Batch]:
        streams = self.world_size * self.workers
        reader = _Stream(self.dataset.shards, self.dataset.spec.seed, stream, streams)
        samples = reader.samples(taken * self.batch_size)
        for first in itertools.count(taken * self.batch_size, self.batch_size):
            # Two streams never share a position.
            positions = [place * streams + stream for place in range(first, first + self.batch_size)]
            batch = self.dataset.build(positions, list(itertools.islice(samples, self.batch_size)))
            batch.bad |= reader.damaged
            yield batch


class _Stream:
    """The samples of the shards of one worker of one process, shuffled, epoch after epoch.

    ``damaged`` names the shards that could not be read to their end so far, and why; the samples before that count.
    """

    def __init__(self, shards: Sequence[str], seed: int, stream: int, streams: int):
        self.shards = shards
        self.seed = seed
        self.stream = stream
        self.streams = streams
        self.damaged: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def samples(self, skip: int) -> Iterator[_Drawn]:
        """Endless samples, without the first ``skip``."""
        for epoch in itertools.count():
            shards = self._shards_of(epoch)
            if skip and (count := self._count_up_to(shards, skip)) <= skip and count:
                skip -= count  # a whole epoch; each shard is read once for that, whatever the number of epochs
                continue
            number = 0
            for number, drawn in enumerate(self._shuffled(epoch, shards), start=1):
                if number > skip:
                    yield drawn
            if number == 0:
                reasons = " ".join(list(self.damaged.values())[:3])
                raise AudioError(reasons or f"{', '.join(shards[:3])}: no samples in these shards.")
            skip = max(0, skip - number)

    def _shards_of(self, epoch: int) -> list[str]:
        order = rng_at(self.seed, epoch, Purpose.SHARDS).permutation(len(self.shards))
        return [self.shards[i] for i in order[self.stream :: self.streams]]

    def _count_up_to(self, shards: Sequence[str], limit: int) -> int:
        """Number of samples in some shards; once it is beyond the limit, the shards behind are not looked into."""
        total = 0
        for shard in shards:
            if shard not in self._counts:
                self._counts[shard] = sum(1 for _ in self._read(shard))
            total += self._counts[shard]
            if total > limit:
                break
        return total

    def _shuffled(self, epoch: int, shards: Sequence[str]) -> Iterator[_Drawn]:
        """Each sample once, drawn from a buffer that is filled up before each draw while there are any left."""
        rng = rng_at(self.seed, epoch * self.streams + self.stream, Purpose.SHUFFLE)
        arriving = itertools.chain.from_iterable(map(self._read, shards))
        buffer = list(itertools.islice(arriving, _BUFFER))
        while buffer:
            place = int(rng.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            members = buffer.pop()
            yield _Drawn(members, list(buffer))
            buffer.extend(itertools.islice(arriving, 1))

    def _read(self, shard: str) -> Iterator[Members]:
        try:
            yield from read_shard(shard)
        except AudioError as error:
            self.damaged[shard] = str(error)


def read_shard(shard: str) -> Iterator[Members]:
    """The samples of one shard, their members as bytes.

    Raises:
        AudioError: if the shard cannot be had, is not a tar file, or is damaged or truncated.
    """
    try:
        with _open_shard(shard) as stream:
            files = tariterators.tar_file_iterator(cast(Any, stream))
            named = ({**file, "__url__": shard} for file in files)
            yield from tariterators.group_by_keys(named)
    except urllib.error.HTTPError as error:
        raise AudioError(f"{shard}: the server answered {error.code} ({error.reason}).") from error
    except (tarfile.TarError, EOFError) as error:
        raise AudioError(f"{shard}: not a tar file, or damaged or truncated ({_plain_text(error)}).") from error
    except (OSError, HTTPException) as error:
        raise AudioError(f"{shard}: cannot be read ({_plain_text(error)}).") from error
    except ValueError as error:  # group_by_keys: two members of one name
        raise AudioError(f"{shard}: {_plain_text(error)}.") from error


def _plain_text(error: Exception) -> str:
    """The message of an error, without the objects that webdataset appends to it."""
    text = getattr(error, "strerror", None) or (error.args[0] if error.args else error)
    return str(text).partition(" @ ")[0]


def _open_shard(shard: str) -> BinaryIO:
    if "://" in shard:
        return io.BufferedReader(_WebFile(shard), 1 << 20)
    return Path(shard).open("rb")


class _WebFile(io.RawIOBase):
    """A file on a web server, read once; connects again where it was when the connection breaks."""

    def __init__(self, url: str):
        self.url = url
        self._at = 0
        self._size: int | None = None
        self._response: Any = None
        self._failed = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._size is None or self._at < self._size:
            try:
                if self._response is None:
                    self._connect()
                count = int(self._response.readinto(buffer))
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):
                    raise
                self._pause(error)
                continue
            except (OSError, HTTPException) as error:
                self._pause(error)
                continue
            if count:
                self._at += count
                self._failed = 0
                return count
            if self._size is None:
                return 0
            self._pause(ConnectionError(f"the connection ended after {self._at} of {self._size} bytes"))
        return 0

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        super().close()

    def _connect(self) -> None:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self._at}-"} if self._at else {})
        self._response = urllib.request.urlopen(request, timeout=_TIMEOUT)
        length = self._response.headers.get("Content-Length")
        if self._response.status != 206:  # from the beginning, whatever was asked for
            self._size = None if length is None else int(length)
            self._pass_over(self._at)

    def _pass_over(self, count: int) -> None:
        while count:
            passed = len(self._response.read(min(count, 1 << 20)))
            if not passed:
                raise ConnectionError("the connection ended")
            count -= passed

    def _pause(self, error: Exception) -> None:
        """Wait before another connection; raise if there have been enough."""
        if self._response is not None:
            self._response.close()
            self._response = None
        self._failed += 1
        if self._failed >= _CONNECTIONS:
            raise error
        time.sleep(_FIRST_PAUSE * 2 ** (self._failed - 1))


def _name_of(members: Members) -> str:
    return f"{members['__url__']}:{members['__key__']}"


def _described(members: Members, name: str) -> tuple[tuple[str, ...], str]:
    """Labels and caption of a sample."""
    content: Any = {}
    caption = None
    try:
        if "json" in members:
            content = json.loads(members["json"].decode("utf-8"))
        if "txt" in members:
            caption = members["txt"].decode("utf-8").strip()
    except ValueError as error:
        raise AudioError(f"{name}: its .json or .txt cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise AudioError(f'{name}: its .json must be like {{"labels": ["a"], "caption": "b"}}.')
    labels = content.get("labels", [])
    caption = content.get("caption", "") if caption is None else caption
    if not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise AudioError(f"{name}: labels in its .json must be a list of words, not {labels!r}.")
    if not isinstance(caption, str):
        raise AudioError(f"{name}: the caption in its .json must be text, not {caption!r}.")
    return tuple(labels), caption
