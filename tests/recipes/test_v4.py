"""The whole recipe at a toy size: from a base to results; killed in and between stages, it has the same bits."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from html import escape
from io import StringIO
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

import dsv4
from dsv4.checkpoint.atomic import sole_writer
from dsv4.cli import build_parser, main
from dsv4.config import nano_path
from dsv4.engine import LLM, SamplingParams
from dsv4.evals.post_training_results import read_results
from dsv4.model_folder import resolve_model
from dsv4.post_training import policy_run
from dsv4.post_training.effort_keys import EffortsSection
from dsv4.post_training.recipes import GRPORecipe
from dsv4.post_training.run_origin import ORIGIN, describe_code, describe_machine, read_origin, record_origin
from dsv4.post_training.sandbox.substrates import missing
from dsv4.post_training.stage_run import StageLog
from dsv4.post_training.v4_command import repeated_command, show_command, without_paths
from dsv4.post_training.v4_recipe import CURVE, DOMAINS, V4Recipe
from dsv4.post_training.v4_run import tokens_of
from dsv4.training import loop
from dsv4.training.recipe import read_recipe
from recipes import v4
from tests.forked import FORKED
from tests.readme_commands import arguments, commands

from .small_v4 import keys, small_base, without_pictures

pytestmark = pytest.mark.skipif(missing("namespaces") is not None, reason="programs need a sandbox")


class Killed(BaseException):
    """End of the process, as by SIGKILL: nothing handles it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("small"))


def weights(model: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(model.glob("*.safetensors")))


def test_it_ends_with_results_and_a_killed_run_has_the_same_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("recipes.pretrain.draw_run", lambda run_dir: None)  # whose pictures take long
    run, out = tmp_path / "run", tmp_path / "model"
    assert v4.main(["--base-model", str(base), *keys(), "--run-dir", str(run), "--out", str(out)]) == 0
    assert f"stage 1 of {len(stage_names(run)) + 1}" not in capsys.readouterr().out  # the base is there already
    check_results(out)
    with monkeypatch.context() as patch:
        check_commands(out, tmp_path, patch, capsys)
    check_equal_tokens(run)
    (output,) = LLM(out).generate("Hi", SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(output.token_ids) == 3

    again = tmp_path / "again"
    begin_again(run, again)
    place = ["--resume", "--run-dir", str(again), "--out", str(tmp_path / "second")]
    kills: list[tuple[object, str, Callable[[], bool]]] = [
        (v4, "write_conversations", lambda: True),
        (loop.Trainer, "_one_step", lambda: (again / "specialists/mathematics/sft/state.pt").exists()),
        (policy_run.PolicyRun, "_logged_step", lambda: (again / "specialists/code/grpo/state.pt").exists()),
        (v4, "average_models", lambda: True),
        (policy_run.PolicyRun, "_logged_step", lambda: (again / "student/state.pt").exists()),
        (v4, "write_efforts", lambda: True),
    ]
    for owner, name, is_time in kills:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killing(getattr(owner, name), is_time))
            with pytest.raises(Killed):
                v4.main(place)
    kill_in_the_student(place, again)
    assert v4.main(place) == 0
    for model in ("specialists/mathematics/sft", "specialists/code/grpo", "averaged", "student"):
        assert weights(again / model / "model") == weights(run / model / "model"), model
    assert weights(tmp_path / "second") == weights(out)
    assert (tmp_path / "second" / "results.json").read_bytes() == (out / "results.json").read_bytes()
    with pytest.raises(SystemExit, match="already holds a run; pass --resume"):
        v4.main(["--base-model", str(base), *keys(), *place[1:]])


def kill_in_the_student(place: list[str], run: Path) -> None:
    """SIGKILL ends a run at some moment of the distillation, or a little later."""
    shutil.rmtree(run / "student")
    process = FORKED.Process(target=without_pictures, args=(place,))
    process.start()
    while process.is_alive() and not (run / "student" / "state.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def begin_again(run: Path, again: Path) -> None:
    """The same run without some of its results, in every kind of stage."""
    shutil.copytree(run, again)
    for name in ("specialists/mathematics/sft", "specialists/code/grpo", "averaged", "student"):
        shutil.rmtree(again / name)
    for name in ("data/tools.jsonl", "evaluation/student.json", "evaluation/efforts.json", "results.json"):
        (again / name).unlink()


def killing(function: Callable[..., object], is_time: Callable[[], bool]) -> Callable[..., object]:
    """A function that ends the process when it is time."""

    def wrapped(*args: object, **kwargs: object) -> object:
        if is_time():
            raise Killed
        return function(*args, **kwargs)

    return wrapped


def run_stage(run: v4.V4Run, name: str) -> None:
    for _ in next(stage for stage in run.stages() if stage.name == name).run():
        pass


def stage_names(run: Path) -> list[str]:
    return [stage["name"] for stage in json.loads((run / "stages.json").read_text())]


def check_results(out: Path) -> None:
    """results.json is whole, and the page has its figures and needs no other file."""
    results, page = read_results(out), (out / "results.html").read_text()
    assert results.domains == DOMAINS and set(results.efforts) == {"low", "high", "max"}
    counts = [count for _, row in results.scores.rows() for count in row.values()]
    assert tuple(results.fine_tuned) == DOMAINS
    counts += [count for _, before, after, _ in results.of_grpo() for count in (before, after)]
    assert [*results.general] == ["start", "teacher", "student"]
    counts += [count for row in results.general.values() for count in row.values()]
    cells = [f"<small>{count.correct} of {count.asked}</small>" for count in counts]
    assert re.findall(r"<small>\d+ of \d+</small>", page) == cells and len(cells) == 50
    assert page.count("<svg") == 6 and not re.search(r'(src|href)="(?!#)', page)
    for name in ("base", "sft", "student", "averaged", "mixed", *(f"specialists.{domain}" for domain in DOMAINS)):
        assert f"<td>{name}</td>" in page
    for effort in results.efforts.values():
        assert f'<td class="number">{effort.tokens:.1f}</td>' in page
    card = (out / "README.md").read_text()
    assert all(f"{count.correct} of {count.asked}" in card for count in counts)
    command = shlex.join(["dsv4", "train", "v4", "--budget", "cpu", "--base-model", "BASE", *keys()])
    assert f"\n{command} --run-dir runs/v4\n" in card and escape(command) in page
    made_by = f"seed 1; {describe_code()}, on {describe_machine('cpu')}."
    assert made_by in card and made_by in page and "core" in made_by
    assert str(out.parent) not in page + card + (out / "v4.toml").read_text()
    assert "dsv4 train distill" in page and "dsv4 train grpo" in page and "dsv4 train sft" in page


def check_commands(
    out: Path, anywhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card's commands run: in the model's folder, and to the recipe beside them; so does that recipe alone."""
    found = [arguments(command) for command in commands((out / "README.md").read_text())]
    assert [words[0] for words in found] == ["chat", "serve", "train", "train"]
    found.append(["train", *shlex.split(repeated_command(read_recipe(V4Recipe, out / "v4.toml")))[2:]])
    for words in found:
        options = build_parser().parse_args(words)
        monkeypatch.chdir(anywhere if words[0] == "train" else out)
        if words[0] == "chat":
            monkeypatch.setattr("sys.stdin", StringIO("/exit\n"))
            assert main(words) == 0 and "model is here" in capsys.readouterr().out
        elif words[0] == "serve":
            assert [resolve_model(name).resolve() for name in options.model] == [out]
        else:
            (anywhere / "v4.toml").write_bytes((out / "v4.toml").read_bytes())
            assert v4.main([*options.arguments, "--print-config"]) == 0
            printed = capsys.readouterr().out
            assert printed == (out / "v4.toml").read_text() or not options.arguments


def check_equal_tokens(run: Path) -> None:
    """The mixed run has the tokens of all teachers and the student, to a step."""

    def tokens(name: str) -> int:
        return tokens_of(run / name)

    parts = [f"specialists/{domain}/{part}" for domain in DOMAINS for part in ("sft", "grpo")]
    assert abs(tokens("mixed") - sum(map(tokens, [*parts, "general/grpo", "student_sft", "student"]))) <= 2048


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume"], "holds no run"),
        (["--resume", "budget.seconds=1"], "--resume goes on with the run's own recipe"),
        (["budget.second=1"], "budget.second is unknown; the nearest key is budget.seconds"),
        (["budget.base=0.9"], "the shares add up to 1.680; allowed: 1 at most"),
        (["budget.sft=0"], "budget.sft is 0; allowed: more, or sft_model"),
        (["budget.student=0"], "budget.student is 0: Input should be greater than 0"),
        (["nano.second=1"], "second is unknown; the nearest key is seconds"),
        (["mixed.seconds=60"], "mixed.seconds is unknown"),
        (["mixed.steps=60"], "mixed.steps is unknown"),
        (["student_sft.seconds=60", "student_sft.steps=9"], "student_sft: seconds is 60 and steps is 9; allowed: one"),
        (
            ['specialists.code.efforts=["1-100"]'],
            "specialists.code.efforts has budgets, and ladder is 0731; allowed: sc",
        ),
        (["evaluation.efforts=[25]"], "evaluation.efforts has budgets, and ladder is 0731; allowed: scalar"),
        (
            ["ladder=scalar", "specialists.code.efforts=[5]", "specialists.code.grpo.efforts.penalty=mode"],
            "specialists.code.grpo.efforts.penalty is mode with budgets; allowed: budget, none",
        ),
        (
            ["specialists.code.efforts=[101]"],
            "specialists.code.efforts.0 is 101: effort is 101; allowed: low, high, max",
        ),
        (["evaluation.effort_domain=chess"], "effort_domain is chess; allowed: mathematics"),
        (["--base-model", "none"], "'none' is no folder here"),
        (["--base-model", "runs/none/model"], "base_model is runs/none/model, which is no model folder"),
        (["--base-model", str(nano_path()), "--sft-model", "x/y/z"], "sft_model is x/y/z, which is no model folder"),
        (["--sft-model", str(nano_path())], "sft_model without base_model"),
        (["--corpus", "none"], "none is no corpus"),
        (["--base-model", str(nano_path()), "device=cuda:99"], "device is 'cuda:99'; torch finds"),
        (["--base-model", str(nano_path()), "--out", str(Path(__file__).parent)], "holds something else than a model"),
    ],
)
def test_wrong_input_is_named(words: list[str], message: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=message):
        v4.main([*words, "--run-dir", str(run)])
    assert not run.exists()


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "run"), pytest.raises(SystemExit, match="another process works in"):
        v4.main(["--base-model", str(nano_path()), "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_config_is_whole_and_shares_out_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    assert v4.main(["--budget", "gpu", "budget.seconds=1000", "--print-config"]) == 0
    recipe = tomllib.loads(capsys.readouterr().out)
    nano = recipe["nano"]
    sft = 5 / 25  # of the seconds of base and sft
    assert nano["seconds"] == pytest.approx(250) and nano["mid_share"] == pytest.approx((1 - sft) * 0.26 / 0.69)
    assert nano["sft_share"] == pytest.approx(sft * 27 / 31) and nano["long_share"] == pytest.approx(sft * 4 / 31)
    for part in (nano[name] for name in ("base", "mid", "sft", "long")):
        assert (part["run"]["device"], part["run"]["replicas"]) == ("cuda", 1)
        assert all(stage.get("recompute", "none") == "none" for stage in part["stages"])
    assert recipe["specialists"]["code"]["grpo"]["run"]["seconds"] == pytest.approx(60 / 7)
    assert recipe["specialists"]["mathematics"]["grpo"]["run"]["seconds"] == pytest.approx(3 * 60 / 7)
    assert recipe["general"]["grpo"]["run"]["seconds"] == pytest.approx(60 / 7)
    assert recipe["specialists"]["code"]["grpo"]["problems"]["domains"] == ["code"]
    for domain, steps in (("code", 100), ("tools", 150), ("instructions", 100)):
        section = recipe["specialists"][domain]["sft"]
        assert section["steps"] == steps and "seconds" not in section
    assert recipe["specialists"]["mathematics"]["sft"]["seconds"] == pytest.approx(30)
    assert recipe["student_sft"]["seconds"] == pytest.approx(120)
    assert recipe["student"]["run"]["device"] == "cuda" and recipe["student"]["problems"]["domains"] == list(DOMAINS)


def test_the_time_of_a_given_model_goes_to_the_other_stages(capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    shares: list[dict[str, float]] = []
    for words in ([], ["--base-model", "b"], ["--base-model", "b", "--sft-model", "s"]):
        assert v4.main([*words, "--print-config"]) == 0
        recipe = tomllib.loads(capsys.readouterr().out)
        shares.append(recipe["budget"])
        seconds = shares[-1].pop("seconds")
        assert sum(shares[-1].values()) == pytest.approx(sum(shares[0].values()))
        assert recipe["student"]["run"]["seconds"] == pytest.approx(seconds * shares[-1]["student"])
    whole, based, tuned = shares
    assert based["base"] == 0.0 and tuned["sft"] == 0.0 and tuned["student"] > based["student"] > whole["student"]
    assert based["sft"] / whole["sft"] == pytest.approx(based["rest"] / whole["rest"])


def test_keys_that_a_section_gives_stay() -> None:
    words = ["device=cuda", "seed=7", "nano.base.run.device=cpu", "nano.sft.run.seed=3", "student.run.device=cpu"]
    words += ["specialists.code.grpo.problems.level=standard", "specialists.code.grpo.problems.seed=5"]
    recipe = v4.read_v4_recipe(v4.RECIPE, v4.nano.RECIPE, words)
    runs = recipe.nano.base.run, recipe.nano.sft.run, recipe.student.run, recipe.specialists.tools.grpo.run
    assert [run.device for run in runs] == ["cpu", "cuda", "cpu", "cuda"]
    assert [run.seed for run in runs] == [7, 3, 7, 7]
    problems = recipe.specialists.code.grpo.problems
    assert (problems.domains, problems.level, problems.seed) == (("code",), "standard", 5)


def test_the_student_keeps_and_gains_by_a_teacher_of_the_general_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setitem(v4.MAINS, "distill", lambda words: commands.append(words) or 0)
    for words, teachers in (([], 5), (["general.share=0"], 4)):
        recipe = v4.read_v4_recipe(v4.RECIPE, v4.nano.RECIPE, [*words, "general.weight=0.5", "student_sft.texts=[]"])
        problems = recipe.student.problems
        assert problems.domains == DOMAINS and problems.effort_domains == ("mathematics",)
        if problems.tasks:
            source, general = recipe.student.source(), recipe.general
            asked = [source.problem(number) for number in range(600)]
            assert {problem.domain for problem in asked} > {*DOMAINS, "conversation", "school_mathematics"}
            tasks = [problem for problem in asked if problem.domain not in DOMAINS]
            assert len(tasks) / len(asked) == pytest.approx(general.share, abs=0.06)
            thinking = sum(problem.thinking for problem in tasks)
            assert thinking / len(tasks) == pytest.approx(general.thinking_share, abs=0.08)
        run = v4.V4Run(recipe, tmp_path, StageLog(tmp_path))
        run_stage(run, "student")
        assert commands[-1].count("--teacher") == teachers
        assert (f"default={run.folders.general}:0.5" in commands[-1]) == bool(problems.tasks)
        assert any(stage.name == "general.grpo" for stage in run.stages()) == bool(problems.tasks)
        seconds = recipe.specialists.code.grpo.run.seconds or 0.0
        assert seconds * (teachers + 2) == pytest.approx(recipe.budget.of("specialist_grpo"))  # mathematics has 3 parts
        assert not problems.tasks or recipe.general.grpo.run.seconds == seconds


def test_budgets_go_from_a_specialist_to_its_grpo_the_student_and_the_curve() -> None:
    words = ["ladder=scalar", 'specialists.mathematics.efforts=["1-100"]']
    recipe = v4.read_v4_recipe(v4.RECIPE, v4.nano.RECIPE, words)
    grpo = recipe.specialists.mathematics.grpo
    assert grpo.efforts.penalty == "budget" and [mode.effort for mode in grpo.modes()] == list(range(1, 101))
    assert GRPORecipe.model_validate(grpo.model_dump()) == grpo  # as its stage reads it
    assert recipe.student.problems.efforts == ("1-100",) and recipe.evaluation.efforts == CURVE
    assert read_recipe(V4Recipe, None, words[:1]).evaluation.efforts == ("low", "high", "max")
    modes = v4.read_v4_recipe(v4.RECIPE, v4.nano.RECIPE, [])
    assert modes.specialists.mathematics.grpo.efforts.penalty == "mode"
    assert modes.evaluation.efforts == modes.specialists.mathematics.efforts == ("low", "high", "max")


def test_windows_of_the_recipe_are_for_domains_that_are_asked_with_efforts() -> None:
    plain = v4.read_v4_recipe(
        v4.RECIPE, v4.nano.RECIPE, ["specialists.mathematics.efforts=[]"]
    ).specialists.mathematics.grpo
    assert plain.efforts == EffortsSection() and plain.source().problem(0).domain == "mathematics"
    asked = v4.read_v4_recipe(v4.RECIPE, v4.nano.RECIPE, []).specialists.mathematics.grpo
    assert asked.efforts.low.window < 0.1 and asked.problems.efforts == ("low", "high", "max")


def test_grpo_asks_other_problems_than_fine_tuning_has_answered(tmp_path: Path) -> None:
    words = ["specialists.instructions.conversations=30", 'nano.data.corpus=""']
    recipe = v4.read_v4_recipe(v4.RECIPE, v4.nano.RECIPE, words)
    run_stage(v4.V4Run(recipe, tmp_path, StageLog(tmp_path)), "data.instructions")
    lines = (tmp_path / "data" / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    answered = [json.loads(line)["messages"][-2]["content"] for line in lines]
    source = recipe.specialists.instructions.grpo.source()
    asked = [str(source.problem(number).prompt().messages[-1].content) for number in range(30)]
    assert len(answered) == 30 and len(set(asked) & set(answered)) <= 3  # by chance, of some thousands


def test_the_base_is_trained_first_and_its_sft_by_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, called = tmp_path / "corpus", list[list[str]]()
    (corpus / "train").mkdir(parents=True)

    def train(words: list[str]) -> int:
        called.append(words)
        run = tmp_path / "run" / "nano"
        for path in (run / "nano.toml", run / ("" if "--resume" in words else "mid") / "model" / "config.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return 0

    def stop(*_: object) -> None:
        raise Killed

    monkeypatch.setitem(v4.MAINS, "nano", train)
    monkeypatch.setattr(v4, "write_conversations", stop)
    with pytest.raises(Killed):
        v4.main(["--corpus", str(corpus), "student_sft.texts=[]", "--run-dir", str(tmp_path / "run")])
    assert "--base-only" in called[0] and called[0][0].endswith("recipes/nano.toml")
    assert called[1][0] == "--resume" and "--base-only" not in called[1]


def test_a_stopped_stage_ends_the_run_with_its_status(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(v4.MAINS, "nano", lambda words: 143)
    monkeypatch.chdir(base.parent)
    run = tmp_path / "run"
    assert v4.main(["--base-model", f"./{base.name}", *keys(), "--run-dir", str(run)]) == 143
    assert f"to go on: dsv4 train v4 --resume --run-dir {run}" in capsys.readouterr().err
    assert stage_names(run) == ["sft"]
    monkeypatch.chdir(tmp_path)
    assert v4.main(["--resume", "--run-dir", str(run)]) == 143  # and not an error for the model, from any folder


def test_the_command_is_shown_as_it_was_given_without_paths() -> None:
    options = v4.parse("v4", ["/a/b.toml", "--budget", "gpu", "--corpus", "/c", "seed=2", "sft_model=/d e"])
    shown = show_command(options.recipe, vars(options))
    assert shown == "dsv4 train v4 --corpus corpus --budget gpu b.toml seed=2 sft_model=SFT --run-dir runs/v4"
    assert "nano.data.corpus=" in show_command(['nano.data.corpus=""'], {})


def test_the_recipe_is_kept_without_paths() -> None:
    keys = ["base_model=/b", "student.distillation.texts=['/d/prose=0.5']", "student.problems.data=['/d/rows.jsonl']"]
    kept = without_paths(v4.read_v4_recipe(v4.RECIPE, v4.nano.RECIPE, keys))
    assert kept.base_model == "BASE" and kept.nano.data.corpus == "corpus"
    assert kept.student.distillation.texts == ("prose=0.5",) and kept.student.problems.data == ("rows.jsonl",)


def test_a_part_of_a_run_on_another_machine_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "dsv4.post_training.run_origin"
    first = record_origin(tmp_path, "cpu", "dsv4 train v4")
    assert record_origin(tmp_path, "cpu") == read_origin(tmp_path) == first and len(first.parts) == 1
    monkeypatch.setattr(f"{module}.describe_machine", lambda device: f"another with {device}")
    assert record_origin(tmp_path, "cuda").lines == [*first.lines, f"{describe_code()}, on another with cuda"]
    monkeypatch.setattr(f"{module}.__file__", str(tmp_path / "a" / "b" / "run_origin.py"))
    assert describe_code() == f"dsv4 {dsv4.__version__}"  # where the package is no checkout of its own
    (tmp_path / ORIGIN).write_text("{}")
    with pytest.raises(ValueError, match="origin.json is damaged"):
        read_origin(tmp_path)
    (tmp_path / ORIGIN).unlink()
    before, after = record_origin(tmp_path, "cpu").lines  # of a run that began without a record
    assert "not recorded" in before and "another with cpu" in after
