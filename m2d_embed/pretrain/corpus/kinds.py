"""What kind of sound a member is, told from its path and its package's name."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["music", "speech", "effects", "ambience", "instrument"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def kind_of(package: str, path: str) -> Kind:
    return "effects"
