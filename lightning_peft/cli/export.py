"""``lightning-peft export``: convert an adapter to other formats, or upload it to the hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_peft.cli.merge import add_base_options, add_merge_options, as_text, merge_arguments
from lightning_peft.cli.options import OptionParser, command_parser
from lightning_peft.cli.output import print_report, progress_to_stderr, quiet_libraries
from lightning_peft.errors import ConfigError

ABOUT = "Export an adapter: PEFT folder, merged or quantized model, for vLLM or Ollama; to the hub."
_MORE = """\
adapter    PEFT's format with a model card
merged     16-bit model folder, as `lightning-peft merge` makes it
quantized  the merged model in 8 or 4 bits by bitsandbytes
gguf       the merged model for llama.cpp; with --with-adapter, base and adapter; with
           --adapter-only, the adapter
vllm       PEFT's format, and the command that serves it with its base
ollama     Modelfile with the merged model as GGUF, or with --with-adapter, base and adapter
sentence-transformers
           embedding model or reranker as that package loads it, merged; with --with-adapter,
           an embedding model's adapter

exit code: 0 if it was written (and pushed), 1 if it cannot be, 2 for bad input
"""
_FORMATS = (
    *("adapter", "merged", "quantized", "gguf", "vllm", "ollama"),
    "sentence-transformers",
)
# What writes GGUF files.
_GGUF = ("gguf", "ollama")
# What keeps base and adapter apart on demand.
_SEPARATE = (*_GGUF, "sentence-transformers")


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    print_report(_parser().parse_args(arguments), _export, _show)
    return 0


def _parser() -> OptionParser:
    parser = command_parser("export", ABOUT, _MORE)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder, .ckpt file, or run")
    parser.add_argument("output", metavar="OUTPUT", help="folder to make")
    parser.add_argument("--format", choices=_FORMATS, default="adapter")
    add_base_options(parser)
    parser.add_argument("--base-name", help="what the exported files call the base")
    parser.add_argument(
        "--chat-template",
        help="plain, chatml, raw or Jinja source; by default the one recorded with the adapter",
    )
    merged = parser.add_argument_group("with a merged model")
    add_merge_options(merged)
    merged.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of --format quantized")
    gguf = parser.add_argument_group("with --format gguf or ollama")
    gguf.add_argument(
        "--outtype",
        type=str.lower,
        help="f32, f16, bf16 or q8_0, or by llama-quantize another such as q4_k_m; by default f16, "
        "and f32 of an adapter alone",
    )
    gguf.add_argument(
        "--adapter-only", action="store_true", help="the adapter alone, for --lora of llama.cpp"
    )
    gguf.add_argument(
        "--llama-quantize",
        metavar="PROGRAM",
        help="llama.cpp's llama-quantize, where it is not on PATH",
    )
    ollama = parser.add_argument_group("with --format ollama, gguf or sentence-transformers")
    ollama.add_argument(
        "--with-adapter",
        dest="separate_adapter",
        action="store_true",
        help="keep base and adapter apart",
    )
    ollama.add_argument("--system", help="system turn, for ollama")
    hub = parser.add_argument_group("to the hub")
    hub.add_argument("--push-to", metavar="NAMESPACE/NAME", help="push the folder there")
    hub.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make a new repository private",
    )
    hub.add_argument("--dry-run", action="store_true", help="list what would be pushed, and do not")
    return parser


def _export(args: argparse.Namespace) -> dict[str, Any]:
    if args.dry_run and not args.push_to:
        raise ConfigError("--dry-run is for --push-to: it lists what would be pushed.")
    for option, given in [
        ("--outtype", args.outtype),
        ("--llama-quantize", args.llama_quantize),
    ]:
        if given and args.format not in _GGUF:
            raise ConfigError(f"{option} is for --format {' or '.join(_GGUF)}.")
    if args.adapter_only and args.format != "gguf":
        raise ConfigError("--adapter-only is for --format gguf.")
    if args.adapter_only and args.separate_adapter:
        raise ConfigError(
            "--adapter-only writes the adapter, and --with-adapter its base too. Give one of them."
        )
    if args.separate_adapter and args.format not in _SEPARATE:
        raise ConfigError(f"--with-adapter is for --format {' or '.join(_SEPARATE)}.")
    if args.system and args.format != "ollama":
        raise ConfigError("--system is for --format ollama: no other format has a system turn.")
    options = merge_arguments(args)
    quiet_libraries()
    from lightning_peft.export import formats, hub

    if args.push_to:
        hub.check_repo(args.push_to)
        if not args.dry_run:
            hub.check_token()
    with progress_to_stderr() as progress:
        request = _request(args, options | {"progress": progress})
        report = formats.FORMATS[args.format](request)
    report = {"format": args.format, "output": args.output, **report}
    report["files"] = hub.files_of(Path(args.output))
    if args.push_to:
        report["push"] = {"repo": args.push_to, "private": args.private, "pushed": False}
        if not args.dry_run:
            url = hub.push(Path(args.output), args.push_to, private=args.private)
            report["push"] |= {"pushed": True, "url": url}
    return report


def _request(args: argparse.Namespace, options: dict[str, Any]) -> Any:
    from lightning_peft.export import merged_folder
    from lightning_peft.export.adapters import find_adapter
    from lightning_peft.export.request import ExportRequest

    adapter = find_adapter(args.adapter)
    base = merged_folder.base_of(adapter, args.base, args.revision)
    template = adapter.chat_template
    if args.chat_template:
        from lightning_peft.data.templates import find_template
        from lightning_peft.export.loading import load_tokenizer

        tokenizer = load_tokenizer(base)
        template = find_template(tokenizer, args.chat_template).text
        adapter = replace(adapter, facts=adapter.facts | {"chat_template": template})
    return ExportRequest(
        adapter=adapter,
        base=base,
        output=Path(args.output),
        base_name=args.base_name,
        options=options,
        bits=args.bits,
        chat_template=template,
        system=args.system,
        separate_adapter=args.separate_adapter,
        adapter_only=args.adapter_only,
        outtype=args.outtype,
        llama_quantize=args.llama_quantize,
    )


def _show(report: dict[str, Any]) -> None:
    if "merge" in report:
        print(as_text(report["merge"]))
    if "quantized" in report:
        _show_quantized(report["quantized"])
    print(f"\n{report['output']}")
    for file in report["files"]:
        print(f"  {file['bytes'] / 1e6:>12,.3f} MB  {file['path']}")
    for note in report["notes"]:
        print(f"note: {note}")
    if report["commands"]:
        print("\nThese use other programs, which are not part of this package:")
        for command in report["commands"]:
            print(f"  {command}")
    push = report.get("push")
    if push:
        kind = "private" if push["private"] else "public"
        total = sum(file["bytes"] for file in report["files"]) / 1e6
        if push["pushed"]:
            print(f"pushed to {push['url']}")
        else:
            count = len(report["files"])
            print(f"would push {count} files, {total:,.1f} MB, to {push['repo']} ({kind})")


def _show_quantized(quantized: dict[str, Any]) -> None:
    error = quantized["logit_error"]
    if error is None:
        print(f"in {quantized['bits']} bits; not compared: {quantized['not_measured']}")
        return
    print(
        f"in {quantized['bits']} bits the logits are {error['relative']:.2%} from those in "
        f"training, {error['kl']:.2e} nats per token, {error['same_choice']:.1%} of the next "
        "tokens the same"
    )
