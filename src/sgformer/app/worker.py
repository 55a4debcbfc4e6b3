"""The page's worker process, which can be killed at any moment and is then replaced.

A computing thread cannot be stopped from outside; a process can, and its memory is freed with it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any

from sgformer.core import plugins
from sgformer.core.errors import UserError
from sgformer.core.processes import end_with_parent

log = logging.getLogger("sgformer")


class Stopped(Exception):
    """The computation took too long and was stopped, or its process died. The message is shown to the visitor."""


class Failed(RuntimeError):
    """The method raised an exception that is not a UserError; the message is its traceback."""


# pebble's ProcessPool reports a failed start only as BrokenProcessPool, without the UserError; it is also LGPL.
class Worker:
    """Calls methods of an object in a separate process, one at a time; thread-safe.

    Args:
        build: creates the object in that process; an importable function or class.
        args: arguments of `build`.

    Raises:
        UserError: raised by `build`.
    """

    def __init__(self, build: Callable[..., Any], *args: Any):
        # "spawn": forking a process that has threads or uses a GPU may hang.
        self._context = multiprocessing.get_context("spawn")
        self._factory = build, args
        self._closed = False
        # Guards the pipe, its closing included: the descriptor of a closed pipe may already belong to another file.
        self._pipe_lock = threading.Lock()
        # Guards starting and ending the process, so that none is started while the worker closes.
        self._process_lock = threading.Lock()
        self._start()

    def call(self, method: str, *args: Any, seconds: float | None = None) -> Any:
        """Call a method and wait for its result.

        Args:
            method: the method's name.
            args: its arguments; they and the result are pickled.
            seconds: timeout, after which the process is killed and replaced; None: no timeout.

        Raises:
            Stopped: the timeout expired, or the process died.
            UserError: raised by the method.
            Failed: the method raised another exception; the message is its traceback.
        """
        with self._pipe_lock:
            try:
                self._pipe.send((method, args))
                if not self._pipe.poll(seconds):
                    self._replace()
                    raise Stopped(
                        f"This took longer than {seconds:g} seconds and was stopped. Please try a smaller image."
                    )
                return _unwrap(self._pipe.recv())
            except (EOFError, OSError):
                self._replace()
                raise Stopped(
                    "The network's process died on this image, possibly because it ran out of memory. "
                    "Please try a smaller image."
                ) from None

    def close(self) -> None:
        """End the process, whatever it is doing."""
        with self._process_lock:
            self._closed = True
            self._kill()
        with self._pipe_lock:  # a waiting caller notices the death at once
            self._end()

    def _start(self) -> None:
        with self._process_lock:
            if self._closed:
                return
            pipe, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(theirs, *self._factory), name="sgformer-explain", daemon=True
            )
            with theirs:  # closed here, so that the child's death closes the pipe
                process.start()
            self._pipe, self._process = pipe, process
        try:
            _unwrap(self._pipe.recv())
        except EOFError:
            self._end()
            raise UserError("the networks' process died during startup; is there enough memory?") from None
        except BaseException:
            self._end()
            raise

    def _kill(self) -> None:
        with contextlib.suppress(ValueError):  # already closed: the page ended while a caller waited
            self._process.kill()
            self._process.join()
            self._process.close()

    def _end(self) -> None:
        with self._process_lock:
            self._kill()
        self._pipe.close()

    def _replace(self) -> None:
        self._end()
        try:
            self._start()
        except Exception as error:  # not caused by the current image; the next call tries again
            log.exception("the networks' process could not be restarted", exc_info=error)
            raise Stopped("The network's process could not be restarted; the server's log says why.") from None


def _unwrap(outcome: tuple[Any, BaseException | None]) -> Any:
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def _serve(pipe: Any, build: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The child process: build the object, then serve calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole process group; the page ends this process
    end_with_parent()  # even an endless computation ends with the page, however the page ended
    instance: list[Any] = []

    def make() -> None:
        plugins.load()
        instance.append(build(*args))

    outcome = _attempt(make)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(outcome)
        while instance:
            method, values = pipe.recv()
            pipe.send(_attempt(lambda: getattr(instance[0], method)(*values)))  # noqa: B023 - called at once
            del values  # free the image before waiting for the next call


def _attempt(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return work(), None
    except UserError as error:
        return None, UserError(str(error))
    except BaseException:
        return None, Failed(traceback.format_exc())
