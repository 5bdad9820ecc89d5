"""Option parsing: no abbreviations, and suggestions for misspelled options.

An abbreviation changes its meaning with every option that is added later.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lightning_peft.errors import ConfigError, similar_names


class OptionParser(argparse.ArgumentParser):
    """Parser of a command that takes no abbreviations and names the nearest right options."""

    _words: Sequence[str] = ()

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns the arguments of the command line ``args``, all of which have to be known."""
        self._words = list(args or ())
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the command; options that do not exist come before what else is wrong."""
        positional = self._get_positional_actions()
        names = {f"--{one.dest}": str(one.metavar) for one in positional if one.metavar}
        refuse_unknown(self._words, self.known(), names)
        super().error(message)

    def known(self) -> list[str]:
        """Returns all options, with those of the subcommands."""
        found = [one for one in self._option_string_actions if one.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [one for parser in action.choices.values() for one in parser.known()]
        return list(dict.fromkeys(found))


def command_parser(
    name: str, about: str, more: str, json: str = "print the result as JSON"
) -> OptionParser:
    """Returns the parser of a command, with ``--json`` if there is a help for it."""
    parser = OptionParser(prog=f"lightning-peft {name}", description=about, epilog=more)
    if json:
        parser.add_argument("--json", action="store_true", help=json)
    return parser


def add_config_option(parser: OptionParser) -> None:
    """Adds ``--config``, of which the last one is on top."""
    text = "recipe, or YAML file; repeatable"
    parser.add_argument("--config", action="append", default=[], help=text)


def refuse_unknown(
    words: Sequence[str], known: Sequence[str], positional: Mapping[str, str] | None = None
) -> None:
    """Refuses options that do not exist; ``positional`` are arguments by what they would be."""
    ours = words[: words.index("--")] if "--" in words else words
    names = [word.partition("=")[0] for word in ours if word.startswith("--")]
    unknown = [name for name in dict.fromkeys(names) if name not in known]
    if unknown:
        order = f": write {' '.join((positional or {}).values())} in this order, without names"
        lines = [
            f"there is no option {name}"
            + (order if name in (positional or {}) else similar_names(name, known))
            for name in unknown
        ]
        raise ConfigError("\n".join(lines) + "\n--help lists them all.")
