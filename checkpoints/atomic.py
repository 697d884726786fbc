"""Files that are either complete or what they were before.

A file is written under a temporary name in its own folder, flushed to the disk and renamed. Whatever goes
wrong, a full disk, Ctrl-C or a crash, the old file stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Temporary name that becomes ``path`` if the block succeeds and vanishes if it fails.

    Raises:
        OSError: If writing fails; the error names ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors makes files that only their owner may read; a shared folder needs the usual mode.
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file that then becomes ``path``; see :func:`replacing`."""
    with replacing(path) as temporary:
        write(temporary)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write bytes; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
