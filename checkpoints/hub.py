"""Where weights are: local folders and files, and repositories on the Hugging Face hub.

A reference is a path, ``org/name``, ``hf://org/name[@revision][/file]``, or ``shipped/NAME`` for weights that
come with this package. An existing path wins over anything else of the same spelling. Downloads land in the
cache of huggingface_hub, whose environment variables (``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``,
``HF_TOKEN``) are honoured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weight files of a Hugging Face folder, best first: safetensors needs no unpickling."""

SHIPPED = "shipped"
"""Folder of this package whose folders are weights that come with it, and how references to them begin."""

_SHARDS = {
    "model.safetensors.index.json": "model-*-of-*.safetensors",
    "pytorch_model.bin.index.json": "pytorch_model-*-of-*.bin",
}
_PULL_REVISION = re.compile(r"refs/(?:pr|convert)/[^/]+")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubRef:
    """A repository on the hub, or a file in it."""

    repo_id: str
    """``org/name``."""
    revision: str | None = None
    """Branch, tag, pull request (``refs/pr/1``) or commit; None is the main branch."""
    filename: str | None = None
    """Path inside the repository with forward slashes; None means the whole model."""

    def __str__(self) -> str:
        """The reference as users write it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo_id}{revision}" + (f"/{self.filename}" if self.filename else "")


def parse(ref: str) -> HubRef:
    """Read ``org/name`` or ``hf://org/name[@revision][/file]``; slashes in a revision are written ``%2F``.

    Raises:
        ValueError: If it is neither.
    """
    rest = ref.removeprefix("hf://")
    org, _, rest = rest.partition("/")
    name, at, tail = rest.partition("@") if "@" in rest.split("/", 1)[0] else (rest, "", "")
    revision: str | None = None
    filename: str
    if at:
        if pull := _PULL_REVISION.match(tail):
            revision, filename = pull.group(), tail[pull.end() :].lstrip("/")
        else:
            revision, _, filename = tail.partition("/")
    else:
        name, _, filename = rest.partition("/")
    well_formed = all(_NAME.fullmatch(part) for part in (org, name)) and (not at or revision)
    if not well_formed or ".." in PurePosixPath(filename).parts:
        raise ValueError(f"{ref!r} is no hub reference; write org/name or hf://org/name[@revision][/file]")
    return HubRef(
        repo_id=f"{org}/{name}", revision=unquote(revision) if revision else None, filename=filename or None
    )


def resolve(ref: str | Path, filename: str | None = None, revision: str | None = None) -> Path:
    """Local path of a reference, downloaded if need be.

    Of a whole repository only ``*.json``, the model card and the best kind of weights are fetched.

    Args:
        ref: Path, ``org/name``, ``hf://org/name[@revision][/file]`` or ``shipped/NAME``.
        filename: A file inside the folder or repository; the folder itself if not given.
        revision: Branch, tag or commit of a hub repository, if the reference does not state one.

    Raises:
        ValueError: If the path, repository, revision or file does not exist, or cannot be reached offline.
    """
    text = str(ref)
    local = Path(text).expanduser()
    if not text.startswith("hf://") and (local.exists() or not _looks_like_repo(text)):
        if revision is not None:
            raise ValueError(f"{text} is a local path, which has no revision {revision!r}")
        return _resolve_local(local, filename)
    if (folder := shipped(text)) is not None:
        if revision is not None:
            raise ValueError(f"{text} comes with this package and has no revision {revision!r}")
        return _resolve_local(folder, filename)
    hub = parse(text)
    if (filename and hub.filename) or (revision and hub.revision):
        raise ValueError(
            f"{text!r} already states what filename={filename!r}, revision={revision!r} asks for"
        )
    hub = HubRef(repo_id=hub.repo_id, revision=hub.revision or revision, filename=hub.filename or filename)
    return _fetch_file(hub) if hub.filename else _fetch_model(hub)


def shipped(ref: str) -> Path | None:
    """Folder of a reference ``shipped/NAME``; None for one of another kind.

    Raises:
        ValueError: If nothing of that name is shipped.
    """
    first, _, name = ref.partition("/")
    if first != SHIPPED or "/" in name:
        return None
    root = Path(str(resources.files(__package__))) / SHIPPED
    known = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if name not in known:
        allowed = ", ".join(f"{SHIPPED}/{one}" for one in known)
        raise ValueError(f"nothing is shipped as {ref!r}, allowed: {allowed}")
    return root / name


def weight_file(folder: str | Path) -> Path:
    """The weight file that a model folder holds, safetensors before PyTorch files, single before sharded.

    Raises:
        ValueError: If there is none; the message lists what the folder holds.
    """
    folder = Path(folder)
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "it is no folder"
    raise ValueError(f"{folder} holds none of {', '.join(WEIGHT_FILES)} (found: {held or 'nothing'})")


def _looks_like_repo(text: str) -> bool:
    """True for ``org/name`` with optional revision; paths with more or fewer parts are local."""
    parts = text.split("@", 1)[0].split("/")
    return len(parts) == 2 and all(_NAME.fullmatch(part) for part in parts)


def _resolve_local(path: Path, filename: str | None) -> Path:
    target = path / filename if filename else path
    if target.exists():
        return target
    if filename and path.is_dir():
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(f"{path} has no file {filename!r} (found: {held})")
    raise ValueError(f"{path} does not exist; for a model on the hub write org/name or hf://org/name")


def _fetch_file(ref: HubRef) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    assert ref.filename is not None
    try:
        return Path(hf_hub_download(ref.repo_id, ref.filename, revision=ref.revision))
    except (HTTPError, FileNotFoundError, OfflineModeIsEnabled) as err:
        raise _explained(err, ref) from err


def _fetch_model(ref: HubRef) -> Path:
    """Snapshot folder with configuration and one kind of weights."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    if constants.is_offline_mode():
        return _cached_model(ref, "offline mode is on")
    try:
        # Large models come in both kinds of weights, and only the list of files tells which there are.
        files = HfApi().model_info(ref.repo_id, revision=ref.revision, timeout=10).siblings or []
        names = {file.rfilename for file in files}
        patterns = ["*.json", "README.md", *_weight_patterns(ref, names)]
        return Path(snapshot_download(ref.repo_id, revision=ref.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError) as err:
        raise _explained(err, ref) from err
    except HTTPError as err:
        return _cached_model(ref, f"the hub cannot be reached ({type(err).__name__})")


def _cached_model(ref: HubRef, reason: str) -> Path:
    """Snapshot folder as it lies in the cache, which must hold the configuration and weights."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                ref.repo_id, revision=ref.revision, local_files_only=True, allow_patterns=["config.json"]
            )
        )
        weight_file(folder)
    except (FileNotFoundError, ValueError) as err:
        raise ValueError(f"{_absent(ref)} and {reason}; {_how_to_download(ref)}") from err
    return folder


def _weight_patterns(ref: HubRef, names: set[str]) -> list[str]:
    for name in WEIGHT_FILES:
        if name in names:
            return [name, _SHARDS[name]] if name in _SHARDS else [name]
    held = ", ".join(sorted(names)[:8])
    raise ValueError(f"{ref} holds none of {', '.join(WEIGHT_FILES)} (found: {held})")


def _explained(err: Exception, ref: HubRef) -> ValueError:
    """What went wrong on the hub, in one line that says what to do."""
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{ref.repo_id}"
    if isinstance(err, errors.GatedRepoError):
        return ValueError(f"{ref} asks for an agreement: accept it at {page}, then run 'hf auth login'")
    if isinstance(err, errors.RepositoryNotFoundError):
        return ValueError(
            f"{ref}: there is no repository {ref.repo_id!r} on the hub, or it is private: check the spelling,"
            " or run 'hf auth login'"
        )
    if isinstance(err, errors.RevisionNotFoundError):
        return ValueError(f"{ref}: {ref.repo_id} has no revision {ref.revision!r}, see {page}/commits")
    if isinstance(err, errors.RemoteEntryNotFoundError):
        return ValueError(f"{ref}: {ref.repo_id} has no file {ref.filename!r}, see {page}/tree/main")
    if isinstance(err, errors.HfHubHTTPError):
        return ValueError(f"{ref}: the hub answered with an error: {str(err).strip().splitlines()[0]}")
    offline = constants.is_offline_mode()
    reason = "offline mode is on" if offline else f"the hub cannot be reached ({type(err).__name__})"
    return ValueError(f"{_absent(ref)} and {reason}; {_how_to_download(ref)}")


def _absent(ref: HubRef) -> str:
    from huggingface_hub import constants

    return f"{ref} is not in the cache {constants.HF_HUB_CACHE}"


def _how_to_download(ref: HubRef) -> str:
    words = ["hf", "download", ref.repo_id, *([ref.filename] if ref.filename else [])]
    words += ["--revision", ref.revision] if ref.revision else []
    return f"on a machine with network run 'HF_HUB_OFFLINE=0 {' '.join(words)}' (HF_HOME moves the cache)"
