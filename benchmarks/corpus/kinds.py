"""What kind of sound a member is, told from its path and its package's name."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Literal, get_args

SoundKind = Literal["music", "speech", "effects", "ambience", "instrument"]
KINDS: tuple[SoundKind, ...] = get_args(SoundKind)

#: Patterns of package and path that settle it, the first that fits counts: packages of one kind, places of odd names
_PLACES: tuple[tuple[str, str, SoundKind], ...] = (
    (r"soundfont|hydrogen|drumkit|lmms|sonic-pi|^exadrums|^horgand|^chuck", r"", "instrument"),
    (r"^minuet", r"\.sf2/", "instrument"),
    (r"asterisk|^gcin-voice|^pocketsphinx|^ktuberling|^fillets-ng-data-|^klettres|^festvox|^saytime", r"", "speech"),
    (r"^qabcs", r"/sounds/", "speech"),
    (r"-music|^fretsonfire-songs", r"", "music"),
    (r"^tuxpaint-stamps", r"_desc|_[a-z]{2}(_[a-zA-Z]{2})?\.ogg$", "speech"),
    (r"^gcompris", r"/(instruments|play_piano|piano_composition|play_rhythm)/", "instrument"),
    (r"^nexuiz", r"/(coms|tutorial)/", "speech"),
    (r"^warzone2100", r"audio/(?!.*(sfx|multi|interfce)/)|sequenceaudio/", "speech"),
    (r"^pushover", r"/themes/", "music"),
    (r"^marsshooter", r"/audio/\w+\.ogg$", "music"),
)

#: Words in names of folders and files; where a name has words of several kinds, the kind that stands first here counts
_WORDS: dict[SoundKind, str] = {
    "speech": "announcer codriver comments dialog dialogs dialogue narration speech taunt taunts vo voice voices",
    "music": "jingle jingles music musics song songs soundtrack soundtracks stdmusic theme",
    "ambience": "ambiance ambience ambient atmosphere env environment nature rain weather wind",
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def kind_of(package: str, path: str) -> SoundKind:
    """SoundKind of a member: music, speech, ambience, instrument (single notes and beats), or else effects.

    Some packages are of one kind throughout, and some have places that are known to be. Otherwise the words in the
    name of the nearest folder that has one of a kind decide, then those in the file's own name.

    Args:
        package: name of the package.
        path: of the member, through archives.
    """
    for packages, places, kind in _PLACES:
        if re.search(packages, package) and re.search(places, path):
            return kind
    place = PurePosixPath(path)
    for name in (*reversed(place.parent.parts), place.stem):
        words = {word.lower() for word in _WORD.findall(name)}
        for kind, of_kind in _WORDS.items():
            if not words.isdisjoint(of_kind.split()):
                return kind
    return "effects"
