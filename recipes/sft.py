"""Fine-tune a model on conversations in OpenAI's message format: JSONL or Parquet, loss on the assistant's tokens.

The run is that of `dsv4 train pretrain` with other defaults, so its keys work here too, `lora.rank` among them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from dsv4.data.records import find_sources
from dsv4.data.tokenizing import ShardWriter
from dsv4.model_folder import resolve_model
from dsv4.post_training.sft_preview import show_samples
from dsv4.post_training.sft_samples import TurnSource, read_samples
from dsv4.tokenizer.prompts import PromptEncoder
from recipes import pretrain

EXAMPLES = """\
examples:
  dsv4 train sft models/nano talks.jsonl --dry-run 3
  dsv4 train sft models/nano talks.jsonl --epochs 2 --run-dir runs/sft --out runs/sft/model
  dsv4 train sft models/nano data/ lora.rank=16 optimizer.rate=1e-3 --run-dir runs/lora
  dsv4 train sft --resume --run-dir runs/sft"""
# Of the keys of pre-training, those whose defaults differ; reasons: docs/post-training.md.
DEFAULTS = {
    "data.fill_in_middle": "0.0",
    "data.split_merged": "0.0",
    "optimizer.rate": "2e-4",
    "optimizer.warmup_steps": "10",
    "optimizer.decay_fraction": "1.0",
    "optimizer.balance_speed": "0.0",
    "run.quantized_share": "1.0",
}
SAMPLES = "samples"  # folder of the run's shards


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 0 when the model folder is written."""
    options = _parser().parse_intermixed_args(arguments)
    run_dir: Path = options.run_dir
    place = ["--run-dir", str(run_dir), *(["--out", str(options.out)] if options.out else [])]
    if options.resume:
        if options.model or options.words:
            raise SystemExit("training stopped: --resume goes on with the run's own model, data and keys")
        return pretrain.main([*place, "--resume"])
    if options.model is None:
        raise SystemExit("training stopped: no model; give the folder of one, and data")
    console = Console()
    data = [word for word in options.words if "=" not in word]
    try:
        folder = resolve_model(options.model)
        prompts = PromptEncoder.from_pretrained(folder)
        sources = find_sources(data)
        if not sources:
            raise ValueError("no data; give files or folders of conversations (.jsonl, .parquet)")
        if options.dry_run is not None:
            samples, _ = show_samples(
                read_samples(sources, prompts, options.max_tokens), prompts.tokenizer, console, options.dry_run
            )
            return 0 if samples else 1
        if (run_dir / "data.json").exists():
            raise ValueError(f"{run_dir} already holds a run; pass --resume to go on with it, or another --run-dir")
        turns = [TurnSource(source, prompts, options.max_tokens) for source in sources]
        index = ShardWriter(turns, folder, run_dir / SAMPLES).run()
    except (ValueError, OSError) as error:
        raise SystemExit(f"training stopped: {error}") from error
    console.print(
        f"{index.counts.documents:,} samples, {index.counts.tokens:,} tokens; refusals: --dry-run 0", highlight=False
    )
    keys = run_keys(folder, run_dir / SAMPLES, options, options.epochs * index.counts.tokens)
    overrides = [word for word in options.words if "=" in word]
    if any(word.startswith("lora.") for word in overrides):
        keys["run.quantized_share"] = "0.0"  # adapters are beside the stored matrices, not in them
    show = ["--print-config"] if options.print_config else []
    return pretrain.main([*(f"{key}={value}" for key, value in keys.items()), *overrides, *place, *show])


def run_keys(folder: Path, samples: Path, options: argparse.Namespace, tokens: int) -> dict[str, str]:
    """Keys of the pre-training recipe for this run, before those of the command line."""
    return DEFAULTS | {
        "model.start": f'"{folder}"',
        "data.shards": f'["{samples}"]',
        "stages.0.name": '"sft"',
        "stages.0.tokens": str(tokens),
        "stages.0.sequence": str(options.max_tokens),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv4 train sft",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="model folder to start from, or owner/name")
    parser.add_argument("words", nargs="*", metavar="DATA|KEY=VALUE", help="files or folders; keys of the recipe")
    parser.add_argument("--epochs", type=_count, default=1, metavar="N", help="passes over the data (default: 1)")
    parser.add_argument(
        "--max-tokens", type=_count, default=4096, metavar="N", help="longer samples are refused (default: 4096)"
    )
    parser.add_argument(
        "--dry-run", type=_number, metavar="N", help="show N samples and what is refused; train nothing"
    )
    parser.add_argument("--out", type=Path, help="model folder to write (default: model in --run-dir)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/sft"), help="folder of the run's state")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    parser.add_argument("--print-config", action="store_true", help="print the whole recipe, and train nothing")
    return parser


def _number(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number, {least} or more")
    return int(text)


def _count(text: str) -> int:
    return _number(text, 1)


if __name__ == "__main__":
    sys.exit(main())
