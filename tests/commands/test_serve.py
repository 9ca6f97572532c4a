"""Flags of `dsv4 serve` reach the model, the engine and the server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import dsv4.engine
from dsv4.cli import main
from dsv4.engine.config import EngineConfig
from dsv4.engine.process import client
from dsv4.engine.process.restarts import RestartPolicy
from dsv4.server import run


class Loaded(Exception):
    """Raised in place of loading the model."""


FLAGS = (
    "--max-num-seqs 3 --max-waiting 5 --queue-seconds 9 --max-model-len 100 --device meta --dtype bfloat16 "
    "--skip-weight-check --no-memory-check"
)


@pytest.mark.parametrize("place", [[], ["--engine-in-process"]])
def test_the_engines_flags_reach_the_llm(monkeypatch: pytest.MonkeyPatch, place: list[str]) -> None:
    def llm(model: str | Path, engine_config: EngineConfig) -> None:
        raise Loaded(str(model), engine_config)

    def engine_process(
        make: Callable[[], object], restarts: RestartPolicy, compiling: float, stuck: float, queue: float
    ) -> None:
        assert not place and (restarts.max_crashes, compiling, stuck, queue) == (3, 2.5, 40.0, 9.0)
        make()

    monkeypatch.setattr(dsv4.engine, "LLM", llm)
    monkeypatch.setattr(client, "EngineProcess", engine_process)
    of_process = [] if place else ["--max-crashes", "3", "--stuck-seconds", "40"]
    flags = [*place, *of_process, "--compile-seconds", "2.5", *FLAGS.split()]
    with pytest.raises(Loaded) as loaded:
        main(["serve", "path/to/model", "--port", "0", *flags])
    assert loaded.value.args == (
        "path/to/model",
        EngineConfig(
            max_num_seqs=3,
            max_num_waiting=5,
            max_queue_seconds=9.0,
            max_model_len=100,
            device="meta",
            dtype="bfloat16",
            check_values=False,
            check_memory=False,
        ),
    )


def test_the_servers_flags_reach_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(run, "serve", lambda model, **options: given.update(options, model=model))
    monkeypatch.setenv("DSV4_API_KEY", "sk-2")
    flags = "--host ::1 --port 9 --threads 2 --api-key sk-1 --allowed-host a --allowed-host b --allowed-origin null"
    limits = "--grace-seconds 1.5 --client-seconds 2 --max-connections 7 --usage-db u.db --log-prompts"
    assert main(["serve", *flags.split(), *limits.split()]) == 0
    wanted = {
        "model": None, "host": "::1", "port": 9, "threads": 2, "api_keys": ["sk-1", "sk-2"],
        "allowed_hosts": ["a", "b"], "allowed_origins": ["null"],
        "grace_seconds": 1.5, "client_seconds": 2.0, "max_connections": 7, "usage_db": "u.db",
        "log_prompts": True,
    }  # fmt: skip
    assert given.items() >= wanted.items()


def test_several_models_and_the_retired_names(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(run, "serve", lambda model, **options: given.update(options, model=model))
    main(["serve", "a", "b/c", "--retired-models", "--model-alias", "gpt-5"])
    assert (given["model"], given["retired_models"], given["model_aliases"]) == (["a", "b/c"], True, ["gpt-5"])
    main(["serve", "a"])
    assert (given["model"], given["retired_models"]) == ("a", False)


def test_an_invalid_value_is_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--threads", "0"], "--threads is 0; allowed: 1 or more\n"),
        (["--max-waiting", "0"], "--max-waiting is 0"),
        (["--num-pages", "0"], "--num-pages is 0; allowed: 1 or more pages\n"),
        (["--cache-window", "foo"], "--cache-window is 'foo'; allowed: full"),
        (["--api-key-file", "/no/such/file"], "--api-key-file /no/such/file: No such file or directory\n"),
    ):
        assert main(["serve", "/no/such/model", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"dsv4 serve: error: {message}") and error.count("\n") == 1
