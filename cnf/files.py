"""Files and directories that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when the block ends well.

    Make a file or a directory there. Whoever looks at ``path`` meanwhile, or after a crash, finds
    what was there before; after an error in the block nothing is left of the attempt. Missing
    parent directories are made.

    An existing directory gives way to a new one only when the new one has an entry for each of the
    old one's, so that nothing is lost that this write knows nothing of.

    Args:
        path: where the complete file or directory is to stand.

    Yields:
        A path that does not exist yet, in the same directory and with the same end of its name.

    Raises:
        FileExistsError: where a directory stands that holds something else, or a directory and a
            file would take each other's place.
        OSError: as the block raises it, but named after ``path``: a full disk names no file.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "greeting.txt"
        >>> with write_whole(target) as part:
        ...     _ = part.write_text("hello")
        ...     target.exists()
        False
        >>> target.read_text()
        'hello'
    """
    # through a link the file that it points to is written, and the link stays
    target = Path(path).resolve()
    if target.exists() and not (target.is_file() or target.is_dir()):
        # a device or a pipe cannot be replaced, only written to
        with _named(path, target):
            yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{secrets.token_hex(4)}-{target.name}")
    with _named(path, part):
        try:
            yield part
            _take_place(part, target)
        finally:
            _remove(part)


@contextlib.contextmanager
def _named(path: str | os.PathLike[str], part: Path) -> Iterator[None]:
    """Name what the system refuses after the file that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, part, str(part)):
            error.filename = os.fspath(path)
        raise


def _take_place(part: Path, target: Path) -> None:
    """Put what is complete, a file or a directory, in the place that is its own."""
    if part.is_dir():
        _sync_tree(part)
        _swap_in(part, target)
    elif part.exists():
        _sync(part)
        if target.is_dir():
            raise FileExistsError(errno.EEXIST, "is a directory; choose another name", str(target))
        os.replace(part, target)
    else:
        raise FileNotFoundError(f"nothing was written for {target}")
    _sync(target.parent)


def _swap_in(part: Path, target: Path) -> None:
    """Put a complete directory in the place of an older one."""
    if not target.exists():
        os.replace(part, target)
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; choose another name for the directory")
    new = {entry.name for entry in part.iterdir()}
    if lost := sorted(entry.name for entry in target.iterdir() if entry.name not in new):
        raise FileExistsError(
            f"{target} holds something else ({', '.join(lost[:5])}), which replacing it would "
            "delete; choose a directory of its own"
        )
    old = target.with_name(f".{secrets.token_hex(4)}-{target.name}")
    os.replace(target, old)
    try:
        os.replace(part, target)
    except OSError:
        os.replace(old, target)
        raise
    _remove(old)


def _sync(path: Path) -> None:
    """Wait until the disk has it; a directory cannot be opened for that on every system."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(root: Path) -> None:
    for path in root.rglob("*"):
        _sync(path)
    _sync(root)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
