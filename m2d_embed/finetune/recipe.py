"""Settings of fine-tuning: what is trained on which clips, and how. Strict, in one YAML file or as ``key=value``."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from m2d_embed.checkpoints.registry import BUNDLED_NAME
from m2d_embed.config import ModelConfig, ScenePooling, from_dict
from m2d_embed.errors import ConfigError
from m2d_embed.training.settings import flatten, override, read_yaml, require, to_plain, to_yaml

ALL_FOLDS = "all"
NO_FOLD = "none"

#: What may differ when a run is resumed: it changes neither the data, whose contents are compared, nor the steps.
_FREE_ON_RESUME = re.compile(r"data|output|log_every|keep|eval_batch_size")
_LORA_TARGETS = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class SpecAugmentSection:
    """Stripes of a log-mel that are blanked (Park et al., arXiv 1904.08779): how many, and how wide at most.

    ``max_freq`` is a share of the mel bands, ``max_time`` of the crop.
    """

    freq_masks: int = 2
    max_freq: float = 0.25
    time_masks: int = 2
    max_time: float = 0.2

    def __post_init__(self) -> None:
        for name in ("freq_masks", "time_masks"):
            value = getattr(self, name)
            require(value >= 0, f"spec_augment.{name} must not be negative, not {value}")
        for name in ("max_freq", "max_time"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"spec_augment.{name} is a share, 0 to 1, not {value}")


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters instead of the blocks' weights (Hu et al., arXiv 2106.09685), by ``peft``.

    ``rank`` 0 means none. The product of both matrices is scaled by ``alpha / rank``. ``targets`` are the matrices of a
    block that get one: qkv, proj (of attention), fc1, fc2 (of the MLP).
    """

    rank: int = 0
    alpha: int = 16
    targets: tuple[str, ...] = _LORA_TARGETS

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank must not be negative, not {self.rank}")
        require(self.alpha > 0, f"lora.alpha must be positive, not {self.alpha}")
        unknown = [name for name in self.targets if name not in _LORA_TARGETS]
        require(not unknown, f"lora.targets are among {', '.join(_LORA_TARGETS)}, not {', '.join(unknown)}")
        require(bool(self.targets), "lora.targets is empty; name at least one, or set lora.rank=0")


@dataclass(frozen=True)
class FinetuneRecipe:
    """Everything about a run of fine-tuning.

    Data and model:
        data: a folder with a sub-folder a label, a CSV of labelled clips, or a CSV of events.
        model: what ``load_model`` takes; the bundled model if empty.
        output: folder of the run; ``runs/finetune-<data>-<model>`` if empty.
        fold: the fold that is tested; null is the lowest, "all" each in turn, "none" trains on everything.
        label_column: of the CSV, if it is not ``label`` or ``labels``.

    Model:
        features: what the head sees: "stacked" patches of a time column (``F * d``), or their mean, "flat" (``d``).
        scene_pooling: what it sees of a clip: their "mean" over time, or "mean_std", followed by the standard
            deviation; null is as the model's scene embeddings. Of events it sees single columns, so it is "mean".
        head_start: "probe", the head begins as the linear probe of the encoder as it is (LP-FT; Kumar et al., arXiv
            2202.10054), or "random"; null is "probe" for clips and "random" for events, which have no other.
        freeze_encoder: train the head alone.
        freeze_patch_embed: keep the patch embedding (Kumar et al., arXiv 2211.09359).
        layer_decay: each layer's learning rate is this share of that of the layer above it (Clark et al., arXiv
            2003.10555, section 3; as in BEiT, arXiv 2106.08254). 1 is the same rate for all.
        window_seconds: another window than the model's; positions are computed anew.
        lora: adapters.

    Clips:
        crop_seconds: length of the random crops; null is the window, or the longest clip if that is shorter.
        balanced: draw clips so that labels come equally often.
        mixup: parameter of the Beta distribution of mixup (arXiv 1710.09412); 0 is none.
        gain_db: clips get louder or softer by at most so many dB.
        freq_warp: frequencies are scaled by at most such a share, up or down (Jaitly and Hinton, 2013).
        spec_augment: blanked stripes.
        patch_dropout: how many rows (flat features only) and columns of patches are left out at each step (Koutini et
            al., arXiv 2110.05069, section 2.2).
        label_smoothing: share of a target that is spread over all labels.

    Training:
        epochs, steps: length; steps, if given, count instead of epochs.
        batch_size: clips a step, on all devices together.
        lr: the highest learning rate, of the head; reached after the share ``warmup`` of the run, then a cosine to 0.
            null is 3e-4 for a head that begins as a probe, 1e-3 for one that begins at random.
        weight_decay: of matrices; biases and norms have none.
        clip_norm: the longest gradient.
        ema_decay: of the average of the weights that is tested and exported; null averages over about the last
            twentieth of the run, 0 takes the weights as they are.
        precision: fp32, bf16 or fp16 (GPU only).
        patience: end after so many epochs without a better validation score; null runs to the end.
        seed: of everything random.

    Bookkeeping:
        log_every: steps between lines of the log.
        keep: checkpoints kept.
        eval_batch_size: clips tested at a time.
    """

    data: str
    model: str = ""
    output: str = ""
    fold: str | None = None
    label_column: str = ""
    features: Literal["stacked", "flat"] = "stacked"
    scene_pooling: ScenePooling | None = None
    head_start: Literal["probe", "random"] | None = None
    freeze_encoder: bool = False
    freeze_patch_embed: bool = False
    layer_decay: float = 0.75
    window_seconds: float | None = None
    lora: LoraSection = field(default_factory=LoraSection)
    crop_seconds: float | None = None
    balanced: bool = False
    mixup: float = 0.0
    gain_db: float = 0.0
    freq_warp: float = 0.0
    spec_augment: SpecAugmentSection = field(default_factory=SpecAugmentSection)
    patch_dropout: tuple[int, int] = (0, 0)
    label_smoothing: float = 0.1
    epochs: float = 20.0
    steps: int | None = None
    batch_size: int = 32
    lr: float | None = None
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip_norm: float = 3.0
    ema_decay: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    patience: int | None = None
    seed: int = 0
    log_every: int = 10
    keep: int = 2
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch_size", "clip_norm", "patience", "log_every", "keep", "eval_batch_size"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} must be positive, not {value}")
        for name in ("window_seconds", "crop_seconds", "lr"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} must be positive, not {value}")
        for name in ("mixup", "gain_db", "freq_warp", "weight_decay"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must not be negative, not {value}")
        require(self.batch_size > 1, "batch_size must be 2 or more: the head normalises over the batch")
        require(0 < self.layer_decay <= 1, f"layer_decay is a share, above 0, at most 1, not {self.layer_decay}")
        require(0 <= self.warmup < 1, f"warmup is a share of the run, 0 <= warmup < 1, not {self.warmup}")
        require(0 <= self.label_smoothing < 1, f"label_smoothing is a share, below 1, not {self.label_smoothing}")
        decay = self.ema_decay
        require(decay is None or 0 <= decay < 1, f"ema_decay must be 0 or more, below 1, not {decay}")
        require(0 <= self.seed < 2**63, f"seed must not be negative, and fit 63 bits, not {self.seed}")
        self._check_fold()
        self._check_parts_of_the_model()

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return Path(self.output or f"runs/finetune-{self.data_name}-{self.model_name}")

    @property
    def data_name(self) -> str:
        """A short name of the data: the folder's, or that of the CSV's folder where the CSV has a general name."""
        path = Path(self.data).absolute()
        if path.suffix.lower() != ".csv":
            return path.name
        return path.parent.name if path.stem in ("metadata", "labels", "data", "events") else path.stem

    @property
    def model_name(self) -> str:
        """A short name of the model."""
        return Path(self.model).name if self.model else BUNDLED_NAME

    def model_config(self, base: ModelConfig) -> ModelConfig:
        """The model's configuration with this recipe's window, and without heads.

        Raises:
            ConfigError: if the window is shorter than a patch.
        """
        input_size = base.input_size
        if self.window_seconds is not None:
            input_size = (input_size[0], whole_columns(self.window_seconds, base) * base.patch_size[1])
        return dataclasses.replace(base, input_size=input_size, head=None, clap=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML or JSON hold them."""
        return to_plain(self)

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return to_yaml(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from the recipe another run was begun with, as ``key: theirs -> ours``; what may is left out."""
        mine, theirs = flatten(self.to_dict()), flatten(dict(other))
        keys = [key for key in {**theirs, **mine} if not _FREE_ON_RESUME.fullmatch(key)]
        return [f"{k}: {theirs.get(k)!r} -> {mine.get(k)!r}" for k in keys if theirs.get(k) != mine.get(k)]

    def _check_fold(self) -> None:
        fold = self.fold
        known = fold in (None, ALL_FOLDS, NO_FOLD) or (fold is not None and fold.isdecimal())
        require(known, f"fold is a number, {ALL_FOLDS!r} or {NO_FOLD!r}, not {fold!r}")
        require(
            fold != NO_FOLD or self.patience is None,
            "patience needs clips to validate on, and fold none trains on all; leave one of them out",
        )

    def _check_parts_of_the_model(self) -> None:
        rows, columns = self.patch_dropout
        require(min(rows, columns) >= 0, f"patch_dropout must not be negative, not {self.patch_dropout}")
        require(
            rows == 0 or self.features == "flat",
            f"patch_dropout leaves out {rows} rows, but stacked features need every row; set features=flat, or "
            f"patch_dropout=[0, {columns}]",
        )
        require(
            not (self.freeze_encoder and self.lora.rank),
            "freeze_encoder and lora contradict one another: adapters train the encoder; leave one of them out",
        )


def whole_columns(seconds: float, config: ModelConfig) -> int:
    """Patch columns that hold so many seconds, the last one perhaps in part.

    Raises:
        ConfigError: if it is not even one patch.
    """
    frames = 1 + round(seconds * config.sample_rate) // config.hop_length  # as the log-mel of a clip so long
    patch_frames = config.patch_size[1]
    if frames < patch_frames:
        raise ConfigError(f"{seconds:g} s are less than a patch, {config.column_ms / 1000:g} s.")
    return -(-frames // patch_frames)


def load_recipe(file: Path | None, overrides: Iterable[str] = (), **given: str | None) -> FinetuneRecipe:
    """The recipe of a YAML file, with ``key=value`` overrides.

    Args:
        file: YAML; None for the defaults.
        overrides: e.g. ``epochs=10`` or ``lora.rank=8``; values are YAML.
        given: values that win over the file's; None are left out.

    Raises:
        ConfigError: if the file cannot be read, or a key or value is wrong; it names the key.
    """
    if file is not None and not file.is_file():
        raise ConfigError(f"{file}: no such recipe file.")
    content = read_yaml(file) if file is not None else {}
    for text in overrides:
        override(content, text, FinetuneRecipe, "epochs=10")
    content |= {key: value for key, value in given.items() if value is not None}
    if isinstance(content.get("fold"), int):
        content["fold"] = str(content["fold"])
    try:
        recipe: FinetuneRecipe = from_dict(FinetuneRecipe, content)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}" if file is not None else str(error)) from error
    return recipe
