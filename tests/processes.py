"""The command line in processes of its own, each forked from one that has imported everything once.

A fresh interpreter spends seconds on importing torch; a fork of one that has done so is a real process all the
same, and can be killed as often as a test likes. Run as a program, this file is the process that forks: it reads
requests as lines of JSON and answers each with a number, the id of a new process or its exit code.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

#: System calls through which a run reaches the disk; `open` and pyarrow's own writes happen between them.
_CALLS = ("mkdir", "replace", "fsync", "fdatasync", "pwrite", "posix_fallocate", "unlink")
#: What names a function to call.
_TARGET = re.compile(r"\w+:\w+")


@dataclass(frozen=True)
class Process:
    """A process that `start` started; `log` has what it printed."""

    pid: int
    log: Path

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """Safe at any time: the process stays, as a zombie at least, until it is waited for."""
        os.kill(self.pid, signal_number)

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        return _ask(wait=self.pid)

    def has_ended(self) -> bool:
        """Whether it waits to be waited for."""
        return bool(_ask(look=self.pid))


@dataclass(frozen=True)
class Team:
    """Processes that work together, as a launcher starts them: if one fails, it ends the others, once."""

    members: list[Process]

    def wait(self) -> list[int]:
        """Exit codes by rank."""
        codes: dict[int, int] = {}
        has_failed = False
        deadline = time.monotonic() + 60
        while len(codes) < len(self.members):
            for rank, member in enumerate(self.members):
                if rank not in codes and member.has_ended():
                    codes[rank] = member.wait()
                    if codes[rank] and not has_failed:
                        has_failed = True
                        for other in set(range(len(self.members))) - set(codes):
                            self.members[other].kill(signal.SIGTERM)
            if time.monotonic() > deadline:
                left = set(range(len(self.members))) - set(codes)
                for end in (signal.SIGUSR1, signal.SIGKILL):
                    for other in left:
                        self.members[other].kill(end)
                    time.sleep(1)  # to say where it stands
                raise AssertionError("\n".join([f"hangs: {set(codes)} ended", *self.logs]))
            time.sleep(0.002)
        return [codes[rank] for rank in range(len(self.members))]

    @property
    def logs(self) -> list[str]:
        """What each printed, by rank."""
        return [member.log.read_text() for member in self.members]


def start_team(size: int, target: str, *arguments: Any, log: Path) -> Team:
    """`start` as often, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Team(
        [
            start(
                "processes:as_rank", rank, size, port, target, *arguments, log=log.with_suffix(f".{rank}.log")
            )
            for rank in range(size)
        ]
    )


def start(target: str, *arguments: Any, log: Path) -> Process:
    """Call ``module:function`` with arguments that JSON can carry."""
    return Process(
        _ask(
            target=target,
            arguments=[os.fspath(a) if isinstance(a, Path) else a for a in arguments],
            log=str(log),
        ),
        log,
    )


def run(target: str, *arguments: Any, log: Path) -> tuple[int, str]:
    """Exit code and output of ``module:function``."""
    code = start(target, *arguments, log=log).wait()
    return code, log.read_text()


def eaptk(*arguments: str) -> None:
    """Target: the command line."""
    from eaptk.cli import main

    main(list(arguments))


def as_rank(rank: int, size: int, port: int, target: str, *arguments: Any) -> None:
    """Target: another one, as one process of several; SIGUSR1 makes it say where it stands."""
    faulthandler.register(signal.SIGUSR1, file=2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    _resolve(target)(*arguments)


def killed_at_call(number: int, target: str, *arguments: Any) -> None:
    """Target: another one, killed in its system call of that number (from 0) that writes to disk.

    A write is torn: half of its bytes reach the file.
    """
    left = number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                if call is pwrite:
                    pwrite(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **kwargs)

        return wrapper

    pwrite = os.pwrite
    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    _resolve(target)(*arguments)


def _resolve(target: str) -> Callable[..., None]:
    module, _, name = target.partition(":")
    function: Callable[..., None] = getattr(importlib.import_module(module), name)
    return function


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )
    atexit.register(server.terminate)
    return server


def _ask(**request: Any) -> int:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def _serve() -> None:
    # As from a terminal: of tests that a shell runs in the background it is ignored, and stays so in what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for module in (
        "eaptk.run",
        "eaptk.cli",
        "torch.distributed",
        "pandas",
        "rich.progress",
        "safetensors.torch",
    ):
        importlib.import_module(module)
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif "look" in request:
            answer = int(
                os.waitid(os.P_PID, request["look"], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            )
        else:
            function = _resolve(request["target"])
            for argument in request["arguments"]:  # a target that wraps another would import it in every fork
                if isinstance(argument, str) and _TARGET.fullmatch(argument):
                    _resolve(argument)
            answer = os.fork()
            if answer == 0:
                _become(function, request["arguments"], request["log"])
        print(answer, flush=True)


def _become(function: Callable[..., None], arguments: list[Any], log: str) -> None:
    """The rest of a forked process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
