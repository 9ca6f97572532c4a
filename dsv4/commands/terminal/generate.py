"""`dsv4 generate`: continues prompts as plain text."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from dsv4.engine.errors import EngineError
from dsv4.engine.llm import LLM
from dsv4.engine.sampling_params import SamplingParams
from dsv4.kernels import backends
from dsv4.text import check_text, keep_foreign_bytes


def generate(
    model: str | None,
    prompts: Sequence[str],
    max_tokens: int = 64,
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    json_schema: str | None = None,
    regex: str | None = None,
    choice: Sequence[str] | None = None,
    as_json: bool = False,
    **engine_options: Any,
) -> int:
    """Prints completions: streamed for a single prompt, else in order, each under a line with its number.

    The prompt "-" is standard input. `as_json` prints one object per prompt, one per line: prompt, text, token_ids,
    logprobs, finish_reason, cached_tokens. Returns 1, after a line on stderr, if the engine fails. `engine_options`:
    keywords of LLM.
    """
    keep_foreign_bytes(sys.stdin)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop),
        json_schema=json_schema,
        regex=regex,
        choice=choice,
        logprobs=as_json,
    )
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    for place, text in enumerate(texts, start=1):
        check_text(text, f"prompt {place}")
    backends.native_module()  # resolved before loading, so that a fallback warning is printed first
    llm = LLM(model, **engine_options)
    try:
        _print(llm, texts, params, as_json)
    except EngineError as error:
        sys.stdout.flush()
        print(f"\ndsv4 generate: error: the engine has failed: {error}", file=sys.stderr)
        return 1
    return 0


def _print(llm: LLM, texts: list[str], params: SamplingParams, as_json: bool) -> None:
    if len(texts) == 1 and not as_json:
        for event in llm.stream(texts[0], params):
            print(event.text, end="", flush=True)
        print()
        return
    for number, (prompt, output) in enumerate(zip(texts, llm.generate(texts, params), strict=True), start=1):
        if as_json:
            row = {
                "prompt": prompt,
                "text": output.text,
                "token_ids": output.token_ids,
                "logprobs": output.logprobs,
                "finish_reason": output.finish_reason,
                "cached_tokens": output.cached_tokens,
            }
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(f"--- {number}\n{output.text}")
