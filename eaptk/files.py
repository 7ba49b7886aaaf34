"""Files that are either whole or not there, and arrays whose space is reserved before they are needed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from eaptk.errors import EaptkError

DAMAGED = "restore it from a copy, or delete the folder and score again"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_meant_as_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name that may be a local path or one on the hub (``name``, ``owner/name``) can only be a path.

    A typing error in a path is then found here, and not by asking the hub for a model of that name.
    """
    if not isinstance(name, str) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return True
    return "/" in name and Path(name).parent.is_dir()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path`, synced and whole, when the block succeeds."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def see_afresh(folder: Path) -> None:
    """Have files in a folder appear that other machines have made: NFS, which looks for them twice a minute, looks at
    once when this machine changes the folder itself.
    """
    change = folder / ".afresh.tmp"
    change.touch()
    change.unlink(missing_ok=True)  # another process may have done so


def reserve_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """An .npy file of zeros whose bytes are already allocated on the disk."""
    with open(path, "wb") as file:
        _write_header(file, shape, dtype)
        file.flush()
        size = file.tell() + int(np.prod(shape)) * dtype.itemsize
        require_space(path.parent, size)
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise _too_small(path.parent, size) from error


def require_space(folder: Path, size: int) -> None:
    """Raises EaptkError if the folder's disk has fewer bytes free."""
    if _free(folder) < size:
        raise _too_small(folder, size)


def _free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _too_small(folder: Path, size: int) -> EaptkError:
    return EaptkError(
        f"the rows of {folder} need {size} bytes and its disk has {_free(folder)} free; "
        f"free some, choose a folder on another disk, or store less with row dtype float16 or metrics only"
    )


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an .npy file, whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        _write_header(file, array.shape, array.dtype)
        # Not np.save: its error on a full disk does not say that the disk is full.
        file.write(np.ascontiguousarray(array).view(np.uint8).data)


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def check_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """The byte at which the data of an .npy file starts, once the file is known to be what it should be."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            found, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise EaptkError(f"{path} is missing; {DAMAGED}") from None
    except (OSError, ValueError) as error:
        raise EaptkError(f"{path} cannot be read as an array ({error}); {DAMAGED}") from error
    if found != shape or found_dtype != dtype or fortran:
        raise EaptkError(f"{path} holds {found_dtype} {found}, the manifest says {dtype} {shape}; {DAMAGED}")
    expected = offset + int(np.prod(shape)) * dtype.itemsize
    if size < expected:
        raise EaptkError(f"{path} is truncated: {size} bytes where {expected} are expected; {DAMAGED}")
    return offset


def map_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """An .npy file, memory-mapped read-only and checked as `check_array` does."""
    offset = check_array(path, shape, dtype)
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    except FileNotFoundError:  # another process has deleted it since
        raise EaptkError(f"{path} is missing; {DAMAGED}") from None


def read_table(path: Path) -> pa.Table:
    """A Parquet file; a missing or broken one is an `EaptkError`."""
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise EaptkError(f"{path} is missing; {DAMAGED}") from None
    except (OSError, pa.ArrowException) as error:
        raise EaptkError(f"{path} cannot be read as Parquet; {DAMAGED}") from error


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file, whole or not at all."""
    with whole_file(path) as temporary:
        pq.write_table(table, temporary)


def pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`: a nearly full disk takes a part of it, and says why only at the next try."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing a run into one line with its remedy."""
    try:
        yield
    except OSError as error:
        remedy = "choose a folder you can write to"
        if error.errno in DISK_FULL:
            remedy = "free some space and repeat the command, finished rows are kept"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise EaptkError(f"cannot write run {path}: {reason}; {remedy}") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; the folder is made if it is not there.

    Raises:
        EaptkError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise EaptkError(f"cannot write {path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        EaptkError: it is missing, or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EaptkError(f"{path} is missing; repeat the command that made it") from None
    except (OSError, ValueError) as error:
        raise EaptkError(
            f"{path} cannot be read ({error}); delete it, and repeat the command that made it"
        ) from error


def differences_between(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], unmatched: Sequence[str] = ()
) -> dict[str, str]:
    """What tells two records of how something was made apart: by dotted key, a text with both values.

    Args:
        unmatched: dotted keys that may differ.
    """
    theirs, ours = _flat(stored, unmatched), _flat(wanted, unmatched)
    return {
        key: f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in {**theirs, **ours}
        if theirs.get(key) != ours.get(key)
    }


def _flat(record: Mapping[str, Any], unmatched: Sequence[str], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if prefix + key in unmatched:
            continue
        is_record = isinstance(value, Mapping)
        flat |= _flat(value, unmatched, f"{prefix}{key}.") if is_record else {prefix + key: value}
    return flat
