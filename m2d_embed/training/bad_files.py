"""Files that cannot be read while a run reads its data: counted, named, and too many of them an error."""

from __future__ import annotations

from typing import Protocol

from m2d_embed.errors import AudioError

BAD_SHARE = 0.01
_BAD_SHOWN = 10
_MIN_SEEN = 100


class MicroBatch(Protocol):
    """What has to be known of a micro-batch: its length, its files, and those that could not be read, with reasons."""

    @property
    def names(self) -> list[str]: ...

    @property
    def bad(self) -> dict[str, str]: ...

    def __len__(self) -> int: ...


class BadFiles:
    """The files that could not be read, and when they are too many.

    Args:
        total: number of files, None if it is not known: then the samples seen are what a share is of.
    """

    def __init__(self, total: int | None = None):
        self.total = total
        self.seen = 0
        self.reasons: dict[str, str] = {}

    def add(self, batch: MicroBatch) -> dict[str, str]:
        """Count a batch in; return its bad files that had not been met before, and why they are bad."""
        self.seen += len(batch)
        new = {name: reason for name, reason in batch.bad.items() if name not in self.reasons}
        self.reasons |= new
        return new

    def check(self, seen: int | None = None) -> None:
        """Raise if more than 1 % of the files cannot be read.

        Args:
            seen: samples read so far by all processes; None is those counted here.

        Raises:
            AudioError: with the names of up to ten files, and why.
        """
        of = self.total if self.total is not None else self.seen if seen is None else seen
        enough = self.total is not None or of >= _MIN_SEEN
        if enough and len(self.reasons) > BAD_SHARE * of:
            shown = "\n".join(f"  {reason}" for reason in list(self.reasons.values())[:_BAD_SHOWN])
            more = len(self.reasons) - _BAD_SHOWN
            raise AudioError(
                f"{len(self.reasons)} of {of} files could not be read, more than {BAD_SHARE:.0%}:\n{shown}"
                + (f"\n  and {more} more" if more > 0 else "")
                + "\nRepair these files or take them out of the data."
            )
