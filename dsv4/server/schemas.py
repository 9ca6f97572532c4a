"""Shapes of requests and answers for the OpenAPI document.

deepseek-recipe validates Chat Completions and Messages requests; these models describe what it and this server accept.
Fields that are not listed are allowed: unknown ones are ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dsv4.engine.sampling_params import MAX_SEED
from dsv4.server.hosted_limits import MAX_ALTERNATIVES, MAX_STOPS, MAX_TOKENS

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"]


class Open(BaseModel):
    """A shape with further fields."""

    model_config = ConfigDict(extra="allow")


class Error(Open):
    message: str
    type: str
    param: str | None = Field(None, description="The field at fault: messages[137].role")
    code: str


class ErrorAnswer(Open):
    error: Error


class AnthropicErrorAnswer(ErrorAnswer):
    type: Literal["error"]


# Chat Completions


class TextPart(Open):
    type: Literal["text"]
    text: str


class CalledFunction(Open):
    name: str
    arguments: str = Field(description="JSON object as a text")


class ToolCall(Open):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Open):
    role: Literal["system", "developer", "user", "assistant", "tool", "latest_reminder"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="Another name for reasoning_content")
    tool_calls: list[ToolCall] | None = Field(None, min_length=1)
    tool_call_id: str | None = None
    prefix: bool | None = Field(None, description="true in the last, assistant message: the answer continues it")


class FunctionShape(Open):
    name: str = Field(pattern="^[a-zA-Z0-9_-]+$", max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of type object")
    strict: bool | None = None


class FunctionTool(Open):
    type: Literal["function"]
    function: FunctionShape


class FunctionName(Open):
    name: str


class FunctionChoice(Open):
    type: Literal["function"]
    function: FunctionName


class Thinking(Open):
    type: Literal["enabled", "disabled", "adaptive"]


class StreamOptions(Open):
    include_usage: bool | None = None


class ResponseFormat(Open):
    type: Literal["text", "json_object", "json_schema", "regex"]


class ChatBody(Open):
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    thinking: Thinking | None = None
    reasoning_effort: Effort | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2, description="Has no effect while the model thinks")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: no limit")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Has no effect")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Has no effect")
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    chat_template_kwargs: dict[str, Any] | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None
    user_id: Any = None
    user: Any = None
    cache_salt: str | None = Field(None, min_length=1)


class CachedTokens(Open):
    cached_tokens: int


class Usage(Open):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int


class AnswerMessage(Open):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Open):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "insufficient_system_resource"]


class ChatAnswer(Open):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None


# Completions


class CompletionLogprobs(Open):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Open):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(Open):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None


# Messages


class Block(Open):
    type: str = Field(description="text, thinking, redacted_thinking, tool_use, tool_result, document, search_result")


class InputMessage(Open):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class MessagesTool(Open):
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class MessagesToolChoice(Open):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class JsonForm(Open):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Open):
    effort: Effort | None = None
    format: JsonForm | None = None


class CountTokensBody(Open):
    model: str
    messages: list[InputMessage] = Field(min_length=1)
    system: str | list[Block] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountTokensBody):
    max_tokens: int | None = Field(None, ge=1, description=f"Values over {MAX_TOKENS} are lowered to it")
    stop_sequences: list[str] | None = Field(None, max_length=MAX_STOPS)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    metadata: dict[str, Any] | None = None
    cache_salt: str | None = Field(None, min_length=1)


class MessagesUsage(Open):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessagesAnswer(Open):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]
    stop_sequence: str | None
    usage: MessagesUsage


class CountTokensAnswer(Open):
    input_tokens: int


# Small endpoints


class Model(Open):
    id: str
    object: Literal["model"]
    root: str = Field(description="The served model that answers to the id")
    context_window: int
    max_output_tokens: int


class ModelList(Open):
    object: Literal["list"]
    data: list[Model]


class BalanceInfo(Open):
    currency: Literal["USD"]
    total_balance: str
    granted_balance: str
    topped_up_balance: str


class Balance(Open):
    is_available: bool
    balance_infos: list[BalanceInfo]


class ModelHealth(Open):
    status: Literal["ok", "busy", "stuck", "error"]
    seconds: float
    error: str | None = None


class Health(Open):
    status: Literal["ok", "error", "restarting", "draining", "stuck", "loading"]
    running: int = 0
    waiting: int = 0
    error: str | None = None
    models: dict[str, ModelHealth] | None = Field(None, description="Of a deep check")


# The inspector


class Inspection(Open):
    id: str
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    pieces: list[str] = Field(description="Text of each token, prompt first")
    window: int
    layers: list[Literal["swa", "csa", "hca"]]
    index_topk: int
    num_experts: int
    experts_per_token: int
    accepted_drafts: list[int] = Field(description="Places in the answer of tokens that were drafted")
    num_draft_tokens: int = Field(description="Verified for this answer")
    num_accepted_tokens: int = Field(description="Those of them that stand in it")


class TracedEntries(Open):
    index: list[int]
    start: list[int]
    stop: list[int]
    weight: list[float]
    score: list[float | None] = Field(description="Of the indexer, where it chose")


class TracedLayer(Open):
    kind: Literal["swa", "csa", "hca"]
    window_start: int
    window: list[float] = Field(
        description="Attention weights, means over heads; with entries and sink they add up to 1"
    )
    entries: TracedEntries
    num_visible: int
    sink: float
    experts: list[int]
    expert_weights: list[float]
    hashed: bool


class LikelyToken(Open):
    id: int
    text: str
    probability: float


class TracedToken(Open):
    position: int
    layers: list[TracedLayer]
    next_tokens: list[LikelyToken]
    cache_bytes: dict[str, int]
