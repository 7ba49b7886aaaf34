"""Who may write a run: the processes of one job, and no others while any of them lives."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType

from eaptk.errors import EaptkError

#: What a file system says that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

#: No name of a job is longer, in bytes.
_LONGEST = 4096


class Lock:
    """The file ``.lock`` of a run, which every process that writes it holds, and which names their job while they do.

    Leaving the context lets go of it, as the end of the process does, however it comes.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = -1

    def __enter__(self) -> Lock:
        self._file = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        os.close(self._file)

    def hold(self, alone: bool) -> None:
        """Hold the run, alone or with other processes; from having held it alone to letting others in too.

        Raises:
            EaptkError: another process holds it, or the file system has no locks.
        """
        try:
            fcntl.flock(self._file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self.busy() from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise EaptkError(
                f"the file system of {self._folder} keeps no locks, so two jobs could write one run; mount it with "
                f"them (Lustre: -o flock), or write to a local disk and copy the run"
            ) from error

    @property
    def job(self) -> str:
        return os.pread(self._file, _LONGEST, 0).decode(errors="replace")

    @job.setter
    def job(self, name: str) -> None:
        # In place: on a full disk the room that a cut would give up might not come back.
        os.pwrite(self._file, name.encode(), 0)
        os.ftruncate(self._file, len(name.encode()))

    def busy(self) -> EaptkError:
        """What to tell a process that may not write now."""
        return EaptkError(
            f"another process is writing run {self._folder}; wait for it, or choose another folder"
        )
