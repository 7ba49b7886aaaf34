"""Environments of peers, and the processes that run in them."""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from eaptk.errors import EaptkError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: What a tool computes: granularity, qkv, ablation, and the prompt its gradient is taken on (`catalogue`).
Form = dict[str, Any]
#: In a process whose memory is measured every block is mapped by itself and given back when freed, so that
#: resident memory is what is alive. It makes allocation slow: such a process is never timed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000"}
INSTALL_SECONDS = 3600
LIST = (
    "import json; from importlib.metadata import distributions as all; "
    "print(json.dumps({each.name: each.version for each in all()}))"
)


class ToolError(EaptkError):
    """A tool that could not be installed, or did not do what it was asked for, in one line."""


def environment(requirements: Path, folder: Path) -> tuple[Path, float]:
    """Python of the peer's own environment, and seconds that were spent on installing it (0 if it was there).

    Args:
        requirements: of pip, all pinned.
        folder: where environments live, each named as its requirements are.

    The torch there is of eaptk's own version and build, down to its local label: timings compare tools, not builds.

    Raises:
        ToolError: it cannot be installed.
    """
    name = requirements.stem
    stamp = folder / name / "installed"
    wanted = hashlib.sha256(f"{torch.__version__}\n{requirements.read_text()}".encode()).hexdigest()
    python = folder / name / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python, 0.0
    start = time.perf_counter()
    _run([sys.executable, "-m", "venv", "--clear", folder / name])
    build = folder / name / "torch.txt"
    build.write_text(f"torch=={torch.__version__}\n")
    _run([python, "-m", "pip", "install", "--quiet", "--constraint", build, "--requirement", requirements])
    found = _run([python, "-c", "import torch; print(torch.__version__, torch.version.cuda)"])
    if found != f"{torch.__version__} {torch.version.cuda}":
        raise ToolError(f"its torch is {found}, not {torch.__version__} {torch.version.cuda}")
    stamp.write_text(wanted)
    return python, time.perf_counter() - start


def packages(python: Path) -> dict[str, str]:
    """Version of every package installed beside this interpreter."""
    listed: dict[str, str] = json.loads(_run([python, "-c", LIST]))
    return dict(sorted(listed.items()))


def _run(command: list[Any]) -> str:
    try:
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            env={name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"},
        )
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{command[0]} took longer than {INSTALL_SECONDS} s") from error
    except OSError as error:
        raise ToolError(str(error)) from error
    if done.returncode:
        raise ToolError(_last_error(done.stderr) or f"{command[0]} ended with status {done.returncode}")
    return done.stdout.strip()


def _last_error(text: str) -> str:
    """What a program said last; of pip, the line that says what was wrong rather than what to do now."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [""])[-1]


class Tool:
    """One tool in a process of its own, started when first asked, and again if it died; see `worker`.

    Args:
        name: of its module; errors begin with it.
        python: the interpreter of its environment.
        threads: of each of its operations.
        limit: seconds for one answer.
        log: file for what it prints.
        path: where it finds what is not installed, besides the modules beside `worker`.
        measured: memory will be asked for, so it allocates slowly.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        *,
        threads: int,
        limit: float,
        log: Path,
        path: Sequence[Path] = (),
        measured: bool = False,
    ) -> None:
        self._name, self._python, self._threads, self._limit = name, python, threads, limit
        self._log_path = log
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            **(MALLOC if measured else {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: dict[str, Any] | None = None
        #: Seconds that the last scores took.
        self.last = 0.0

    @property
    def name(self) -> str:
        """What errors begin with."""
        return self._name.rpartition(".")[2]

    def load(self, folder: Path, dtype: str, form: Form) -> None:
        """Load the model, unless that is the one it has."""
        wanted = {"folder": str(folder.resolve()), "dtype": dtype, "form": form}
        if self._loaded != wanted:
            self._ask("load", **wanted)
            self._loaded = wanted

    def score(self, tokens: int, save: Path | None = None) -> float:
        """Seconds that scores of so many tokens take; they are written to `save`."""
        path = None if save is None else str(save)
        self.last = float(self._ask("score", tokens=tokens, save=path)["seconds"])
        return self.last

    def peak(self, tokens: int) -> int:
        """Most bytes of resident memory above the loaded model while that is done."""
        return int(self._ask("peak", tokens=tokens)["bytes"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._log.close()
        self._process = self._loaded = None

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = self._log_path.open("w+")
        spec = {"tool": self._name, "threads": self._threads, "most_bytes": _free_bytes()}
        self._process = subprocess.Popen(
            [str(self._python), str(HERE / "worker.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
        )
        self._answer()

    def _ask(self, action: str, **request: Any) -> dict[str, Any]:
        try:
            if self._process is None:
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):  # of a process that has ended: why is what it answers
                self._process.stdin.write((json.dumps({"do": action, **request}) + "\n").encode())
                self._process.stdin.flush()
            return self._answer()
        except (ToolError, OSError) as error:
            self.close()
            raise ToolError(f"{self.name}: {error}") from error
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self._limit)
        if not ready:
            raise ToolError(f"took longer than {self._limit:g} s")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            said = _last_error(self._log.read())
            ended = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise ToolError(f"{ended}: {said}" if said else ended)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ToolError(answer["error"])
        return answer


def _free_bytes() -> int:
    """Memory that a process may take before it is refused more, rather than the machine run dry."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024 * 9 // 10
    raise EaptkError("/proc/meminfo does not say how much memory is available")
