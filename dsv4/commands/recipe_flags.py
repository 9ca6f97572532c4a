"""Command lines of the recipes in recipes/. Needs no torch, so that help and refusals come at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv4.commands.options import CommandParser, count, number, seconds

BUDGETS = ("cpu", "gpu")  # of nano and v4
MIRROR, SUITE = "http://deb.debian.org/debian", "trixie"
ROOT = Path(__file__).resolve().parents[2]

PRETRAIN = """\
Train a model on text, or on shards of it, as a recipe says: from scratch, or on from a model folder.

A recipe is a TOML file; KEY=VALUE changes one of its keys, or a default. --print-config prints all keys, as a recipe.
--resume continues a run that was killed or stopped from its last saved step, to the same bits, on the same data. On
other ranks it takes their parallel.* keys: the losses are then the same but for rounding."""
PRETRAIN_EXAMPLES = """\
dsv4 train pretrain data.text=docs stages.0.steps=20 --run-dir runs/text --out runs/text/model
dsv4 train pretrain model.start=nano data.text=docs stages.0.steps=20 --run-dir runs/more
dsv4 train pretrain model.start=nano lora.rank=16 data.text=docs stages.0.steps=20 --run-dir runs/lora
dsv4 train pretrain recipes/stages.toml model.layers=4 optimizer.rate=1e-3 --print-config
dsv4 train pretrain --resume --run-dir runs/text
torchrun --nproc-per-node 2 -m dsv4 train pretrain data.text=docs parallel.data=2 --run-dir runs/two"""

SFT = """\
Fine-tune a model on conversations in OpenAI's message format: JSONL or Parquet, loss on the assistant's tokens.

The run is that of `dsv4 train pretrain` with other defaults, so its keys work here too, `lora.rank` among them."""
SFT_EXAMPLES = """\
dsv4 train sft models/nano talks.jsonl --dry-run
dsv4 train sft models/nano talks.jsonl --dry-run 1 --ids
dsv4 train sft models/nano talks.jsonl --epochs 2 --run-dir runs/sft --out runs/sft/model
dsv4 train sft models/nano data/ lora.rank=16 optimizer.rate=1e-3 --run-dir runs/lora
dsv4 train sft --resume --run-dir runs/sft"""

GRPO = """\
Train a model by GRPO: rollouts by the engine, rewards by tasks' scorers, known answers, or the model as a judge.

problems.data=FILE has problems of your own, a row each: `prompt` or `messages`, and `answer` or `rubric`. Rows with a
rubric are judged by the model itself; judge.data=FILE has labelled judgements from which it learns to judge."""
GRPO_EXAMPLES = """\
dsv4 train grpo models/nano problems.tasks='["gcd", "number_sorting"]' run.steps=20 --run-dir runs/grpo
dsv4 train grpo models/nano problems.data=problems.jsonl judge.data=judgements.jsonl --run-dir runs/own
dsv4 train grpo models/nano problems.tasks='["gcd"]' service.workers=2 service.max_staleness=1 --run-dir runs/many
dsv4 train grpo --resume --run-dir runs/grpo
dsv4 train grpo models/nano problems.tasks='["gcd"]' --print-config"""

DISTILL = "Distil teachers into a student on the student's own samples: full-vocabulary reverse KL, token by token."
DISTILL_EXAMPLES = """\
dsv4 train distill models/nano --teacher gcd=runs/gcd/model --teacher default=models/nano problems.tasks='["gcd"]'
dsv4 train distill --resume --run-dir runs/distill
dsv4 train distill models/nano --teacher default=runs/gcd/model --print-config"""

NANO = """\
Train the nano model from scratch: data, base and mid (pre-training), sft (conversations), long, model folder.

recipes/nano.toml is the recipe; KEY=VALUE changes one of its keys. --corpus is a folder that `dsv4 train corpus` made.
Its budget is 6 hours on 2 cores, or 20 minutes on one data-centre GPU. --resume continues a killed run from its last
saved step, to the same bits; `timeout 3h` or SIGTERM ends a part of a long run with its state saved. The run's folder
keeps data/ (tokenizer, questions, shards) and a folder for each part, with its state, metrics, losses.png and model
folder; the last part's is copied to --out."""
NANO_EXAMPLES = """\
dsv4 train nano --corpus corpus --run-dir runs/nano
dsv4 train nano --corpus corpus --budget gpu
dsv4 train nano --corpus corpus --steps 6 --run-dir runs/try --out runs/try/model data.scale=0.01
dsv4 train nano --corpus corpus base.optimizer.rate=2e-3 --print-config
dsv4 train nano --resume --run-dir runs/nano"""

V4 = """\
The whole recipe: base, sft, four specialists, one student by on-policy distillation, comparisons, results.

recipes/v4.toml is the recipe, beside recipes/nano.toml for its base; KEY=VALUE changes one of its keys. Its budget is 6
hours on 2 cores, or 30 minutes on one data-centre GPU. --base-model and --sft-model take a model folder in place of
training one. Every stage is a command of its own, and is skipped when its result stands: --resume goes on with a run
that was killed, to the same bits. --out has the student in the official layout, results.json, results.html
and v4.toml."""
V4_EXAMPLES = """\
dsv4 train v4 --corpus corpus --run-dir runs/v4 --out runs/v4/model
dsv4 train v4 --base-model models/nano budget.seconds=1800 --run-dir runs/short
dsv4 train v4 --base-model runs/nano/mid/model --sft-model runs/nano/model --run-dir runs/students
dsv4 train v4 --corpus corpus specialists.code.grpo.objective.group_size=16 --print-config
dsv4 train v4 --resume --run-dir runs/v4"""

CORPUS = """\
Build a training corpus from Debian's documentation packages, with a data card.

A killed call goes on where it was: with the packages that it had not finished, and within a download. Needs dpkg-deb;
groff for man pages, pod2text for Perl's."""
CORPUS_EXAMPLES = """\
dsv4 train corpus --out corpus
dsv4 train corpus --out corpus --packages dict-wn dict-foldoc manpages
dsv4 data tokenize corpus/train --out shards"""

PLOT = "Draw the losses, learning rate and speed of runs: losses.png in each run's folder."
PLOT_EXAMPLES = "dsv4 train plot runs/text"

DEMO = """\
Train a tiny model on a folder of text in a few minutes, print a sample of its writing, and how to serve it.

The tokenizer is made from the text, the model has every kind of layer, and the run is one of `dsv4 train pretrain`."""
DEMO_EXAMPLES = """\
dsv4 train demo
dsv4 train demo path/to/texts --steps 400
dsv4 train demo --serve"""

DRILL = """\
Provoke a loss spike in a tiny model and show the way out: detection, rollback, Anticipatory Routing, a sane end.

After --hurt-at steps the weights of one routed expert of every block are multiplied, an outlier as those that the
DeepSeek-V4 report ties to spikes; the saved states do not have it. The folder then holds metrics.jsonl, to be read."""
DRILL_EXAMPLES = "dsv4 train spike_drill --run-dir runs/drill"


def parse(name: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments of a recipe, flags and words in any order; what is wrong is one line, and status 2."""
    parser = PARSERS[name]()
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        parser.refuse(unknown)
    return options


def pretrain_parser() -> CommandParser:
    parser = _new_parser("pretrain", PRETRAIN, PRETRAIN_EXAMPLES)
    _add_keys(parser)
    _add_run(parser, Path("runs/pretrain"))
    _add_workers(parser)
    return parser


def sft_parser() -> CommandParser:
    parser = _new_parser("sft", SFT, SFT_EXAMPLES)
    parser.add_argument("model", nargs="?", help="model folder to start from, or owner/name")
    parser.add_argument("words", nargs="*", metavar="DATA|KEY=VALUE", help="files or folders; keys of the recipe")
    parser.add_argument("--epochs", type=count, default=1, metavar="N", help="passes over the data (default: 1)")
    longest = "longer samples are refused (default: 4096)"
    parser.add_argument("--max-tokens", type=count, default=4096, metavar="N", help=longest)
    dry = "show N samples and 20 refusals, or with 0 all refusals; train nothing (default of N at the line's end: 3)"
    parser.add_argument("--dry-run", nargs="?", type=_samples, const=3, metavar="N", help=dry)
    parser.add_argument("--ids", action="store_true", help="dry run with a line for each token, and its id")
    _add_run(parser, Path("runs/sft"))
    return parser


def grpo_parser() -> CommandParser:
    parser = _new_parser("grpo", GRPO, GRPO_EXAMPLES)
    parser.add_argument("model", nargs="?", help="model folder to start from, or owner/name; none with --resume")
    _add_keys(parser)
    _add_run(parser, Path("runs/grpo"))
    return parser


def distill_parser() -> CommandParser:
    parser = _new_parser("distill", DISTILL, DISTILL_EXAMPLES)
    parser.add_argument("model", nargs="?", help="model folder to start from, or owner/name; none with --resume")
    _add_keys(parser)
    _add_run(parser, Path("runs/distill"))
    teacher = (
        "teacher of the questions of a task or domain, of one effort or mode of it (mathematics.low), or of all others "
        "(default); may be given many times"
    )
    metavar = "DOMAIN[.EFFORT]=FOLDER[:WEIGHT]"
    parser.add_argument("--teacher", action="append", default=[], metavar=metavar, help=teacher)
    return parser


def nano_parser() -> CommandParser:
    parser = _new_parser("nano", NANO, NANO_EXAMPLES)
    words = "a TOML file in place of recipes/nano.toml, and keys to change"
    parser.add_argument("keys", nargs="*", metavar="RECIPE|KEY=VALUE", help=words)
    parser.add_argument("--corpus", type=Path, help="folder that dsv4 train corpus made (default: corpus)")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu", help="size of the run (default: %(default)s)")
    parser.add_argument("--seconds", type=seconds, help="training time instead of the budget's")
    parser.add_argument("--steps", type=count, help="a fixed number of steps instead of a time")
    _add_run(parser, ROOT / "runs" / "nano")
    parser.add_argument(
        "--base-model", metavar="FOLDER", help="leave out base and mid: the sft goes on from this model"
    )
    parser.add_argument("--base-only", action="store_true", help="stop before the sft")
    _add_workers(parser)
    return parser


def v4_parser() -> CommandParser:
    parser = _new_parser("v4", V4, V4_EXAMPLES)
    _add_keys(parser)
    parser.add_argument(
        "--corpus", type=Path, help="folder that dsv4 train corpus made (default: corpus, with --base-model none)"
    )
    parser.add_argument("--budget", choices=BUDGETS, default="cpu", help="size of the run (default: %(default)s)")
    parser.add_argument("--base-model", metavar="FOLDER", help="model in place of the base; its sft goes on from it")
    parser.add_argument("--sft-model", metavar="FOLDER", help="model in place of the sft; with --base-model")
    _add_run(parser, Path("runs/v4"))
    return parser


def corpus_parser() -> CommandParser:
    parser = _new_parser("corpus", CORPUS, CORPUS_EXAMPLES)
    parser.add_argument("--out", type=Path, default=Path("corpus"), help="folder of the corpus (default: %(default)s)")
    parser.add_argument("--packages", nargs="+", default=[], metavar="NAME", help="only these of the list")
    parser.add_argument("--mirror", default=MIRROR, help="Debian mirror (default: %(default)s)")
    parser.add_argument("--suite", default=SUITE, help="Debian release (default: %(default)s)")
    parser.add_argument("--workers", type=count, default=2, help="processes that read files (default: %(default)s)")
    return parser


def plot_parser() -> CommandParser:
    parser = _new_parser("plot", PLOT, PLOT_EXAMPLES)
    parser.add_argument("run_dir", nargs="+", type=Path, help="folder with a run's metrics.jsonl")
    return parser


def demo_parser() -> CommandParser:
    parser = _new_parser("demo", DEMO, DEMO_EXAMPLES)
    parser.add_argument("texts", nargs="?", type=Path, default=ROOT / "docs", help="folder of text (default: docs/)")
    parser.add_argument("--steps", type=count, default=150, help="default: %(default)s")
    parser.add_argument("--prompt", default="The model ", help="beginning of the sample (default: %(default)r)")
    parser.add_argument("--run-dir", type=Path, help="folder of the run (default: a new one, runs/demo)")
    parser.add_argument("--serve", action="store_true", help="serve the model when it is trained")
    parser.add_argument("--port", type=int, default=8000, help="of the server (default: %(default)s)")
    return parser


def spike_drill_parser() -> CommandParser:
    parser = _new_parser("spike_drill", DRILL, DRILL_EXAMPLES)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/drill"), help="a new folder")
    parser.add_argument("--steps", type=int, default=45, help="default: %(default)s")
    parser.add_argument("--hurt-at", type=int, default=27, metavar="STEP", help="default: %(default)s")
    parser.add_argument("--factor", type=float, default=300.0, help="of the expert's weights (default: %(default)s)")
    parser.add_argument("--delay", type=int, default=1, help="of Anticipatory Routing (default: %(default)s)")
    return parser


# Name of a file of recipes/ -> its parser.
PARSERS: dict[str, Callable[[], CommandParser]] = {
    "pretrain": pretrain_parser,
    "sft": sft_parser,
    "grpo": grpo_parser,
    "distill": distill_parser,
    "nano": nano_parser,
    "v4": v4_parser,
    "corpus": corpus_parser,
    "plot": plot_parser,
    "demo": demo_parser,
    "spike_drill": spike_drill_parser,
}


def _samples(text: str) -> int:
    """Number of samples; a word behind a bare --dry-run, which takes it for one, is told where the number goes."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: how many samples to show, as in --dry-run 3")
    return int(text)


def _new_parser(name: str, text: str, examples: str) -> CommandParser:
    return CommandParser(
        prog=f"dsv4 train {name}",
        description=text,
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="*", metavar="RECIPE|KEY=VALUE", help="a TOML file, and keys to change")


def _add_run(parser: argparse.ArgumentParser, run_dir: Path) -> None:
    """The flags of every recipe that trains and resumes."""
    parser.add_argument("--out", type=Path, help="model folder to write (default: model in --run-dir)")
    shown = run_dir.relative_to(ROOT) if run_dir.is_absolute() else run_dir
    parser.add_argument("--run-dir", type=Path, default=run_dir, help=f"folder of the run's state (default: {shown})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    parser.add_argument("--print-config", action="store_true", help="print the whole recipe, and train nothing")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=number, default=0, metavar="N", help="processes that prepare batches")
