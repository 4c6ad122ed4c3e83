"""Processes that count and binarise parts of text files.

Each worker is a fresh interpreter that imports numpy and nothing of torch, reads jobs as JSON from
its standard input and writes its results to files: nothing is forked, nothing large is pickled.
`python -m fairseq_lite.data.workers` is such a worker; `fairseq_lite.data.text.segment` is another.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_lite.data.binarize import Encoder, Progress, Span, count_words, encode_span
from fairseq_lite.errors import DataError, FliteError

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])

# What a worker can do: the name of a job -> a function of the job and of how far it is.
Jobs = Mapping[str, Callable[[dict[str, Any], Progress], Any]]


class Workers:
    """A number of worker processes, started when first needed; close it, or use it in a `with`.

    Args:
        count: how many processes; 1 works in this one.
        jobs: what can be done in this process.
        module: the module whose `__main__` is a worker for these jobs.
    """

    def __init__(
        self, count: int, jobs: Jobs | None = None, module: str = "fairseq_lite.data.workers"
    ) -> None:
        self.count = count
        self._jobs = JOBS if jobs is None else jobs
        self._module = module
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._all: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, jobs: Sequence[dict[str, Any]], progress: Progress | None = None) -> list[Any]:
        """Do all jobs; results in the order of the jobs.

        Raises:
            DataError: what the first job that failed said.
        """
        if self.count == 1 or len(jobs) == 1:
            return [self._jobs[job["job"]](job, progress or _ignore) for job in jobs]
        lock = threading.Lock()

        def report(done: int) -> None:
            if progress is not None:
                with lock:
                    progress(done)

        with concurrent.futures.ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(self._send, job, report) for job in jobs]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                self.close()  # the other jobs end with their processes
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            return [future.result() for future in futures]

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._closed = True
            for process in self._all:
                process.kill()
            for process in self._all:
                process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        with contextlib.suppress(OSError):  # what was not sent is not wanted
                            stream.close()
            self._all.clear()

    def _take(self) -> subprocess.Popen[str]:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            pass
        paths = [_PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]
        with self._lock:
            if self._closed:
                raise DataError("preprocessing was ended")
            process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(p for p in paths if p),
                    # numpy's linear algebra, unused here, would start a thread for every core.
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )
            self._all.append(process)
        return process

    def _send(self, job: dict[str, Any], report: Progress) -> Any:
        process = self._take()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                if "error" in answer:
                    raise DataError(answer["error"])
                if "result" in answer:
                    self._idle.put(process)
                    return answer["result"]
                report(answer["bytes"])
        except (OSError, ValueError):  # its end of a pipe has gone
            pass
        raise DataError(
            f"a worker process ended unexpectedly (exit status {process.poll()}); "
            "if it was killed for lack of memory, use fewer --workers"
        )


def _ignore(_: int) -> None:
    pass


def count_job(span: Span) -> dict[str, Any]:
    """The job of counting the words of a span; its result maps words to counts."""
    return {"job": "count", "span": dataclasses.astuple(span)}


def encode_job(span: Span, encoder_args: Sequence[Any], prefix: str) -> dict[str, Any]:
    """The job of writing a span as a dataset; its result is the fields of a `Summary`."""
    return {
        "job": "encode",
        "span": dataclasses.astuple(span),
        "encoder": list(encoder_args),
        "prefix": prefix,
    }


def _count(job: dict[str, Any], progress: Progress) -> Any:
    return count_words(Span(*job["span"]), progress)


def _encode(job: dict[str, Any], progress: Progress) -> Any:
    encoder = Encoder(*job["encoder"])
    summary = encode_span(Span(*job["span"]), encoder, job["prefix"], progress)
    return dataclasses.astuple(summary)


JOBS: Jobs = {"count": _count, "encode": _encode}


def main(jobs: Jobs) -> None:
    """Do jobs from standard input until it ends."""
    # Ctrl-C reaches the whole group; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out, sys.stdout = sys.stdout, sys.stderr  # a plugin may print

    def answer(**value: Any) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    for line in sys.stdin:
        try:
            job = json.loads(line)
            answer(result=jobs[job["job"]](job, lambda done: answer(bytes=done)))
        except FliteError as e:
            answer(error=str(e))
        except BrokenPipeError:  # the parent has gone
            return
        except OSError as e:
            answer(error=f"cannot write {e.filename or 'a part of the output'}: {e.strerror}")


if __name__ == "__main__":
    main(JOBS)
