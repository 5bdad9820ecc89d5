"""Decorator for event handlers: access check and readable errors."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.guards import redacted
from gradio_app.texts import Texts

_log = logging.getLogger(__name__)
Handler = TypeVar("Handler", bound=Callable[..., Any])


def report_errors(t: Texts) -> Callable[[Handler], Handler]:
    """Returns a decorator for handlers whose errors are shown to the visitor.

    A :class:`UserError` becomes its text. Anything else is logged under a number, which is all that
    the visitor sees of it: messages of Python hold paths, and sometimes more.

    Handlers of timers must not raise, since Gradio shows nothing of them.
    """

    @contextmanager
    def shown() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise as_gradio_error(error, t) from None

    def decorate(handler: Handler) -> Handler:
        if not inspect.isgeneratorfunction(handler):
            return shown()(handler)

        @functools.wraps(handler)
        def generating(*args: Any, **kwargs: Any) -> Any:
            with shown():
                yield from handler(*args, **kwargs)

        return generating  # type: ignore[return-value]

    return decorate


def as_gradio_error(error: Exception, t: Texts) -> gr.Error:
    """Returns the error that a visitor sees."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, UserError):
        # A toast shows HTML, and what is refused may be somebody's idea of it.
        text = html.escape(localized_message(error, t), quote=False)
        return gr.Error(text, title=t("frame.refused"), print_exception=False)
    number = secrets.token_hex(3)
    _log.error("error %s: %s", number, redacted(repr(error)), exc_info=error)
    text = t("errors.unexpected", number=number)
    return gr.Error(text, title=t("frame.failed"), print_exception=False)


_NUMBERS = ("least", "most", "has", "needed", "free", "billions")


def localized_message(error: UserError, t: Texts) -> str:
    """Returns a refusal in the visitor's language; a list among its values is of refusals."""
    values = {name: _localized_value(name, value, t) for name, value in error.values.items()}
    return t(error.key, **values)


def _localized_value(name: str, value: object, t: Texts) -> object:
    if isinstance(value, list):
        return "\n".join(localized_message(one, t) for one in value)
    # Sizes and bounds are numbers of the page; other values are what somebody typed.
    return t.localized(f"{value}") if name in _NUMBERS else value
