"""A data set and a model in, scores out: read, check, embed, probe, score (``m2d-embed probe``)."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from m2d_embed import __version__
from m2d_embed.audio.clips import open_sound
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.evaluate.embedding_cache import embed_cached, hash_files, refuse_failed
from m2d_embed.evaluate.probes import PROBES, check_probes, probe_embeddings
from m2d_embed.evaluate.report import ProbeReport, write_report, write_sound_map
from m2d_embed.evaluate.scores import RESAMPLES, score_predictions
from m2d_embed.extras import require, require_sklearn
from m2d_embed.jobs.settings import fingerprint
from m2d_embed.labelled.clips import LabelledClips, check_contents, named, read_labelled
from m2d_embed.labelled.events import is_event_table
from m2d_embed.m2d import M2D

_PACKAGES = ("torch", "numpy", "scikit-learn", "soundfile", "soxr")


@dataclass(frozen=True)
class ProbeOptions:
    """How to probe.

    Attributes:
        probes: which, of ``PROBES``.
        label_column: the column of the labels, if it is neither ``label`` nor ``labels``.
        limit: at most so many clips, drawn as ``read_labelled`` does.
        seed: of folds, if the data has none, of the draw, the MLP and the resamples.
        batch_size: windows encoded at a time, at most.
        draw_map: write the page with all clips, too.
        cache: the folder of the embeddings; by default ``embedding_cache.default_cache()``.
        show_progress: show bars on stderr.
    """

    probes: tuple[str, ...] = PROBES
    label_column: str = ""
    limit: int | None = None
    seed: int = 0
    batch_size: int = 32
    draw_map: bool = False
    cache: Path | None = None
    show_progress: bool = False


def run_probe(
    model: M2D, data: Path, output: Path | None = None, options: ProbeOptions | None = None
) -> tuple[ProbeReport, list[Path]]:
    """Probe a model on labelled clips.

    Args:
        model: in evaluation mode; its ``features`` say what an embedding is. The MLP is trained on its device.
        data: a folder with one sub-folder a label, or a CSV file, as ``read_labelled`` takes it.
        output: a folder for the report, of which it replaces an earlier one; None writes nothing.
        options: which probes, and how.

    Returns:
        The report, and the files written.

    Raises:
        ConfigError: if the data or an option makes no sense, or the same content lies in two parts of the data.
        AudioError: if files are missing or cannot be embedded; it names all of them.
        UnsupportedError: if scikit-learn, or umap-learn for the map, is not installed.
    """
    options = options or ProbeOptions()
    started = time.perf_counter()
    _check_options(options, output)
    clips, contents = read_checked(data, options)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)  # better refused now than after an hour
    embeddings = embed_cached(model, clips.files, contents, options.batch_size, options.cache, options.show_progress)
    embedded = time.perf_counter()
    results = probe_embeddings(embeddings, clips, options.probes, options.seed, model.device, options.show_progress)
    report = ProbeReport(
        name=data_name(data, options.label_column),
        data=data,
        clips=clips,
        embeddings=embeddings,
        results=results,
        scores={result.probe: score_predictions(clips, result.scores, seed=options.seed) for result in results},
        notes=notes_on(clips, contents),
        model=_model_facts(model),
        settings=_settings(options),
        seconds={"read and embed": embedded - started, "all": time.perf_counter() - started},
    )
    if output is None:
        return report, []
    files = write_report(report, output)
    if options.draw_map:
        files.append(write_sound_map(report, output, model.sample_rate))
    return report, files


def data_name(data: Path, label_column: str = "") -> str:
    """What to call a data set: its folder, or its CSV file unless that is called ``metadata.csv``."""
    path = data.resolve()
    name = path.name if path.is_dir() else path.parent.name if path.name == "metadata.csv" else path.stem
    return f"{name}-{label_column}" if label_column else name


def read_checked(data: Path, options: ProbeOptions) -> tuple[LabelledClips, list[str]]:
    """The clips, each of which is a sound file, and none in two parts of the data; and the hash of each file.

    Raises:
        ConfigError: if the data is not well-formed, a table of events, or has the same content in two parts.
        AudioError: if files are missing or no sound files; it names all of them.
    """
    if data.exists() and is_event_table(data):
        raise ConfigError(
            f"{data}: a table of events (columns onset and offset), but probes name whole clips; "
            "use m2d-embed finetune, or benchmarks/hear."
        )
    clips = read_labelled(data, options.limit, options.seed, options.label_column)
    failed = []
    for file in clips.files:
        try:
            open_sound(file).close()
        except AudioError as error:
            failed.append(str(error))
    refuse_failed(failed, len(clips))
    contents = hash_files(clips.files, options.show_progress)
    check_contents(clips, contents, data)
    return clips, contents


def notes_on(clips: LabelledClips, contents: Sequence[str]) -> list[str]:
    """What one should know when reading scores: groups on both sides, labels never tested, copies, empty clips."""
    notes = []
    shared = sorted({group for fold in clips.test_folds() for group in clips.shared_groups(fold)})
    if shared and not set(shared) <= set(clips.label_names):  # labels that are groups, e.g. speakers, have to be
        notes.append(
            f"{len(shared)} groups are both in training and in test ({named(shared)}), so the scores say little about "
            "clips of new groups."
        )
    targets, tested = clips.targets, clips.folds >= 0
    untested = [clips.label_names[i] for i in np.flatnonzero(~targets[tested].any(axis=0))]
    if untested:
        notes.append(f"{len(untested)} labels are only trained on, never tested: {named(untested)}.")
    for fold in clips.test_folds():
        lacking = targets[tested].any(axis=0) & ~targets[clips.folds == fold].any(axis=0)
        if lacking.any():
            absent = [clips.label_names[i] for i in np.flatnonzero(lacking)]
            notes.append(f"fold {fold} has no clip of {named(absent)}, left out of its macro-F1 and mAP.")
    if clips.multi_label and not targets.any(axis=1).all():
        notes.append(f"{int((~targets.any(axis=1)).sum())} clips have no label.")
    if num_copies := len(contents) - len(set(contents)):
        notes.append(f"{num_copies} clips are copies of others in the same part.")
    return notes


def _check_options(options: ProbeOptions, output: Path | None) -> None:
    check_probes(options.probes)
    require_sklearn("m2d-embed probe")
    if options.draw_map:
        require("umap", "the map")
    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name a folder, new or of an earlier report.")


def _model_facts(model: M2D) -> dict[str, Any]:
    config = model.config
    return {
        "name": config.name or "unnamed model",
        "origin": model.origin,
        "source": config.source,
        "licence": config.license,
        "hash": fingerprint(model, "scene"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "features": asdict(model.features),
        "embedding_size": model.scene_embedding_size,
    }


def _settings(options: ProbeOptions) -> dict[str, Any]:
    return {
        "label_column": options.label_column or None,
        "limit": options.limit,
        "seed": options.seed,
        "resamples": RESAMPLES,
        "versions": {
            "python": platform.python_version(),
            "m2d-embed": __version__,
            **{package: version(package) for package in _PACKAGES},
        },
    }
