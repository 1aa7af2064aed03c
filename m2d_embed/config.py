"""What a model is: one frozen dataclass (= ``config.json``), and the grammar of the published checkpoint names.

Shapes and front-end settings follow Niizumi et al., "Masked Modeling Duo" (arXiv 2210.14648, section 4.1) and
"M2D-X" (arXiv 2404.06095, section 4); CLAP variants "M2D-CLAP" (arXiv 2406.02032).
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from m2d_embed.errors import ConfigError

FORMAT_VERSION = 1

#: How the features of several layers are combined: their mean, or one after the other.
LayerPooling = Literal["mean", "concat"]
#: What a scene embedding keeps of the frame features: their mean over time, or that and their standard deviation.
ScenePooling = Literal["mean", "mean_std"]
CONFIG_FILE = "config.json"

#: size -> (embed_dim, depth, num_heads)
VIT_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}

#: sample rate in Hz -> settings of the published log-mel at that rate
FRONT_ENDS: dict[int, dict[str, Any]] = {
    16_000: {"n_fft": 400, "hop_length": 160, "f_min": 50.0, "f_max": 8_000.0},
    32_000: {"n_fft": 800, "hop_length": 320, "f_min": 50.0, "f_max": 16_000.0},
}

#: The letter in a CLAP checkpoint's name -> its text encoder. Names without a letter are of 2024: ``A``.
TEXT_ENCODERS = {
    "A": "thenlper/gte-base",
    "B": "google-bert/bert-base-uncased",
    "N": "nvidia/NV-Embed-v2",
}


@dataclass(frozen=True)
class HeadConfig:
    """A classification head on the scene embedding: BatchNorm without affine, then Linear.

    ``labels`` name its outputs in order; ``features`` says what it was trained on: ``"stacked"`` columns
    (``F * d``) or ``"flat"`` patches (``d``), and ``scene_pooling`` how a clip's were made of them, with ``"mean_std"``
    twice as wide; ``multi_label`` chooses sigmoid (True) or softmax (False).
    """

    labels: tuple[str, ...]
    features: Literal["stacked", "flat"] = "stacked"
    multi_label: bool = True
    scene_pooling: ScenePooling = "mean"


@dataclass(frozen=True)
class ClapConfig:
    """The two projections of an M2D-CLAP model into the joint audio-text space.

    ``audio_projector`` is ``"mlp"`` (Linear, ReLU, Linear on the mean of the flat features) or ``"semantic"``
    (a learned token and ``semantic_depth`` transformer blocks over the flat features). ``text_layers`` are the
    sizes of the text projector, input first; two entries are one Linear, more an MLP with ReLU. With
    ``text_encoder_included`` the checkpoint has weights of its own for ``text_encoder``.
    """

    audio_projector: Literal["mlp", "semantic"]
    audio_layers: tuple[int, ...]
    text_layers: tuple[int, ...]
    text_encoder: str
    text_pooling: Literal["mean", "cls"]
    semantic_depth: int = 0
    semantic_mlp_dim: int = 0
    text_encoder_included: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Shape, front end and origin of a model; the content of ``config.json``.

    ``input_size`` and ``patch_size`` are (mels, frames); ``norm_stats`` the mean and standard deviation of the
    training data's log-mel. ``n_fft`` (= window length) and ``hop_length`` are in samples, ``f_min`` and
    ``f_max`` in Hz. ``layers``, ``layer_pooling``, ``flat``, ``hop_ms`` and ``scene_pooling`` are the model's own
    features: those it has unless a ``FeatureConfig``, which explains them, says otherwise.

    Raises:
        ConfigError: if the values contradict one another; it names the field.
    """

    name: str = ""
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    input_size: tuple[int, int] = (80, 608)
    patch_size: tuple[int, int] = (16, 16)
    sample_rate: int = 16_000
    n_fft: int = 400
    hop_length: int = 160
    f_min: float = 50.0
    f_max: float = 8_000.0
    norm_stats: tuple[float, float] = (-7.1, 4.2)
    layers: tuple[int, ...] = (-1,)
    layer_pooling: LayerPooling = "mean"
    flat: bool = False
    hop_ms: float | None = None
    scene_pooling: ScenePooling = "mean"
    head: HeadConfig | None = None
    clap: ClapConfig | None = None
    source: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        (mels, frames), (patch_mels, patch_frames) = self.input_size, self.patch_size
        for field in ("embed_dim", "depth", "num_heads", "sample_rate", "n_fft", "hop_length"):
            _require(getattr(self, field) > 0, f"{field} must be positive, not {getattr(self, field)}")
        _require(min(mels, frames, patch_mels, patch_frames) > 0, "input_size and patch_size must be positive")
        _require(mels % patch_mels == 0, f"input_size has {mels} mels, not a multiple of the patch's {patch_mels}")
        _require(frames >= patch_frames, f"input_size has {frames} frames, fewer than the patch's {patch_frames}")
        _require(self.embed_dim % self.num_heads == 0, f"embed_dim {self.embed_dim} is not a multiple of num_heads")
        _require(self.embed_dim % 4 == 0, f"embed_dim {self.embed_dim} is not a multiple of 4")
        _require(0 <= self.f_min < self.f_max <= self.sample_rate / 2, "need 0 <= f_min < f_max <= sample_rate / 2")
        FeatureConfig().check(self)
        _require(self.mlp_ratio > 0, f"mlp_ratio must be positive, not {self.mlp_ratio}")
        _require(
            len(self.norm_stats) == 2 and all(map(math.isfinite, self.norm_stats)),
            f"norm_stats must be a mean and a standard deviation, not {self.norm_stats}",
        )
        _require(self.norm_stats[1] > 0, f"norm_stats has a standard deviation of {self.norm_stats[1]}")
        if self.clap is not None:
            first = self.clap.audio_layers[0] if self.clap.audio_layers else None
            _require(
                first == self.embed_dim, f"clap.audio_layers begins with {first}, but embed_dim is {self.embed_dim}"
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches of one full window: (rows in mel ``F``, columns in time ``T``)."""
        return self.input_size[0] // self.patch_size[0], self.input_size[1] // self.patch_size[1]

    @property
    def head_dim(self) -> int:
        """Width of the features that the classification head takes."""
        head = self.head or HeadConfig(())
        frame = self.embed_dim * (self.grid_size[0] if head.features == "stacked" else 1)
        return frame * (2 if head.scene_pooling == "mean_std" else 1)

    @property
    def front_end(self) -> dict[str, float]:
        """What decides the log-mel before it is normalised."""
        names = ("sample_rate", "n_fft", "hop_length", "f_min", "f_max")
        return {name: getattr(self, name) for name in names} | {"mels": self.input_size[0]}

    @property
    def frame_ms(self) -> float:
        """Hop of the log-mel in milliseconds."""
        return 1000.0 * self.hop_length / self.sample_rate

    @property
    def column_ms(self) -> float:
        """Width of a patch, and so the native hop of the embeddings, in milliseconds."""
        return self.patch_size[1] * self.frame_ms

    def to_json(self) -> str:
        """The text of ``config.json``."""
        fields = dataclasses.asdict(self)
        for name, default in _LATER_FIELDS.items():  # releases that lack them go on reading what does not need them
            if fields[name] == default:
                del fields[name]
        content = {"model_type": "m2d", "format_version": FORMAT_VERSION, **fields}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read a ``config.json``.

        Raises:
            ConfigError: if the file is not JSON, is of another kind of model or of a newer format, or has an
                unknown key or a value of the wrong type.
        """
        try:
            return cls.parse_json(Path(path).read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not valid JSON ({error}).") from error

    @classmethod
    def parse_json(cls, text: str, path: str) -> ModelConfig:
        """The configuration that ``to_json`` wrote; ``path`` is for messages. Raises what ``from_json`` does."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not valid JSON ({error}).") from error
        if not isinstance(content, dict) or content.pop("model_type", None) != "m2d":
            raise ConfigError(f'{path}: not an m2d-embed configuration (it lacks "model_type": "m2d").')
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{path}: format_version {version!r}, but this release reads {FORMAT_VERSION}; upgrade m2d-embed."
            )
        try:
            config: ModelConfig = from_dict(cls, content)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return config


#: Fields of ``config.json`` that its first readers did not know, with what their absence means.
_LATER_FIELDS: dict[str, Any] = {"layer_pooling": "mean", "flat": False, "hop_ms": None}


@dataclass(frozen=True)
class FeatureConfig:
    """Which features an embedding is made of; None is everywhere the model's own choice.

    ``layers`` are transformer blocks, 0 the first and -1 the last, each read through the model's final norm. Several
    are combined by ``layer_pooling``, ``"mean"`` or ``"concat"``. ``flat`` averages the patches of a time column (``d``
    values), False stacks them (``F * d``). ``hop_ms`` is the step of timestamp embeddings, at most one patch.
    ``scene_pooling`` makes a scene embedding of frame features: ``"mean"`` over time, or ``"mean_std"``, followed by
    the standard deviation over time.

    Whole numbers and floats of numpy are taken as Python's.
    """

    layers: tuple[int, ...] | None = None
    layer_pooling: LayerPooling | None = None
    flat: bool | None = None
    hop_ms: float | None = None
    scene_pooling: ScenePooling | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            plain = tuple(int(i) if is_whole(i) else i for i in self.layers)
            object.__setattr__(self, "layers", plain)
        if self.flat is not None:
            _require(self.flat in (True, False), f"flat is True or False, not {self.flat!r}")
            object.__setattr__(self, "flat", bool(self.flat))
        if self.hop_ms is not None:
            is_number = isinstance(self.hop_ms, numbers.Real) and not isinstance(self.hop_ms, bool)
            _require(is_number, f"hop_ms is a number, not {self.hop_ms!r}")
            object.__setattr__(self, "hop_ms", float(self.hop_ms))

    def resolved(self, config: ModelConfig) -> FeatureConfig:
        """These features with the model's own in place of None; only ``hop_ms`` may be None still, for one patch."""
        own = {field.name: getattr(config, field.name) for field in dataclasses.fields(self)}
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        return FeatureConfig(**own | chosen)

    def as_own(self, config: ModelConfig) -> ModelConfig:
        """The configuration of a model whose own features are these."""
        return dataclasses.replace(config, **vars(self.resolved(config)))

    def blocks(self, config: ModelConfig) -> tuple[int, ...]:
        """Which transformer blocks are read."""
        return config.layers if self.layers is None else self.layers

    def pooling(self, config: ModelConfig) -> ScenePooling:
        """How frame features become a scene embedding."""
        return self.scene_pooling or config.scene_pooling

    def scene_dim(self, config: ModelConfig) -> int:
        """Size of a scene embedding."""
        return self.frame_dim(config) * (2 if self.pooling(config) == "mean_std" else 1)

    def frame_dim(self, config: ModelConfig) -> int:
        """Size of one frame feature."""
        chosen = self.resolved(config)
        per_layer = config.embed_dim * (1 if chosen.flat else config.grid_size[0])
        return per_layer * (len(chosen.blocks(config)) if chosen.layer_pooling == "concat" else 1)

    def hop_frames(self, config: ModelConfig) -> int:
        """Step between timestamp embeddings in log-mel frames, a divisor of the patch's.

        Raises:
            ConfigError: if ``hop_ms`` is not a whole number of log-mel frames that divides the patch.
        """
        patch_frames = config.patch_size[1]
        hop_ms = self.resolved(config).hop_ms
        if hop_ms is None:
            return patch_frames
        possible = [n for n in range(1, patch_frames + 1) if patch_frames % n == 0]
        for frames in possible:
            if abs(frames * config.frame_ms - hop_ms) < 1e-6:
                return frames
        choices = ", ".join(f"{n * config.frame_ms:g}" for n in possible)
        raise ConfigError(f"hop_ms={hop_ms:g} is not possible with this model; choose one of {choices}.")

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError if these features cannot be had from a model of this configuration."""
        chosen = self.resolved(config)
        chosen.hop_frames(config)
        resolve_layers(chosen.blocks(config), config.depth)
        _require(
            chosen.layer_pooling in typing.get_args(LayerPooling),
            f'layer_pooling is "mean" or "concat", not {chosen.layer_pooling!r}',
        )
        _require(
            chosen.scene_pooling in typing.get_args(ScenePooling),
            f'scene_pooling is "mean" or "mean_std", not {chosen.scene_pooling!r}',
        )


def is_whole(value: object) -> typing.TypeGuard[int]:
    """Whether a value is a whole number: Python's or numpy's, but no boolean and no float."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def resolve_layers(layers: typing.Sequence[int], depth: int) -> list[int]:
    """Layer numbers as non-negative block indices.

    Raises:
        ConfigError: if there are none, or one lies outside ``-depth .. depth - 1``.
    """
    _require(len(layers) > 0, "layers is empty; name at least one, e.g. layers=[-1]")
    for layer in layers:
        _require(
            is_whole(layer) and -depth <= layer < depth,
            f"layer {layer!r} does not exist; this model's run from 0 to {depth - 1} (or -{depth} to -1)",
        )
    return [int(layer) % depth for layer in layers]


_NAME = re.compile(
    r"(?P<family>[a-z0-9]+(?:_[a-z0-9]+)*)_vit_(?P<size>[a-z]+)"
    r"-(?P<mels>\d+)x(?P<frames>\d+)p(?P<patch_mels>\d+)x(?P<patch_frames>\d+)"
    r"(?:p(?P<rate>\d+)k)?(?:p(?P<text>[ABN]))?(?P<text_inside>p?TI)?(?:[-_.].*)?"
)


@dataclass(frozen=True)
class CheckpointName:
    """What the name of a published checkpoint says about it."""

    name: str
    family: str
    size: str
    input_size: tuple[int, int]
    patch_size: tuple[int, int]
    sample_rate: int
    text_encoder: str
    text_encoder_inside: bool

    @classmethod
    def parse(cls, name: str) -> CheckpointName:
        """Parse ``<family>_vit_<size>-<mels>x<frames>p<pf>x<pt>[p<rate>k][p<A|B|N>][pTI]-<date>...``.

        Raises:
            ConfigError: if the name does not follow that grammar or states a size or rate that does not exist.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"{name!r} is not a published checkpoint name: expected something like "
                "'m2d_vit_base-80x608p16x16-221006-mr7'. The name carries the model's shape, so keep it."
            )
        rate = int(match["rate"] or 16) * 1000
        _require(match["size"] in VIT_SIZES, f"{name!r}: unknown size {match['size']!r}, not one of {[*VIT_SIZES]}")
        _require(rate in FRONT_ENDS, f"{name!r}: no front end is defined for {rate} Hz, only for {[*FRONT_ENDS]}")
        return cls(
            name=name,
            family=match["family"],
            size=match["size"],
            input_size=(int(match["mels"]), int(match["frames"])),
            patch_size=(int(match["patch_mels"]), int(match["patch_frames"])),
            sample_rate=rate,
            text_encoder=TEXT_ENCODERS[match["text"] or "A"],
            text_encoder_inside=match["text_inside"] is not None,
        )

    @staticmethod
    def matches(name: str) -> bool:
        """Whether ``name`` follows the grammar."""
        return _NAME.fullmatch(name) is not None

    def model_config(self, **fields: Any) -> ModelConfig:
        """The configuration the name describes; ``fields`` adds what only the tensors know."""
        embed_dim, depth, num_heads = VIT_SIZES[self.size]
        return ModelConfig(
            name=self.name,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            input_size=self.input_size,
            patch_size=self.patch_size,
            sample_rate=self.sample_rate,
            **FRONT_ENDS[self.sample_rate],
            **fields,
        )


def from_dict(cls: type[Any], content: dict[str, Any]) -> Any:
    """Build a config dataclass from plain JSON values, strictly.

    Raises:
        ConfigError: on an unknown key, a missing one, or a value of the wrong type; it names the key.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in content:
        _require(key in known, f"unknown key {key!r} (known: {', '.join(known)})")
    for key, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        _require(key in content or not required, f"key {key!r} is missing")
    return cls(**{key: _convert(key, value, hints[key]) for key, value in content.items()})


def _convert(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` asks for: lists become tuples, dicts dataclasses, ints floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(key, value, next(a for a in arguments if a is not types.NoneType))
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        try:
            return from_dict(typing.cast(type[Any], hint), value)
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(f"{key}.") else f"{key}: {text}") from error
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            return tuple(_convert(key, item, arguments[0]) for item in value)
        if len(value) == len(arguments):
            return tuple(_convert(key, item, a) for item, a in zip(value, arguments, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    shown = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ConfigError(f"{key!r} must be {shown}, not {value!r}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
