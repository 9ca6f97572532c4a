"""One conversation turn: a converted request becomes a prompt and sampling parameters, its tokens become wire events.

deepseek-recipe validates requests, renders prompts and parses what the model writes (thinking, tool calls, stop
strings) for every protocol; this module only carries tokens between it and the engine.

Limits: an output constraint of the request (JSON mode, a required tool call) is not enforced on the tokens. JSON mode
has its instruction in the prompt and its parsing of the answer; a required tool call has its prompt opened inside the
tool block, and the model does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import deepseek_recipe as recipe

from dsv4.conversation.tool_calls import Schema
from dsv4.conversation.tool_markup import Text, Token, ToolMarkup
from dsv4.engine.llm import LLM
from dsv4.engine.outputs import Alternatives, Timings, TokenEvent
from dsv4.engine.sampling_params import SamplingParams
from dsv4.tokenizer.prompts import PromptEncoder

Generator = recipe.ChatCompletionChunkGenerator | recipe.MessagesChunkGenerator
Chunk = recipe.ChatCompletionChunk | recipe.ResponsesStreamEvent | recipe.MessagesStreamEvent

# A model that writes one of these has begun somebody else's turn: its own is over.
_TURN_TOKENS = (
    recipe.SpecialToken.Bos,
    recipe.SpecialToken.User,
    recipe.SpecialToken.Assistant,
    recipe.SpecialToken.System,
    recipe.SpecialToken.LatestReminder,
)


@dataclass(frozen=True)
class Turn:
    """What the engine needs to answer one request, and how to parse the answer."""

    prompt_token_ids: list[int]
    params: SamplingParams
    parsing: recipe.ParsingOptions
    tools: dict[str, Schema]  # properties of the parameters by name; empty where no tools are offered


class ConversationModel:
    """What a served model adds to plain generation: prompts from conversations, and the parser's tokenizer."""

    def __init__(self, llm: LLM) -> None:
        if llm.tokenizer is None or llm.prompts is None or llm.path is None:
            raise ValueError(f"{llm.path or 'this model'} has no tokenizer, so it cannot hold a conversation")
        self.prompts: PromptEncoder = llm.prompts
        self.max_model_len = llm.max_model_len
        self.parser_tokenizer = recipe.Tokenizer.from_file(str(llm.path / "tokenizer.json"))
        self.vocab_size = llm.tokenizer.vocab_size
        special = llm.tokenizer.special_tokens  # which of the turn tokens a tokenizer has differs
        turn_ids = [special[t.default_str()] for t in _TURN_TOKENS if t.default_str() in special]
        self.stop_token_ids = frozenset({*llm.config.eos_token_ids, *turn_ids})

    def prepare(self, request: recipe.ConversationRequest, *, top_k: int = 0, min_p: float = 0.0) -> Turn:
        """Renders and tokenises. Raises recipe.ConversionError when the context cannot hold the prompt.

        `top_k`, `min_p`: as in SamplingParams; the request does not carry them. A text that cannot fit by its length
        is refused before it is tokenised, with the fewest tokens that it can have.
        """
        rendered = self.prompts.render(request.conversation)
        tokenizer, text, ranges = self.prompts.tokenizer, rendered.prompt, rendered.special_ranges
        least = tokenizer.min_tokens_rendered(text, ranges)
        if least > self.max_model_len:
            request.resolve_max_tokens(least, self.max_model_len)  # raises: it words the error
        prompt = tokenizer.encode_rendered(text, ranges)
        options = request.inference_options
        params = SamplingParams(
            max_tokens=self._max_tokens(request, len(prompt)),
            temperature=1.0 if options.temperature is None else options.temperature,
            top_p=1.0 if options.top_p is None else options.top_p,
            top_k=top_k,
            min_p=min_p,
            seed=options.seed,
            stop_token_ids=tuple(sorted(self.stop_token_ids)),
            logprobs=(options.top_logprobs or 0) if options.logprobs else False,
        )
        tools = {tool.name: _properties(tool.parameters) for tool in request.conversation.tools}
        return Turn(prompt, params, request.parsing_options, tools)

    def _max_tokens(self, request: recipe.ConversationRequest, num_prompt_tokens: int) -> int:
        """Tokens that the answer may have: what is asked for, at most the room beside the prompt."""
        wanted, room = request.inference_options.max_tokens, self.max_model_len - num_prompt_tokens
        if wanted is None or room < 1:
            return request.resolve_max_tokens(num_prompt_tokens, self.max_model_len)
        return min(wanted, room)

    def answer(self, turn: Turn, generator: Generator) -> Answer:
        return Answer(turn, generator, self)


class Answer:
    """Turns the token events of one turn into the protocol's chunks."""

    def __init__(self, turn: Turn, generator: Generator, model: ConversationModel) -> None:
        self._prompt_tokens = len(turn.prompt_token_ids)
        self._model = model
        parsing = turn.parsing
        stage = parsing.thinking_initial_stage
        thinks = stage is not None and stage != recipe.ThinkingInitialStage.ContentContinuation
        calls = turn.tools if parsing.parse_tool_calls else None
        in_block = parsing.starts_in_tool_calls
        self._markup = ToolMarkup(calls, in_block, thinks and not in_block)
        self._decoder = model.prompts.tokenizer.decode_stream()
        self._processor = recipe.StreamProcessor(generator, _outside(parsing), model.parser_tokenizer)
        self._started = False
        self.timings: Timings | None = None  # of the latest event

    @property
    def finished(self) -> bool:
        """The answer is complete: a stop string or the end of a tool block may end it before the tokens end."""
        return self._processor.finished

    def push(self, event: TokenEvent) -> list[Chunk]:
        """Chunks that the event's tokens bring about; the first event also brings the opening ones."""
        chunks: list[Chunk] = []
        self.timings = event.timings
        if not self._started:
            self._started = True
            usage = recipe.PromptUsage(prompt_tokens=self._prompt_tokens, prompt_cache_hit_tokens=event.cached_tokens)
            chunks += self._processor.push(recipe.InferenceChunk.ready(prompt_usage=usage))
        for i, token_id in enumerate(event.token_ids):
            if self.finished:
                return chunks
            if token_id in self._model.stop_token_ids or token_id >= self._model.vocab_size:
                # Counted in the usage, never shown. The parser may answer with an empty delta: nothing to send.
                self._processor.push(recipe.InferenceChunk.text("", 1))
            else:
                token = Token(token_id, self._decoder.push(token_id), _logprobs(event, i))
                chunks += self._parse(self._markup.push(token))
        if event.finish_reason is not None and not self.finished:
            truncated = event.finish_reason == "length"
            chunks += self._parse(self._markup.finish(truncated))
            reasons = recipe.InferenceFinishReason
            if not self.finished:
                chunks += self._processor.push(
                    recipe.InferenceChunk.finish(reasons.Length if truncated else reasons.Stop)
                )
            if not self.finished:
                chunks += self._processor.finish()
        return chunks

    def _parse(self, items: list[Token | Text]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for item in items:
            if self.finished:  # a stop string, or the end of the calls
                break
            if isinstance(item, Text):
                chunks += self._processor.push(recipe.InferenceChunk.text(item.text, item.num_tokens))
            else:
                logprobs = None if item.logprobs is None else [item.logprobs]
                chunks += self._processor.push(recipe.InferenceChunk.tokens([item.token_id], logprobs))
        return chunks


def _outside(options: recipe.ParsingOptions) -> recipe.ParsingOptions:
    """The options for a parser that sees the block of calls whole, its beginning too."""
    return recipe.ParsingOptions(
        parse_tool_calls=options.parse_tool_calls,
        parse_json_output=options.parse_json_output,
        thinking_initial_stage=options.thinking_initial_stage,
        stop_sequences=options.stop_sequences,
        special_tokens=options.special_tokens,
    )


def _properties(parameters: object) -> Schema:
    """The properties of a JSON schema, empty where it names none."""
    found: object = cast(Schema, parameters).get("properties") if isinstance(parameters, dict) else None
    return cast(Schema, found) if isinstance(found, dict) else {}


def _logprobs(event: TokenEvent, i: int) -> tuple[float, Alternatives] | None:
    return (event.logprobs[i], event.top_logprobs[i]) if event.logprobs else None
