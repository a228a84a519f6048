"""Models that other programs have downloaded, read where they are: Ollama's, and LM Studio's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gguf_pager.errors import LayoutError
from gguf_pager.model import engine, metadata
from gguf_pager.model.variants import Variant, listed, variants_of

_DEPTH = 4
"""Folders in folders that are looked into: LM Studio's files lie two deep."""


# ---- Ollama -----------------------------------------------------------------------------------------------------------

_MODEL_LAYER = "application/vnd.ollama.image.model"

_REGISTRY, _LIBRARY = "registry.ollama.ai", "library"
"""What Ollama leaves out of the names it shows."""


def find_in_ollama(name: str) -> Path:
    """Return the file of a model of Ollama's, by the name it has there: NAME, NAME:TAG, USER/NAME:TAG.

    Raises:
        LayoutError: it is not there, and what is.
    """
    folders = _ollama_folders()
    there = {shown: (folder, manifest) for folder in reversed(folders) for shown, manifest in _manifests(folder)}
    model, _, tag = name.rpartition("/")[2].partition(":")
    wanted = f"{name.rpartition(':')[0] if tag else name}:{tag or 'latest'}".lower()
    names = {shown.lower(): shown for shown in there}
    if not tag and wanted not in names:
        same = [lower for lower in names if lower.rpartition(":")[0] == name.lower()]
        wanted = same[0] if len(same) == 1 else wanted
    if not model or wanted not in names:
        raise LayoutError(f"Ollama has no {name or 'model without a name'}. " + (
            f"It has: {listed(sorted(there))}." if there else f"It has none in {_looked_at(folders)}: ollama pull {name}"))
    folder, manifest = there[names[wanted]]
    return _model_blob(folder, manifest, names[wanted])


def _ollama_folders() -> list[Path]:
    """Return where Ollama keeps models, whether there are any or not: the user's own, and the service's."""
    own = [Path(os.environ["OLLAMA_MODELS"])] if os.environ.get("OLLAMA_MODELS") else []
    return [*own, Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def _manifests(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield names as Ollama shows them, and the files that say what they are made of."""
    for path in _files(folder / "manifests"):
        host, user, *rest = path.parts
        if len(rest) == 2:  # HOST/USER/NAME/TAG
            shown = [*([host] if host != _REGISTRY else []), *([user] if (host, user) != (_REGISTRY, _LIBRARY) else []), rest[0]]
            yield f"{'/'.join(shown)}:{rest[1]}", folder / "manifests" / path


def _model_blob(folder: Path, manifest: Path, name: str) -> Path:
    try:
        layers = json.loads(manifest.read_bytes())["layers"]
        digests = [str(layer["digest"]) for layer in layers if layer["mediaType"] == _MODEL_LAYER]
    except OSError as error:
        raise LayoutError(f"{manifest} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise LayoutError(f"{manifest} is no manifest of Ollama's: ollama pull {name}") from None
    if len(digests) != 1:
        raise LayoutError(f"{name} holds {len(digests) or 'no'} models in Ollama: take one that is a single GGUF file.")
    for blob in (digests[0].replace(":", "-"), digests[0]):  # the second in older versions
        if os.path.exists(folder / "blobs" / blob):
            return folder / "blobs" / blob
    raise LayoutError(f"The file of {name} is missing in {folder / 'blobs'}, or may not be read: ollama pull {name}")


# ---- LM Studio --------------------------------------------------------------------------------------------------------

def find_in_lmstudio(name: str) -> Path:
    """Return the first file of a model of LM Studio's, by PUBLISHER/REPO, PUBLISHER/REPO/FILE or parts of it ("qwen3@q4_k_m").

    Raises:
        LayoutError: there is none, or there are several.
    """
    folders = _lmstudio_folders()
    there = [(folder, variant) for folder in folders for variant in variants_of(path.as_posix() for path in _files(folder))]
    wanted = name.lower().strip("/")
    right = [(folder, variant) for folder, variant in there
             if wanted and (wanted in map(str.lower, variant.files) or variant.name.lower().startswith(f"{wanted}/"))]
    for words in (wanted, wanted.rpartition("/")[2]):  # the second for `lms ls`, which names who made a model, not who has quantised it
        right = right or [(folder, variant) for folder, variant in there
                          if words and all(part in variant.name.lower() for part in words.split("@"))]
    if not right:
        names = sorted(variant.files[0] for _, variant in there)
        raise LayoutError(f"LM Studio has no {name or 'model without a name'}. " + (
            f"It has: {listed(names)}." if names else f"It has none in {_looked_at(folders)}: give the path of a file."))
    return only_one(right, f"lmstudio:{name}")


def _lmstudio_folders() -> list[Path]:
    home = Path.home()
    try:
        chosen = [Path(os.fsdecode((home / ".lmstudio-home-pointer").read_bytes().strip()))]
    except (OSError, ValueError):
        chosen = []
    homes = dict.fromkeys([*chosen, home / ".lmstudio", home / ".cache" / "lm-studio"])
    folders = [*(folder for at in homes for folder in _downloads(at / "settings.json")), *(at / "models" for at in homes)]
    found: list[Path] = []
    for folder in folders:  # the same one by another name counts once
        if not any(os.path.realpath(folder) == os.path.realpath(other) for other in found):
            found.append(folder)
    return found


def _downloads(settings: Path) -> list[Path]:
    """Return the folder that somebody has chosen in LM Studio instead of the usual one."""
    try:
        folder = json.loads(settings.read_bytes())["downloadsFolder"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [Path(folder)] if isinstance(folder, str) else []


# ---- folders ----------------------------------------------------------------------------------------------------------

def find_in_folder(folder: Path) -> Path:
    """Return the first file of the one model in a folder, or, where it has only folders, in those.

    Raises:
        LayoutError: there is none, there are several, or a part of it is missing.
    """
    for depth in (1, 2):
        found = variants_of(path.as_posix() for path in _files(folder, depth))
        if found:
            return only_one([(folder, variant) for variant in found], str(folder))
    raise LayoutError(f"{folder} is a folder without a GGUF model: give the path of a .gguf file.")


def only_one(found: Sequence[tuple[Path, Variant]], where: str) -> Path:
    """Return the first file of the one model among several files in folders.

    Raises:
        LayoutError: there are several, or a part of it is missing.
    """
    if len(found) > 1:
        found = [(folder, variant) for folder, variant in found if _is_model(folder / variant.files[0])] or found
    if len(found) > 1:
        names = listed(sorted(variant.files[0] for _, variant in found))
        raise LayoutError(f"{where} stands for {len(found)} models: name one of them. They are: {names}.")
    folder, variant = found[0]
    if not variant.is_complete:
        raise LayoutError(f"{folder} holds only {len(variant.files)} of the {variant.n_files} parts of {variant.name}: download the "
                          "others, too.")
    return folder / variant.files[0]


def _is_model(path: Path) -> bool:
    """Return whether a file is not, by its header, something that only helps a model."""
    try:
        metadata.check_file(engine.read_header(path))
    except LayoutError:
        return False
    return True


def _files(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Yield the files in a folder and those in it, as seen from it; what may not be read is left out."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        if os.path.isfile(folder / name):
            yield Path(name)
        elif depth > 1:
            yield from (name / path for path in _files(folder / name, depth - 1))


def _looked_at(folders: Sequence[Path]) -> str:
    return ", ".join(str(folder) if os.access(folder, os.R_OK | os.X_OK) or not os.path.lexists(folder)
                     else f"{folder} (which may not be read)" for folder in folders)
