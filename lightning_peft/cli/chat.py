"""``lightning-peft chat``: chat with a base and its adapters in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning_peft.chat.sampling import NAMES, Sampling, broken_rules
from lightning_peft.cli.merge import add_base_options
from lightning_peft.cli.options import OptionParser, command_parser
from lightning_peft.cli.output import quiet_libraries, to_stderr
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from lightning_peft.chat.chat_model import ChatModel
    from lightning_peft.chat.conversation import Conversation
    from lightning_peft.export.adapters import Adapter
    from lightning_peft.export.base import Base
    from lightning_peft.export.loading import LoadedModel

ABOUT = "Talk to a base and its adapters, which are switched while you talk."
_MORE = """\
ADAPTER is an adapter folder, a .ckpt file, or the folder of a run; NAME=PATH names it.

In the conversation: /adapter NAME, /base, /adapters, /image PATH, /reset, /help, /quit. Where the
input is a pipe, each line is a question, or a command, and the answers alone go to the standard
output. With --serve another program asks, in lines of JSON that docs/chat-and-compare.md describes.

exit code: 0 at the end, 1 if the adapters cannot be loaded, 2 for bad input, 130 if interrupted
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    args = _parser().parse_args(list(arguments))
    if args.serve:
        if args.image:
            raise ConfigError("--image is for a conversation; requests of --serve bring their own.")
        return _serve(args)
    with to_stderr():
        conversation = _load(args)
    return _answer_all(conversation, args)


def add_model_options(parser: argparse.ArgumentParser, max_new_tokens: int = 256) -> None:
    """Adds the options that say how the model is loaded and speaks."""
    add_loading_options(parser)
    parser.add_argument("--tools", metavar="FILE", help="JSON file with tools that it may call")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how the model is loaded and how its prompts are written."""
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
    parser.add_argument("--system", help="system turn")


def _parser() -> OptionParser:
    parser = command_parser("chat", ABOUT, _MORE, "print each answer as a line of JSON")
    parser.add_argument("adapters", metavar="ADAPTER", nargs="*")
    add_model_options(parser)
    once = parser.add_mutually_exclusive_group()
    once.add_argument("--prompt", help="ask this, print the answer, and end")
    once.add_argument(
        "--serve", action="store_true", help="serve requests over stdin/stdout as JSON lines"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH",
        help="image that the first question is about, for models that see; may be repeated",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 = greedy"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="share that is drawn from")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="tokens that are drawn from; 0 = all"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="for tokens that are there already; 1 = none",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="text before which an answer ends; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed for sampling")
    return parser


def load_chat_model(
    args: argparse.Namespace, progress: Callable[[str], None] = lambda what: None
) -> Any:
    """Returns the model that the options of :func:`add_model_options` describe.

    Those of sampling that a command does not have are as by default.
    """
    values = {name: getattr(args, name) for name in NAMES if hasattr(args, name)}
    _check_options(args, values)
    progress("loading the libraries")
    from lightning_peft.chat.template_inputs import read_tools_file, read_variables

    tools = read_tools_file(args.tools)
    variables = read_variables(args.chat_template_kwargs)
    quiet_libraries()
    from lightning_peft.chat.chat_model import ChatModel
    from lightning_peft.chat.images import find_images, note_of_processor

    progress("finding the base")
    base, adapters = find_model(args)
    # Before the model, which can take minutes.
    images, problem = find_images(base, adapters)
    check_template(args, base, adapters, images and images.tokenizer)
    progress("loading the model")
    more = [f"images cannot be shown: {problem}"] if problem else []
    if images is not None:
        more = note_of_processor(images, adapters)
    loaded = load_model(args, base, adapters, more)
    if images is not None:
        # Some know tokens that the base's does not, such as that of an image.
        loaded.tokenizer = images.tokenizer
    chat_model = ChatModel(
        loaded,
        adapters,
        args.chat_template,
        Sampling(**{**values, "stop": tuple(values.get("stop", ()))}),
        variables_override=variables,
        tools=tools,
        images=images,
        image_problem=problem,
    )
    show_memory(chat_model)
    return chat_model


def show_memory(chat_model: ChatModel) -> None:
    """Prints what memory is taken besides that of the model."""
    if chat_model.memory_note:
        print(f"note: {chat_model.memory_note}", file=sys.stderr)


def find_model(args: argparse.Namespace) -> tuple[Base, list[Adapter]]:
    """Returns the base and the adapters that the options name."""
    from lightning_peft.export.adapters import find_adapters
    from lightning_peft.export.base import find_base
    from lightning_peft.export.merged_folder import base_of

    adapters = find_adapters(args.adapters)
    if adapters:
        return base_of(adapters[0], args.base, args.revision), adapters
    return find_base(args.base, args.revision), adapters


def check_template(
    args: argparse.Namespace, base: Base, adapters: Sequence[Adapter], tokenizer: Any = None
) -> None:
    """Refuses a chat template that does not exist; ``tokenizer`` is by default the base's."""
    from lightning_peft.data.templates import find_template
    from lightning_peft.export.loading import check_generates, load_tokenizer

    check_generates(adapters)
    recorded = adapters[0].chat_template if adapters else None
    find_template(tokenizer or load_tokenizer(base), args.chat_template or recorded)


def load_model(
    args: argparse.Namespace, base: Base, adapters: Sequence[Adapter], more: Sequence[str] = ()
) -> LoadedModel:
    """Returns the model as the options say, and prints its notes and ``more``."""
    from lightning_peft.export import loading

    loaded = loading.load_with_adapters(
        base,
        adapters,
        bits=args.bits,
        device=loading.select_device(args.device),
        check_base=args.check_base,
    )
    loaded.notes += more
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded


def _check_options(args: argparse.Namespace, values: dict[str, Any]) -> None:
    problems = [
        f"--{name.replace('_', '-')} {values[name]}: {rule}"
        for name, rule in broken_rules(values).items()
    ]
    if not args.adapters and not args.base:
        problems.append("neither an ADAPTER nor --base is given")
    if problems:
        raise ConfigError("; ".join(problems))


def _load(args: argparse.Namespace) -> Conversation:
    from torch import manual_seed

    from lightning_peft.chat.conversation import Conversation

    chat_model = load_chat_model(args)
    manual_seed(args.seed)
    conversation: Conversation = Conversation(chat_model, args.system)
    for path in args.image:
        conversation.add_image(path)
    return conversation


def _serve(args: argparse.Namespace) -> int:
    from lightning_peft.chat import protocol

    out = sys.stdout

    def make(progress: Callable[[str], None]) -> Any:
        return load_chat_model(args, progress)

    # A byte that is not UTF-8 makes a bad request, and no end.
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    # Nothing else may get between the lines of the protocol.
    with to_stderr():
        protocol.Server(sys.stdin, out, args.system, args.seed).serve(make)
    return 0


def _answer_all(conversation: Conversation, args: argparse.Namespace) -> int:
    from lightning_peft.chat.conversation import is_command, question_of

    alone = args.prompt is not None
    lively = sys.stdin.isatty() and not alone
    if lively:
        print(
            f"{conversation.chat_model.active} answers. /help lists the commands.", file=sys.stderr
        )
    for line in [args.prompt] if alone else _lines(conversation, lively):
        try:
            if not alone and is_command(line):
                reply = conversation.run_command(line)
                if reply is None:
                    break
                print(reply, file=sys.stderr)
            elif line.strip():
                _ask(conversation, line if alone else question_of(line), args.json, lively)
        except ConfigError as error:
            # One bad line ends no conversation with a person, but a script must notice it.
            if not lively:
                raise
            print(error, file=sys.stderr)
    return 0


def _lines(conversation: Conversation, lively: bool) -> Iterator[str]:
    if not lively:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    # Arrow keys and a history in the prompt, where the module exists.
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input("\nyou> ")
        except EOFError:
            print()
            return


def _ask(conversation: Conversation, question: str, as_json: bool, lively: bool) -> None:
    def write(text: str) -> None:
        if not as_json:
            print(text, end="", flush=True)

    if lively and not as_json:
        print(f"{conversation.chat_model.active}> ", end="", flush=True)
    try:
        answer = conversation.ask(question, write)
    except KeyboardInterrupt:
        if not lively:
            raise
        print(" (stopped; not part of the conversation)")
        return
    if as_json:
        row = {"adapter": conversation.chat_model.active, "prompt": question, "answer": answer.text}
        print(json.dumps(row | {"tokens": answer.tokens, "ended": answer.ended}), flush=True)
    else:
        print(flush=True)
    if answer.dropped:
        note = f"the first {answer.dropped} turns were left out: the model takes no more tokens"
        print(f"note: {note}", file=sys.stderr)
