"""Whether the files of a checkpoint are what they should be, found without loading their tensors or running anything.

Checksums say that a file is what was written. These checks are for what they cannot: a checkpoint without any, and a
file that was put there on purpose, with a manifest to match.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..data_only import data_only
from ..engines.deepspeed import SAFE_CLASSES
from ..errors import BadInput

NEVER_READ = ("training_args.bin",)  # the Trainer writes it; nothing here loads it
# Of numpy's random state, as the Trainer saves it.
NUMPY = ("numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType", "numpy._core.multiarray._reconstruct",
         "numpy.core.multiarray._reconstruct")  # fmt: skip
# The plan of a sharded checkpoint (torch.distributed.checkpoint), which torch reads with pickle, and its parts.
SHARDED_PLAN = ".metadata"
_PLAN = "torch.distributed.checkpoint.metadata"
PLAN_CLASSES = {
    *(f"{_PLAN}.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
                                     "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                                     "_MEM_FORMAT_ENCODING")),
    "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.Size", "torch.serialization._get_layout",
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    "collections.OrderedDict",
}  # fmt: skip


class AsksForCode(BadInput):
    """A file names something that would have to be run."""


class _Stand:
    """Stands for a class of an engine, which need not be installed to look at a file."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def unreadable(file: Path) -> str | None:
    """Why a file of a checkpoint cannot be read as what its name says; None if it can, or if nothing reads it.

    Raises:
        AsksForCode: for one that is no data.
    """
    try:
        if file.name in NEVER_READ:
            return None
        if file.suffix in (".pt", ".pth", ".bin"):
            _look_into_pickle(file)
        elif file.name == SHARDED_PLAN:
            _look_into_plan(file)
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.name == "latest":  # DeepSpeed's: the folder of the newest part
            _look_into_latest(file)
    except AsksForCode:
        raise
    except Exception as error:  # a broken file can make its reader fail in any way
        return f"{file.name} cannot be read: {_first_sentence(error)}"
    return None


def _look_into_pickle(file: Path) -> None:
    stands: Any = [(_Stand, name) for name in (*SAFE_CLASSES, *NUMPY)]
    zipped = {"mmap": True} if zipfile.is_zipfile(file) else {}  # then no tensor is read
    try:
        with data_only(), torch.serialization.safe_globals(stands), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that is none of torch's
            torch.load(file, map_location="meta", weights_only=True, **zipped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is not None:
            raise AsksForCode(_refusal(file, found[1])) from None
        raise


def _look_into_plan(file: Path) -> None:
    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if not is_dtype and f"{module}.{name}" not in PLAN_CLASSES:
                raise AsksForCode(_refusal(file, f"{module}.{name}"))
            return super().find_class(module, name)

    with file.open("rb") as opened:
        Reader(opened).load()


def _refusal(file: Path, wanted: str) -> str:
    return (
        f"{str(file)!r} is no data: it asks for {wanted} to be run. Nothing was; find out who wrote it, and remove the "
        "folder or resume from another"
    )


def _look_into_latest(file: Path) -> None:
    name = file.read_text(encoding="utf-8").strip()
    if Path(name).name != name or not (file.parent / name).is_dir():
        raise ValueError(f"it names {name!r}, which is no folder beside it")


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.split(r"(?<=[.;:]) ", text)[0].rstrip(".;:")[:200] or type(error).__name__
