import logging
import os
from pathlib import Path

import pytest

from dsv4.cli import main
from dsv4.server.key_limits import KeyLimits
from dsv4.server.keys import collect_keys, read_key_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# ours\nsk-one\n\n  sk-two   # Anna's\n")
    path.chmod(0o600)
    return path


def test_keys_of_all_sources_count(file: Path) -> None:
    keys = collect_keys(["sk-flag"], file, {"DSV4_API_KEY": "sk-env, sk-one"})
    assert keys == ["sk-flag", "sk-env", "sk-one", "sk-two"]
    assert collect_keys([], None, {}) == []


def test_a_key_of_several_sources_keeps_its_limits(file: Path) -> None:
    file.write_text("sk-one max_requests=2\nsk-two\n")
    for given, environment in ((["sk-one"], {}), ([], {"DSV4_API_KEY": "sk-two,sk-one"})):
        keys = {str(key): getattr(key, "limits", None) for key in collect_keys(given, file, environment)}
        assert keys == {"sk-one": KeyLimits(max_requests=2), "sk-two": None}
    file.write_text("sk-one max_requests=2\nsk-one max_requests=3\n")
    with pytest.raises(ValueError, match="line 2 has limits of an API key that stands in an earlier line too"):
        read_key_file(file)


@pytest.mark.parametrize(
    ("given", "environment", "place"),
    [
        ([""], {}, "--api-key"),
        ([" "], {}, "--api-key"),
        ([], {"DSV4_API_KEY": ""}, "DSV4_API_KEY"),  # an unset variable in a compose file must not open the server
        ([], {"DSV4_API_KEY": "a,,b"}, "DSV4_API_KEY"),
    ],
)
def test_an_empty_key_is_refused_with_its_source(given: list[str], environment: dict[str, str], place: str) -> None:
    with pytest.raises(
        ValueError, match=rf"an API key is an empty string \({place}\); give keys of at least 1 character"
    ):
        collect_keys(given, None, environment)


def test_a_key_that_no_header_can_carry_is_refused(file: Path) -> None:
    file.write_text("sk-one\nsk two\n")
    with pytest.raises(ValueError, match="line 2.* holds white space or characters beyond ASCII"):
        read_key_file(file)


def test_a_file_without_keys_is_refused(file: Path) -> None:
    file.write_text("# none yet\n\n")
    with pytest.raises(ValueError, match="holds no API key; allowed: one per line"):
        read_key_file(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text file"):
        read_key_file(file)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_key_file_that_others_can_read_is_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dsv4.server"):
        read_key_file(file)
        assert not caplog.messages
        file.chmod(0o640)
        assert read_key_file(file) == ["sk-one", "sk-two"]
    assert "mode 0640: others can read the API keys in it; chmod 600" in caplog.messages[0]


def test_the_command_line_says_what_is_wrong_before_it_loads(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("DSV4_API_KEY", "")
    assert main(["serve", "/no/such/model"]) == 2
    assert "DSV4_API_KEY" in capsys.readouterr().err
    monkeypatch.delenv("DSV4_API_KEY")
    assert main(["serve", "--api-key-file", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_the_command_line_passes_all_keys_on(monkeypatch, file: Path) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr("dsv4.server.run.serve", lambda model, **options: seen.update(options))
    monkeypatch.setenv("DSV4_API_KEY", "sk-env")
    assert main(["serve", "--api-key", "sk-flag", "--api-key-file", str(file)]) == 0
    assert seen["api_keys"] == ["sk-flag", "sk-env", "sk-one", "sk-two"]
