"""The tests in processes, with xdist or shared by processes of their own, and what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .results import Results, read

ROOT = Path(__file__).resolve().parents[2]
LAST = 60  # seconds that a test which has begun is given, where there is a limit
_ENDS = (0, 1)  # of pytest: no test failed, some did


@dataclasses.dataclass(frozen=True)
class Run:
    """What the tests said, how many processes ran them, and what became of those that did not end by themselves."""

    results: Results
    processes: int
    ended: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Options:
    """How tests are run.

    workers: processes at a time. folder: where each process leaves its results and what it printed, in the place of
    what an earlier run left there. seconds: after them all processes are ended, and in the last minute before no test
    begins. whole: files whose tests are run by one process.
    """

    workers: int
    folder: Path
    seconds: float = float("inf")
    whole: Sequence[str] = ()


def once(tests: Sequence[str]) -> list[str]:
    """Each test once: none of a file that is there as a whole, in the order given."""
    files = {test for test in tests if "::" not in test}
    return [test for test in dict.fromkeys(tests) if test in files or test.partition("::")[0] not in files]


def command(tests: Sequence[str], marker: str, *, record: Path) -> list[str]:
    """pytest, with a record of how tests end."""
    line = [sys.executable, "-m", "pytest", "-q", "-p", "tests.reliability.recording", "-p", "no:cacheprovider"]
    return [*line, "-m", marker, f"--record={record}", "--durations=15", *tests]


def by_xdist(tests: Sequence[str], marker: str, options: Options) -> Run:
    """In one pytest, which asks xdist where there are several workers."""
    record = options.folder / "tests.jsonl"
    record.unlink(missing_ok=True)
    line = command(once(tests), marker, record=record)
    line += ["-n", str(options.workers), "--dist", "loadfile"] if options.workers > 1 else []
    done = subprocess.run(line, cwd=ROOT, stdout=sys.stderr, check=False)
    if done.returncode not in _ENDS:
        raise SystemExit(f"pytest ended with {done.returncode}")
    return Run(read([record]), options.workers)


def shared(tests: Sequence[str], marker: str, options: Options) -> Run:
    """In several processes, each of which takes the next test that none has begun."""
    for file in options.folder.glob("process-[0-9]*"):  # of an earlier run, whose results are not this one's
        file.unlink()
    end = time.time() + options.seconds
    with tempfile.TemporaryDirectory() as claims, contextlib.ExitStack() as stack:
        more = [f"--share={claims}", f"--until={end - LAST}", *(f"--whole={file}" for file in options.whole)]
        found = []
        for worker in range(options.workers):
            name = options.folder / f"process-{worker}"
            line = [*command(once(tests), marker, record=name.with_suffix(".jsonl")), *more]
            found.append((name, stack.enter_context(_started(line, name.with_suffix(".log"), options.workers))))
        try:
            ended = tuple(filter(None, [_waited(name.name, process, end) for name, process in found]))
        finally:
            for _, process in found:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)  # so that it ends what its test has started
    return Run(read(sorted(options.folder.glob("process-[0-9]*.jsonl"))), options.workers, ended)


@contextlib.contextmanager
def _started(line: Sequence[str], log: Path, workers: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own group that does not outlive this one; together they have as many compilers as cores."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _waited(name: str, process: subprocess.Popen[bytes], end: float) -> str:
    """What became of a process; empty where it ended by itself, having run tests."""
    try:
        status = process.wait(None if end == float("inf") else max(0.0, end - time.time()))
    except subprocess.TimeoutExpired:
        return f"{name} was ended after its time"
    if status in _ENDS:
        return ""
    return f"{name} ended with " + (f"signal {-status}" if status < 0 else f"status {status}")
