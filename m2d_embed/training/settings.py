"""Settings of a run: a frozen dataclass, read strictly from YAML and ``key=value`` overrides.

Unknown keys and values of the wrong type are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from m2d_embed.errors import ConfigError


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
        close = [k for k in known if k.rpartition(".")[2] == keys[-1]] or difflib.get_close_matches(path, known)
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
    for name, hint in typing.get_type_hints(cls).items():
        keys[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            keys |= known_keys(hint, f"{prefix}{name}.")
    return keys


def to_plain(settings: Any) -> dict[str, Any]:
    """A config dataclass as plain values, as YAML or JSON hold them."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(settings))
    return plain


def to_yaml(settings: Any) -> str:
    """A whole config dataclass as YAML, defaults included."""
    return yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True)


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
