"""Findings, and the base class of rules."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_peft.migration.source import CodeBase, Mention, Place, Source

Served = Literal["yes", "partly", "no"]


@dataclass(frozen=True)
class Edit:
    """A piece of a file, from its first to behind its last byte, and what takes its place."""

    source: Source
    # Line from 1 and UTF-8 byte in it from 0, as `ast` counts.
    start: tuple[int, int]
    end: tuple[int, int]
    text: str
    # Name to import from `lightning_peft`.
    needs: str = ""
    # Class of the statement that is removed with its lines.
    removes: str = ""

    @classmethod
    def replace(cls, source: Source, node: Any, text: str, needs: str = "") -> Edit:
        """Returns the edit that puts ``text`` into the place of a node."""
        start = (node.lineno, node.col_offset)
        return cls(source, start, (node.end_lineno, node.end_col_offset), text, needs)

    @classmethod
    def remove(cls, source: Source, node: Any) -> Edit:
        """Returns the edit that removes the lines of a statement, decorators included."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return cls(source, (first, 0), (node.end_lineno + 1, 0), "", removes=type(node).__name__)


@dataclass(frozen=True)
class Finding:
    """One thing in a code base that changes, or could."""

    rule: str
    place: Place
    # The code, or a name.
    found: str
    # What to write instead, or that nothing is to be done.
    becomes: str
    # Whether this package does what it does.
    served: Served
    # What is wrong with it today.
    problem: str = ""
    # The change, where it is mechanical.
    edits: tuple[Edit, ...] = ()
    # Arguments of the Trainer's strategy that the change requests.
    strategy: Mapping[str, str] | None = None

    @property
    def mechanical(self) -> bool:
        """Whether the change can be made without a person."""
        return bool(self.edits) or self.strategy is not None


class Rule(ABC):
    """One kind of thing to find, with what its findings say where they say nothing else."""

    name: ClassVar[str]
    becomes: ClassVar[str]
    served: ClassVar[Served] = "yes"

    @abstractmethod
    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields what there is."""

    def finding(self, source: Source, node: ast.AST | int, found: str, **changes: Any) -> Finding:
        """Returns a finding of this rule at a node or line."""
        line = node if isinstance(node, int) else node.lineno  # type: ignore[attr-defined]
        settings = {"becomes": self.becomes, "served": self.served, **changes}
        return Finding(self.name, source.place(line), found, **settings)


class MentionRule(Rule):
    """A rule that finds calls, or mentions in YAML, of classes or functions by their last name."""

    names: ClassVar[frozenset[str]]

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields what there is."""
        for source, mention in base.mentions(*self.names):
            found = mention.name if mention.call is None else source.code(mention.call)
            if not mention.name.startswith("lightning_peft."):
                yield self.finding(source, mention.line, found, **self.details(source, mention))

    def details(self, source: Source, mention: Mention) -> dict[str, Any]:
        """Returns the changes from the rule's own words for one mention."""
        return {}
