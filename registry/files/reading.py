"""Reading: the way from a path to what it holds, for files, folders, and folders of shards with their index.

The formats of files are the rows of `registry.files.formats`. Nothing that a file holds is ever run. What a file says
of itself (epoch, step, loss, metrics, hyperparameters) fills the checkpoint's fields.
"""

from __future__ import annotations

import os
from pathlib import Path

from registry.files.folders import read_folder
from registry.files.foreign import kind_of
from registry.files.formats import FORMS, format_of
from registry.files.imported import Imported, file_status
from registry.files.mlflow_models import MLMODEL, read_mlflow_model
from registry.files.shards import INDEXES, read_index
from registry.store.errors import Unsupported, storage_errors
from registry.store.text import printable


def read_checkpoint_file(path: Path | str) -> Imported:
    """Read a file of a known format, a folder, or the index file of shards.

    `read` of each format, `registry.files.folders.read_folder`, and `registry.files.mlflow_models.read_mlflow_model` say
    what it becomes.

    Raises:
        NotFound: if there is no such file.
        Invalid: if it is malformed, empty, holds no tensors, or is no regular file.
        Unsupported: if its form is unknown, or needs code to run.
        StorageError: if the system refuses.
    """
    path = Path(path)
    if os.path.isdir(path):
        is_mlflow = os.path.isfile(path / MLMODEL)
        return read_mlflow_model(path) if is_mlflow else read_folder(path)
    file_status(path)
    if path.name.lower().endswith(INDEXES):
        return read_index(path)
    form = format_of(path.name)
    if form is not None:
        return form.read(path)
    with storage_errors(path):
        kind = kind_of(path) or Unsupported("unknown kind of file", f"readable are {FORMS}")
    raise kind.about(printable(str(path)))
