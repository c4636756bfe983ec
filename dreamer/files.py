"""Files that are written whole or not at all."""

import os
from pathlib import Path


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file beside its place, then move it there: a kill or a full disk leaves the old one,
    and of several processes that write the same file each leaves a whole one.

    Raises OSError where the disk is full; nothing half-written stays behind.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
