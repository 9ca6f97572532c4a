"""GET /metrics, read by Prometheus' own parser."""

from __future__ import annotations

import re
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsv4.engine import LLM
from dsv4.engine.process.client import EngineProcess

from .conftest import serving
from .responses_api import markup
from .scripted_engine import scripted_llm

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
DOC = Path(__file__).parents[2] / "docs" / "request.md"


def families(text: str) -> dict[str, object]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(text: str, model: str = "tiny") -> dict[str, float]:
    """Sample name and labels but the model's -> value."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == model
            found["/".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def test_prometheus_reads_what_was_counted(model, serve) -> None:
    with serve(model) as served:
        for _ in range(3):
            assert served.http().post("/v1/chat/completions", json=BODY).status_code == 200
        served.wait_until_idle()
        response = served.http().get("/metrics")
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=")
        got = samples(response.text)
        assert got["vllm:request_success_total/stop"] == 3
        assert got["vllm:time_to_first_token_seconds_count"] == 3
        assert got["vllm:time_to_first_token_seconds_bucket/+Inf"] == 3
        assert 0 < got["vllm:time_to_first_token_seconds_sum"] < got["vllm:e2e_request_latency_seconds_sum"]
        assert got["vllm:generation_tokens_total"] == model.num_sampled
        assert got["vllm:prompt_tokens_total"] == sum(map(len, model.prompts))
        assert got["vllm:num_requests_running"] == got["vllm:num_requests_waiting"] == 0
        buckets = [value for name, value in got.items() if name.startswith("vllm:iteration_tokens_total_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == got["vllm:iteration_tokens_total_count"]


def test_running_requests_are_shown_while_the_engine_is_busy(model, serve) -> None:
    model.reply, model.seconds_per_step = "</think>" + "word " * 3000, 0.01
    with serve(model, max_num_seqs=1) as served:
        leave = threading.Event()

        def hold() -> None:
            with served.http().stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}):
                leave.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            served.wait_until_running()
            assert samples(served.http().get("/metrics").text)["vllm:num_requests_running"] == 1
        finally:
            leave.set()
            thread.join()
        served.wait_until_idle()
        assert samples(served.http().get("/metrics").text)["vllm:request_success_total/abort"] == 1


@pytest.mark.parametrize("process", [False, True], ids=["in the server", "process"])
def test_answers_that_their_calls_have_ended_have_stopped(model, folder: Path, process: bool) -> None:
    """The engine would go on; it is told before the client has its answer, so that it is the same however it races."""
    fields = {"reply": "</think>" + markup("f", x="v") + "word " * 5000, "seconds_per_step": 0.01}
    for name, value in fields.items():
        setattr(model, name, value)
    llm = EngineProcess(partial(scripted_llm, folder, fields)) if process else LLM(model, folder=folder)
    tool = {"type": "function", "function": {"name": "f"}}
    with serving(llm, model) as served:
        for _ in range(3):
            answer = served.http().post("/v1/chat/completions", json=BODY | {"tools": [tool]}).json()
            assert answer["choices"][0]["finish_reason"] == "tool_calls"
        served.wait_until_idle()
        got = samples(served.http().get("/metrics").text)
    assert (got["vllm:request_success_total/stop"], got["vllm:request_success_total/abort"]) == (3, 0)
    assert got["vllm:generation_tokens_total"] < 5000, "of 25,000 of each answer: it may be told late"


def test_metrics_need_a_key_where_answers_do(model, serve) -> None:
    with serve(model, api_keys=["secret"]) as served:
        assert served.http().get("/metrics").status_code == 401
        assert served.http(headers={"Authorization": "Bearer secret"}).get("/metrics").status_code == 200


def test_without_the_library_the_answer_says_what_to_install(server, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    response = server.http().get("/metrics")
    assert (
        response.status_code == 501
        and "in the repository, .venv/bin/pip install '.[server]'" in response.json()["error"]["message"]
    )


def test_the_page_lists_every_metric(tmp_path: Path) -> None:
    from dsv4.checkpoint.expert_memory import ExpertStats
    from dsv4.engine import LLM
    from dsv4.engine.metric_sources import ExpertMemoryMetrics

    class Memory:
        def stats(self) -> ExpertStats:
            return ExpertStats(1, 2, 3, 4, 5, 6, 7)

    llm = LLM(cache_dir=tmp_path, speculate=1)
    llm.core.metrics.add(ExpertMemoryMetrics(Memory()))
    listed = set(re.findall(r"`((?:vllm|dsv4):[a-z0-9_]+)`", DOC.read_text(encoding="utf-8")))
    listed -= {"dsv4:engine_up", "dsv4:engine_restarts_total"}  # of the process that the engine runs in
    assert listed == {metric.name + "_total" * (metric.kind == "counter") for metric in llm.core.metrics.collect()}
    llm.close()


def test_the_load_of_every_expert_is_shown() -> None:
    from dsv4.engine import LLM

    llm = LLM(max_model_len=1024)
    config = llm.config
    with serving(llm) as served:
        body = BODY | {"model": llm.name, "max_tokens": 5}
        assert served.http().post("/v1/chat/completions", json=body).status_code == 200
        served.wait_until_idle()
        got = samples(served.http().get("/metrics").text, llm.name)
    loads = [got[f"dsv4:expert_tokens_total/{expert}/0"] for expert in range(config.n_routed_experts)]
    assert sum(loads) == got["vllm:iteration_tokens_total_sum"] * config.num_experts_per_tok > 0
