"""Models by name: the real huggingface_hub, and a hub on this machine. Each look-up is a process of its own."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file

from dsv4.checkpoint import save_model
from dsv4.config import ModelConfig, nano_path
from dsv4.hub import HubError, HubName, hub_name, in_words
from dsv4.model.transformer import Transformer
from dsv4.model_folder import model_name, resolve_model
from dsv4.tokenizer.prompts import LADDER_KEY
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer

from .hub_server import TOKEN, Hub, Repository, serving

ROOT = Path(__file__).parents[1]
NAME = "owner/tiny-v4"
UNWANTED = ("README.md", "pytorch_model.bin", "figure.png", "model.safetensors")  # the last beside an index
SHAPE = {
    "vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2, "num_hash_layers": 1, "n_routed_experts": 4,
    "compress_ratios": [0, 4, 0], "max_position_embeddings": 8192,
}  # fmt: skip
NOTHING = HubName("owner/name")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several shards, and files beside it that nothing here reads."""
    path = tmp_path_factory.mktemp("hub") / "tiny"
    model = Transformer(ModelConfig.from_dict(ModelConfig.preset("nano").to_dict() | SHAPE))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, model.config, path, max_shard_bytes=300_000)
    write_tokenizer(train_tokenizer(iter(["the cat sat on the mat"] * 4), 300), path)
    for name in UNWANTED:
        (path / name).write_bytes(b"not wanted")
    return path


@pytest.fixture(scope="module")
def plain_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without what a by-name fetch leaves out: the folder to compare with."""
    path = tmp_path_factory.mktemp("hub") / "plain"
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns(*UNWANTED))
    return path


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[Hub]:
    """NAME with a branch "other", whose settings say another length and ladder."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    (other / "generation_config.json").write_text(json.dumps({LADDER_KEY: "scalar"}))
    with serving(Hub({NAME: Repository({"main": folder, "other": other})})) as hub:
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """A process that looks the hub up, with a cache of its own for the test."""

    def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=_environment(hub, tmp_path) | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return start


def _environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return mine | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}


def resolved(run: Run, name: str, **environment: str) -> Path:
    """The folder that a name leads to."""
    done = run("-c", f"from dsv4.model_folder import resolve_model; print(resolve_model({name!r}))", **environment)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def refused(run: Run, command: str, name: str, *flags: str, **environment: str) -> str:
    """The one line with which a command ends."""
    done = run("-m", "dsv4", command, name, *flags, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"dsv4 {command}: error: "), done.stderr
    return done.stderr.removeprefix(f"dsv4 {command}: error: ").strip()


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_text_is_a_name_only_where_nothing_of_that_name_is_here(tmp_path: Path, monkeypatch) -> None:
    assert hub_name("deepseek-ai/DeepSeek-V4-Flash") == HubName("deepseek-ai/DeepSeek-V4-Flash")
    assert hub_name("a/b@refs/pr/1") == hub_name("a/b", "refs/pr/1") == HubName("a/b", "refs/pr/1")
    for text in ("nano", "flash", "./a", "/a/b", "a/b/c", "~/b", "a/", "a/b@", "a b/c", "a/../b"):
        assert hub_name(text) is None, text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert hub_name("a/b") is None and resolve_model("a/b") == Path("a/b")
    assert hub_name(Path("owner/name")) is None


def test_texts_that_are_no_model_are_answered_with_what_is_allowed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model() == resolve_model("nano") == nano_path()
    with pytest.raises(ValueError, match=r"'flas' is no folder here; allowed: a model folder, 'nano', or owner/name\["):
        resolve_model("flas")
    with pytest.raises(ValueError, match="'flash' is a shape without weights; allowed: a model folder"):
        resolve_model("flash")
    with pytest.raises(ValueError, match="revision is 'v1', but 'nano' is no name of a repository"):
        resolve_model(revision="v1")
    with pytest.raises(ValueError, match="revision is 'v1', but 'a/b@v2' names 'v2'; give one of them"):
        resolve_model("a/b@v2", "v1")


def test_a_name_is_fetched_once_and_then_needs_no_network(run: Run, hub: Hub, plain_folder: Path) -> None:
    found = resolved(run, NAME)
    assert files_of(found) == files_of(plain_folder), "exactly what the reader needs, byte for byte"
    assert model_name(found) == "tiny-v4"
    fetched = hub.sent
    hub.forget()
    assert resolved(run, NAME) == found
    assert hub.sent == 0 and len(hub.log) == 1, "one look for a newer commit"
    hub.forget()
    assert resolved(run, NAME, HF_HUB_OFFLINE="1") == found
    assert hub.log == [] and fetched >= sum(map(len, files_of(plain_folder).values()))
    assert resolved(run, NAME, HF_ENDPOINT="http://127.0.0.1:9") == found, "without a network, as offline"
    for command in ("serve", "inspect"):
        said = refused(run, command, "owner/absent", *(["--port", "0"] * (command == "serve")), HF_HUB_OFFLINE="1")
        assert said.startswith("owner/absent: HF_HUB_OFFLINE is set, and the cache ")


def test_a_revision_is_fetched(run: Run, hub: Hub) -> None:
    commit = hub.repositories[NAME].commit("other")
    assert commit is not None
    for name in (f"{NAME}@other", f"{NAME}@{commit}"):
        found = resolved(run, name)
        assert found.name == commit and ModelConfig.from_pretrained(found).max_position_embeddings == 4096
    done = run("-m", "dsv4", "inspect", NAME, "--revision", "other", "--json")
    assert json.loads(done.stdout)["config"]["max_position_embeddings"] == 4096
    assert refused(run, "inspect", f"{NAME}@v9") == (
        f"{NAME}@v9: no such revision; allowed: a branch, a tag or a commit of {hub.url}/{NAME}"
    )


def test_a_cut_connection_is_taken_up_where_it_broke(run: Run, hub: Hub, plain_folder: Path, tmp_path: Path) -> None:
    """To the 10 MiB that the library writes at a time."""
    large = tmp_path / "large"
    large.mkdir()
    shutil.copyfile(plain_folder / "config.json", large / "config.json")
    save_file({"a": torch.arange(3_000_000)}, large / "model.safetensors")
    hub.repositories["owner/large"] = Repository({"main": large})
    hub.cut_after["model.safetensors"] = 13_000_000
    assert files_of(resolved(run, "owner/large")) == files_of(large)
    asked = [line for line in hub.log if line.startswith("GET") and "model.safetensors" in line]
    assert len(asked) == 2 and asked[1].endswith(f"bytes={10 << 20}-"), asked


def test_what_is_there_already_is_not_fetched_again(run: Run, hub: Hub, plain_folder: Path) -> None:
    """After a start that was killed some shards are whole."""
    found = resolved(run, NAME)
    shards = sorted(found.glob("*.safetensors"))
    (lost := shards[1].resolve()).unlink()
    shards[1].unlink()
    hub.forget()
    assert refused(run, "serve", NAME, "--port", "0", HF_HUB_OFFLINE="1").startswith(f"{NAME}: HF_HUB_OFFLINE is set")
    assert files_of(resolved(run, NAME)) == files_of(plain_folder)
    assert hub.sent == lost.stat().st_size


def test_a_gated_repository_needs_a_token(run: Run, hub: Hub, plain_folder: Path) -> None:
    hub.repositories[NAME].gated = True
    for command in ("inspect", "verify"):
        assert refused(run, command, NAME) == (
            f"{NAME}: the repository is gated: accept its terms at {hub.url}/{NAME} and set HF_TOKEN to a token of"
            " that account"
        )
    assert files_of(resolved(run, NAME, HF_TOKEN=TOKEN)) == files_of(plain_folder)


def test_what_cannot_be_fetched_is_said_in_one_line(run: Run, hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    shutil.copyfile(folder / "config.json", tmp_path / "bin" / "config.json")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    hub.repositories["owner/bin"] = Repository({"main": tmp_path / "bin"})
    hub.repositories["owner/empty"] = Repository({"main": tmp_path / "empty"})
    absent = f"owner/absent: no such repository at {hub.url}/owner/absent, or a private one that HF_TOKEN opens"
    assert refused(run, "inspect", "owner/absent").startswith(absent)
    target = str(tmp_path / "out")
    assert refused(run, "convert", "owner/absent", target, "--format", "bf16").startswith(absent)
    assert "the repository has no config.json" in refused(run, "inspect", "owner/empty")
    assert "the repository has no model.safetensors; a model of" in refused(run, "verify", "owner/bin")
    nowhere = refused(run, "inspect", NAME, HF_ENDPOINT="http://127.0.0.1:9")
    assert re.match(rf"{NAME}: http://127.0.0.1:9 cannot be reached \(.*refused.*\), and the cache ", nowhere)
    assert "no name of a repository" in refused(run, "inspect", "owner/a--b")


def test_a_disk_that_is_too_small_is_said_before_the_first_shard(run: Run, hub: Hub, plain_folder: Path) -> None:
    shard = next(plain_folder.glob("*.safetensors"))
    hub.claimed[shard.name] = 10**18
    said = refused(run, "verify", NAME)
    assert said.startswith(
        f"{NAME}: no space left on the disk for the hub's cache (HF_HOME moves it): it takes 1e+09 GB"
    )
    assert not any("resolve" in line and "safetensors" in line and "index" not in line for line in hub.log)


def test_a_disk_that_fills_up_on_the_way_is_said_so() -> None:
    with pytest.raises(HubError, match="^owner/name: no space left on the disk for the hub's cache"), in_words(NOTHING):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(HubError, match="^owner/name: fetching from http.* has failed: cut off$"), in_words(NOTHING):
        raise RuntimeError("cut off\n\nand a second line")


def test_inspect_by_name_reads_headers_alone(run: Run, hub: Hub, plain_folder: Path, tmp_path: Path) -> None:
    """Of a folder whose weights are large; its counts are those of the folder here."""
    large = tmp_path / "large"
    large.mkdir()
    shutil.copyfile(plain_folder / "config.json", large / "config.json")
    weight_map = {}
    for number in range(3):
        tensors = {f"t{number}.{i}": torch.zeros(1 << 18) for i in range(8)}
        tensors |= {f"a.rather.long.name.of.a.tensor.{number}.{i}": torch.zeros(1).bfloat16() for i in range(1000)}
        save_file(tensors, large / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (large / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    hub.repositories["owner/large"] = Repository({"main": large})
    by_name = run("-m", "dsv4", "inspect", "owner/large", "--json")
    size = sum(file.stat().st_size for file in large.iterdir())
    index = (large / "model.safetensors.index.json").stat().st_size
    assert size > 25_000_000 and hub.sent < index + 3 * 250_000 + 10_000, (size, hub.sent)
    by_folder = run("-m", "dsv4", "inspect", str(large), "--json")
    counts = json.loads(by_name.stdout)
    assert counts["stored"]["tensors"] == 3024 and counts["stored"]["by_dtype"] == {"BF16": 3000, "F32": 24}
    assert counts | {"model": ""} == json.loads(by_folder.stdout) | {"model": ""}


def test_inspect_by_name_equals_inspect_of_the_folder(run: Run, hub: Hub, plain_folder: Path) -> None:
    want = json.loads(run("-m", "dsv4", "inspect", str(plain_folder), "--json").stdout)
    assert want["stored"]["bytes"] == want["checkpoint"]["bytes"]
    assert want["stored"]["by_dtype"] == dict(sorted(want["checkpoint"]["by_dtype"].items()))
    for _ in ("headers from the hub", "weights in the cache"):
        got = json.loads(run("-m", "dsv4", "inspect", NAME, "--json").stdout)
        assert got == want | {"model": NAME}
        resolved(run, NAME)
    shown = run("-m", "dsv4", "inspect", NAME, COLUMNS="80").stdout
    assert f"in {want['stored']['files']} files " in shown and shown.count(f"{want['stored']['bytes']:,}") == 2


def test_python_takes_names(run: Run, plain_folder: Path) -> None:
    code = f"""
import dsv4, torch
from dsv4.tokenizer.prompts import PromptEncoder
assert dsv4.ModelConfig.from_pretrained({NAME!r}) == dsv4.ModelConfig.from_pretrained({str(plain_folder)!r})
assert dsv4.ModelConfig.from_pretrained({NAME!r}, revision="other").max_position_embeddings == 4096
assert dsv4.Tokenizer.from_pretrained({NAME!r}).encode("the cat")
assert dsv4.Tokenizer.from_pretrained({NAME!r}, revision="other").encode("the cat")
assert PromptEncoder.from_pretrained({NAME!r}, revision="other").ladder == "scalar"
ids = torch.arange(40)[None]
assert torch.equal(dsv4.load({NAME!r})(ids), dsv4.load({str(plain_folder)!r})(ids))
assert dsv4.load({NAME!r}, revision="other").config.max_position_embeddings == 4096
llm = dsv4.LLM({NAME!r}, revision="other")
assert (llm.name, llm.max_model_len) == ("tiny-v4", 4096) and llm.tokenizer is not None
try:
    dsv4.LLM(dsv4.load({NAME!r}), revision="other")
except ValueError as error:
    assert "revision is 'other', but the model is an object" in str(error)
else:
    raise AssertionError
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_convert_takes_a_name(run: Run, plain_folder: Path, tmp_path: Path) -> None:
    done = run("-m", "dsv4", "convert", NAME, str(tmp_path / "named"), "--format", "bf16")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert run("-m", "dsv4", "convert", str(plain_folder), str(tmp_path / "here"), "--format", "bf16").returncode == 0
    assert files_of(tmp_path / "named") == files_of(tmp_path / "here")


def test_serve_by_name_answers_under_the_repositorys_name(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsv4", "serve", NAME, "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, env=_environment(hub, tmp_path), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"tiny-v4 is ready\. Chat page: (http://127\.0\.0\.1:\d+)/\n", line)
            assert found, line
            assert httpx.get(f"{found[1]}/v1/models", timeout=60).json()["data"][0]["id"] == "tiny-v4"
            body = {"model": "tiny-v4", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4}
            answer = httpx.post(f"{found[1]}/v1/chat/completions", json=body, timeout=120)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()


def test_help_does_not_import_the_library() -> None:
    code = (
        "import sys\nfrom dsv4.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "main(['inspect', 'nano'])\nsys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0
