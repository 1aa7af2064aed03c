"""Every layout of M2D weights -> one: our configuration and our state dict. Safetensors in and out.

Published layouts (``.pth``, its folder, or the release's ``.zip``): ``{"model": state_dict, ...}`` or a state dict;
encoder only, with decoder and target network, fine-tuned (encoder below ``module.ar.runtime.backbone.``, head below
``module.head.``), or CLAP (``audio_proj``, ``text_proj``, ``logit_scale``, perhaps ``text_encoder``).

Our layout is a folder: ``config.json``, ``model.safetensors``, optional ``model.bf16.safetensors`` or
``model.fp16.safetensors`` beside it, ``README.md``. No pickle.
"""

from __future__ import annotations

import argparse
import errno
import os
import pathlib
import pickletools
import re
import shutil
import tempfile
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2d_embed.checkpoints import hub
from m2d_embed.checkpoints.registry import RELEASES
from m2d_embed.config import (
    CONFIG_FILE,
    VIT_SIZES,
    CheckpointName,
    ClapConfig,
    FeatureConfig,
    HeadConfig,
    ModelConfig,
)
from m2d_embed.errors import CheckpointError, ConfigError, ModelNotFoundError
from m2d_embed.files import atomic_write, sync
from m2d_embed.model.encoder import Encoder, sincos_positions
from m2d_embed.model.heads.clap import FIRST_LOGIT_SCALE, TEXT_ENCODER_FILE, ClapHead
from m2d_embed.model.heads.tagging import TaggingHead, audioset_labels

#: What the files of our layout are called, by the dtype of the matrices in them.
WEIGHT_FILES = {
    torch.float32: "model.safetensors",
    torch.bfloat16: "model.bf16.safetensors",
    torch.float16: "model.fp16.safetensors",
}

_INTERRUPTED = (
    f"weights without a {CONFIG_FILE}, as while a model is saved, and where that was interrupted; save it again, or "
    "download all of it."
)
_NORM_STATS_OF_2022 = (-7.1, 4.2)  # what checkpoints without the key `norm_stats` were trained with
_LICENSE_OF_RELEASES = "NTT evaluation licence (non-commercial); see the release's own LICENSE"

# What a checkpoint may hold besides tensors and plain containers: the training arguments, with paths and numpy values.
# None of these runs code when unpickled. Paths come back as pure ones, which exist on every system.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    *(
        (pure, f"{module}.{kind}")
        for module in ("pathlib", "pathlib._local")
        for pure, kinds in (
            (pathlib.PurePosixPath, ("PosixPath", "PurePosixPath")),
            (pathlib.PureWindowsPath, ("WindowsPath", "PureWindowsPath")),
        )
        for kind in kinds
    ),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
]


@dataclass
class Checkpoint:
    """A checkpoint in memory: what the model is, and its tensors under the names of ``M2D.state_dict()``.

    ``text_encoder`` holds a CLAP checkpoint's own text encoder, or the path of the file that does. ``unused`` lists
    what was in the file but is no part of the model, such as the decoder of pre-training. ``file_dtype`` is what the
    file is for: float32, or half precision if it is such a sibling. ``text_stamp`` is the ``stamp_of`` a text encoder's
    file.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    text_encoder: Path | dict[str, Tensor] | None = None
    unused: list[str] = field(default_factory=list)
    file_dtype: torch.dtype = torch.float32
    text_stamp: tuple[int, int, int] | None = None


def load_checkpoint(location: hub.Location, prefer_half: Iterable[torch.dtype] = ()) -> Checkpoint:
    """Read the checkpoint at a location that ``hub.locate`` found.

    An official release is converted once, into the cache, and read from there afterwards.

    Args:
        location: where the files are.
        prefer_half: half-precision files to take when the folder has them, best first; then the float32 file, then
            any other.

    Raises:
        CheckpointError: if it cannot be read, or holds more than tensors.
        ConfigError: if its name or ``config.json`` makes no sense.
    """
    if location.release is not None:
        location = replace(location, path=_converted_release(location.path, location.release))
    return read_checkpoint(location.path, prefer_half)


def read_checkpoint(path: Path, prefer_half: Iterable[torch.dtype] = ()) -> Checkpoint:
    """Read a checkpoint of any layout: a folder (ours or published), a ``.pth`` or a release's ``.zip``.

    Raises:
        ModelNotFoundError: if there is no such file or folder, or the folder holds no checkpoint.
        CheckpointError: if it cannot be read, holds more than tensors, or its tensors contradict its configuration.
        ConfigError: if its name or ``config.json`` makes no sense.
    """
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or folder.")
    checkpoint = _read_any(path, prefer_half)
    check_fit(checkpoint.config, checkpoint.tensors, str(path))
    return checkpoint


def check_fit(config: ModelConfig, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Compare names and shapes of tensors with what their configuration asks for.

    Raises:
        CheckpointError: if they differ; it names the tensors.
    """
    expected = _skeleton(config)
    problems = [f"{n} is missing" for n in expected if n not in tensors]
    problems += [f"{n} is not part of the model" for n in tensors if n not in expected]
    problems += [
        f"{n} has shape {tuple(t.shape)}, not {tuple(expected[n].shape)}"
        for n, t in tensors.items()
        if n in expected and t.shape != expected[n].shape
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{origin}: the tensors do not fit the configuration: {'; '.join(problems[:4])}{more}.")


def convert(source: Path, destination: Path, half_dtypes: Iterable[torch.dtype] = ()) -> Checkpoint:
    """Write a checkpoint of any layout in ours, float32, with half-precision siblings if asked for.

    Raises:
        CheckpointError: if the source cannot be read or the destination exists and is not empty.
    """
    destination = destination.resolve()  # a link to an empty folder stays a link
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists and is not an empty folder; choose another destination.")
    checkpoint = read_checkpoint(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _folder_written_whole(destination) as folder:
        write_native(folder, checkpoint, [torch.float32, *half_dtypes])
    return checkpoint


def read_native(folder: Path, prefer_half: Iterable[torch.dtype] = ()) -> Checkpoint:
    """Read our layout; the tensors keep the precision they are stored in."""
    try:
        before = stamp_of(folder / CONFIG_FILE)
        checkpoint = _read_native(folder, prefer_half)
        is_being_replaced = stamp_of(folder / CONFIG_FILE) != before
    except FileNotFoundError:  # a moment ago it was there
        is_being_replaced = True
    if is_being_replaced:
        raise CheckpointError(f"{folder}: another model is being saved here at this moment; try again.")
    return checkpoint


def _read_native(folder: Path, prefer_half: Iterable[torch.dtype]) -> Checkpoint:
    config = ModelConfig.from_json(folder / CONFIG_FILE)
    dtype = next((d for d in (*prefer_half, *WEIGHT_FILES) if (folder / WEIGHT_FILES[d]).exists()), None)
    if dtype is None:
        raise CheckpointError(f"{folder}: has a {CONFIG_FILE} but no {WEIGHT_FILES[torch.float32]}.")
    tensors = _load_safetensors(folder / WEIGHT_FILES[dtype])
    text_encoder = folder / TEXT_ENCODER_FILE if config.clap and config.clap.text_encoder_included else None
    if text_encoder and not text_encoder.exists():
        raise CheckpointError(f"{folder}: its {CONFIG_FILE} speaks of a {TEXT_ENCODER_FILE}, which is missing.")
    text_stamp = stamp_of(text_encoder) if text_encoder else None
    return Checkpoint(config, tensors, text_encoder, file_dtype=dtype, text_stamp=text_stamp)


def check_unchanged(text_encoder: object, stamp: tuple[int, int, int] | None) -> None:
    """Raise CheckpointError if the file of a text encoder, which is read late, is not the one it was at first."""
    file = text_encoder
    if stamp and isinstance(file, Path) and not (file.exists() and stamp_of(file) == stamp):
        raise CheckpointError(f"{file}: gone, or another file since the model was loaded; load the model again.")


def stamp_of(file: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def write_native(folder: Path, checkpoint: Checkpoint, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> None:
    """Write our layout into an existing folder, one weight file a dtype, in place of a model that was there before.

    Whatever happens meanwhile, the folder holds the old model, the new one, or weights without ``config.json``, which
    ``read_native`` refuses: everything is written under other names first, then the old ``config.json`` and weights go,
    and the new ``config.json`` comes last. A ``README.md`` that is there is kept.
    """
    tensors, dtypes = checkpoint.tensors, set(dtypes)
    check_unchanged(checkpoint.text_encoder, checkpoint.text_stamp)
    with _only_writer(folder), ExitStack() as renamed:  # in the reverse order
        if not (folder / "README.md").exists():
            card = renamed.enter_context(atomic_write(folder / "README.md"))
            card.write_text(model_card(checkpoint.config), encoding="utf-8")
        config = renamed.enter_context(atomic_write(folder / CONFIG_FILE))
        config.write_text(checkpoint.config.to_json(), encoding="utf-8")
        for dtype in dtypes:
            partial = renamed.enter_context(atomic_write(folder / WEIGHT_FILES[dtype]))
            _save_safetensors({name: as_stored(name, t, dtype) for name, t in tensors.items()}, partial)
            sync(partial)  # which takes long: not while there is no model
        stale = [folder / WEIGHT_FILES[dtype] for dtype in WEIGHT_FILES.keys() - dtypes]
        source, text_encoder = checkpoint.text_encoder, folder / TEXT_ENCODER_FILE
        if source is None:
            stale.append(text_encoder)
        elif not (isinstance(source, Path) and source.resolve() == text_encoder.resolve()):
            partial = renamed.enter_context(atomic_write(text_encoder))
            if isinstance(source, Path):
                shutil.copyfile(source, partial)
            else:
                _save_safetensors(source, partial)
            sync(partial)
        for file in (folder / CONFIG_FILE, *stale):
            file.unlink(missing_ok=True)
        sync(folder)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Wait for others who write into this folder: the files of two writers would be mixed.

    It holds where ``flock`` locks folders: not on Windows, nor on some network file systems.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def as_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as a file of that dtype holds it: matrices in ``dtype``, everything else in float32.

    Norms, positions and the patch embedding stay in float32: they are small, and the residual stream they feed is.
    """
    if not tensor.is_floating_point():
        return tensor.contiguous()
    in_blocks = name.startswith("encoder.blocks.") and ".norm" not in name
    return tensor.to(dtype if in_blocks else torch.float32).contiguous()


def model_card(config: ModelConfig) -> str:
    """The text of a model's ``README.md`` on the Hub."""
    (mels, frames), (patch_mels, patch_frames) = config.input_size, config.patch_size
    origin = f"\nSource: {config.source}.\n" if config.source else ""
    licence = f"\nLicence of the weights: {config.license}\n" if config.license else ""
    return f"""---
library_name: m2d-embed
pipeline_tag: {"feature-extraction" if config.head is None else "audio-classification"}
tags: [audio, embeddings, HEAR, m2d]
---

# {config.name or "An M2D model"}

Audio embeddings by Masked Modeling Duo: {config.embed_dim}-d, {config.depth} layers; {config.sample_rate} Hz;
windows of {mels} mels x {frames} frames, patches of {patch_mels} x {patch_frames}.
{origin}{licence}
```python
import m2d_embed

model = m2d_embed.load_model("path-or-repository-of-this-model")
embeddings = model.encode(["a.wav", "b.flac"])  # (2, {FeatureConfig().scene_dim(config)})
```
"""


# --- published layouts -------------------------------------------------------------------------------------------


def read_published(file: Path, name: str, source: str = "") -> Checkpoint:
    """Read a published ``.pth``; ``name`` is its folder's, which carries shape and rate.

    Raises:
        CheckpointError: if the file is unsafe or unreadable, or its tensors contradict the name.
    """
    parsed = CheckpointName.parse(name)
    state = _unwrap(_unpickle(file), file)
    prefix = _encoder_prefix(state, file)
    taken: dict[str, str] = {}  # name in the file -> name in M2D.state_dict()
    for key in state:
        if key.startswith(prefix) and _ENCODER_KEY.fullmatch(key.removeprefix(prefix)):
            taken[key] = f"encoder.{key.removeprefix(prefix)}"
    stats_key = _find_norm_stats(state, prefix)
    norm_stats = tuple(state[stats_key].flatten().tolist()) if stats_key else _NORM_STATS_OF_2022
    text_keys = {k: k.partition("text_encoder.")[2] for k in state if "text_encoder." in k}
    try:
        head, head_names = _find_head(state, parsed)
        clap, clap_names = _find_clap(state, parsed)
        config = parsed.model_config(
            norm_stats=norm_stats,
            head=head,
            clap=clap,
            source=source or f"{name}/{file.name}",
            license=_LICENSE_OF_RELEASES if name in RELEASES else "",
        )
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    taken |= head_names | clap_names
    tensors = _completed({ours: state[theirs].clone() for theirs, ours in taken.items()}, config)
    text_encoder = {ours: state[theirs].clone() for theirs, ours in text_keys.items()} or None
    unused = [key for key in state if key not in taken and key not in text_keys and key != stats_key]
    return Checkpoint(config, tensors, text_encoder, unused)


def read_full_state(path: Path) -> dict[str, Tensor]:
    """Every tensor of a published checkpoint, predictor ("decoder") and target network included.

    Args:
        path: a ``.pth``, the folder of one, or a release's ``.zip``.

    Returns:
        Tensors by their published names, without the prefix of modules around the encoder.

    Raises:
        CheckpointError: if it cannot be read, or is in our own layout, which holds the encoder alone.
    """
    if path.is_dir() and (path / CONFIG_FILE).exists():
        raise CheckpointError(f"{path}: a folder with {CONFIG_FILE} holds the encoder alone, no predictor.")
    if path.suffix == ".zip":
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "checkpoint.pth"
            _unpack_only_checkpoint(path, file)
            return read_full_state(file)
    file = _only_checkpoint(path) if path.is_dir() else path
    state = _unwrap(_unpickle(file), file)
    prefix = _encoder_prefix(state, file)
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _completed(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Add what some checkpoints leave out because it is fixed or plays no part in inference."""
    tensors.setdefault("encoder.pos_embed", sincos_positions(config.embed_dim, config.grid_size))
    if config.head is not None:
        batches = tensors.get("head.norm.num_batches_tracked", torch.tensor(0))
        tensors["head.norm.num_batches_tracked"] = batches.long()
    if config.clap is not None:
        scale = tensors.get("clap.logit_scale", torch.tensor(FIRST_LOGIT_SCALE))
        tensors["clap.logit_scale"] = scale.squeeze()  # some hold it as one value, some as a list of one
    return tensors


_ENCRYPTED = 1  # bit of a zip member's flags (PKWARE's APPNOTE, section 4.4.4)
_WRAPPERS = re.compile(r"(module\.)?(ar\.)?(runtime\.)?(backbone\.)?")  # modules around the encoder in training
_ENCODER_KEY = re.compile(r"cls_token|pos_embed|patch_embed\.proj\..*|blocks\.\d+\..*|norm\.(weight|bias)")
_HEAD_KEYS = {
    "norm.running_mean": "norm.running_mean",
    "norm.running_var": "norm.running_var",
    "norm.num_batches_tracked": "norm.num_batches_tracked",
    "mlp.mlp.0.weight": "linear.weight",
    "mlp.mlp.0.bias": "linear.bias",
}


def summarise_unused(keys: Iterable[str]) -> str:
    """``decoder_blocks (24), mask_token (1)``: what a checkpoint held besides the model, by first component."""
    counts = Counter(_WRAPPERS.sub("", key, count=1).partition(".")[0] for key in keys)
    return ", ".join(f"{part} ({count})" for part, count in sorted(counts.items()))


def _find_norm_stats(state: Mapping[str, Tensor], prefix: str) -> str | None:
    """The encoder's own ``norm_stats``, else those of the module around it."""
    keys = [key for key in state if key.rpartition(".")[2] == "norm_stats"]
    return f"{prefix}norm_stats" if f"{prefix}norm_stats" in keys else next(iter(keys), None)


def _find_head(state: Mapping[str, Tensor], parsed: CheckpointName) -> tuple[HeadConfig | None, dict[str, str]]:
    weight_key = next((k for k in state if re.fullmatch(r"(module\.)?head\.mlp\.mlp\.0\.weight", k)), None)
    if weight_key is None:
        return None, {}
    prefix = weight_key.removesuffix("mlp.mlp.0.weight")
    names = {prefix + k: f"head.{ours}" for k, ours in _HEAD_KEYS.items() if prefix + k in state}
    outputs, width = _matrix_shape(state, weight_key)
    embed_dim, _, _ = VIT_SIZES[parsed.size]
    audioset = audioset_labels()
    labels = audioset if outputs == len(audioset) else tuple(f"class_{i}" for i in range(outputs))
    return HeadConfig(labels, "flat" if width == embed_dim else "stacked"), names


def _find_clap(state: Mapping[str, Tensor], parsed: CheckpointName) -> tuple[ClapConfig | None, dict[str, str]]:
    parts = ("audio_proj.", "text_proj.", "logit_scale")
    keys = {m[2]: k for k in state if (m := re.fullmatch(rf"(.*?\.)?((?:{'|'.join(parts)}).*)", k))}
    if not any(key.startswith("audio_proj.") for key in keys):
        return None, {}
    names = {theirs: f"clap.{short}" for short, theirs in keys.items()}
    for short, theirs in keys.items():
        if m := re.fullmatch(r"(audio_proj|text_proj)\.(weight|bias)", short):  # a single Linear, not in a Sequential
            names[theirs] = f"clap.{m[1]}.0.{m[2]}"
    tensors = {ours: state[theirs] for theirs, ours in names.items()}
    depth = len({m[1] for n in tensors if (m := re.match(r"clap\.audio_proj\.sem_blocks\.(\d+)\.", n))})
    token = tensors.get("clap.audio_proj.sem_token")
    return ClapConfig(
        audio_projector="mlp" if token is None else "semantic",
        audio_layers=_mlp_sizes(tensors, "clap.audio_proj") if token is None else tuple(token.shape[-1:]),
        text_layers=_mlp_sizes(tensors, "clap.text_proj"),
        text_encoder=parsed.text_encoder,
        text_pooling="cls" if "bert-base" in parsed.text_encoder else "mean",
        semantic_depth=depth,
        semantic_mlp_dim=_matrix_shape(tensors, "clap.audio_proj.sem_blocks.0.mlp.fc1.weight")[0] if depth else 0,
        text_encoder_included=any("text_encoder." in key for key in state),
    ), names


def _mlp_sizes(tensors: Mapping[str, Tensor], prefix: str) -> tuple[int, ...]:
    """Layer sizes, input first, of the Linear layers ``prefix.0``, ``prefix.2``, ..."""
    names = [n for n in sorted(tensors) if re.fullmatch(rf"{re.escape(prefix)}\.\d+\.weight", n)]
    shapes = [_matrix_shape(tensors, n) for n in names]
    return (shapes[0][1], *(outputs for outputs, _ in shapes)) if shapes else ()


def _matrix_shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    shape = tuple(tensors[name].shape) if name in tensors else None
    if shape is None or len(shape) != 2:
        raise ConfigError(f"{name} is missing" if shape is None else f"{name} has shape {shape}, not that of a matrix")
    return shape[0], shape[1]


def _encoder_prefix(state: Mapping[str, Tensor], file: Path) -> str:
    anchor = "patch_embed.proj.weight"
    prefixes = [k.removesuffix(anchor) for k in state if re.fullmatch(rf"(.*\.)?{re.escape(anchor)}", k)]
    if not prefixes:
        shown = ", ".join(list(state)[:5])
        raise CheckpointError(f"{file}: no M2D encoder in it; its keys begin with {shown} ...")
    # A teacher of offline distillation may be there too, under a name of its own.
    return min(prefixes, key=lambda prefix: (_WRAPPERS.fullmatch(prefix) is None, len(prefix)))


def _unwrap(content: Any, file: Path) -> dict[str, Tensor]:
    """The state dict of ``{"model": state_dict, ...}`` or of a bare state dict."""
    state = content.get("model", content) if isinstance(content, dict) else None
    items = state.items() if isinstance(state, dict) else ()
    tensors = {key: value.detach() for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{file}: no state dict in it; it holds {held or 'nothing'}.")
    return tensors


def _unpickle(file: Path) -> Any:
    """Load a pickle that holds nothing but tensors, plain containers and the allow-listed types."""
    with file.open("rb") as stream:
        try:
            with torch.serialization.safe_globals(_SAFE_GLOBALS):
                return torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged or malicious file raises can be anything
            held = _unsafe_objects(file, error)
            if not held:
                raise CheckpointError(
                    f"{file}: not a readable checkpoint; it is damaged, or was not written by torch.save."
                ) from error
            raise CheckpointError(
                f"{file}: refused, it holds objects that could run code when loaded: {', '.join(held)}. "
                "Save its state dict alone (torch.save(model.state_dict(), ...)) and load that."
            ) from error


def _unsafe_objects(file: Path, error: Exception) -> list[str]:
    """What a refused pickle would import, as ``module.name``; found by reading it, nothing of it is run."""
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            held = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # not the zip of torch.save, but torch's layout before 2020 or a plain pickle
        held = [*re.findall(r"GLOBAL (\S+)", str(error)), *_imports_of_pickle(file)]
    return sorted(set(held))


def _imports_of_pickle(file: Path) -> list[str]:
    imports: list[str] = []
    strings: list[str] = []
    try:
        with file.open("rb") as stream:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    imports.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    imports.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # not a pickle
        return []
    return imports


def _read_any(path: Path, prefer_half: Iterable[torch.dtype]) -> Checkpoint:
    if path.is_dir():
        if (path / CONFIG_FILE).exists():
            return read_native(path, prefer_half)
        file = _only_checkpoint(path)
        return read_published(file, _published_name(path.resolve().name, path.absolute().name, file.stem))
    if path.suffix == ".zip":
        return _read_zip(path)
    if path.suffix in (".pth", ".pt"):
        # A link may lead to a file of another name, as in a download cache.
        folders = (path.resolve().parent.name, path.absolute().parent.name)
        return read_published(path, _published_name(*folders, path.stem))
    raise CheckpointError(f"{path}: not a checkpoint; expected a folder, a .pth or a release's .zip.")


def _published_name(*candidates: str) -> str:
    """The first that follows the grammar of published names; the first of all if none does."""
    return next((name for name in candidates if CheckpointName.matches(name)), candidates[0])


def _skeleton(config: ModelConfig) -> dict[str, Tensor]:
    """The tensors a model of this configuration has, by the names of ``M2D.state_dict()``, without memory."""
    parts = torch.nn.Module()
    with torch.device("meta"):
        parts.encoder = Encoder(config)
        if config.head is not None:
            parts.head = TaggingHead(config.head_dim, config.head)
        if config.clap is not None:
            parts.clap = ClapHead(config.clap)
    return parts.state_dict()


def _only_checkpoint(folder: Path) -> Path:
    files = sorted([*folder.glob("*.pth"), *folder.glob("*.pt")])
    if len(files) == 1:
        return files[0]
    if not files and any((folder / name).exists() for name in WEIGHT_FILES.values()):
        raise CheckpointError(f"{folder}: {_INTERRUPTED}")
    if not files:
        raise ModelNotFoundError(f"{folder}: no model in this folder ({CONFIG_FILE} or a .pth).")
    raise CheckpointError(f"{folder}: several checkpoints ({', '.join(f.name for f in files)}); name one of them.")


def _read_zip(path: Path) -> Checkpoint:
    """Read the one ``.pth`` of a release's zip; only that member is unpacked, under a name of our own."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "checkpoint.pth"
        try:
            inside = pathlib.PurePosixPath(_unpack_only_checkpoint(path, file))
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
            if isinstance(error, CheckpointError) or getattr(error, "errno", None) not in (None, errno.EINVAL):
                raise  # ours, or the disk's; a damaged archive can make its reader seek to before the start
            raise CheckpointError(f"{path}: a damaged zip archive ({error}); download it again.") from error
        except NotImplementedError as error:  # zipfile's word for a compression it does not know
            raise CheckpointError(f"{path}: cannot be unpacked ({error}).") from error
        name = _published_name(inside.parent.name or path.stem, path.stem, inside.stem)
        return read_published(file, name, source=f"{path.name}: {inside}")


def _unpack_only_checkpoint(path: Path, destination: Path) -> str:
    """Write the one ``.pth`` of a zip to ``destination``; return its name in there."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith((".pth", ".pt")) and not n.startswith("__MACOSX/")]
        if len(names) != 1:
            raise CheckpointError(f"{path}: expected one .pth in the archive, found {', '.join(names) or 'none'}.")
        if archive.getinfo(names[0]).flag_bits & _ENCRYPTED:
            raise CheckpointError(f"{path}: cannot be unpacked without its password; unpack it, and give the .pth.")
        with archive.open(names[0]) as packed, destination.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        return names[0]


def _converted_release(archive: Path, converted: Path) -> Path:
    """The folder of a release in our layout; made from its zip, which is then deleted, if it is not there yet."""
    if not converted.exists():
        with hub.lock_of_release(archive):
            if not converted.exists():  # else another process was quicker
                convert(archive, converted, [torch.bfloat16])
                archive.unlink(missing_ok=True)
    return converted


# --- safetensors and whole files ---------------------------------------------------------------------------------


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file ({error}); download it again.") from error


def _save_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})


@contextmanager
def _folder_written_whole(destination: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``destination`` when the block ends well, and vanishes when it does not."""
    scratch = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.partial")
    scratch.mkdir()
    try:
        yield scratch
        if destination.exists():
            destination.rmdir()
        scratch.rename(destination)
        sync(destination.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
