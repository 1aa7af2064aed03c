"""A model as one graph, waveform in and embeddings out, for runtimes without this package: ONNX and ``torch.export``.

``M2D`` cuts a clip into windows in Python, by its length. A graph has no such branches, so here the same windows are
written as sizes that follow from the number of samples: the log-mel is padded to whole windows, all windows go through
the encoder as one batch, tokens of padding are not attended to, and columns that the model would not have are left out.
One graph serves every length and batch size.

The spectrogram is a convolution with the windowed sines and cosines instead of an FFT, which few runtimes have.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2d_embed import __version__
from m2d_embed.config import FeatureConfig, ModelConfig, is_whole, resolve_layers
from m2d_embed.errors import ConfigError, ExportError, UnsupportedError
from m2d_embed.files import atomic_write
from m2d_embed.m2d import M2D
from m2d_embed.model.pooling import frame_features, pool_scene

Kind = Literal["scene", "timestamps", "tags"]

#: The newest opset that torch 2.13's exporter writes (with onnxscript 0.7); onnxruntime 1.31 reads up to 26.
NEWEST_OPSET = 25
#: The one that every runtime reads, and the exporter itself writes.
OLDEST_OPSET = 18
#: Below 23, as ``quantize_dynamic`` of ONNX Runtime (1.31) makes an invalid graph of the attention operator.
DEFAULT_OPSET = OLDEST_OPSET

#: Largest difference from the model, in any value of an output, with which a file is kept.
TOLERANCE = 1e-4

#: Name of the metadata inside a ``.pt2``.
METADATA_FILE = "m2d_embed.json"

_ATTENTION_OPSET = 23  # since when ONNX has an operator for attention
_MAX_ONNX_BYTES = 2_000_000_000  # of weights: a protobuf message ends at 2 GiB

Runner = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Export:
    """A written file.

    Attributes:
        path: where it is.
        sample_rate: of the audio it takes, in Hz.
        num_bytes: its size.
        outputs: names and shapes of the outputs, e.g. ``{"embeddings": ("batch", "960")}``.
        opset: of an ONNX file, else None.
        max_difference: largest difference from the model that was seen when the file was checked.
    """

    path: Path
    sample_rate: int
    num_bytes: int
    outputs: dict[str, tuple[str, ...]]
    opset: int | None
    max_difference: float


def export_onnx(
    model: M2D, path: str | Path, kind: Kind = "scene", opset: int | None = None, overwrite: bool = False
) -> Export:
    """Write a model as one ONNX file, and check it with ONNX Runtime.

    The graph takes ``audio``, (batch, samples) float32 in [-1, 1] at the model's rate, of any length from one sample
    and any batch size. It returns ``embeddings``: (batch, D) for scenes, (batch, columns, D) for timestamps, then with
    ``timestamps_ms`` (batch, columns); for tags ``probabilities`` (batch, labels). All windows of a batch are encoded
    at a time, so its memory grows with the length of the clips. Audio is not checked: what comes out for an empty clip,
    or one with NaN, means nothing.

    Model, rate, kind, size, settings and labels are in the file's metadata, as strings.

    Args:
        model: float32, on the CPU, in evaluation mode; its ``features`` say what an embedding is.
        path: ``*.onnx``.
        kind: scene embeddings, timestamp embeddings with their times, or probabilities of the tagging head.
        opset: of ONNX, 18 to 25; None is 18. From 23 on attention is one operator, but then ONNX Runtime's
            ``quantize_dynamic`` makes an invalid graph.
        overwrite: replace an existing file.

    Raises:
        ConfigError: on an impossible path, kind or opset, or a model in training mode.
        UnsupportedError: without onnx, onnxscript or onnxruntime, for a model that is not float32 on the CPU or too
            large for one file, or for tags of a model without a tagging head.
        ExportError: if the file does not give the model's numbers; it is not left behind.
    """
    target = check_target(path, ".onnx", overwrite)
    chosen = DEFAULT_OPSET if opset is None else opset
    if not is_whole(chosen) or not OLDEST_OPSET <= chosen <= NEWEST_OPSET:
        raise ConfigError(f"opset {opset} is not possible; choose one of {OLDEST_OPSET} to {NEWEST_OPSET}.")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(module) is None:
            raise UnsupportedError(f"ONNX export: {module} is not installed: pip install 'm2d-embed[onnx]'")
    graph = _Graph(model, kind)
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    if weight_bytes > _MAX_ONNX_BYTES:
        raise UnsupportedError(f"{weight_bytes / 1e9:.1f} GB of weights do not fit one ONNX file; export a .pt2.")
    written = _as_onnx(graph, chosen).SerializeToString()
    with atomic_write(target) as partial:
        partial.write_bytes(written)
        difference = _check(graph, model, _onnx_runner(partial, graph), target)
    return Export(target, model.sample_rate, target.stat().st_size, graph.outputs, chosen, difference)


def export_program(model: M2D, path: str | Path, kind: Kind = "scene", overwrite: bool = False) -> Export:
    """Write a model as a ``torch.export`` program, and check it as loaded again.

    Inputs, outputs and arguments are those of ``export_onnx``; ``torch.export.load(path).module()`` runs it and returns
    a tuple of the outputs. The metadata is JSON in the file ``m2d_embed.json`` inside (``extra_files`` of
    ``torch.export.load``). Nothing in the file is pickled. The program refuses empty clips.

    Raises:
        ConfigError: on an impossible path or kind, or a model in training mode.
        UnsupportedError: for a model that is not float32 on the CPU, or for tags of a model without a tagging head.
        ExportError: if the program does not give the model's numbers; it is not left behind.
    """
    target = check_target(path, ".pt2", overwrite)
    graph = _Graph(model, kind)
    program = _trace(graph)
    with atomic_write(target) as partial:
        with partial.open("wb") as stream, _quiet():
            torch.export.save(program, stream, extra_files={METADATA_FILE: json.dumps(graph.metadata)})
        difference = _check(graph, model, _program_runner(partial), target)
    return Export(target, model.sample_rate, target.stat().st_size, graph.outputs, None, difference)


def describe(export: Export) -> str:
    """What was written, how well it agrees with the model, and three lines of Python that use it."""
    shapes = ", ".join(f"{name} ({', '.join(shape)})" for name, shape in export.outputs.items())
    about = f"{export.num_bytes / 1e6:.1f} MB" + (f", opset {export.opset}" if export.opset else "")
    names = ", ".join(export.outputs) + ("," if len(export.outputs) == 1 else "")
    file = str(export.path)
    if export.opset is None:
        lines = ["import torch", f"program = torch.export.load({file!r}).module()", f"{names} = program(audio)"]
    else:
        lines = [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({file!r})",
            f'{names} = session.run(None, {{"audio": audio}})',
        ]
    return (
        f"{file}: {about}; audio (batch, samples) float32 at {export.sample_rate} Hz -> {shapes}; "
        f"differs from the model by at most {export.max_difference:.1g}\n    " + "\n    ".join(lines)
    )


# --- the graph --------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How many windows a clip fills, how many columns wide each is, and how many embeddings come out over time."""

    windows: int
    width: int
    embeddings: int


def layout(num_frames: int, config: ModelConfig, hop_frames: int) -> Layout:
    """What ``windows.cut`` and ``windows.interleave`` do to a clip, as arithmetic without branches.

    Args:
        num_frames: of the log-mel; a plain or a symbolic integer.
        config: the model's.
        hop_frames: step of the embeddings, a divisor of the patch.
    """
    window_frames, patch_frames, columns = config.input_size[1], config.patch_size[1], config.grid_size[1]
    shifts = patch_frames // hop_frames
    # Embedding q covers frames from q * hop_frames on, and is kept if half a patch of them is real.
    kept = _max(0, 2 * num_frames - patch_frames + 2 * hop_frames) // (2 * hop_frames)
    # A window may end in frames that no column holds. Then the first shift that fits the window ends a column early,
    # and the others end there with it. If none fits, the last term puts the limit out of reach.
    over = _max(0, num_frames - window_frames + hop_frames - 1) // hop_frames
    limit = columns * shifts + over + shifts * (over // shifts)
    embeddings = _max(1, _min(kept, limit))
    width = _min((num_frames + patch_frames - 1) // patch_frames, columns)
    return Layout((embeddings + columns * shifts - 1) // (columns * shifts), width, embeddings)


class _Graph(nn.Module):
    """A model as a function of tensors alone.

    Attributes:
        outputs: names and shapes of what ``forward`` returns.
        metadata: what the file says about itself.
    """

    kernels: Tensor

    def __init__(self, model: M2D, kind: Kind):
        super().__init__()
        _check_model(model, kind)
        self.kind = kind
        self.config = model.config
        self.features = model.head_features() if kind == "tags" else model.features
        self.layers = resolve_layers(self.features.blocks(self.config), self.config.depth)
        self.hop_frames = self.features.hop_frames(self.config) if kind == "timestamps" else self.config.patch_size[1]
        self.frontend = deepcopy(model.frontend)
        self.register_buffer("kernels", fourier_kernels(model.frontend.window))
        self.encoder = deepcopy(model.encoder)
        self.encoder.blocks = self.encoder.blocks[: max(self.layers) + 1]
        self.head = deepcopy(model.head) if kind == "tags" else None
        self.requires_grad_(False).eval()
        self.outputs = _outputs(model, kind)
        self.metadata = _metadata(model, kind, self.features)

    def forward(self, audio: Tensor) -> tuple[Tensor, ...]:
        """(B, samples) float32 -> the tensors that ``outputs`` names."""
        num_samples = _opaque(audio.shape[1])  # refuses an empty clip when a program runs
        num_frames = 1 + num_samples // self.config.hop_length
        sizes = self._sizes(num_samples, num_frames)
        frames = self._embed(audio, num_frames, sizes)
        if self.kind == "timestamps":
            return frames, self._times(num_samples, sizes.embeddings).expand(frames.shape[0], sizes.embeddings)
        if self.head is not None:
            return (self.head.probabilities(self.head(pool_scene(frames, self.head.config.scene_pooling))),)
        return (pool_scene(frames, self.features.pooling(self.config)),)

    def _sizes(self, num_samples: int, num_frames: int) -> Layout:
        sizes = layout(num_frames, self.config, self.hop_frames)
        if self.kind == "timestamps":
            sizes = sizes._replace(embeddings=_max(1, _min(sizes.embeddings, self._centres(num_samples))))
        sizes = Layout(*map(_opaque, sizes))
        columns, shifts = self.config.grid_size[1], self.config.patch_size[1] // self.hop_frames
        _promise(sizes.width <= columns)
        _promise(sizes.embeddings <= sizes.windows * sizes.width * shifts)
        return sizes

    def _embed(self, audio: Tensor, num_frames: int, sizes: Layout) -> Tensor:
        """(B, samples) -> (B, embeddings, D)."""
        batch, rows, patch_frames = audio.shape[0], self.config.grid_size[0], self.config.patch_size[1]
        shifts = patch_frames // self.hop_frames
        shift = torch.arange(shifts) * self.hop_frames
        window_frames = sizes.width * patch_frames
        clip_frames = sizes.windows * window_frames

        log_mel = self._log_mel(audio, num_frames, clip_frames + patch_frames - self.hop_frames)  # (B, mels, ...)
        if shifts > 1:
            taken = (shift[:, None] + torch.arange(clip_frames)).flatten()
            log_mel = log_mel.index_select(2, taken)
        windows = log_mel.view(batch, -1, shifts * sizes.windows, window_frames).transpose(1, 2)

        start = (torch.arange(sizes.windows * sizes.width) * patch_frames).view(sizes.windows, sizes.width)
        is_audio = shift[:, None, None] + start < num_frames  # (shifts, windows, width)
        is_audio = is_audio[None, :, :, None] & torch.ones(batch, 1, 1, rows, 1, dtype=torch.bool)

        tokens = self._tokens(windows.flatten(0, 1).unsqueeze(1), sizes.width)
        encoded = self.encoder.encode(tokens, self.layers, is_audio.flatten(0, 2).flatten(1, 2))
        patches = [x[:, 1:].reshape(-1, rows, sizes.width, x.shape[-1]) for x in encoded]
        frames = frame_features(patches, self.features)  # (B * shifts * windows, width, D)
        frames = frames.reshape(batch, shifts, sizes.windows * sizes.width, -1).transpose(1, 2).flatten(1, 2)
        return frames[:, : sizes.embeddings]

    def _log_mel(self, audio: Tensor, num_frames: int, wanted: int) -> Tensor:
        """Normalised log-mel of the first ``wanted`` frames, (B, mels, wanted); zeros behind the clip's own frames."""
        n_fft, hop = self.config.n_fft, self.config.hop_length
        half = n_fft // 2
        # As in LogMel: a clip too short to be mirrored is zero-padded first.
        last = _max(audio.shape[1], half + 1) - 1
        source = (torch.arange((wanted - 1) * hop + n_fft) - half).abs()
        source = (last - (last - source).abs()).clamp(min=0)
        samples = F.pad(audio, (0, half + 1)).index_select(1, source)
        spectrum = F.conv1d(samples.unsqueeze(1), self.kernels, stride=hop)  # (B, ..., wanted)
        real, imaginary = torch.split(spectrum, half + 1, dim=1)
        power = real.square() + imaginary.square()
        log_mel = self.frontend.normalize(torch.log(self.frontend.filterbank.t() @ power + self.frontend.eps))
        return torch.where(torch.arange(wanted) < num_frames, log_mel, 0.0)

    def _tokens(self, log_mel: Tensor, width: int) -> Tensor:
        """``Encoder.embed``, whose slice of the positions export would fix to one width."""
        patches: Tensor = self.encoder.patch_embed(log_mel)  # (N, dim, F, width)
        positions = self.encoder.pos_embed[0, 1:].view(*self.config.grid_size, -1)  # (F, T, dim)
        positions = positions.index_select(1, torch.arange(width)).flatten(0, 1)
        return patches.flatten(2).transpose(1, 2) + positions

    def _centres(self, num_samples: int) -> int:
        """How many embeddings have their centre within the clip; see ``windows.column_times``."""
        hop = self.config.hop_length
        first, step = (self.config.patch_size[1] - 1) * hop, 2 * self.hop_frames * hop  # in half samples
        return _max(0, 2 * num_samples - first + step) // step

    def _times(self, num_samples: int, count: int) -> Tensor:
        """Centres in ms, (count,); of a clip that ends before its first centre, the middle."""
        patch_frames, hop = self.config.patch_size[1], self.config.hop_length
        samples = torch.full((), num_samples)
        times = (torch.arange(count).double() * self.hop_frames + (patch_frames - 1) / 2) * self.config.frame_ms
        middle = 500.0 * samples.double() / self.config.sample_rate
        return torch.where(2 * samples >= (patch_frames - 1) * hop, times, middle).float()


def fourier_kernels(window: Tensor) -> Tensor:
    """Windowed cosines, then sines, of all frequencies: (n_fft + 2, 1, n_fft) float32, for a convolution."""
    n_fft = len(window)
    # Whole turns are taken off while the phase is an exact integer.
    turns = torch.outer(torch.arange(n_fft // 2 + 1), torch.arange(n_fft)) % n_fft
    angles = turns.double() * (2 * math.pi / n_fft)
    return (torch.cat([angles.cos(), angles.sin()]) * window.double()).float().unsqueeze(1)


def _opaque(size: int) -> int:
    """The same positive integer, but one of which export does not know how it follows from the input.

    Knowing that, it would fix the graph to the case of its example: one window or several, whole or not.
    """
    opaque = cast("int", torch.full((), size).item())
    _promise(opaque >= 1)
    return opaque


def _promise(condition: bool) -> None:
    """Tell export what holds for every input; a program checks it when it runs."""
    torch._check(condition)


def _max(first: int, second: int) -> int:
    larger: int = torch.sym_max(first, second)
    return larger


def _min(first: int, second: int) -> int:
    smaller: int = torch.sym_min(first, second)
    return smaller


def _outputs(model: M2D, kind: Kind) -> dict[str, tuple[str, ...]]:
    if kind == "tags":
        return {"probabilities": ("batch", str(len(model.tagging_head().config.labels)))}
    if kind == "scene":
        return {"embeddings": ("batch", str(model.scene_embedding_size))}
    return {
        "embeddings": ("batch", "columns", str(model.timestamp_embedding_size)),
        "timestamps_ms": ("batch", "columns"),
    }


def _metadata(model: M2D, kind: Kind, features: FeatureConfig) -> dict[str, str]:
    config = model.config
    settings = dataclasses.asdict(features)
    settings |= {"layers": features.blocks(config), "scene_pooling": features.pooling(config)}
    settings |= {"norm_stats": config.norm_stats, "input_size": config.input_size, "patch_size": config.patch_size}
    facts = {
        "model": config.name,
        "kind": kind,
        "sample_rate": str(config.sample_rate),
        "embedding_size": str(features.scene_dim(config) if kind == "scene" else features.frame_dim(config)),
        "settings": json.dumps(settings),
        "source": config.source,
        "license": config.license,
        "m2d_embed_version": __version__,
    }
    if kind == "tags":
        facts["labels"] = json.dumps(model.tagging_head().config.labels, ensure_ascii=False)
    return facts


# --- files ------------------------------------------------------------------------------------------------------------


def check_target(path: str | Path, suffix: str, overwrite: bool) -> Path:
    """The path as one that can be written to, or ConfigError."""
    target = Path(path)
    if target.suffix != suffix:
        raise ConfigError(f"{target}: give it a name that ends in {suffix}.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: the folder {target.parent} does not exist.")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; choose another name.")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists; choose another name, or replace it with --overwrite (overwrite=True).")
    return target


def _check_model(model: M2D, kind: Kind) -> None:
    if kind not in ("scene", "timestamps", "tags"):
        raise ConfigError(f'kind is "scene", "timestamps" or "tags", not {kind!r}.')
    if kind == "tags":
        model.tagging_head()
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise UnsupportedError(
            f"export takes a float32 model on the CPU, but this one is {str(model.dtype).removeprefix('torch.')} on "
            f'{model.device}; load it with device="cpu", dtype="fp32".'
        )
    if model.training:
        raise ConfigError("the model is in training mode; call model.eval() first.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back torch's remarks on its own parts, on missing torchvision and the like; errors are still raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _trace(graph: _Graph) -> torch.export.ExportedProgram:
    """Trace the graph for any batch size and number of samples."""
    example = torch.zeros(2, _window_samples(graph.config) + 1000)
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("samples", min=1)}
    # With gradients on, the encoder runs its plain blocks rather than those packed for this machine.
    with torch.enable_grad(), _quiet():
        try:
            program = torch.export.export(graph, (example,), dynamic_shapes={"audio": sizes}, strict=False)
        except Exception as error:  # its errors have no common class
            raise ExportError(f"torch {torch.__version__} could not trace the model ({_brief(error)}).") from error
    program.example_inputs = None  # would be stored, pickled
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    return program


def _as_onnx(graph: _Graph, opset: int) -> Any:
    """The graph as an ONNX ``ModelProto``."""
    table: dict[Callable[..., Any], Any] = {}
    if opset >= _ATTENTION_OPSET:
        table[torch.ops.aten.scaled_dot_product_attention.default] = _onnx_attention
    program = _trace(graph)
    with _quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["audio"],
                output_names=list(graph.outputs),
                external_data=False,
                verbose=False,
                custom_translation_table=table,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"torch could not write the model as ONNX ({_brief(error)}).") from error
    assert exported is not None
    proto = exported.model_proto
    written = [entry.version for entry in proto.opset_import if entry.domain == ""]
    if written != [opset]:
        raise ExportError(f"torch wrote opset {written} instead of {opset}; update torch and onnxscript, or lower it.")
    _describe(proto, graph)
    return proto


def _describe(proto: Any, graph: _Graph) -> None:
    """Name the dimensions, store the metadata, and drop what tells of this machine."""
    for values, shapes in ((proto.graph.input, [("batch", "samples")]), (proto.graph.output, graph.outputs.values())):
        for value, shape in zip(values, shapes, strict=True):
            for dim, name in zip(value.type.tensor_type.shape.dim, shape, strict=True):
                if not name.isdigit():
                    dim.dim_param = name
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    for key, text in graph.metadata.items():
        proto.metadata_props.add(key=key, value=text)
    proto.producer_name, proto.producer_version = "m2d-embed", __version__


def _onnx_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """ONNX's attention with the mask repeated for every query: ONNX Runtime 1.31 does not take one row for all."""
    from onnxscript import opset23

    op: Any = opset23  # its annotations tell constants from tensors
    assert not is_causal and scale is None and not enable_gqa, "the encoder asks for plain attention"
    one = op.Constant(value_ints=[1])
    mask = op.Expand(attn_mask, op.Concat(one, one, op.Shape(query, start=2, end=3), one, axis=0))
    return op.Attention(query, key, value, mask)[0]


def _brief(error: Exception) -> str:
    """The first line of a message: those of torch and of runtimes run to pages."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


# --- the check --------------------------------------------------------------------------------------------------------


def _check(graph: _Graph, model: M2D, run: Runner, path: Path) -> float:
    """The largest difference between ``run`` and the model, on clips of other sizes than the traced one."""
    window = _window_samples(graph.config)
    worst = 0.0
    for batch, num_samples in ((1, 2 * window + window // 3), (3, window // 4 + 77), (2, graph.config.n_fft // 3)):
        audio = _check_audio(batch, num_samples)
        where = f"{path} ({batch} x {num_samples} samples)"
        try:
            found = run(audio)
        except Exception as error:  # runtimes have no common class of errors
            raise ExportError(f"{where}: the export does not run ({_brief(error)}); not kept.") from error
        for name, expected, got in zip(graph.outputs, _expected(model, graph.kind, audio), found, strict=True):
            if got.shape != expected.shape:
                shapes = f"{tuple(got.shape)}, the model's of {tuple(expected.shape)}"
                raise ExportError(f"{where}: {name} are of shape {shapes}; not kept.")
            difference = float((got - expected).abs().max())
            if not difference <= TOLERANCE:  # nor NaN
                raise ExportError(f"{where}: {name} differ from the model's by up to {difference:.2g}; not kept.")
            worst = max(worst, difference)
    return worst


def _expected(model: M2D, kind: Kind, audio: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        if kind == "timestamps":
            return model.timestamps(audio)
        if kind == "scene":
            return (model.scene(audio),)
        return (model.tagging_head().probabilities(model.logits(audio)),)


def _check_audio(batch: int, num_samples: int) -> Tensor:
    """Noise over a loud low tone, which fades from full scale to silence: what a log-mel is sensitive to."""
    generator = torch.Generator().manual_seed(num_samples)
    noise = torch.rand(batch, num_samples, generator=generator) * 2 - 1
    tone = torch.sin(0.04 * torch.arange(num_samples) + torch.arange(batch)[:, None])
    return (0.1 * noise + 0.9 * tone) * torch.logspace(0, -6, num_samples)


def _window_samples(config: ModelConfig) -> int:
    return config.input_size[1] * config.hop_length


def _onnx_runner(path: Path, graph: _Graph) -> Runner:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        message = f"ONNX Runtime {onnxruntime.__version__} does not load the model ({_brief(error)})"
        raise ExportError(f"{message}; update onnxruntime, or take a lower opset.") from error
    return lambda audio: [torch.from_numpy(y) for y in session.run(list(graph.outputs), {"audio": audio.numpy()})]


def _program_runner(path: Path) -> Runner:
    with path.open("rb") as stream, _quiet():
        program: Runner = torch.export.load(stream).module()
    return program
