"""Every command of docs/usage.md does what it says, the server's included."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dsv4.cli import main
from dsv4.usage.report import write_records
from dsv4.usage.store import insert, open_store, read_records
from tests.readme_commands import arguments, commands
from tests.usage.conftest import record

ROOT = Path(__file__).parents[2]
COMMANDS = commands((ROOT / "docs" / "usage.md").read_text(encoding="utf-8"))
URL = "postgresql://dsv4@localhost/dsv4"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the page names."""
    monkeypatch.chdir(tmp_path)
    store = open_store("usage.db")
    insert(store, [record()])
    with open("usage.csv", "w") as file:
        write_records(file, read_records(store))
    with zipfile.ZipFile("usage_data.zip", "w") as archive:
        header = "user_id,utc_date,model,api_key_name,api_key,type,price,amount"
        archive.writestr("amount.csv", f"{header}\nu,2026-01-01,deepseek-chat,k,sk,output_tokens,0.00000042,1000000\n")
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    Path("answers.jsonl").write_text(json.dumps({"created": 1793880000, "model": "deepseek-chat", "usage": usage}))
    Path("src").mkdir()
    Path("src", "a.py").write_text('create(base_url="https://api.deepseek.com", model="deepseek-chat", messages=m)\n')
    Path("app.env").write_text("MODEL=deepseek-chat\n")
    return tmp_path


@pytest.mark.parametrize("command", [text for text in COMMANDS if "serve" not in text and URL not in text])
def test_the_commands_run(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(command)
    proposes = given[0] == "migrate" and "src" in given and "--write" not in given
    assert main(given) == (1 if proposes else 0)
    out = capsys.readouterr().out
    assert ("deepseek-v4-pro" if "deepseek-v4-pro" in command and given[0] == "migrate" else "") in out
    assert len(out.splitlines()) > 1


@pytest.mark.postgres
@pytest.mark.parametrize("command", [text for text in COMMANDS if text.startswith("dsv4 usage") and URL in text])
def test_the_commands_run_with_postgresql(
    command: str, postgres_place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(postgres_place)
    insert(store, [record()])
    store.close()
    assert main(arguments(command.replace(URL, postgres_place))) == 0
    assert "****1234#00000000" in capsys.readouterr().out


@pytest.fixture(params=[text for text in COMMANDS if text.startswith("dsv4 serve")])
def served_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Database and arguments of a serve command of the page."""
    given = arguments(request.param)
    place = str(tmp_path / "usage.db")
    if URL in given:
        place = request.getfixturevalue("postgres_place")
    yield place, [place if argument in (URL, "usage.db") else argument for argument in given]


@pytest.mark.postgres
def test_a_server_records_until_it_is_stopped(served_place: tuple[str, list[str]], tmp_path: Path) -> None:
    place, given = served_place
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "dsv4", *given, "--port", "0"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if found := re.search(r"OpenAI base URL: (\S+)", line):
                break
        else:
            raise AssertionError("the server has not started")
        body = {"model": "deepseek-v4-flash", "messages": [{"role": "user", "content": "1, 2,"}]}
        body |= {"max_tokens": 4, "temperature": 0}
        for user in ("ann", "bob"):
            answer = httpx.post(f"{found[1]}/chat/completions", json=body | {"user_id": user}, timeout=120)
            assert answer.status_code == 200, answer.text
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.communicate()
    store = open_store(place, create=False)
    records = list(read_records(store))
    store.close()
    assert [(row.user_id, row.completion_tokens, row.finish_reason) for row in records] == [
        ("ann", 4, "length"),
        ("bob", 4, "length"),
    ]
