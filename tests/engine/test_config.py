"""An engine option is declared once: its keyword, check and flag follow from the field."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dsv4.cli import build_parser
from dsv4.commands.options import add_flags, pick_flags
from dsv4.engine import LLM
from dsv4.engine.config import EngineConfig
from dsv4.model import transformer
from dsv4.options import check_keywords, format_size, option, options_of, parse_size, pick_keywords, takes_options
from dsv4.server.config import ServerConfig
from dsv4.server.run import serve

COMMANDS = ("serve", "chat", "generate", "inspect", "convert", "verify")


@dataclass(frozen=True)
class Probe(EngineConfig):
    """The engine's options plus three new ones."""

    draft_tokens: int = option(2, "draft tokens per step (default: %(default)s)", unit="tokens", minimum=0, metavar="N")
    kept_window: str | None = option(None, "what is kept", choices=("full", "zero"), commands=("chat",))
    rehearse: bool = option(False, "draft and verify")


def test_a_new_field_is_a_flag_with_its_help() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Probe, "serve")
    text = parser.format_help()
    assert "--draft-tokens N" in text and "draft tokens per step (default: 2)" in text
    assert "--rehearse" in text and "--kept-window" not in text
    given = pick_flags(parser.parse_args(["--draft-tokens", "5", "--rehearse"]), Probe)
    assert given == pick_flags(parser.parse_args([]), Probe) | {"draft_tokens": 5, "rehearse": True}
    assert given["max_num_seqs"] == 8 and given["cache_window"] == "full" and "kept_window" not in given
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype", "float16"])


def test_a_new_field_is_a_keyword_with_a_default_and_a_check() -> None:
    @takes_options(Probe)
    def run(name: str, **options: object) -> Probe:
        check_keywords("run", options, Probe)
        return pick_keywords(Probe, options)

    assert str(inspect.signature(run)).endswith(
        "kept_window: 'str | None' = None, rehearse: 'bool' = False) -> 'Probe'"
    )
    assert run("x", draft_tokens=3) == Probe(draft_tokens=3)
    with pytest.raises(ValueError, match="draft_tokens is -1; allowed: 0 or more tokens"):
        run("x", draft_tokens=-1)
    with pytest.raises(ValueError, match="kept_window is 'half'; allowed: full, zero, or None"):
        run("x", kept_window="half")
    with pytest.raises(
        TypeError, match=r"run\(\) got an unknown keyword 'drafts'; allowed: cache_bytes, cache_dir, cache_window, "
    ):
        run("x", drafts=3)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_is_a_flag_of_the_commands_that_it_names(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    shown = capsys.readouterr().out
    for known in options_of(EngineConfig):
        flag = known.flag or f"--{known.name.replace('_', '-')}"
        assert (f" {flag}" in shown) == (command in known.commands), known.name
        assert set(known.commands) <= set(COMMANDS)


def test_every_field_is_a_keyword_of_llm_and_of_serve() -> None:
    for function, configs in ((LLM, (EngineConfig,)), (serve, (EngineConfig, ServerConfig))):
        parameters = inspect.signature(function).parameters
        fields = [field for config in configs for field in dataclasses.fields(config)]
        assert {field.name: field.default for field in fields}.items() <= {
            name: parameter.default for name, parameter in parameters.items()
        }.items()
        assert len({field.name for field in fields}) == len(fields), "an option of both would reach one of them"
        assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def test_llm_takes_keywords_a_config_or_both(model) -> None:
    assert LLM(model, max_num_seqs=2).engine_config == EngineConfig(max_num_seqs=2)
    config = EngineConfig(max_num_seqs=2, max_model_len=50)
    llm = LLM(model, engine_config=config, max_num_seqs=3)
    assert llm.engine_config == EngineConfig(max_num_seqs=3, max_model_len=50)
    assert llm.max_model_len == 50 and len(model.cache.histories) == 3


def test_an_unknown_keyword_is_answered_with_the_known_ones(model) -> None:
    with pytest.raises(
        TypeError, match=r"LLM\(\) got an unknown keyword 'max_len'; allowed: .*max_model_len, max_num_"
    ):
        LLM(model, max_len=5)
    with pytest.raises(TypeError, match=r"serve\(\) got an unknown keyword 'prot'; allowed: .*host, .*port, .*threads"):
        serve(prot=5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0; allowed: 1 or more requests"),
        ({"max_num_seqs": 2.5}, "max_num_seqs is 2.5; it must be an integer"),
        ({"max_num_seqs": True}, "max_num_seqs is True; it must be an integer"),
        ({"check_memory": "no"}, "check_memory is 'no'; it must be True or False"),
        ({"device": 3}, "device is 3; it must be a text"),
        ({"revision": 1.5}, "revision is 1.5; it must be a text"),
        ({"max_num_waiting": 0}, "max_num_waiting is 0; allowed: 1 or more requests"),
        ({"max_waiting_tokens": 0}, "max_waiting_tokens is 0; allowed: 1 or more tokens"),
        ({"max_model_len": 1}, "max_model_len is 1; allowed: 2 or more tokens, or None"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens is 8; it must be at least max_num"),
        ({"dtype": "half"}, "dtype is 'half'; allowed: auto, bfloat16, float32, or a torch.dtype"),
        ({"numerics": "exact"}, "numerics is 'exact'; allowed: float, bf16, shipped"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("8G", 8 << 30), ("8 GiB", 8 << 30), ("1.5k", 1536), ("500MB", 500_000_000), ("2T", 2 << 40)],
)
def test_a_size_has_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, "serve")
    assert parser.parse_args(["--expert-memory", text]).expert_memory == size


@pytest.mark.parametrize("name", ["prefix_cache_bytes", "cache_bytes", "expert_memory", "response_store_bytes"])
def test_a_size_with_a_unit_is_a_keyword_too(name: str) -> None:
    config: Any = ServerConfig if name == "response_store_bytes" else EngineConfig
    assert getattr(config(**{name: "1.5G"}), name) == 3 << 29
    with pytest.raises(ValueError, match=f"{name}: size 'many'; allowed: a number of bytes, or with a unit"):
        config(**{name: "many"})
    with pytest.raises(ValueError, match=f"{name} is 1.5; it must be an integer"):
        config(**{name: 1.5})


def test_help_shows_the_defaults_of_sizes_with_their_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--prefix-cache-bytes SIZE memory of prefixes for later requests (default: 1G)" in shown
    assert "0 stores none (default: 256M)" in shown
    assert build_parser().parse_args(["serve"]).prefix_cache_bytes == 1 << 30
    for size, text in ((0, "0"), (1, "1"), (1023, "1023"), (1536, "1536"), (10 << 10, "10K"), (1 << 50, "1024T")):
        assert format_size(size) == text and parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "8X", "1e9", "8 G B"])
def test_a_size_that_is_none_is_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="a number of bytes, or with a unit, as in 500M, 8G or 1.5T"):
        parse_size(text)
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, "serve")
    with pytest.raises(SystemExit):
        parser.parse_args([f"--expert-memory={text}"])
    assert f"argument --expert-memory: size {text!r}; allowed: a number" in capsys.readouterr().err


def test_a_torch_dtype_is_taken() -> None:
    assert EngineConfig(dtype=torch.float16).dtype is torch.float16


def test_the_numerics_are_the_models() -> None:
    (numerics,) = (known for known in options_of(EngineConfig) if known.name == "numerics")
    assert numerics.choices == transformer.NUMERICS
