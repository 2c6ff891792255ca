"""Files of the user: where they lie, and how several processes write to one."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def user_folder() -> Path:
    """Where the user's own tables lie.

    FASTLINEAR_CACHE, or fastlinear/ in XDG_CACHE_HOME, which is ~/.cache where it is not set.

    Raises:
        RuntimeError: nobody knows where the home folder is.
    """
    given = os.environ.get("FASTLINEAR_CACHE")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fastlinear"


def replace(path: Path, text: str) -> None:
    """Puts `text` in the place of what `path` held, so that a kill leaves the one or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it no other process is, for the same path, where the system can say so."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # not on every network's folder
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
