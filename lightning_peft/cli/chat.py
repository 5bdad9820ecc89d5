"""``lightning-peft chat``: talk to a base and its adapters in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.merge import add_base_options
from lightning_peft.cli.options import OptionParser
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from lightning_peft.chat.conversation import Conversation

ABOUT = "Talk to a base and its adapters, which are switched while you talk."
_MORE = """\
ADAPTER is an adapter folder, a .ckpt file, or the folder of a run; NAME=PATH names it.

In the conversation: /adapter NAME, /base, /adapters, /reset, /help, /quit. Where the input is a
pipe, each line is a question, or a command, and the answers alone go to the standard output. With
--serve another program asks, in lines of JSON that docs/chat-and-compare.md describes.

exit code: 0 at the end, 1 if the adapters cannot be loaded, 2 for bad input, 130 if interrupted
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 at the end, 1 if something cannot be loaded, 2 for bad input.
    """
    given = _parser().parse_args(list(arguments))
    if given.serve:
        return _serve(given)
    with redirect_stdout(sys.stderr):
        talk = _load(given)
    return _answer_all(talk, given)


def add_model_options(parser: argparse.ArgumentParser, max_new_tokens: int = 256) -> None:
    """Adds the options that say how the model is loaded and speaks."""
    add_base_options(parser)
    parser.add_argument(
        "--bits",
        type=int,
        choices=(16, 8, 4),
        help="of the base; by default as the first adapter was trained",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs"
    )
    parser.add_argument(
        "--chat-template",
        help="plain, chatml, raw or Jinja source; by default the one recorded with the adapter, "
        "else the tokenizer's",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="values for variables of the chat template, such as "
        "'{\"enable_thinking\": false}'; by default those recorded with the adapter",
    )
    parser.add_argument("--tools", metavar="FILE", help="JSON file with tools that it may call")
    parser.add_argument("--system", help="system turn")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="lightning-peft chat",
        description=ABOUT,
        epilog=_MORE,
    )
    parser.add_argument("adapters", metavar="ADAPTER", nargs="*")
    add_model_options(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", help="ask this, print the answer, and end")
    asked.add_argument(
        "--serve", action="store_true", help="answer another program, in lines of JSON"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 draws nothing")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--json", action="store_true", help="print each answer as a line of JSON")
    return parser


def load_chat_model(
    given: argparse.Namespace,
    temperature: float = 0.0,
    top_p: float = 1.0,
    say: Callable[[str], None] = lambda what: None,
) -> Any:
    """Returns the speaker that the options of :func:`add_model_options` describe.

    Args:
        given: Options.
        temperature: How its tokens are drawn.
        top_p: Likewise.
        say: Is told what is going on.

    Raises:
        ConfigError: If options contradict each other, or nothing says what the base is.
    """
    _check_options(given, temperature, top_p)
    say("loading the libraries")
    reading = import_module("lightning_peft.chat.template_inputs")
    for_template = {
        "tools": reading.read_tools_file(given.tools),
        "variables_override": reading.read_variables(given.chat_template_kwargs),
    }
    import_module("lightning_peft.cli.progress").quiet_libraries()
    loading = import_module("lightning_peft.export.loading")
    speaking = import_module("lightning_peft.chat.chat_model")
    say("finding the base")
    adapters = import_module("lightning_peft.export.adapters").find_adapters(given.adapters)
    if adapters:
        folders = import_module("lightning_peft.export.merged_folder")
        base = folders.base_of(adapters[0], given.base, given.revision)
    else:
        base = import_module("lightning_peft.export.base").find_base(given.base, given.revision)
    # Before the model, which can take minutes.
    speaking.template_for(loading.load_tokenizer(base), adapters, given.chat_template)
    say("loading the model")
    loaded = loading.load_with_adapters(
        base,
        adapters,
        bits=given.bits,
        device=loading.select_device(given.device),
        check_base=given.check_base,
    )
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    sampling = speaking.Sampling(given.max_new_tokens, temperature, top_p)
    return speaking.ChatModel(loaded, adapters, given.chat_template, sampling, **for_template)


def _check_options(given: argparse.Namespace, temperature: float, top_p: float) -> None:
    problems = []
    if given.max_new_tokens < 1:
        problems.append(f"--max-new-tokens {given.max_new_tokens}: at least 1")
    if temperature < 0:
        problems.append(f"--temperature {temperature}: 0 or more")
    if not 0 < top_p <= 1:
        problems.append(f"--top-p {top_p}: more than 0, and at most 1")
    if not given.adapters and not given.base:
        problems.append("neither an ADAPTER nor --base is given")
    if problems:
        raise ConfigError("; ".join(problems))


def _load(given: argparse.Namespace) -> Conversation:
    chat_model = load_chat_model(given, given.temperature, given.top_p)
    import_module("torch").manual_seed(given.seed)
    made: Conversation = import_module("lightning_peft.chat.conversation").Conversation(
        chat_model, given.system
    )
    return made


def _serve(given: argparse.Namespace) -> int:
    protocol = import_module("lightning_peft.chat.protocol")
    out = sys.stdout

    def make(say: Callable[[str], None]) -> Any:
        return load_chat_model(given, given.temperature, given.top_p, say)

    # A byte that is no UTF-8 makes a bad request, and no end.
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    # Nothing else may get between the lines of the protocol.
    with redirect_stdout(sys.stderr):
        protocol.Server(sys.stdin, out, given.system, given.seed).serve(make)
    return 0


def _answer_all(talk: Conversation, given: argparse.Namespace) -> int:
    conversation = import_module("lightning_peft.chat.conversation")
    alone = given.prompt is not None
    lively = sys.stdin.isatty() and not alone
    if lively:
        print(f"{talk.chat_model.active} answers. /help lists the commands.", file=sys.stderr)
    for line in [given.prompt] if alone else _lines(talk, lively):
        try:
            if not alone and conversation.is_command(line):
                told = talk.run_command(line)
                if told is None:
                    break
                print(told, file=sys.stderr)
            elif line.strip():
                _ask(talk, line if alone else conversation.question_of(line), given.json, lively)
        except ConfigError as error:
            # One bad line ends no conversation with a person, but a script must notice it.
            if not lively:
                raise
            print(error, file=sys.stderr)
    return 0


def _lines(talk: Conversation, lively: bool) -> Iterator[str]:
    if not lively:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    # Arrow keys and a history in the prompt, where the module exists.
    with suppress(ImportError):
        import_module("readline")
    while True:
        try:
            yield input("\nyou> ")
        except EOFError:
            print()
            return


def _ask(talk: Conversation, question: str, as_json: bool, lively: bool) -> None:
    def write(text: str) -> None:
        if not as_json:
            print(text, end="", flush=True)

    if lively and not as_json:
        print(f"{talk.chat_model.active}> ", end="", flush=True)
    try:
        found = talk.ask(question, write)
    except KeyboardInterrupt:
        if not lively:
            raise
        print(" (stopped; not part of the conversation)")
        return
    if as_json:
        row = {"adapter": talk.chat_model.active, "prompt": question, "answer": found.text}
        print(json.dumps(row | {"tokens": found.tokens, "ended": found.ended}), flush=True)
    else:
        print(flush=True)
    if found.dropped:
        note = f"the first {found.dropped} turns were left out: the model takes no more tokens"
        print(f"note: {note}", file=sys.stderr)
