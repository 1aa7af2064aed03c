"""Settings of a run: frozen dataclasses, a section each, read strictly from YAML and ``key=value`` overrides.

Unknown keys and values of the wrong type are errors that name the key. ``TrainingSection`` and ``RunRecipe`` are what
pre-training and fine-tuning share.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml

from m2d_embed.config import from_dict
from m2d_embed.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
R = TypeVar("R", bound="RunRecipe")


@dataclass(frozen=True)
class TrainingSection:
    """Length, batches, learning rate and bookkeeping of a run.

    Attributes:
        steps: optimiser steps.
        epochs: passes over the data, instead of ``steps``.
        batch_size: clips of one optimiser step, on all devices together.
        micro_batch: clips on a device at a time; gradients of several are accumulated. null is all of a step.
        lr: the peak learning rate, reached after the share ``warmup`` of the run and followed by a cosine to zero. null
            is a default that each kind of training explains.
        warmup: share of the run.
        weight_decay: of matrices; biases and norms have none.
        clip_norm: gradients longer than this are scaled down to it.
        drop_path: rate of stochastic depth of the last block; it rises linearly from 0 at the first.
        grad_checkpointing: compute the blocks' activations again in the backward pass, which takes less memory.
        average_decay: EMA decay of the average of the weights that is validated and exported; null averages over about
            the last twentieth of the run, 0 takes the weights as they are.
        export: the weights of the "best" validation, if there was one, or the "last".
        patience: end after so many validations without a better score; null runs to the end.
        precision: fp32, bf16 or fp16 (GPU only).
        compile: train through ``torch.compile``.
        seed: of everything random.
        log_every: steps between lines of the log, each the mean over these.
        save_every: steps between checkpoints; null is an epoch. There is one after each validation, too.
        keep: checkpoints kept.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    micro_batch: int | None = None
    lr: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip_norm: float = 3.0
    drop_path: float = 0.0
    grad_checkpointing: bool = False
    average_decay: float | None = None
    export: Literal["best", "last"] = "best"
    patience: int | None = None
    precision: Precision = "bf16"
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        positive = ("steps", "epochs", "batch_size", "micro_batch", "lr", "clip_norm", "patience")
        for name in (*positive, "log_every", "save_every", "keep"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"training.{name} must be positive, not {value}")
        decay, average = self.weight_decay, self.average_decay
        require(0 <= decay < math.inf, f"training.weight_decay must not be negative, not {decay}")
        require(0 <= self.warmup < 1, f"training.warmup is a share of the run, 0 <= warmup < 1, not {self.warmup}")
        require(0 <= self.drop_path < 1, f"training.drop_path is a rate, 0 or more, below 1, not {self.drop_path}")
        require(
            average is None or 0 <= average < 1, f"training.average_decay must be 0 or more, below 1, not {average}"
        )
        require(0 <= self.seed < 2**63, f"training.seed must not be negative, and fit 63 bits, not {self.seed}")


class RunRecipe(abc.ABC):
    """Everything about a run: a frozen dataclass of sections. The same recipe in the same folder is the same run."""

    kind: ClassVar[str]
    training: TrainingSection

    @property
    @abc.abstractmethod
    def folder(self) -> Path:
        """Where the run is kept."""

    @abc.abstractmethod
    def may_change(self, key: str) -> bool:
        """Whether a run may go on with another value of a dotted key: it changes neither the data nor the steps."""

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> Self:
        """The recipe of plain values, as YAML holds them; ConfigError names the key that is wrong."""
        recipe: Self = from_dict(cls, content)
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML or JSON hold them."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(typing.cast(Any, self)))
        return plain

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from the recipe another run was begun with, as ``key: theirs -> ours``; what may is left out."""
        mine, theirs = flatten(self.to_dict()), flatten(dict(other))
        keys = [key for key in {**theirs, **mine} if not self.may_change(key)]
        return [f"{k}: {theirs.get(k)!r} -> {mine.get(k)!r}" for k in keys if theirs.get(k) != mine.get(k)]


def read_recipe(cls: type[R], name: str, folder: Path, overrides: Iterable[str], example: str) -> R:
    """Read a recipe and apply ``key=value`` overrides.

    Args:
        cls: of the recipe; it has a section ``data`` with the key ``source``.
        name: a YAML file, or the name of a recipe in ``folder``; "" is one of defaults alone.
        folder: of the recipes that come with the package.
        overrides: dotted keys; values are YAML.
        example: of an override, for messages.

    Raises:
        ConfigError: if there is no such recipe, it is not YAML, or a key or value is wrong; it names the key.
    """
    file = _find_recipe(name, folder) if name else None
    where = f"{file}: " if file is not None else ""
    content = read_yaml(file) if file is not None else {}
    for text in overrides:
        override(content, text, cls, example)
    for key, how in (("data", "data.source=FOLDER"), ("training", example)):
        require(isinstance(content.get(key, {}), dict), f"{where}{key} is a section, e.g. {how}")
    if "source" not in content.setdefault("data", {}):
        raise ConfigError(f"{where}data.source is missing; say what to train on: data.source=FOLDER or a file.")
    try:
        return cls.from_plain(content)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error


def known_recipes(folder: Path) -> dict[str, str]:
    """Names of the recipes in a folder, and what each is about."""
    return {file.stem: str(read_yaml(file).get("about", "")).strip() for file in sorted(folder.glob("*.yaml"))}


def _find_recipe(name: str, folder: Path) -> Path:
    file = Path(name)
    if file.suffix in (".yaml", ".yml") or file.is_file():
        require(file.is_file(), f"{name}: no such recipe file")
        return file
    known = sorted(packaged.stem for packaged in folder.glob("*.yaml"))
    if name not in known:
        close = difflib.get_close_matches(name, known) or known
        raise ConfigError(f"{name!r} is neither a YAML file nor a known recipe; known: {', '.join(close)}.")
    return folder / f"{name}.yaml"


class _StrictLoader(yaml.SafeLoader):
    """YAML without surprises: a key given twice is an error, and 3e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            require(isinstance(key, str), f"line {node.start_mark.line + 1}: the key {key!r} is not a word")
            require(keys.count(key) == 1, f"line {node.start_mark.line + 1}: the key {key!r} is there twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """Plain values of YAML; ``where`` is for messages.

    Raises:
        ConfigError: if it is not valid, makes objects, or has a key twice.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML ({' '.join(str(error).split())}).") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: if it is not a text file, not valid YAML, or no mapping.
    """
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not a text file ({error}).") from error
    require(isinstance(content, dict), f"{file}: a recipe is a mapping of keys to values")
    mapping: dict[str, Any] = content
    return mapping


def override(content: dict[str, Any], text: str, cls: type[Any], example: str) -> None:
    """Set ``a.b=value`` in the nested dicts that ``cls``, a config class, will be made of.

    Args:
        content: changed in place.
        text: a dotted key, "=" and a value in YAML. Where the key is text, it is taken as it is.
        cls: which keys there are.
        example: of an override, for messages.

    Raises:
        ConfigError: if it is no override, or there is no such key.
    """
    path, equals, value = text.partition("=")
    keys = path.split(".")
    require(bool(equals) and all(keys), f"{text!r}: an override is key=value, e.g. {example}")
    known = known_keys(cls)
    if path not in known:
        last = {k: k.rpartition(".")[2] for k in known}
        close = [k for k in known if last[k] == keys[-1]] or difflib.get_close_matches(path, known)
        close = close or [k for k in known if last[k] in difflib.get_close_matches(keys[-1], last.values(), 1)]
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"{text!r}: there is no key {path!r} in a recipe{hint}")
    inner = content
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
        require(isinstance(inner, dict), f"{text!r}: {key} is not a section in this recipe")
    # Text is taken as it is: a path may hold what YAML gives a meaning to.
    is_text = known[path] in (str, str | None) and value != "null"
    inner[keys[-1]] = os.path.expanduser(value) if is_text else parse_yaml(value, text)  # noqa: PTH111


def known_keys(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a config class, sections included, and their types."""
    keys = {}
    hints = typing.get_type_hints(cls)
    for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(cls)):
        keys[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            keys |= known_keys(hint, f"{prefix}{name}.")
    return keys


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def require(condition: bool, message: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
