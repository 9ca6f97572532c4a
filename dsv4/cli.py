"""The `dsv4` command. Each command imports the package that does the work when it runs, so `--help` stays quick."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv4 import __version__
from dsv4.config import ModelConfig, nano_path
from dsv4.kernels.native import KernelChoiceError
from dsv4.presets import PRESETS

EFFORTS = ("low", "high", "max")

# Package that serving does not need -> the extra of pyproject.toml that installs it.
_EXTRAS = {"reasoning_gym": "train", "transformers": "bench", "psutil": "bench"}

Handler = Callable[[argparse.Namespace], "int | None"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> exit status. What a user can mend (a path, a value, a file) is one line on stderr, status 2.

    DSV4_TRACEBACK=1 shows where such an error came from.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    options, unknown = parser.parse_known_args(arguments)
    if unknown and options.command == "eval":  # which has a parser of its own
        options.arguments = unknown + options.arguments
    elif unknown:  # said with the usage of the command, not of all of them
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    handler: Handler = options.handler
    try:
        status = handler(options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None or os.environ.get("DSV4_TRACEBACK") == "1":
            raise
        print(
            f"dsv4 {options.command}: error: {error.name} is not installed; it comes with the extra {extra!r}: "
            f"in the repository, pip install '.[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError, KernelChoiceError) as error:
        if os.environ.get("DSV4_TRACEBACK") == "1":
            raise
        print(f"dsv4 {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv4",
        description="DeepSeek V4: run it, look into it, convert it, train it.",
        epilog="MODEL is a model folder; without one, serve, chat, generate, verify and eval use the embedded nano\n"
        "model.\n"
        "examples:\n  dsv4 serve\n  dsv4 chat\n  dsv4 inspect flash",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dsv4 {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for add in (
        _add_serve,
        _add_chat,
        _add_generate,
        _add_inspect,
        _add_convert,
        _add_verify,
        _add_train,
        _add_eval,
        _add_bench,
    ):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, handler: Handler, text: str, examples: str, **options: Any
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.set_defaults(handler=handler, parser=parser)
    return parser


def _add_model(parser: argparse.ArgumentParser, flag: str = "model") -> None:
    nargs: dict[str, Any] = {} if flag.startswith("-") else {"nargs": "?"}
    parser.add_argument(flag, metavar="MODEL", help="model folder (default: the embedded nano model)", **nargs)


def _add_weight_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-weight-check",
        action="store_true",
        help="load without looking for NaN and infinity in the weights, which reads them all",
    )


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=None, metavar="T", help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same text")


def _add_serve(commands: Any) -> None:
    parser = _command(
        commands,
        "serve",
        _serve,
        "serve a chat page and the OpenAI and Anthropic APIs",
        "dsv4 serve\ndsv4 serve path/to/model --port 9000 --api-key sk-one --api-key sk-two",
    )
    _add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="require one of these keys; repeatable"
    )
    parser.add_argument(
        "--max-num-seqs", type=int, default=8, metavar="N", help="requests computed at once (default: %(default)s)"
    )
    parser.add_argument(
        "--max-model-len", type=int, default=None, metavar="N", help="tokens a request may hold, prompt included"
    )
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads of a forward")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    _add_weight_check(parser)


def _serve(options: argparse.Namespace) -> int | None:
    from dsv4.server.run import serve

    return serve(
        model=options.model,
        host=options.host,
        port=options.port,
        api_keys=options.api_key,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        threads=options.threads,
        device=options.device,
        check_values=not options.skip_weight_check,
    )


def _add_chat(commands: Any) -> None:
    parser = _command(
        commands, "chat", _chat, "talk to a model in the terminal", "dsv4 chat\ndsv4 chat --no-thinking --temperature 0"
    )
    _add_model(parser)
    thinking = parser.add_mutually_exclusive_group()
    thinking.add_argument("--no-thinking", action="store_true", help="answer at once")
    thinking.add_argument("--effort", choices=EFFORTS, default=None, help="how much to think")
    _add_sampling(parser, max_tokens=1024)
    _add_weight_check(parser)


def _chat(options: argparse.Namespace) -> int | None:
    from dsv4.engine.chat import chat

    return chat(
        options.model,
        thinking=not options.no_thinking,
        effort=options.effort,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        check_values=not options.skip_weight_check,
    )


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        _generate,
        "continue prompts as plain text, without a chat template",
        'dsv4 generate "def add(a, b):" --max-tokens 32\ndsv4 generate "1, 2, 3," --temperature 0 --json',
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    _add_model(parser, "--model")
    _add_sampling(parser, max_tokens=64)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, with token ids and logprobs")
    _add_weight_check(parser)


def _generate(options: argparse.Namespace) -> int | None:
    from dsv4.engine.generate_cli import generate

    return generate(
        options.model,
        options.prompts,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop=options.stop,
        as_json=options.json,
        check_values=not options.skip_weight_check,
    )


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        _inspect,
        "count a model's parameters, tensors, bytes, KV cache and FLOPs from its config alone",
        "dsv4 inspect flash\ndsv4 inspect path/to/model --json",
    )
    presets = ", ".join(PRESETS)
    parser.add_argument("model", metavar="MODEL_OR_PRESET", help=f"a folder with a config.json, or one of {presets}")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def _inspect(options: argparse.Namespace) -> None:
    from dsv4.analysis import Layout, summary

    name: str = options.model
    layout: Layout | None = None
    if name in PRESETS and not Path(name).is_dir():
        config = ModelConfig.preset(name)
    else:
        if not Path(name).exists():
            raise ValueError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a model folder")
        config = ModelConfig.from_pretrained(name)
        layout = _plain_layout(Path(name))
    report = summary(config, layout)
    if options.json:
        print(json.dumps({"model": name, **report, "config": config.to_dict()}, indent=2))
    else:
        from dsv4.analysis.table import print_summary

        print_summary(name, config, report)


def _plain_layout(path: Path) -> Any:
    """The layout of a folder that is not quantised, None when it is."""
    raw = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    if raw.get("quantization_config") is not None:
        return None
    return "fp32" if raw.get("dtype", raw.get("torch_dtype")) == "float32" else "bf16"


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        _convert,
        "rewrite a checkpoint in another layout, tensor by tensor",
        "dsv4 convert path/to/model out --format official-base\ndsv4 convert path/to/model out --format transformers\n"
        "dsv4 convert path/to/model model.gguf --format gguf",
    )
    parser.add_argument("src", metavar="SRC")
    parser.add_argument("dst", metavar="DST", help="folder to create; for gguf, a file")
    formats = ("official", "official-base", "bf16", "fp32", "transformers", "gguf")
    parser.add_argument("--format", choices=formats, required=True, help="layout to write; gguf is for llama.cpp")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at DST")
    parser.add_argument(
        "--allow-rounding", action="store_true", help="write a layout that cannot hold all values, and print the error"
    )
    parser.add_argument(
        "--linears", choices=("bf16", "q8_0"), help="gguf: type of FP8 matrices (default: an exact one)"
    )
    parser.add_argument("--mtp", action="store_true", help="gguf: write the MTP block alone, llama.cpp's draft model")


def _convert(options: argparse.Namespace) -> None:
    from dsv4.checkpoint.convert_cli import convert_checkpoint

    convert_checkpoint(
        options.src,
        options.dst,
        options.format,
        overwrite=options.overwrite,
        allow_rounding=options.allow_rounding,
        linears=options.linears,
        mtp=options.mtp,
    )


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        _verify,
        "compare a model's logits with an independent implementation",
        "dsv4 verify path/to/model --against transformers",
    )
    _add_model(parser)
    parser.add_argument("--against", choices=("transformers",), default="transformers", help="default: %(default)s")


def _verify(options: argparse.Namespace) -> int | None:
    from dsv4.evals.verify import verify

    return verify(options.model or str(nano_path()), options.against)


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "run a recipe of this repository",
        "dsv4 train nano --budget cpu\ndsv4 train nano --help",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a file of recipes/, without .py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the recipe")


def _train(options: argparse.Namespace) -> None:
    _run_script("recipes", options.recipe, options.arguments)


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        _bench,
        "run a benchmark of this repository",
        "dsv4 bench model\ndsv4 bench engine --help",
    )
    parser.add_argument("benchmark", nargs="?", metavar="BENCHMARK", help="a file of benchmarks/, without .py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the benchmark")


def _bench(options: argparse.Namespace) -> None:
    _run_script("benchmarks", options.benchmark, options.arguments)


def _run_script(folder: str, name: str | None, arguments: list[str]) -> None:
    """Run folder/name.py of the checkout with its own command line."""
    root = Path(__file__).resolve().parents[1] / folder
    if not root.is_dir():
        raise ValueError(f"no {folder}/ at {root}; it comes with the repository, not with the installed package")
    scripts = sorted(path.stem for path in root.glob("*.py") if not path.stem.startswith("_"))
    if name is None:
        raise ValueError(f"give the name of one of {folder}/: {', '.join(scripts)}")
    if name not in scripts:
        raise ValueError(f"{name!r} is not in {folder}/; allowed: {', '.join(scripts)}")
    sys.argv = [f"dsv4 {name}", *arguments]
    sys.path.insert(0, str(root.parent))
    runpy.run_path(str(root / f"{name}.py"), run_name="__main__")


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands,
        "eval",
        _eval,
        "score a model on tasks it has not seen, with confidence intervals",
        "dsv4 eval nano\ndsv4 eval nano --model path/to/model",
        add_help=False,
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def _eval(options: argparse.Namespace) -> int | None:
    from dsv4.evals.runner import main as run

    return run(options.arguments)
