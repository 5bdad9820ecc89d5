"""Errors shown to the visitor."""

from __future__ import annotations


class UserError(Exception):
    """An error in a request; its text is shown to the visitor, and holds no path or secret.

    Attributes:
        key: Key of the text in ``texts``, such as ``"errors.no_such_run"``.
        values: What the text names.
    """

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(f"{key} {values}" if values else key)
        self.key = key
        self.values = values

    @property
    def problems(self) -> list[UserError]:
        """All that is wrong, one by one."""
        found = self.values.get("problems")
        return found if isinstance(found, list) else [self]

    @property
    def reasons(self) -> set[str]:
        """Keys of what is wrong with the value of a setting."""
        inner = self.values.get("problem")
        return {one.key for one in inner} if isinstance(inner, list) else {self.key}
