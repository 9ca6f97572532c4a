"""Requests that schemathesis makes of the OpenAPI document, to a real server: answers are as the document says.

DSV4_SCHEMATHESIS is the number of requests for each operation and mode, 4 by default; with it every path of an
operation is asked, not one of them.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.conftest import Served

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
REQUESTS = int(os.environ.get("DSV4_SCHEMATHESIS", "0"))
BASES = ("/anthropic/v1", "/anthropic", "/beta/v1", "/beta", "/v1")
LENGTH = 16  # tokens of an answer at most
LONGEST = 60  # seconds of an answer on the slowest machine


def operations(document: dict[str, Any], mode: GenerationMode) -> list[tuple[str, str]]:
    """(path, method) of all that can be asked rightly, or wrongly: those have a body or a query; by default one path of
    those that have the same operation below different base addresses.
    """
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for path, methods in document["paths"].items():
        base = next((base for base in BASES if path.startswith(f"{base}/")), "")
        for method, operation in methods.items():
            queried = any(parameter["in"] == "query" for parameter in operation.get("parameters", ()))
            if mode is GenerationMode.NEGATIVE and not queried and "requestBody" not in operation:
                continue
            key = (path, method) if REQUESTS else (path.removeprefix(base), method)
            found.setdefault(key, (path, method.upper()))
    return list(found.values())


def ask(case: Any, url: str, session: requests.Session) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"  # else most requests would end at their model
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if type(case.body.get(name, LENGTH)) is int and case.body.get(name, LENGTH) >= LENGTH:
                case.body[name] = LENGTH  # a constraint may keep an answer from its end
    response = case.call(base_url=url, timeout=LONGEST, session=session)
    # An engine that has no time to answer a deep check is a 503 by design.
    checks = CHECKS if case.path.startswith("/health") else [not_a_server_error, *CHECKS]
    case.validate_response(response, checks=checks)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_the_server_answers_as_its_document_says(model, serve, mode: GenerationMode) -> None:
    with serve(model, max_model_len=4096) as served, requests.Session() as session:
        document = served.http().get("/openapi.json").json()
        schema = schemathesis.openapi.from_dict(document)
        faults: list[str] = []
        wanted = operations(document, mode)
        asked = sum(
            ask_all(schema[path][method].as_strategy(generation_mode=mode), served, session, faults)
            for path, method in wanted
        )
        assert not faults, f"{len(faults)} operations of {len(wanted)}:\n" + "\n\n".join(faults)
        assert asked > 3 * len(wanted) > 20
        assert served.http().post("/v1/completions", json={"model": "tiny", "prompt": "a"}).status_code == 200


def ask_all(strategy: Any, served: Served, session: requests.Session, faults: list[str]) -> int:
    """Number of requests made of a strategy; adds the first fault that is found, if any."""
    asked = 0

    @settings(
        max_examples=REQUESTS or 4,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if REQUESTS else [])],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def check(case: Any) -> None:
        nonlocal asked
        asked += 1
        ask(case, served.url, session)

    try:
        check()
    except Unsatisfiable:
        pass  # as of parameters of which every text is right
    except (Exception, BaseExceptionGroup) as fault:
        told = fault.exceptions if isinstance(fault, BaseExceptionGroup) else [fault]
        faults.append("\n".join(str(error) for error in (fault, *told)))
    return asked
