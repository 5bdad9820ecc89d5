"""What the page tells a visitor who asked for something that cannot be."""

from __future__ import annotations


class UserError(Exception):
    """A request that is refused; the text is for the visitor, and holds no path or secret.

    Attributes:
        key: Key of the text in ``texts``, such as ``"errors.no_such_run"``.
        values: What the text names.
    """

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(f"{key} {values}" if values else key)
        self.key = key
        self.values = values
