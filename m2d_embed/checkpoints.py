"""Every layout of M2D weights -> one: our configuration and our state dict. Safetensors in and out.

Published layouts (``.pth``, its folder, or the release's ``.zip``): ``{"model": state_dict, ...}`` or a state dict;
encoder only, with decoder and target network, fine-tuned (encoder below ``module.ar.runtime.backbone.``, head below
``module.head.``), or CLAP (``audio_proj``, ``text_proj``, ``logit_scale``, perhaps ``text_encoder``).

Our layout is a folder: ``config.json``, ``model.safetensors``, optional ``model.bf16.safetensors`` or
``model.fp16.safetensors`` beside it, ``README.md``. No pickle.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import shutil
import tempfile
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2d_embed import hub
from m2d_embed.config import CONFIG_FILE, CheckpointName, ClapConfig, FeatureConfig, HeadConfig, ModelConfig
from m2d_embed.encoder import sincos_positions
from m2d_embed.errors import CheckpointError, ConfigError, ModelNotFoundError
from m2d_embed.heads.clap import TEXT_ENCODER_FILE
from m2d_embed.heads.tagging import audioset_labels

#: What the files of our layout are called, by the dtype of the matrices in them.
WEIGHT_FILES = {
    torch.float32: "model.safetensors",
    torch.bfloat16: "model.bf16.safetensors",
    torch.float16: "model.fp16.safetensors",
}

_NORM_STATS_OF_2022 = (-7.1, 4.2)  # what checkpoints without the key `norm_stats` were trained with
_LICENSE_OF_RELEASES = "NTT evaluation licence (non-commercial); see the release's own LICENSE"

# What a checkpoint may hold besides tensors and plain containers: the training arguments and a few numpy scalars.
# None of these runs code when unpickled.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "bool")},
]


@dataclass
class Checkpoint:
    """A checkpoint in memory: what the model is, and its tensors under the names of ``M2D.state_dict()``.

    ``text_encoder`` holds a CLAP checkpoint's own text encoder, or the path of the file that does. ``unused`` lists
    what was in the file but is no part of the model, such as the decoder of pre-training. ``file_dtype`` is what the
    file is for: float32, or half precision if it is such a sibling.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    text_encoder: Path | dict[str, Tensor] | None = None
    unused: list[str] = field(default_factory=list)
    file_dtype: torch.dtype = torch.float32


def load_checkpoint(location: hub.Location, prefer_half: Iterable[torch.dtype] = ()) -> Checkpoint:
    """Read the checkpoint at a location that ``hub.locate`` found.

    An official release is converted once, into the cache, and read from there afterwards.

    Args:
        location: where the files are.
        prefer_half: half-precision files to take when the folder has them, best first.

    Raises:
        CheckpointError: if it cannot be read, or holds more than tensors.
        ConfigError: if its name or ``config.json`` makes no sense.
    """
    if location.release is not None:
        location = replace(location, path=_converted_release(location.path, location.release))
    return read_checkpoint(location.path, prefer_half)


def read_checkpoint(path: Path, prefer_half: Iterable[torch.dtype] = ()) -> Checkpoint:
    """Read a checkpoint of any layout: a folder (ours or published), a ``.pth`` or a release's ``.zip``."""
    if path.is_dir():
        if (path / CONFIG_FILE).exists():
            return read_native(path, prefer_half)
        return read_published(_only_checkpoint(path), path.resolve().name)
    if path.suffix == ".zip":
        return _read_zip(path)
    if path.suffix in (".pth", ".pt"):
        names = (path.resolve().parent.name, path.stem)
        return read_published(path, next((n for n in names if CheckpointName.matches(n)), names[0]))
    raise CheckpointError(f"{path}: not a checkpoint; expected a folder, a .pth or a release's .zip.")


def convert(source: Path, destination: Path, half_dtypes: Iterable[torch.dtype] = ()) -> Checkpoint:
    """Write a checkpoint of any layout in ours, float32, with half-precision siblings if asked for.

    Raises:
        CheckpointError: if the source cannot be read or the destination exists and is not empty.
    """
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} exists and is not empty; choose another destination.")
    checkpoint = read_checkpoint(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _folder_written_whole(destination) as folder:
        write_native(folder, checkpoint, [torch.float32, *half_dtypes])
    return checkpoint


def read_native(folder: Path, prefer_half: Iterable[torch.dtype] = ()) -> Checkpoint:
    """Read our layout; the tensors keep the precision they are stored in."""
    config = ModelConfig.from_json(folder / CONFIG_FILE)
    dtype = next((d for d in (*prefer_half, torch.float32) if (folder / WEIGHT_FILES[d]).exists()), None)
    if dtype is None:
        raise CheckpointError(f"{folder}: has a {CONFIG_FILE} but no {WEIGHT_FILES[torch.float32]}.")
    tensors = _load_safetensors(folder / WEIGHT_FILES[dtype])
    text_encoder = folder / TEXT_ENCODER_FILE
    return Checkpoint(config, tensors, text_encoder if text_encoder.exists() else None, file_dtype=dtype)


def write_native(folder: Path, checkpoint: Checkpoint, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> None:
    """Write our layout into an existing folder, one weight file a dtype; each file appears whole or not at all."""
    _write_text(folder / CONFIG_FILE, checkpoint.config.to_json())
    for dtype in dtypes:
        tensors = {name: as_stored(name, tensor, dtype) for name, tensor in checkpoint.tensors.items()}
        _save_safetensors(tensors, folder / WEIGHT_FILES[dtype])
    if isinstance(checkpoint.text_encoder, Path):
        if checkpoint.text_encoder.parent.resolve() != folder.resolve():
            shutil.copyfile(checkpoint.text_encoder, folder / TEXT_ENCODER_FILE)
    elif checkpoint.text_encoder is not None:
        _save_safetensors(checkpoint.text_encoder, folder / TEXT_ENCODER_FILE)
    if not (folder / "README.md").exists():
        _write_text(folder / "README.md", model_card(checkpoint.config))


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
    origin = f"\nConverted from {config.source}.\n" if config.source else ""
    licence = f"\nLicence of the weights: {config.license}\n" if config.license else ""
    return f"""---
library_name: m2d-embed
pipeline_tag: feature-extraction
tags: [audio, embeddings, HEAR, m2d]
---

# {config.name or "An M2D model"}

Audio embeddings by Masked Modeling Duo: {config.embed_dim}-d, {config.depth} layers; {config.sample_rate} Hz;
windows of {mels} mels x {frames} frames, patches of {patch_mels} x {patch_frames}.
{origin}{licence}
```python
import m2d_embed

model = m2d_embed.load_model("path-or-repository-of-this-model")
embeddings = model.encode(["a.wav", "b.flac"])  # (2, {FeatureConfig().frame_dim(config)})
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
    head, head_names = _find_head(state, taken)
    clap, clap_names = _find_clap(state, parsed)
    taken |= head_names | clap_names
    stats_key = f"{prefix}norm_stats"
    norm_stats = tuple(state[stats_key].flatten().tolist()) if stats_key in state else _NORM_STATS_OF_2022
    text_keys = {k: k.partition("text_encoder.")[2] for k in state if "text_encoder." in k}
    try:
        config = parsed.model_config(
            norm_stats=norm_stats,
            head=head,
            clap=clap,
            source=source or f"{name}/{file.name}",
            license=_LICENSE_OF_RELEASES,
        )
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    tensors = {ours: state[theirs].clone() for theirs, ours in taken.items()}
    tensors.setdefault("encoder.pos_embed", sincos_positions(config.embed_dim, config.grid_size))
    if "head.norm.running_mean" in tensors:
        tensors.setdefault("head.norm.num_batches_tracked", torch.tensor(0))
        tensors["head.norm.num_batches_tracked"] = tensors["head.norm.num_batches_tracked"].long()
    text_encoder = {ours: state[theirs].clone() for theirs, ours in text_keys.items()} or None
    unused = [key for key in state if key not in taken and key not in text_keys and key != stats_key]
    return Checkpoint(config, tensors, text_encoder, unused)


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
    counts = Counter(re.sub(r"^(module\.)?(ar\.)?(runtime\.)?(backbone\.)?", "", k).split(".")[0] for k in keys)
    return ", ".join(f"{part} ({count})" for part, count in sorted(counts.items()))


def _find_head(state: Mapping[str, Tensor], taken: Mapping[str, str]) -> tuple[HeadConfig | None, dict[str, str]]:
    weight_key = next((k for k in state if re.fullmatch(r"(module\.)?head\.mlp\.mlp\.0\.weight", k)), None)
    if weight_key is None:
        return None, {}
    prefix = weight_key.removesuffix("mlp.mlp.0.weight")
    names = {prefix + k: f"head.{ours}" for k, ours in _HEAD_KEYS.items() if prefix + k in state}
    outputs, width = state[weight_key].shape
    embed_dim = next(state[k].shape[-1] for k, ours in taken.items() if ours == "encoder.cls_token")
    audioset = audioset_labels()
    labels = audioset if outputs == len(audioset) else tuple(f"class_{i}" for i in range(outputs))
    return HeadConfig(labels, "flat" if width == embed_dim else "stacked"), names


def _find_clap(state: Mapping[str, Tensor], parsed: CheckpointName) -> tuple[ClapConfig | None, dict[str, str]]:
    parts = ("audio_proj.", "text_proj.", "logit_scale")
    keys = {m[2]: k for k in state if (m := re.fullmatch(rf"(.*?\.)?((?:{'|'.join(parts)}).*)", k))}
    if not any(key.startswith("audio_proj.") for key in keys):
        return None, {}
    names = {theirs: f"clap.{short}" for short, theirs in keys.items()}
    if "text_proj.weight" in keys:  # a single Linear, not in a Sequential
        for part in ("weight", "bias"):
            names[keys[f"text_proj.{part}"]] = f"clap.text_proj.0.{part}"
    tensors = {ours: state[theirs] for theirs, ours in names.items()}
    depth = len({m[1] for n in tensors if (m := re.match(r"clap\.audio_proj\.sem_blocks\.(\d+)\.", n))})
    token = tensors.get("clap.audio_proj.sem_token")
    return ClapConfig(
        audio_projector="mlp" if token is None else "semantic",
        audio_layers=_mlp_sizes(tensors, "clap.audio_proj") if token is None else (token.shape[-1],),
        text_layers=_mlp_sizes(tensors, "clap.text_proj"),
        text_encoder=parsed.text_encoder,
        text_pooling="cls" if "bert-base" in parsed.text_encoder else "mean",
        semantic_depth=depth,
        semantic_mlp_dim=len(tensors["clap.audio_proj.sem_blocks.0.mlp.fc1.weight"]) if depth else 0,
    ), names


def _mlp_sizes(tensors: Mapping[str, Tensor], prefix: str) -> tuple[int, ...]:
    """Layer sizes, input first, of the Linear layers ``prefix.0``, ``prefix.2``, ..."""
    weights = [tensors[n] for n in sorted(tensors) if re.fullmatch(rf"{re.escape(prefix)}\.\d+\.weight", n)]
    return (weights[0].shape[1], *(len(w) for w in weights)) if weights else ()


def _encoder_prefix(state: Mapping[str, Tensor], file: Path) -> str:
    anchor = "patch_embed.proj.weight"
    prefixes = sorted((k.removesuffix(anchor) for k in state if k.endswith(anchor)), key=len)
    if not prefixes:
        shown = ", ".join(list(state)[:5])
        raise CheckpointError(f"{file}: no M2D encoder in it; its keys begin with {shown} ...")
    return prefixes[0]


def _unwrap(content: Any, file: Path) -> dict[str, Tensor]:
    """The state dict of ``{"model": state_dict, ...}`` or of a bare state dict."""
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) for k in state):
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{file}: no state dict in it; it holds {held or 'nothing'}.")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _unpickle(file: Path) -> Any:
    """Load a pickle that holds nothing but tensors, plain containers and the allow-listed types."""
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        held = sorted(_unsafe_globals(file))
        if held:
            raise CheckpointError(
                f"{file}: refused, it holds objects that could run code when loaded: {', '.join(held)}. "
                "Save its state dict alone (torch.save(model.state_dict(), ...)) and load that."
            ) from error
        raise CheckpointError(f"{file}: not a readable checkpoint ({_first_line(error)}).") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: not a readable checkpoint ({_first_line(error)}).") from error


def _unsafe_globals(file: Path) -> list[str]:
    with torch.serialization.safe_globals(_SAFE_GLOBALS):
        try:
            return torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
            return []


def _only_checkpoint(folder: Path) -> Path:
    files = sorted([*folder.glob("*.pth"), *folder.glob("*.pt")])
    if len(files) == 1:
        return files[0]
    if not files:
        raise ModelNotFoundError(f"{folder}: no model in this folder ({CONFIG_FILE} or a .pth).")
    raise CheckpointError(f"{folder}: several checkpoints ({', '.join(f.name for f in files)}); name one of them.")


def _read_zip(path: Path) -> Checkpoint:
    """Read the one ``.pth`` of a release's zip; only that member is unpacked, under a name of our own."""
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as scratch:
            members = [m for m in archive.infolist() if m.filename.endswith((".pth", ".pt"))]
            if len(members) != 1:
                held = ", ".join(m.filename for m in members) or "none"
                raise CheckpointError(f"{path}: expected one .pth in the archive, found {held}.")
            inside = pathlib.PurePosixPath(members[0].filename)
            file = Path(scratch) / "checkpoint.pth"
            with archive.open(members[0]) as packed, file.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            names = (inside.parent.name, path.stem)
            name = next((n for n in names if CheckpointName.matches(n)), names[1])
            return read_published(file, name, source=f"{path.name}: {inside}")
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path}: a damaged zip archive ({error}); download it again.") from error


def _converted_release(archive: Path, converted: Path) -> Path:
    """The folder of a release in our layout; made from its zip, which is then deleted, if it is not there yet."""
    if not converted.exists():
        convert(archive, converted, [torch.bfloat16])
        archive.unlink()
    return converted


# --- safetensors and whole files ---------------------------------------------------------------------------------


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file ({error}); download it again.") from error


def _save_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    partial = file.with_name(f".{file.name}.partial")
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, metadata={"format": "pt"})
    shutil.copymode(file.with_name(CONFIG_FILE), partial)  # safetensors makes files that only their owner can read
    partial.replace(file)


def _write_text(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


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
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
