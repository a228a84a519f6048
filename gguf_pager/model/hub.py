"""Models of Hugging Face: what a name of one means, and the files it stands for, downloaded by huggingface_hub."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from gguf_pager.errors import LayoutError, PagerError
from gguf_pager.model.variants import Variant, choose, labels, listed, variants_of

_HOSTS = ("huggingface.co", "hf.co")

_HOW = "write hf:OWNER/REPO, hf:OWNER/REPO:Q4_K_M or hf:OWNER/REPO/FILE.gguf"

_LIST_TIMEOUT_S = 30.0
"""For the list of a repository's files, which is a small answer."""


@dataclass(frozen=True, slots=True)
class HubName:
    """A model of Hugging Face: a repository, and a file or folder of it, or a quantisation, or neither."""

    repo: str
    revision: str | None = None
    path: str | None = None
    quantisation: str | None = None


def parse(name: str) -> HubName | None:
    """Return what a name means at Hugging Face, None if it is another's.

    Raises:
        LayoutError: it is one of Hugging Face, but of no repository; or the address of another site.
    """
    text = name
    if is_address := re.match(r"(?i)https?:/+", name):
        host, _, text = name[is_address.end():].partition("/")
        if host.removeprefix("www.") not in (*_HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc):
            shown = re.sub(r":/+", "://", name, count=1)  # a path has lost one of them
            raise LayoutError(f"{shown} is no address of Hugging Face: download the file, and give its path.")
        text = unquote(text.split("?")[0].split("#")[0])
    elif name.startswith("hf:"):
        text = name.removeprefix("hf:").lstrip("/")
    elif name.partition("/")[0] in _HOSTS:
        text = name.partition("/")[2]
    else:
        return None
    owner, _, rest = text.strip("/").partition("/")
    repo, _, path = rest.partition("/")
    repo, _, quantisation = repo.partition(":")
    if not owner or not repo or ":" in owner:
        raise LayoutError(f"{name} names no repository of Hugging Face: {_HOW}.")
    revision = None
    if under := re.match(r"(?:resolve|blob|raw|tree)/([^/]+)/?", path):
        revision, path = under[1], path[under.end():]
    return HubName(f"{owner}/{repo}", revision, path or None, None if quantisation in ("", "latest") else quantisation)


def download(name: HubName, *, has_bars: bool) -> tuple[Path, str | None]:
    """Return the first file of a model, all of which lie in Hugging Face's cache afterwards, and what was chosen among several.

    Raises:
        LayoutError: there is no such model.
        PagerError: it cannot be had, and why.
    """
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise PagerError("Models of Hugging Face need the package huggingface_hub: pip install 'gguf-pager[hf]'.") from None
    try:
        return _download(huggingface_hub, name, has_bars=has_bars)
    except _Unreachable as error:
        raise PagerError(str(error)) from None


def _download(hub: Any, name: HubName, *, has_bars: bool) -> tuple[Path, str | None]:
    sizes, is_cached = _files(hub, name)
    variant, note = _choose(name, list(sizes), is_cached=is_cached)
    with _explained(hub, name), _bars(hub, has_bars):
        if not is_cached:
            _check_room(hub, name, {file: sizes[file] for file in variant.files})
        paths = [hub.hf_hub_download(name.repo, file, revision=name.revision, local_files_only=is_cached) for file in variant.files]
    return Path(paths[0]), note


def _files(hub: Any, name: HubName) -> tuple[dict[str, int | None], bool]:
    """Return a repository's files and their sizes, and whether those in the cache had to do, because nobody answers."""
    try:
        with _explained(hub, name):
            found = hub.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=_LIST_TIMEOUT_S)
            return {file.rfilename: file.size for file in found.siblings or ()}, False
    except _Unreachable:
        cached = _cached_files(hub, name)
        if not variants_of(cached):
            raise
        return dict.fromkeys(cached), True


def _cached_files(hub: Any, name: HubName) -> list[str]:
    try:
        folder = Path(hub.snapshot_download(name.repo, revision=name.revision, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError as error:
        if not hasattr(error, "snapshot_path"):  # of a repository of which only some files are there
            return []
        folder = Path(error.snapshot_path)
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf") if path.exists()]


def _choose(name: HubName, files: Sequence[str], *, is_cached: bool) -> tuple[Variant, str | None]:
    where = f"What is in Hugging Face's cache of {name.repo}" if is_cached else name.repo
    found = variants_of(files)
    if not found:
        others = f" It has files of other kinds: {listed(files)}." if files else ""
        raise LayoutError(f"{where} has no GGUF model: look for a repository whose name ends with GGUF.{others}")
    right = [variant for variant in found if _is_in(variant, name.path)] if name.path else found
    if not right:
        raise LayoutError(f"{where} has no {name.path}. It has: {listed(variant.files[0] for variant in found)}.")
    variant = choose(right, name.quantisation, where)
    if not variant.is_complete:
        raise LayoutError(f"{where} has only {len(variant.files)} of the {variant.n_files} parts of {variant.name}: "
                          f"{'download it again with a network' if is_cached else 'choose another'}.")
    if len(right) == 1 or name.quantisation is not None:
        return variant, None
    rest = [label for label in labels(right) if label != variant.quantisation]
    return variant, f"{name.repo}: {variant.quantisation or variant.name} is taken; there is also {listed(rest)}"


def _is_in(variant: Variant, path: str) -> bool:
    return path in variant.files or variant.name.startswith(f"{path.rstrip('/')}/")


def _check_room(hub: Any, name: HubName, sizes: dict[str, int | None]) -> None:
    """Refuse what does not fit onto the disk before hours are spent on it."""
    missing = sum(size or 0 for file, size in sizes.items()
                  if not isinstance(hub.try_to_load_from_cache(name.repo, file, revision=name.revision), str))
    folder = Path(hub.constants.HF_HUB_CACHE)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise PagerError(f"{name.repo} needs {missing / 1e9:,.1f} GB, and {folder} has {free / 1e9:,.1f} GB free: make room, or set "
                         "HF_HOME to a folder on another disk.")


@contextmanager
def _bars(hub: Any, are_wanted: bool) -> Iterator[None]:
    """Keep huggingface_hub's bars from being shown meanwhile, where nobody wants them."""
    if are_wanted or hub.utils.are_progress_bars_disabled():
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()


class _Unreachable(PagerError):
    """Nobody answers: what was downloaded earlier has to do."""


@contextmanager
def _explained(hub: Any, name: HubName) -> Iterator[None]:
    """Say in a sentence what huggingface_hub raises."""
    errors, site = hub.errors, hub.constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise PagerError(f"{name.repo} is open to those who have agreed to its terms: agree at {site}/{name.repo}, then "
                         "run hf auth login, or set HF_TOKEN.") from None
    except errors.RepositoryNotFoundError:
        raise LayoutError(f"There is no repository {name.repo} at {site}, or it is private: check the name, or log in with "
                          "hf auth login (or HF_TOKEN).") from None
    except errors.RevisionNotFoundError:
        raise LayoutError(f"{name.repo} has no revision {name.revision}: check the name.") from None
    except errors.HFValidationError as error:
        raise LayoutError(f"{name.repo} cannot be a repository of Hugging Face: {_HOW} ({_first_line(error)}).") from None
    except errors.OfflineModeIsEnabled:
        raise _Unreachable(f"{name.repo} is not in Hugging Face's cache, and HF_HUB_OFFLINE forbids asking for it: unset "
                           "that, or give the path of a file.") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PagerError(f"{site} does not let you have {name.repo}: log in with hf auth login, or set HF_TOKEN "
                             f"({_first_line(error)}).") from None
        kind = _Unreachable if status >= 500 or status == 429 else PagerError
        raise kind(f"{site} does not give {name.repo}: try again later ({_first_line(error)}).") from None
    except _http_error(errors) as error:
        raise _Unreachable(f"{site} cannot be reached, or has stopped in the middle ({_first_line(error) or type(error).__name__}): check "
                           "the network, or give the path of a file.") from None
    except (OSError, RuntimeError) as error:  # the latter of hf_xet, which says everything in words
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise PagerError(f"There is no room left in {hub.constants.HF_HUB_CACHE} for {name.repo}: make some, or set HF_HOME to a "
                             "folder on another disk.") from None
        raise PagerError(f"{name.repo} could not be downloaded: {_first_line(error)}.") from None


def _http_error(errors: Any) -> type[Exception]:
    """Return what the HTTP library raises where nobody answers; before 1.0 that is requests, whose HTTPError is only for answers."""
    known: type[Exception] = errors.HTTPError
    return known.__bases__[0] if issubclass(known, OSError) else known


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
