"""A folder that receives all of a study's files or none."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """Give a staging folder whose files move to ``path`` when the block ends without an error.

    A folder that is new appears in one rename. One that exists keeps its other files, and each new file
    replaces its older version in one rename. After an error nothing has changed.

    path: the folder to fill; its parents are made too. Yields the staging folder, on the same file system.
    Raises OSError at once if ``path`` cannot be written.
    """
    path = Path(path).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file")
    beside = path if path.is_dir() else _nearest_existing(path.parent)
    staging = beside / f".{path.name}.{uuid.uuid4().hex}"
    try:
        staging.mkdir()
    except OSError as error:
        raise type(error)(f"cannot write to {beside}: {error.strerror}") from error
    try:
        yield staging
        if path.is_dir():
            for file in sorted(staging.iterdir()):
                os.replace(file, path / file.name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.rename(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file")
    return path
