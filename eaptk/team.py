"""The processes that score one run together: what torchrun, or any launcher that sets the same variables, starts.

    torchrun --nproc-per-node 8 -m eaptk score …

They share out numbered work by one counter, so that a slow process delays no other, and exchange a few words; rows
go to the disk, never from one process to another. So all they need is the launcher's key-value store: there is no
collective operation that a process could leave the others hanging in. A process that fails says so there, and the
others end with its error; one that is killed takes what it had claimed with it, which the next start finds left.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from types import TracebackType
from typing import Any, TypeVar
from uuid import uuid4

from eaptk.errors import EaptkError

T = TypeVar("T")

#: Seconds between two looks at what others say, at first and at most.
_LOOK, _LOOK_MOST = 0.002, 0.1
#: Seconds that the lead waits at the end for others to have heard that it is.
_PARTING = 30.0
#: Seconds until all processes must have been started.
_MEETING = 600.0

_GONE = "the other processes have gone; finished rows are kept, the same command goes on from there"


class Team:
    """The processes of one call of `eaptk.score`; one process alone is a team of its own.

        with Team.join() as team:
            facts = team.share("facts", read_facts)         # the lead reads, all have it
            for number in team.claim("stretches", 1000):    # each number goes to one of them
                ...
            found = team.gather("found", n_found)           # all have everyone's

    Every process makes the same calls in the same order, each name once. Leaving the block with an error makes
    the others' next call raise it.

    Args:
        rank, size: number of this process, 0 being the lead, and of all.
        store: of torch.distributed, shared by all; None for a process alone.
        as_one: the processes have a part of the model each: all do all the work, and the lead writes it.
    """

    _joined = 0

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, as_one: bool = False) -> None:
        self.rank, self.size, self._store, self.as_one = rank, size, store, as_one
        self._numbers: dict[str, int] = {}

    @classmethod
    def join(cls, as_one: bool = False) -> Team:
        """The team that the environment speaks of: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

        Raises:
            EaptkError: the variables are incomplete, or the other processes cannot be reached.
        """
        if launched_processes() == 1:
            return cls()
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        store, rank, size = _meet()
        # One process may score several runs, one after the other, and all do so in the same order.
        cls._joined += 1
        return cls(rank, size, PrefixStore(f"eaptk-{cls._joined}", store), as_one)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._store is None:
            return
        if kind is None:
            self._part()
            return
        if kind is KeyboardInterrupt:
            said = "was stopped"
        elif isinstance(error, EaptkError):
            said = f"failed: {error}"
        else:
            said = f"failed: {kind.__name__} {error}".strip()
        # The first to fail is the one whose error matters: those of others follow from it.
        with contextlib.suppress(RuntimeError):  # the store has ended, and with it the others
            self._store.compare_set("failed", "", json.dumps([self.rank, said]))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether what this process finds is its to write."""
        return self.leads or not self.as_one

    def share(self, name: str, make: Callable[[], T]) -> T:
        """What the lead's `make` gives, as JSON carries it; the others wait for it.

        Raises:
            EaptkError: in all processes, if `make` raises one.
        """
        if self._store is None:
            return make()
        if self.leads:
            made = make()
            self._said(self._store.set, name, json.dumps(made))
            return made
        found: T = json.loads(self._wait(name))
        return found

    def gather(self, name: str, value: T) -> list[T]:
        """Every process's value, by rank, as JSON carries it; waits until all have said theirs.

        Processes that are as one have one value.
        """
        if self._store is None:
            return [value]
        self._said(self._store.set, f"{name}/{self.rank}", json.dumps(value))
        found = [json.loads(self._wait(f"{name}/{rank}")) for rank in range(self.size)]
        return found[:1] if self.as_one else found

    def claim(self, name: str, n: int) -> Iterator[int]:
        """Some of the numbers 0 … n − 1, in order: each goes to one process, the first that asks.

        Processes that are as one get all.
        """
        number = self.add(name, 1) - 1
        while number < n:
            yield number
            number = self.add(name, 1) - 1

    def add(self, name: str, amount: int) -> int:
        """Add to a number that all share, and have the sum."""
        if self._store is None or self.as_one:
            self._numbers[name] = self._numbers.get(name, 0) + amount
            return self._numbers[name]
        self._raise_failure()
        return int(self._said(self._store.add, name, amount))

    def _wait(self, name: str) -> Any:
        pause = _LOOK
        while not self._said(self._store.check, [name]):
            self._raise_failure()
            time.sleep(pause)
            pause = min(2 * pause, _LOOK_MOST)
        return self._said(self._store.get, name)

    def _part(self) -> None:
        """Let the lead, which may be where the store is, end last."""
        with contextlib.suppress(RuntimeError):  # all is done, whoever is still there
            n_gone = self._store.add("gone", 1)
            deadline = time.monotonic() + _PARTING
            while self.leads and n_gone < self.size and time.monotonic() < deadline:
                time.sleep(_LOOK)
                n_gone = self._store.add("gone", 0)

    def _raise_failure(self) -> None:
        if self._said(self._store.check, ["failed"]):
            rank, said = json.loads(self._said(self._store.get, "failed"))
            raise EaptkError(f"process {rank} of {self.size} {said}")

    def _said(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return call(*args)
        except RuntimeError as error:  # DistError, or the kind that older versions raise
            raise EaptkError(_GONE) from error


def launched_processes() -> int:
    """How many processes were launched together, this one included."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int | None:
    """Which process of its machine this is, and so which card is its own; None if it was launched alone."""
    return _number("LOCAL_RANK", 0) if launched_processes() > 1 else None


def leads() -> bool:
    """Whether this process is the one to print what all of them found."""
    return launched_processes() == 1 or _number("RANK", 0) == 0


def _number(variable: str, default: int | None = None) -> int:
    text = os.environ.get(variable, "" if default is None else str(default))
    if not text.isdecimal():
        raise EaptkError(f"{variable} is {text!r}, no number; start the processes with torchrun")
    return int(text)


@cache
def _meet() -> tuple[Any, int, int]:
    """Store, rank and size of the processes launched together, once a process."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    rank, size = _number("RANK"), _number("WORLD_SIZE")
    address = os.environ.get("MASTER_ADDR", "localhost"), _number("MASTER_PORT")
    if rank >= size or address[1] >= 2**16:
        raise EaptkError(
            f"RANK is {rank}, WORLD_SIZE {size} and MASTER_PORT {address[1]}, which cannot be; start the processes "
            f"with torchrun"
        )
    # torchrun's agent has the store; without one the first process has.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + _MEETING
    try:
        while not hosts and not _answers(address) and time.monotonic() < deadline:
            time.sleep(_LOOK_MOST)
        # Not with the store's own wait for all others, which is deaf to signals.
        tcp = TCPStore(*address, size, is_master=hosts, wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EaptkError(f"cannot meet the other processes: {reason}; start them with torchrun") from error
    tcp.set_timeout(timedelta(seconds=_MEETING))
    store = PrefixStore("eaptk", tcp)
    try:
        start = _greet(store, rank, size, deadline)
    except RuntimeError as error:
        raise EaptkError(_GONE) from error
    return PrefixStore(start, store), rank, size


def _greet(store: Any, rank: int, size: int, deadline: float) -> str:
    """A name for this start of the processes, once all are there.

    A store outlives the processes that torchrun starts anew, with all that earlier ones said; and there is no number
    to tell starts apart by, as the agent of each node counts its own restarts alone. So each process greets with a
    name that nobody had before, and the lead answers all greetings, of the dead too, until each rank has taken it up.
    """
    own = uuid4().hex
    if rank:
        store.set(f"greeting/{rank}", own)
        while not store.check([f"answer/{own}"]):
            _pause(deadline, 0, size)
        start = str(store.get(f"answer/{own}").decode())
        store.set(f"{start}/there/{rank}", "")
        return start
    absent = list(range(1, size))
    while absent := [other for other in absent if not store.check([f"{own}/there/{other}"])]:
        for other in absent:
            if store.check([f"greeting/{other}"]):
                store.set(f"answer/{store.get(f'greeting/{other}').decode()}", own)
        _pause(deadline, absent[0], size)
    return own


def _pause(deadline: float, awaited: int, size: int) -> None:
    if time.monotonic() > deadline:
        raise EaptkError(
            f"process {awaited} of {size} has not come within {_MEETING / 60:.0f} minutes; start them with torchrun"
        )
    time.sleep(_LOOK_MOST)


def _answers(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=_LOOK_MOST):
            return True
    except (ConnectionError, TimeoutError):
        return False
