"""The command line as a user meets it: help, inspect, and errors in one line."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4.cli import build_parser, main
from dsv4.commands.recipe_flags import PARSERS, parse
from dsv4.config import ModelConfig

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("serve", "chat", "generate", "inspect", "convert", "verify", "data", "train", "plan", "eval", "bench"),
    *("usage", "migrate"),
)
OWN_HELP = {"eval"}  # parses the rest of its arguments itself


def dsv4(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsv4", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", ["", "inspect", "plan", "serve", "usage", "migrate", "train", "train nano"])
def test_help_is_quick_and_has_examples(command: str) -> None:
    arguments = [*command.split(), "--help"]
    best = 9.0
    for _ in range(5):  # the best of a few, in processor time: the machine may be busy
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = dsv4(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if best < 0.5:
            break
    assert done.returncode == 0
    assert "examples:\n  dsv4 " in done.stdout
    assert best < 0.5


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert re.findall(r"^    (\w+)  ", capsys.readouterr().out, flags=re.M) == list(COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in OWN_HELP])
def test_examples_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    examples = re.findall(r"^  dsv4 (.*)$", capsys.readouterr().out, flags=re.M)
    assert examples
    for example in examples:
        assert build_parser().parse_args(shlex.split(example)).command == command


@pytest.mark.parametrize("name", PARSERS)
def test_examples_of_a_recipe_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    with pytest.raises(SystemExit, match="0"):
        main(["train", name, "--help"])
    examples = re.findall(rf"^  dsv4 train {name}(.*)$", capsys.readouterr().out, flags=re.M)
    assert examples
    for example in examples:
        parse(name, shlex.split(example))


def test_every_recipe_has_a_parser() -> None:
    assert set(PARSERS) == {path.stem for path in (ROOT / "recipes").glob("*.py")}


def test_a_recipes_words_and_flags_come_in_any_order() -> None:
    options = parse("pretrain", ["recipe.toml", "--run-dir", "runs/text", "model.layers=2"])
    assert options.recipe == ["recipe.toml", "model.layers=2"]


PUBLISHED = {
    "flash": (284_332_230_231, 290_942_278_866, 13_270_091_351, 69_187, 159_609_485_896, 3514.25, 0.073, 0.101),
    "pro": (1_572_997_179_491, 1_598_837_325_086, 48_852_379_747, 145_116, 864_704_792_696, 5031.4375, 0.105, 0.267),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_inspect_json_has_the_published_figures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", name, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    parameters, checkpoint, ratios = out["parameters"], out["checkpoint"], out["vs_v3_2"]
    assert (
        parameters["total"],
        parameters["total_with_mtp"],
        parameters["active"],
        checkpoint["tensors"],
        checkpoint["bytes"],
        out["kv_bytes_per_token"],
        round(ratios["kv_ratio_1m"], 3),
        round(ratios["flops_ratio_1m"], 3),
    ) == PUBLISHED[name]
    assert sum(checkpoint["by_dtype"].values()) == checkpoint["tensors"]
    assert sum(checkpoint["bytes_by_dtype"].values()) == checkpoint["bytes"]
    assert out["kv_bytes"]["1048576"] == out["kv_bytes_per_token"] * 1048576
    assert set(out["kv_bytes"]) == {"4096", "131072", "1048576"}
    assert {"4096", "1048576"} <= set(out["decode_flops"])


def test_inspect_table_shows_the_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", "flash"]) == 0
    out = capsys.readouterr().out
    for figure in ("284,332,230,231", "13,270,091,351", "69,187", "159,609,485,896", "3,514.25", "7.3%", "10.1%"):
        assert figure in out


def test_inspect_folder_counts_plain_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig.preset("nano")
    for raw, layout in (
        (config.to_dict(), "official"),
        (config.to_dict(quantized=False), "bf16"),
        ({**config.to_dict(quantized=False), "torch_dtype": "float32"}, "fp32"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert main(["inspect", str(tmp_path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["checkpoint"]["layout"] == layout


def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"hidden_sizes": 1}')
    for arguments, message in (
        (
            ["inspect", "flas"],
            "'flas' is neither a preset (flash, pro, flash-base, pro-base, nano) nor a model folder, nor own",
        ),
        (["inspect", str(tmp_path)], f"{tmp_path}/config.json: unknown key 'hidden_sizes'"),
        (["train"], "give the name of one of recipes/: corpus, demo, distill, grpo, nano, plot, pretrain"),
        (["train", "nanno"], "'nanno' is not in recipes/; allowed: "),
        (["train", "pretran"], "spike_drill, v4; did you mean pretrain?"),
        (
            ["train", "recipes/stages.toml", "data.text=docs"],
            "recipes/stages.toml is a file of keys; to train by it: dsv4 train pretrain recipes/stages.toml data.text=",
        ),
        (["train", "recipes/nano.toml"], "to train by it: dsv4 train nano recipes/nano.toml"),
        (["bench", "engin"], "; did you mean engine?"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"dsv4 {arguments[0]}: error: ") and error.count("\n") == 1
        assert message in error
    monkeypatch.setenv("DSV4_TRACEBACK", "1")
    with pytest.raises(ValueError, match="neither a preset"):
        main(["inspect", "flas"])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("serve nano --prot 9", "serve: error: no option --prot; did you mean --port? See dsv4 serve --help"),
        ("serve --quue-seconds=5", "serve: error: no option --quue-seconds; did you mean --queue-seconds? See dsv4"),
        ("inspect nano more --jsn", "inspect: error: no option --jsn; did you mean --json? See dsv4 inspect --help"),
        ("inspect nano more", "inspect: error: unexpected argument 'more'. See dsv4 inspect --help"),
        ("data inspect x --ouut", "data inspect: error: no option --ouut. See dsv4 data inspect --help"),
        ("serve --port many", "serve: error: argument --port: invalid int value: 'many'. See dsv4 serve --help"),
        ("chat --temperature 9", "chat: error: argument --temperature: it is '9'; allowed: [0, 2]. See dsv4 "),
        ("train pretrain --run-di x", "train pretrain: error: no option --run-di; did you mean --run-dir? See dsv4 "),
        ("train nano --steps 0", "train nano: error: argument --steps: '0'; allowed: a whole number, 1 or more. See "),
        ("train nano --seconds 0", "train nano: error: argument --seconds: '0'; allowed: seconds, above 0. See "),
        ("train demo --steps 0", "train demo: error: argument --steps: '0'; allowed: a whole number, 1 or more. See "),
        ("data solutions code --out x --count many", "data solutions: error: argument --count: 'many'; allowed: a "),
        ("train sft --dry-run nano talks.jsonl", "train sft: error: argument --dry-run: 'nano'; allowed: how many "
         "samples to show, as in --dry-run 3. See "),
        ("usage --by", "usage: error: argument --by: expected one argument. See dsv4 usage --help"),
    ],
)  # fmt: skip
def test_an_error_of_the_arguments_is_one_line(given: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given.split())
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"dsv4 {error}") and told.count("\n") == 1


def test_a_dry_run_without_a_number_shows_some_samples() -> None:
    for words, shown in ((["--dry-run"], 3), (["--dry-run", "1"], 1), (["--dry-run", "--ids"], 3), ([], None)):
        options = parse("sft", ["nano", "talks.jsonl", *words])
        assert (options.dry_run, options.model, options.words) == (shown, "nano", ["talks.jsonl"])


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for command, error in (
        ("sevre", "no command sevre; did you mean serve? See dsv4 --help"),
        ("xyzzy", "no command xyzzy. See dsv4 --help"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([command])
        assert capsys.readouterr().err == f"dsv4: error: {error}\n"


def test_a_recipe_and_the_evaluation_get_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    for command in ("train", "bench"):
        monkeypatch.setattr(
            f"dsv4.commands.{command}.run_script", lambda folder, name, rest: asked.append([folder, name, *rest])
        )
    monkeypatch.setattr("dsv4.commands.eval.run", lambda options: asked.append([options.command, *options.arguments]))
    for arguments in (
        ["train", "nano", "--resume", "data.scale=1"],
        ["bench", "engine", "-h", "x"],
        ["eval", "--help"],
        ["eval", "nano", "-h"],
    ):
        assert main(arguments) == 0
    assert asked == [
        ["recipes", "nano", "--resume", "data.scale=1"],
        ["benchmarks", "engine", "-h", "x"],
        ["eval", "--help"],
        ["eval", "nano", "-h"],
    ]


def test_a_missing_package_of_an_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(package: str) -> None:
        def handler(options: object) -> None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)

        monkeypatch.setattr("dsv4.commands.eval.run", handler)

    without("reasoning_gym")
    assert main(["eval", "nano"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "reasoning_gym is not installed" in error and "pip install '.[train]'" in error
    without("dsv4.nothing")
    with pytest.raises(ModuleNotFoundError, match=r"dsv4\.nothing"):
        main(["eval", "nano"])


def test_inspect_needs_no_torch() -> None:
    code = "import sys; from dsv4.cli import main; main(['inspect', 'nano']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m dsv4 inspect flash --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{", "")


def test_plan_needs_no_torch() -> None:
    code = "import sys; from dsv4.cli import main; main(['plan', 'flash', '--gpus', '512']); "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], capture_output=True)
    assert done.returncode == 0
