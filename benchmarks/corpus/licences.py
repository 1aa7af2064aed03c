"""Which licence a package's ``copyright`` file states for one of its members, as far as a program can tell."""

from __future__ import annotations

import re
from dataclasses import dataclass

SEE_COPYRIGHT = "see copyright"

_DEP5 = re.compile(r"copyright-format|dep5|DEP-5")
_FIELD = re.compile(r"^([!-9;-~]+):[ \t]*(.*(?:\n[ \t].*)*)", re.MULTILINE)


@dataclass(frozen=True)
class _Files:
    """One paragraph ``Files:``: its patterns with their worths, worthiest first, and the short name of its licence."""

    patterns: list[tuple[int, re.Pattern[str]]]
    licence: str

    def fit(self, member: str) -> int:
        """Worth of the best pattern that fits; -1 if none does."""
        return next((worth for worth, pattern in self.patterns if pattern.fullmatch(member)), -1)


class Licences:
    """What the text of a ``copyright`` file, machine-readable (DEP-5) or not, says about members of its package."""

    def __init__(self, text: str):
        # Some files have carriage returns, and some white space on the lines between paragraphs.
        first, *others = (
            {name.lower(): value.strip() for name, value in _FIELD.findall(paragraph)}
            for paragraph in re.split(r"\n\s*\n(?=\S)", text.replace("\r\n", "\n").strip())
        )
        stated = (
            [p for p in others if p.get("license")]
            if _DEP5.search(first.get("format") or first.get("format-specification", ""))
            else []
        )
        self._files = [_Files(_patterns(p["files"].split()), _short_name(p["license"])) for p in stated if "files" in p]
        self._all = " / ".join(dict.fromkeys(_short_name(p["license"]) for p in stated)) or SEE_COPYRIGHT

    def of(self, member: str) -> str:
        """Short name of the licence of a member.

        The patterns speak of the source package, the member's path of the installed one. So it is enough that the end
        of a pattern fits. The fit with most literal parts counts, of equals the last, as DEP-5 says. Where none fits,
        it is the names of all licences in the file, and ``"see copyright"`` where that is not machine-readable.

        Args:
            member: path in the package, through archives.
        """
        best, licence = 0, self._all
        for files in self._files:
            worth = files.fit(member)
            if worth >= best:
                best, licence = worth, files.licence
        return licence


def _patterns(patterns: list[str]) -> list[tuple[int, re.Pattern[str]]]:
    """Patterns and their ends, each with its worth: the number of parts without wildcards; ``*`` is worth 0."""
    worths: dict[str, int] = {}
    for pattern in patterns:
        parts = pattern.removeprefix("./").split("/")
        ends = [parts[i:] for i in range(len(parts))]
        if parts[0] == "debian":  # the packaging: its ends would fit everything
            ends = ends[:1]
        for end in ends:
            worth = sum("*" not in part and "?" not in part for part in end)
            if worth or end is ends[0]:
                worths["/".join(end)] = worth
    return sorted(((worth, _compile(end)) for end, worth in worths.items()), key=lambda pair: -pair[0])


def _compile(pattern: str) -> re.Pattern[str]:
    """``*`` and ``?`` fit slashes as well; the match begins at the path's start or after a slash."""
    wild = {"*": ".*", "?": "."}
    expression = "".join(wild.get(c) or re.escape(c) for c in pattern.replace("\\", ""))
    return re.compile(f"(?:.*/)?{expression}", re.DOTALL)


def _short_name(value: str) -> str:
    return value.splitlines()[0].strip()
