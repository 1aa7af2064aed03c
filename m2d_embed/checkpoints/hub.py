"""A model's name -> its files: the bundled model, a local path, a Hugging Face Hub repository, an official release.

The Hub client (downloads, cache, resuming, tokens, offline mode) is huggingface_hub's; its environment variables
(``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``) apply. Releases are kept in ``M2D_EMBED_CACHE``
(default ``~/.cache/m2d-embed``); ``M2D_EMBED_RELEASE_URL`` overrides the address they come from. Offline mode and
``force_download`` hold for them too.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import responses
from pathlib import Path

from filelock import FileLock

from m2d_embed.checkpoints.registry import BUNDLED_NAME, LICENSE_NOTICE, RELEASE_URL, RELEASES, Release
from m2d_embed.config import CONFIG_FILE
from m2d_embed.errors import CheckpointError, ConfigError, ModelNotFoundError
from m2d_embed.files import cache_folder, sync

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Location:
    """Where a model's files are.

    ``path`` is a folder, a ``.pth`` or a ``.zip``; ``origin`` says in words where they come from. For an official
    release ``release`` is the folder of the cache that holds it, or will hold it, in our layout.
    """

    path: Path
    origin: str
    release: Path | None = None


@dataclass(frozen=True)
class HubOptions:
    """What huggingface_hub is asked with; see ``huggingface_hub.hf_hub_download`` for each."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False


def locate(
    name: str | os.PathLike[str],
    weight_files: Sequence[str],
    optional_files: Sequence[str],
    options: HubOptions,
    rounded_files: Sequence[str] = (),
) -> Location:
    """Find a model's files, downloading what is not here yet.

    Args:
        name: "" or the bundled name; a folder, ``.pth`` or ``.zip``; ``org/name`` or ``org/name@revision`` of the Hub;
            or the name of an official release.
        weight_files: file names to take from a Hub repository, the first that it has.
        optional_files: further files to take if the repository has them.
        options: for the Hub.
        rounded_files: weights to take of a repository that has none of ``weight_files``; not where these are only not
            in the cache.

    Raises:
        ModelNotFoundError: if the name leads nowhere or access is refused.
        CheckpointError: if a download does not arrive whole.
        ConfigError: if two different revisions are asked for.
    """
    text = str(name)
    if text in ("", "bundled", BUNDLED_NAME):
        return Location(bundled_folder(), "bundled with m2d-embed")
    path = Path(text).expanduser()
    if os.path.exists(path):  # noqa: PTH110  (Path.exists raises on a name that is too long for a file)
        return Location(path, str(path))
    if text in RELEASES:
        return _locate_release(RELEASES[text], options)
    repository, _, revision = text.partition("@")
    looks_local = (
        isinstance(name, os.PathLike) or text.startswith((".", "~", os.sep)) or path.suffix in (".pth", ".pt", ".zip")
    )
    if _REPOSITORY.fullmatch(repository) and not looks_local:
        if revision and options.revision not in (None, revision):
            raise ConfigError(f"{text}: names another revision than revision={options.revision!r}; give one of them.")
        weights = (weight_files, rounded_files)
        return _locate_on_hub(repository, revision or options.revision, weights, optional_files, options)
    if looks_local or os.sep in text:
        raise ModelNotFoundError(f"{text}: no such file or folder.")
    known = [BUNDLED_NAME, *RELEASES]
    close = difflib.get_close_matches(text, known, n=3, cutoff=0.5) or known
    raise ModelNotFoundError(
        f"{text!r} is neither a file, a Hub repository (org/name) nor a known model. Known: {', '.join(close)}."
    )


def bundled_folder() -> Path:
    """The folder of the bundled model: inside the installed package, or ``weights/`` of a source checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "weights", package.parent / "weights"):
        if (folder / CONFIG_FILE).exists():
            return folder
    raise ModelNotFoundError(f"The bundled weights are missing from {package}; reinstall m2d-embed.")


def release_cache() -> Path:
    """The folder that keeps converted official releases."""
    return cache_folder() / "releases"


def _locate_on_hub(
    repository: str,
    revision: str | None,
    weights: tuple[Sequence[str], Sequence[str]],
    optional_files: Sequence[str],
    options: HubOptions,
) -> Location:
    shown = f"{repository}@{revision}" if revision else repository
    with _hub_errors(shown):
        config = _fetch(repository, CONFIG_FILE, revision, options)
        commit = config.parent.name  # the other files come from this one, whatever is pushed meanwhile
        exact, rounded = weights
        found = _fetch_first(repository, exact, commit, options)
        if found is None and all(_is_known_to_lack(repository, file, commit, options) for file in exact):
            found = _fetch_first(repository, rounded, commit, options)
        if found is None:
            lacking = "local cache has its" if _is_offline(options) else "repository has a"
            raise ModelNotFoundError(f"{shown}: the {lacking} {CONFIG_FILE} but none of {', '.join(exact)}.")
        for file in optional_files:
            _fetch_first(repository, [file], commit, options)
    return Location(config.parent, f"Hub repository {shown}")


@contextmanager
def _hub_errors(shown: str) -> Iterator[None]:
    """Turn the Hub client's errors into ours; ``shown`` is the repository's name in their messages."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{shown}: access to this repository is gated. Accept its terms on the Hub and log in (hf auth login)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{shown}: the repository exists, but not this revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{shown}: no such repository on the Hub, or it is private; check the name, or log in (hf auth login)."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = _first_line(error.__cause__) if error.__cause__ else "local_files_only"
        raise ModelNotFoundError(f"{shown}: not in the local cache, and the Hub cannot be reached ({why}).") from error
    except errors.EntryNotFoundError as error:
        raise ModelNotFoundError(f"{shown}: not an m2d-embed model, the repository has no {CONFIG_FILE}.") from error
    except errors.LocalTokenNotFoundError as error:
        raise ModelNotFoundError(f"{shown}: asked for with token=True, but you are not logged in.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        answer = f"{status} {error.server_message or responses.get(status, '')}"
        if status in (401, 403):
            raise ModelNotFoundError(
                f"{shown}: the Hub refuses access ({answer}); check the token, or log in (hf auth login)."
            ) from error
        raise ModelNotFoundError(f"{shown}: the Hub answered with an error ({answer}).") from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{shown}: not a valid repository name ({error}).") from error
    except ValueError as error:  # force_download without a connection
        why = _first_line(error.__cause__ or error)
        raise ModelNotFoundError(f"{shown}: cannot be downloaded again ({why}).") from error
    except (OSError, _http_error()) as error:
        if _is_of_disk(error):
            raise
        why = _first_line(error)
        raise CheckpointError(f"{shown}: the download did not arrive whole ({why}); try again.") from error


def _fetch(repository: str, file: str, revision: str | None, options: HubOptions) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(
            hf_hub_download(
                repository,
                file,
                revision=revision,
                token=options.token,
                cache_dir=options.cache_dir,
                force_download=options.force_download,
                local_files_only=options.local_files_only,
            )
        )
    except (ValueError, errors.LocalEntryNotFoundError) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # the Hub did answer, and says what is wrong
            raise error.__cause__ from None
        raise


def _fetch_first(repository: str, files: Sequence[str], commit: str, options: HubOptions) -> Path | None:
    """The first of the files that the commit has; offline, the first that the cache has."""
    from huggingface_hub import errors

    for file in files:
        if _is_known_to_lack(repository, file, commit, options):  # asking again takes long without a connection
            continue
        try:
            return _fetch(repository, file, commit, options)
        except errors.LocalEntryNotFoundError:
            if not _is_offline(options):  # the Hub fails, which says nothing about the file
                raise
        except errors.EntryNotFoundError:
            continue
    return None


def _is_known_to_lack(repository: str, file: str, commit: str, options: HubOptions) -> bool:
    """Whether the Hub has said of this commit that it has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    known = try_to_load_from_cache(repository, file, cache_dir=options.cache_dir, revision=commit)
    return known is _CACHED_NO_EXIST


def _is_offline(options: HubOptions) -> bool:
    """Whether downloads are off by the user's choice."""
    from huggingface_hub import constants

    return options.local_files_only or constants.HF_HUB_OFFLINE


def _locate_release(release: Release, options: HubOptions) -> Location:
    folder = release_cache() / release.name
    archive = folder.with_name(f"{release.name}.zip")
    if options.force_download or not (folder.exists() or archive.exists()):
        if _is_offline(options):
            raise ModelNotFoundError(
                f"{release.name}: would have to be downloaded into {folder.parent}, but this is offline mode "
                "(HF_HUB_OFFLINE or local_files_only)."
            )
        url = release.url(os.environ.get("M2D_EMBED_RELEASE_URL", RELEASE_URL))
        print(f"Downloading {release.name}\n{LICENSE_NOTICE}", file=sys.stderr)
        archive.parent.mkdir(parents=True, exist_ok=True)
        with lock_of_release(archive):
            if options.force_download or not (folder.exists() or archive.exists()):
                _download(url, archive)
                shutil.rmtree(folder, ignore_errors=True)  # what an earlier download was converted to
    return Location(archive, f"official M2D release {release.tag}", release=folder)


def lock_of_release(archive: Path) -> FileLock:
    """Held while an official release is downloaded, or converted: another process that wants it, too, waits."""
    return FileLock(archive.with_name(f".{archive.stem}.lock"))


def _download(url: str, file: Path) -> None:
    """Download a zip with a progress bar, going on where an earlier try stopped, and check every byte of it."""
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get

    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("ab") as stream:
            http_get(url, stream, resume_size=partial.stat().st_size, displayed_filename=file.name)
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 416:  # the partial file is longer than the real one
            partial.unlink()
            raise CheckpointError(f"{url}: the part downloaded earlier does not fit; try again.") from error
        raise ModelNotFoundError(f"{url}: the server answered {status}.") from error
    except (OSError, _http_error()) as error:
        if _is_of_disk(error):
            raise
        raise CheckpointError(
            f"{url}: the download broke off ({_first_line(error)}); run it again to go on from there."
        ) from error
    try:
        with zipfile.ZipFile(partial) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError):
        damaged = "the archive itself"
    if damaged is not None:
        partial.unlink()
        raise CheckpointError(f"{url}: the download is damaged ({damaged}); try again.")
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def _http_error() -> type[Exception]:
    """The base class of the errors of the HTTP library that this huggingface_hub is built on (requests, httpx)."""
    from huggingface_hub.errors import HfHubHTTPError

    base = HfHubHTTPError.__bases__[0]
    return base.__bases__[0] if issubclass(base, OSError) else base  # requests has one more below its own


def _is_of_disk(error: Exception) -> bool:
    """Whether an error of a download is the local disk's, not the network's."""
    return getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
