"""Shapes of the Responses API for the OpenAPI document: requests, responses, lists of items."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dsv4.engine.sampling_params import MAX_SEED
from dsv4.server.schemas import Effort, FunctionName, Open

MAX_METADATA = 16


class InputItem(Open):
    type: str | None = Field(
        None,
        description="message, reasoning, function_call, function_call_output, custom_tool_call, "
        "custom_tool_call_output, item_reference; without a type it is a message. Other types are ignored",
    )
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None


class ReasoningWish(Open):
    effort: Effort | None = None
    summary: str | None = Field(None, description="Reported only")


class TextFormat(Open):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextWish(Open):
    format: TextFormat | None = None


class ResponseTool(Open):
    type: str = Field(description="function, custom, namespace; tools that run in OpenAI's service are not offered")
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolOfChoice(FunctionName):
    type: Literal["function", "custom"]


class AllowedTools(Open):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


class InputTokensBody(Open):
    model: str
    input: str | list[InputItem] | None = None
    instructions: str | None = Field(None, description="Enough without an input")
    previous_response_id: str | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolOfChoice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningWish | None = None
    text: TextWish | None = None
    truncation: Literal["auto", "disabled"] | None = None


class ResponsesBody(InputTokensBody):
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="Has no effect while the model thinks")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stream: bool | None = None
    store: bool | None = Field(None, description="true if omitted")
    include: list[str] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=MAX_METADATA)
    user: Any = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    cache_salt: str | None = Field(None, min_length=1)


class OutputItem(Open):
    type: Literal["message", "reasoning", "function_call", "custom_tool_call"]
    id: str
    status: str | None = None


class CachedInput(Open):
    cached_tokens: int


class ReasoningOutput(Open):
    reasoning_tokens: int


class ResponsesUsage(Open):
    input_tokens: int
    input_tokens_details: CachedInput
    output_tokens: int
    output_tokens_details: ReasoningOutput
    total_tokens: int


class ResponseAnswer(Open):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[OutputItem]
    usage: ResponsesUsage | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    previous_response_id: str | None
    store: bool


class InputTokensAnswer(Open):
    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedResponse(Open):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(Open):
    object: Literal["list"]
    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool
