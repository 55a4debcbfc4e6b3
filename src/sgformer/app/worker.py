"""A process that works for the page and can be stopped at any moment; another one then takes its place.

A thread that computes cannot be ended from outside, a process can: with what it held, whatever it was doing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any

from sgformer.core import plugins
from sgformer.core.errors import UserError
from sgformer.core.processes import end_with_parent


class Stopped(Exception):
    """The work took too long and was stopped, or its process died. The message is for the person who waits."""


class Worker:
    """Calls methods of an object that lives in a process of its own, one after the other; any thread may ask or close.

    Args:
        build: makes the object, there; a function or class that can be imported.
        args: for `build`.

    Raises:
        UserError: what `build` raised.
    """

    def __init__(self, build: Callable[..., Any], *args: Any):
        # "spawn": a fork of a process with threads, or with a GPU in use, may hang.
        self._context = multiprocessing.get_context("spawn")
        self._made_of = build, args
        self._closed = False
        # One thread at a time uses the pipe, closing it included: the number of a closed one may be another file's.
        self._asking = threading.Lock()
        # One thread at a time starts or ends the process, so that none starts unseen while the worker closes.
        self._changing = threading.Lock()
        self._start()

    def ask(self, method: str, *args: Any, seconds: float | None = None) -> Any:
        """Call a method and wait for what it returns.

        Args:
            method: its name.
            args: for it; they and the result travel as pickles.
            seconds: so long at most; then the process is killed and another one started.

        Raises:
            Stopped: it took longer, or the process died.
            UserError: what the method raised.
            RuntimeError: the method failed; the message has its traceback.
        """
        with self._asking:
            try:
                self._pipe.send((method, args))
                if not self._pipe.poll(seconds):
                    self._replace()
                    raise Stopped(
                        f"This took longer than {seconds:g} seconds and was stopped. Please try a smaller image."
                    )
                return _opened(self._pipe.recv())
            except (EOFError, OSError):
                self._replace()
                raise Stopped(
                    "The network's process ended on this image, perhaps because memory was short. "
                    "Please try a smaller image."
                ) from None

    def close(self) -> None:
        """End the process, whatever it is doing."""
        with self._changing:
            self._closed = True
            self._kill()
        with self._asking:  # whoever waits for an answer sees that death at once
            self._end()

    def _start(self) -> None:
        with self._changing:
            if self._closed:
                return
            pipe, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(theirs, *self._made_of), name="sgformer-explain", daemon=True
            )
            with theirs:  # closed here, so that its death is the end of the pipe
                process.start()
            self._pipe, self._process = pipe, process
        try:
            _opened(self._pipe.recv())
        except EOFError:
            self._end()
            raise UserError("the process that networks run in died while it started; is there enough memory?") from None
        except BaseException:
            self._end()
            raise

    def _kill(self) -> None:
        with contextlib.suppress(ValueError):  # it is gone already: the page ended while somebody waited
            self._process.kill()
            self._process.join()
            self._process.close()

    def _end(self) -> None:
        with self._changing:
            self._kill()
        self._pipe.close()

    def _replace(self) -> None:
        self._end()
        try:
            self._start()
        except Exception as error:  # not the fault of the image that is being looked at; the next one tries again
            raise Stopped(f"The network's process could not be started again: {error}") from error


def _opened(answer: tuple[Any, BaseException | None]) -> Any:
    result, failure = answer
    if failure is not None:
        raise failure
    return result


def _serve(pipe: Any, build: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The process: build, then answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches everybody in the terminal; the page ends this one
    end_with_parent()  # even a request without end ends with the page, however that ended
    made: list[Any] = []

    def make() -> None:
        plugins.load()
        made.append(build(*args))

    answer = _tried(make)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(answer)
        while made:
            method, given = pipe.recv()
            pipe.send(_tried(lambda: getattr(made[0], method)(*given)))  # noqa: B023 - called at once
            del given  # an image is not held until the next one comes


def _tried(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return work(), None
    except UserError as error:
        return None, UserError(str(error))
    except BaseException:
        return None, RuntimeError(traceback.format_exc())
