"""The whole recipe: base, sft, four specialists, one student by on-policy distillation, comparisons, results.

recipes/v4.toml is the recipe, beside recipes/nano.toml for its base; KEY=VALUE changes one of its keys. --base-model
and --sft-model take a model folder in place of training one. Every stage is a command of its own, and is skipped when
its result stands: --resume goes on with a run that was killed, to the same bits. --out has the student in the official
layout, a README.md, results.json, results.html and v4.toml.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from dsv4.checkpoint.atomic import DiskFullError, new_file, new_folder, sole_writer
from dsv4.commands.recipe_flags import parse
from dsv4.config import ModelConfig
from dsv4.data.shards import Index
from dsv4.engine.loading import check_device
from dsv4.evals.post_training_results import read_results, write_results
from dsv4.evals.results_card import write_card
from dsv4.evals.results_page import write_page
from dsv4.evals.v4_results import (
    collect_record,
    collect_results,
    evaluate_fine_tuned,
    evaluate_general,
    evaluate_model,
    write_efforts,
)
from dsv4.model_folder import resolve_model
from dsv4.parallel.mesh import launched
from dsv4.post_training.averaging import average_models
from dsv4.post_training.domains.registry import open_domain
from dsv4.post_training.domains.solutions import write_conversations
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.run_origin import read_origin, record_origin
from dsv4.post_training.stage_run import Stage, StageLog, run_stages
from dsv4.post_training.v4_command import repeated_command, show_command, without_paths
from dsv4.post_training.v4_recipe import DOMAINS, SpecialistSection, V4Recipe, read_v4_recipe
from dsv4.post_training.v4_run import RunFolders, tokens_of
from dsv4.post_training.v4_texts import texts_of
from dsv4.tokenizer.prompts import write_effort_ladder
from dsv4.training.export import check_output, export_model
from dsv4.training.recipe import Section, read_recipe, split_words, write_recipe
from dsv4.training.run_shards import read_share
from dsv4.training.stopping import RunStoppedError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the other recipes, also where this file is run by its path

from recipes import distill, grpo, nano, sft  # noqa: E402

RECIPE = ROOT / "recipes" / "v4.toml"
MAINS: dict[str, Callable[[list[str]], int]] = {
    "nano": nano.main, "sft": sft.main, "grpo": grpo.main, "distill": distill.main
}  # fmt: skip
MIXED_SHARE = 0.7  # of the budget's `rest`, as far as it can be foretold; evaluation takes what is left
BUDGETS = {
    "cpu": (),
    "gpu": ("device=cuda", "budget.seconds=1800", *(f"nano.{key}" for key in nano.ON_GPU)),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 0 when the model folder and its results are written."""
    options = parse("v4", arguments)
    if launched():
        raise SystemExit("v4 trains in one process: start it without torchrun")
    console = Console()
    run_dir: Path = options.run_dir
    out: Path = options.out or run_dir / "model"
    try:
        recipe = saved_recipe(run_dir, options) if options.resume else given_recipe(options)
        if options.print_config:
            print(write_recipe(recipe), end="")
            return 0
        check_output(out, run_dir)
        recipe = check_recipe(recipe)
        if recipe.student_sft.texts and not recipe.nano.data.corpus:
            console.print("no --corpus: the student is trained without student_sft.texts")
        with sole_writer(run_dir):
            if options.resume:
                record_origin(run_dir, recipe.device)
            else:
                begin_run(recipe, run_dir, show_command(options.recipe, vars(options)))
            run = V4Run(recipe, run_dir, StageLog(run_dir))
            run_stages(run.stages(), run.log, lambda text: console.print(text, highlight=False))
            ship(run, out)
    except RunStoppedError as stopped:
        print(f"{stopped}; to go on: dsv4 train v4 --resume --run-dir {run_dir}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print(f"\nto go on: dsv4 train v4 --resume --run-dir {run_dir}", file=sys.stderr)
        raise
    except (ValueError, OSError, DiskFullError, MemoryError) as error:
        raise SystemExit(f"training stopped: {error}") from error
    console.print(f"model folder: {out}\nresults: {out / 'results.html'}", highlight=False)
    return 0


def given_recipe(options: argparse.Namespace) -> V4Recipe:
    """Recipe of the command line, resolved."""
    files, given = split_words(options.recipe)
    if len(files) > 1:
        raise ValueError(f"recipes {', '.join(files)}; allowed: one, and KEY=VALUE")
    keys = [*BUDGETS[options.budget], *given]
    keys += [f"base_model={options.base_model}"] if options.base_model else []
    keys += [f"sft_model={options.sft_model}"] if options.sft_model else []
    corpus = options.corpus.absolute() if options.corpus else ""
    keys += [f"nano.data.corpus={corpus}"] if options.corpus or options.base_model else []
    return read_v4_recipe(Path(files[0]) if files else RECIPE, nano.RECIPE, keys)


def saved_recipe(run_dir: Path, options: argparse.Namespace) -> V4Recipe:
    """Recipe of the run in `run_dir`."""
    if options.recipe or options.base_model or options.sft_model or options.corpus:
        raise ValueError("--resume goes on with the run's own recipe, models and corpus; without them")
    if not RunFolders(run_dir).recipe.is_file():
        raise ValueError(f"--resume: {run_dir} holds no run (no v4.toml)")
    return read_recipe(V4Recipe, RunFolders(run_dir).recipe)


def check_recipe(recipe: V4Recipe) -> V4Recipe:
    """The recipe with whole paths of its models and texts, so that a run is resumed from any folder.

    ValueError, before hours of training, for a device, a model, a corpus, texts or a sandbox that is missing.
    """
    check_device(recipe.device)
    models: dict[str, str] = {}
    for key in ("base_model", "sft_model"):
        name: str | None = getattr(recipe, key)
        if name is None:
            continue
        folder = resolve_model(name).absolute()
        if not (folder / "config.json").is_file():
            raise ValueError(f"{key} is {name}, which is no model folder (no config.json)")
        models[key] = str(folder)
    if recipe.sft_model is not None and recipe.base_model is None:
        raise ValueError("sft_model without base_model; allowed: both, since the base is evaluated too")
    corpus = recipe.nano.data.corpus
    if recipe.base_model is None and not (Path(corpus) / "train").is_dir():
        raise ValueError(
            f"{corpus} is no corpus, and the base is trained on one: give --corpus, which `dsv4 train corpus` makes, "
            "or --base-model"
        )
    if (texts := texts_of(recipe, Path())) is not None:
        _ = texts.data  # names what the corpus lacks
    student = recipe.student.placed()
    for word in student.distillation.texts:
        Index.read(Path(read_share(word)[0]))
    for name in DOMAINS:
        open_domain(name).prepare()
    return recipe.model_copy(update={**models, "student": student})


def begin_run(recipe: V4Recipe, run_dir: Path, command: str) -> None:
    """Write the run's origin, then its v4.toml: a folder with it holds a run, which is never overwritten."""
    path = RunFolders(run_dir).recipe
    if path.exists():
        raise ValueError(f"{run_dir} already holds a run; pass --resume to go on with it, or another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    record_origin(run_dir, recipe.device, command)
    with new_file(path) as temporary:
        temporary.write_text(write_recipe(recipe), encoding="utf-8")


class V4Run:
    """Stages of a run. Those that train are commands, which can be run by hand with the same words."""

    def __init__(self, recipe: V4Recipe, run_dir: Path, log: StageLog) -> None:
        self.recipe, self.log = recipe, log
        self.folders = RunFolders(
            run_dir,
            None if recipe.base_model is None else Path(recipe.base_model),
            None if recipe.sft_model is None else Path(recipe.sft_model),
        )
        self.texts = texts_of(recipe, self.folders.nano / "data")

    def stages(self) -> list[Stage]:
        """All stages in their order; those of a model that was given have its folder as their result."""
        recipe, folders, budget = self.recipe, self.folders, self.recipe.budget
        rest = budget.of("rest")
        found = [
            Stage("base", folders.base, budget.of("base"), self._base),
            Stage("sft", folders.sft, budget.of("sft"), self._sft),
            Stage("start", folders.start, 0.0, self._begin),
        ]
        for domain in DOMAINS:
            found.append(Stage(f"data.{domain}", folders.data(domain), 0.0, lambda d=domain: self._write_data(d)))
        if self.texts is not None:
            found.append(Stage("data.texts", self.texts.made, 0.0, self._write_texts))
        for domain, section in recipe.specialists.items():
            tuned, trained = section.sft.seconds or 0.0, section.grpo.run.seconds or 0.0
            name = f"specialists.{domain}"
            found += [
                Stage(f"{name}.sft", folders.tuned(domain), tuned, lambda d=domain: self._fine_tune(d)),
                Stage(f"{name}.grpo", folders.specialist(domain), trained, lambda d=domain: self._grpo(d)),
            ]
        if recipe.general.asked:
            seconds = recipe.general.grpo.run.seconds or 0.0
            found.append(Stage("general.grpo", folders.general, seconds, self._grpo_general))
        found.append(Stage("averaged", folders.averaged, 0.0, self._average))
        if recipe.student_sft.has_length:
            seconds = recipe.student_sft.seconds or 0.0
            found.append(Stage("student.sft", folders.student_tuned, seconds, self._fine_tune_student))
        found += [
            Stage("student", folders.student, recipe.student.run.seconds or 0.0, self._distill),
            Stage("mixed", folders.mixed, MIXED_SHARE * rest, self._mix),
        ]
        models = folders.models()
        seconds = (1.0 - MIXED_SHARE) * rest / (len(models) + 2 + recipe.general.asked)
        for name in models:
            found.append(Stage(f"evaluation.{name}", folders.scores(name), seconds, lambda n=name: self._evaluate(n)))
        found.append(Stage("evaluation.fine_tuned", folders.fine_tuned, seconds, self._evaluate_fine_tuned))
        if recipe.general.asked:
            found.append(Stage("evaluation.general", folders.general_scores, seconds, self._evaluate_general))
        found.append(Stage("evaluation.efforts", folders.efforts, seconds, self._evaluate_efforts))
        found.append(Stage("results", folders.results, 0.0, self._write_results))
        return found

    def _base(self) -> Iterator[str]:
        return self._nano("--base-only")

    def _sft(self) -> Iterator[str]:
        base = self.recipe.base_model
        return self._nano(*([] if base is None else ["--base-model", base]))

    def _nano(self, *flags: str) -> Iterator[str]:
        """The base, or the sft, which goes on in the base's run if it has no other model to begin with."""
        run_dir = self.folders.nano
        out = run_dir / ("base-model" if "--base-only" in flags else "model")  # the sft has ended if model is there
        place = ["--run-dir", str(run_dir), "--out", str(out)]
        begin = [self._write("nano", self.recipe.nano), *flags, *place]
        go_on = ["--resume", *(flag for flag in flags if flag == "--base-only"), *place]
        yield shown("nano", begin if flags else go_on)
        command("nano", go_on if (run_dir / "nano.toml").exists() else begin)

    def _begin(self) -> Iterator[str]:
        """The model to begin with, its levels of reasoning told apart by their prompts."""
        source = self.folders.sft if self.recipe.start == "sft" else self.folders.base
        yield f"copy of {source} with the effort ladder {self.recipe.ladder}"
        with new_folder(self.folders.start, overwrite=False) as unfinished:
            shutil.copytree(source, unfinished, dirs_exist_ok=True)
            write_effort_ladder(unfinished, self.recipe.ladder)

    def _write_data(self, domain: str) -> Iterator[str]:
        section: SpecialistSection = getattr(self.recipe.specialists, domain)
        path, count, recipe = self.folders.data(domain), section.conversations, self.recipe
        yield f"{count:,} conversations of {domain}"
        write_conversations(domain, path, count, recipe.data_seed, section.thinking, section.efforts, recipe.level)

    def _write_texts(self) -> Iterator[str]:
        assert self.texts is not None
        yield f"shards of {', '.join(self.texts.shares)}, of the corpus"
        nano.take_tokenizer(self.folders.start, self.texts.data.tokenizer)
        self.texts.make(lambda text: None)

    def _fine_tune(self, domain: str) -> Iterator[str]:
        words = getattr(self.recipe.specialists, domain).sft.words(self.recipe.device)
        return self._train_sft([self.folders.data(domain)], words, self.folders.tuned(domain).parent)

    def _grpo(self, domain: str) -> Iterator[str]:
        section, folders = getattr(self.recipe.specialists, domain).grpo, self.folders
        words = [str(folders.tuned(domain))], [self._write(f"grpo-{domain}", section)]
        return self._train_policy("grpo", *words, folders.specialist(domain).parent)

    def _grpo_general(self) -> Iterator[str]:
        words = [str(self.folders.start)], [self._write("grpo-general", self.recipe.general.grpo)]
        return self._train_policy("grpo", *words, self.folders.general.parent)

    def _average(self) -> Iterator[str]:
        folders = [self.folders.specialist(domain) for domain in DOMAINS]
        target = self.folders.averaged
        yield f"mean of the weights of {len(folders)} specialists"
        target.parent.mkdir(parents=True, exist_ok=True)
        export_model(average_models(folders), tokenizer_files(folders[0], target.parent), target)

    def _fine_tune_student(self) -> Iterator[str]:
        data = [self.folders.data(domain) for domain in DOMAINS]
        section, run_dir = self.recipe.student_sft, self.folders.student_tuned.parent
        texts = {} if self.texts is None else self.texts.folders()
        words = section.words(self.recipe.device) + section.mixture_words(run_dir / sft.SAMPLES, texts)
        return self._train_sft(data, words, run_dir)

    def _distill(self) -> Iterator[str]:
        folders = self.folders
        words = [str(folders.student_tuned if self.recipe.student_sft.has_length else folders.start)]
        for domain, section in self.recipe.specialists.items():
            words += ["--teacher", f"{domain}={folders.specialist(domain)}:{section.weight:g}"]
        if self.recipe.general.asked:
            words += ["--teacher", f"default={folders.general}:{self.recipe.general.weight:g}"]
        keys = [self._write("student", self.recipe.student)]
        if self.texts is not None and not self.recipe.student.distillation.texts:
            given = [f"{folder.absolute()}={share:.6g}" for folder, share in self.texts.folders().items()]
            keys += [f"distillation.texts={json.dumps(given)}"]
            words += ["--teacher", f"texts={folders.start}"]
        return self._train_policy("distill", words, keys, folders.student.parent)

    def _mix(self) -> Iterator[str]:
        """All specialists' conversations in one run, of as many tokens as specialists and student had together."""
        folders, recipe = self.folders, self.recipe
        tokens = sum(tokens_of(folder) for folder in folders.trained())
        words = recipe.mixed.words(recipe.device, tokens)
        return self._train_sft([folders.data(domain) for domain in DOMAINS], words, folders.mixed.parent)

    def _evaluate(self, name: str) -> Iterator[str]:
        folder, section = self.folders.models()[name], self.recipe.evaluation
        yield f"{section.questions} questions of each domain to {folder}"
        evaluate_model(folder, self.recipe, self.folders.scores(name))

    def _evaluate_fine_tuned(self) -> Iterator[str]:
        yield f"{self.recipe.evaluation.questions} questions to each specialist before its GRPO"
        evaluate_fine_tuned(self.folders, self.recipe)

    def _evaluate_general(self) -> Iterator[str]:
        yield f"questions of {len(self.recipe.general.tasks)} tasks to the start, their teacher and the student"
        evaluate_general(self.folders, self.recipe)

    def _evaluate_efforts(self) -> Iterator[str]:
        yield f"questions of {self.recipe.evaluation.effort_domain} to {self.folders.student} at each level"
        write_efforts(self.folders.student, self.recipe, self.folders.efforts)

    def _write_results(self) -> Iterator[str]:
        yield "results.json, results.html"
        folders = self.folders
        results = collect_results(folders, self.recipe)
        times = [one for one in self.log.times if one.name != "results"]  # whose time is not known yet
        page = write_page(results, collect_record(folders, times, *self.made_by()))
        with new_file(folders.page) as temporary:
            temporary.write_text(page, encoding="utf-8")
        write_results(results, folders.results)  # last: the stage's result

    def made_by(self) -> tuple[str, list[str]]:
        """The command of the run, and its seed, code and machine."""
        origin = read_origin(self.folders.run_dir)
        return origin.command or repeated_command(self.recipe), [f"seed {self.recipe.seed}", *origin.lines]

    def _train_sft(self, data: list[Path], words: list[str], run_dir: Path) -> Iterator[str]:
        given = [str(self.folders.start), *map(str, data), *words, f"run.seed={self.recipe.seed}"]
        return trained("sft", given, run_dir, "data.json")

    def _train_policy(self, name: str, model: list[str], recipe: list[str], run_dir: Path) -> Iterator[str]:
        return trained(name, [*model, *recipe], run_dir, "recipe.toml")

    def _write(self, name: str, section: Section) -> str:
        """Path of a stage's recipe, written to the run's folder."""
        path = self.folders.run_dir / "recipes" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            temporary.write_text(write_recipe(section), encoding="utf-8")
        return str(path)


def trained(name: str, words: list[str], run_dir: Path, begun: str) -> Iterator[str]:
    """Give `dsv4 train NAME WORDS` as text and run it, or go on with its run, whose folder then has a file `begun`."""
    place = ["--run-dir", str(run_dir)]
    yield shown(name, [*words, *place])
    command(name, [*(["--resume"] if (run_dir / begun).exists() else words), *place])


def command(name: str, words: list[str]) -> None:
    """Run `dsv4 train NAME WORDS`. RunStoppedError if it was stopped, ValueError if it failed."""
    try:
        status = MAINS[name](words)
    except SystemExit as error:
        raise ValueError(str(error.code).removeprefix("training stopped: ")) from error
    if status:
        raise RunStoppedError(f"stopped in dsv4 train {name}", status)


def shown(name: str, words: list[str]) -> str:
    return f"dsv4 train {name} {shlex.join(words)}"


def ship(run: V4Run, out: Path) -> None:
    """Copy the student, results.json and the page to `out`, with a README.md and the recipe; all or nothing."""
    folders = run.folders
    card = write_card(ModelConfig.from_pretrained(folders.student), read_results(folders.results), *run.made_by())
    with new_folder(out, overwrite=True) as unfinished:
        for path in (*sorted(folders.student.iterdir()), folders.results, folders.page):
            shutil.copyfile(path, unfinished / path.name)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        (unfinished / folders.recipe.name).write_text(write_recipe(without_paths(run.recipe)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
