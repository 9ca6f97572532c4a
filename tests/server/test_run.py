"""`serve` as a user starts it: a real process, a real (random) model folder."""

import contextlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import torch

from dsv4.checkpoint import save_model
from dsv4.checkpoint.errors import CheckpointError
from dsv4.config import ModelConfig
from dsv4.kernels import backends
from dsv4.model.transformer import Transformer
from dsv4.server.config import ServerConfig
from dsv4.server.listening import PortTakenError, address, bind
from dsv4.server.run import serve
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer

from . import patient


def test_a_taken_port_is_reported_before_anything_is_loaded(monkeypatch) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            PortTakenError, match=rf"cannot listen on 127.0.0.1 port {port}: .*choose another with --port"
        ):
            serve("/no/such/model", port=port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"host is '192.0.2.1'; this machine has no such address"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=rf"port is {port}; allowed: \[0, 65535\]"):
        bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70 + ".invalid"])
def test_an_impossible_host_is_named(host: str) -> None:
    with pytest.raises(ValueError, match=f"host is '{host}'; allowed: a name or an address of this machine"):
        bind(host, 0)


def test_impossible_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="threads is 0; allowed: 1 or more"):
        serve("/no/such/model", port=0, threads=0)


def test_an_open_server_on_the_network_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for host, keys, warned in (("127.0.0.1", [], False), ("0.0.0.0", ["sk-1"], False), ("0.0.0.0", [], True)):
        caplog.clear()
        with pytest.raises(sqlite3.OperationalError):  # comes next, before anything is loaded
            serve(host=host, port=0, api_keys=keys, response_store=str(tmp_path))
        assert ("everyone who reaches 0.0.0.0:" in caplog.text) == warned, (host, keys)


def test_addresses_are_urls_for_a_browser() -> None:
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")):
        with bind(host, 0) as listening:
            assert address(listening) == f"http://{shown}:{listening.getsockname()[1]}"
    if socket.has_ipv6:
        try:
            listening = bind("::1", 0)
        except OSError:
            return  # no IPv6 on this machine
        with listening:
            assert address(listening) == f"http://[::1]:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random"
    shape = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2, "num_hash_layers": 1}
    shape |= {"compress_ratios": [0, 4, 0], "max_position_embeddings": 8192, "n_routed_experts": 8}
    model = Transformer(ModelConfig.from_dict(ModelConfig.preset("nano").to_dict() | shape))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, model.config, path)  # the official layout, FP4 experts and FP8 linears
    write_tokenizer(train_tokenizer(iter(["the cat sat on the mat"] * 4), 300), path)
    return path


@contextlib.contextmanager
def process_serving(folder: Path, **options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts a process that serves a folder -> (process, the URL that it printed)."""
    code = f"from dsv4.server.run import serve; serve({str(folder)!r}, port=0, threads=1, **{options!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"random is ready\. Chat page: (http://127\.0\.0\.1:\d+)/\n", line)
            assert found, line
            yield process, found[1]
        finally:
            process.kill()


def test_both_sdks_talk_to_a_served_folder(folder: Path) -> None:
    with process_serving(folder, api_keys=["sk-1"]) as (process, url):
        question = [{"role": "user", "content": "the cat"}]
        with openai.OpenAI(base_url=url + "/v1", api_key="sk-1", max_retries=0) as client:
            options = {"model": "random", "messages": question, "max_tokens": 12, "seed": 5, "reasoning_effort": "low"}
            whole = client.chat.completions.create(**options)
            assert 1 <= whole.usage.completion_tokens <= 12
            chunks = list(client.chat.completions.create(stream=True, **options))
            streamed = "".join(chunk.choices[0].delta.reasoning_content or "" for chunk in chunks)
            assert streamed == whole.choices[0].message.reasoning_content, "a seed gives the same text, streamed or not"
        with anthropic.Anthropic(base_url=url + "/anthropic", api_key="sk-1", max_retries=0) as client:
            message = client.messages.create(model="random", messages=question, max_tokens=8)
            assert 1 <= message.usage.output_tokens <= 8
        assert patient.get(url + "/").status_code == 200
        assert patient.get(url + "/v1/models").status_code == 401
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130, -signal.SIGINT)


def test_ctrl_c_ends_the_server_while_a_client_still_streams(folder: Path) -> None:
    body = {"model": "random", "messages": [{"role": "user", "content": "x"}], "stream": True}
    body |= {"max_tokens": 8000, "ignore_eos": True}
    with (
        process_serving(folder) as (process, url),
        httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=20) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        process.wait(60)  # the time of grace is over long before
        with contextlib.suppress(httpx.HTTPError):
            assert "data: [DONE]" not in list(lines), "it waited for the whole answer"


def test_weights_cut_short_under_a_server_fail_its_health(folder: Path, tmp_path: Path) -> None:
    """The next request gets the error, and no damaged answer is sent."""
    if backends.native_module() is None:
        pytest.skip("the reference kernels keep no weights in files")
    copy = tmp_path / "random"
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    with process_serving(copy) as (_, url):
        assert patient.get(url + "/health").status_code == 200
        os.truncate(file, 4096)
        body = {"model": "random", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
        answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 503 and "was cut from" in answer.json()["error"]["message"]
        health = patient.get(url + "/health")
        assert health.status_code == 503 and str(file) in health.json()["error"]


@contextlib.contextmanager
def slow_loading(folder: Path, may_load: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process whose loading begins when the file `may_load` is there -> (process, URL)."""
    reserved = socket.socket()  # it holds the port until the server has it: no other process is given it meanwhile
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # but one that asks for it by number, as the server
    reserved.bind(("127.0.0.1", 0))
    port = reserved.getsockname()[1]
    code = (
        "import pathlib, time; from dsv4.server import loading, run\n"
        "load = loading.load_engines\n"
        "def slow(*given):\n"
        f"    while not pathlib.Path({str(may_load)!r}).exists(): time.sleep(0.05)\n"
        "    return load(*given)\n"
        f"run.load_engines = slow; run.serve({str(folder)!r}, port={port}, threads=1)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with reserved, subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def ask_when_bound(url: str, path: str) -> httpx.Response:
    deadline = time.monotonic() + 300
    while True:
        try:
            return httpx.get(url + path, timeout=60)
        except httpx.ConnectError:
            assert time.monotonic() < deadline, "the port is not bound"
            time.sleep(0.05)


def test_the_server_says_that_it_is_loading(folder: Path, tmp_path: Path) -> None:
    with slow_loading(folder, tmp_path / "load") as (process, url):
        health = ask_when_bound(url, "/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        assert int(health.headers["Retry-After"]) >= 1 and health.headers["x-request-id"]
        assert patient.get(url + "/health/deep").json() == {"status": "loading"}
        chat = patient.post(url + "/v1/chat/completions", json={})
        assert chat.status_code == 503 and chat.headers["x-should-retry"] == "true" and chat.headers["Retry-After"]
        assert "loading" in chat.json()["error"]["message"]
        assert patient.post(url + "/anthropic/v1/messages", json={}).json()["type"] == "error"
        (tmp_path / "load").touch()
        assert process.stdout is not None
        assert process.stdout.readline().startswith("random is ready")
        assert patient.get(url + "/health").status_code == 200


def test_ctrl_c_ends_a_server_that_is_loading(folder: Path, tmp_path: Path) -> None:
    with slow_loading(folder, tmp_path / "never") as (process, url):
        assert ask_when_bound(url, "/health").status_code == 503
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130, -signal.SIGINT)


def test_an_error_of_loading_is_raised(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json"):
        serve(tmp_path, port=0)


def test_models_of_one_name_are_refused_before_loading(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "random")
    with pytest.raises(ValueError, match="two models are named 'random'"):
        serve([folder, tmp_path / "random"], port=0)
    with pytest.raises(ValueError, match="there is no model to serve"):
        serve([], port=0)


def test_several_folders_are_served_by_one_process(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    code = f"from dsv4.server.run import serve; serve({[str(folder), str(tmp_path / 'other')]!r}, port=0, threads=1)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = re.fullmatch(r"random, other are ready\. Chat page: (\S+)/\n", process.stdout.readline())
            assert found
            with openai.OpenAI(base_url=found[1] + "/v1", api_key="x", max_retries=0) as client:
                options = {"prompt": "the cat", "max_tokens": 8, "seed": 5}
                texts = {name: client.completions.create(model=name, **options) for name in ("random", "other")}
            assert {name: answer.model for name, answer in texts.items()} == {"random": "random", "other": "other"}
            assert texts["random"].choices[0].text == texts["other"].choices[0].text, "the same weights"
        finally:
            process.kill()


@pytest.mark.parametrize(("options", "words"), [
    ({"max_requests_per_key": 5}, "max_requests_per_key is 5 without API keys"),
    ({"tokens_per_minute_per_key": 5}, "tokens_per_minute_per_key is 5 without API keys"),
    ({"share_prefixes": "key"}, "share_prefixes is 'key' without API keys"),
    ({"max_crashes": 1, "engine_process": False}, "max_crashes is 1 without an engine process, where it does nothing"),
    ({"stuck_seconds": 9.0, "engine_process": False}, "stuck_seconds is 9.0 without an engine process"),
    ({"max_crashes": 1, "cluster": "local"}, "max_crashes is 1 with a cluster"),
])  # fmt: skip
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServerConfig(**options)
    if "engine_process" not in options and "cluster" not in options:
        ServerConfig(**options, api_keys=["sk-one"])


def test_options_that_do_something_are_not() -> None:
    ServerConfig(share_prefixes="user"), ServerConfig(cluster="local", stuck_seconds=9.0)
    ServerConfig(engine_process=False), ServerConfig(max_crashes=1, stuck_seconds=9.0)
