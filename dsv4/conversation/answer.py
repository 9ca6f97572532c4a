"""Answer: turns the tokens of one turn into chunks of a wire format."""

from __future__ import annotations

import deepseek_recipe as recipe

from dsv4.conversation.call_ids import Chunk, begun_calls
from dsv4.conversation.tool_markup import Text, Token, ToolMarkup
from dsv4.conversation.turn import Turn
from dsv4.conversation.turn_recorder import TurnRecorder
from dsv4.conversation.vocabulary import Vocabulary
from dsv4.engine.outputs import Alternatives, Timings, TokenEvent

Generator = recipe.ChatCompletionChunkGenerator | recipe.MessagesChunkGenerator | recipe.ResponsesChunkGenerator


class Answer:
    """Turns the token events of one turn into chunks, built by the chunk generator of a wire format.

    `recorder`: is given what was sampled and shown, and told if the turn ends, other than by a stop string.
    """

    def __init__(
        self, turn: Turn, generator: Generator, vocabulary: Vocabulary, recorder: TurnRecorder | None = None
    ) -> None:
        self._prompt_tokens = len(turn.prompt_token_ids)
        self._vocabulary = vocabulary
        parsing = turn.parsing
        calls = turn.tools if parsing.parse_tool_calls else None
        in_block = parsing.starts_in_tool_calls
        self._markup = ToolMarkup(calls, in_block, thinks(parsing))
        self._decoder = vocabulary.tokenizer.decode_stream()
        self._processor = recipe.StreamProcessor(generator, _outside(parsing), vocabulary.parser_tokenizer)
        self._started = False
        self._recorder = recorder
        self.timings: Timings | None = None  # of the latest event

    @property
    def finished(self) -> bool:
        """True if the answer is complete: a stop string or the end of a tool block may end it before the tokens end."""
        return self._processor.finished

    def push(self, event: TokenEvent) -> list[Chunk]:
        """Chunks that follow from the event's tokens; the first event adds the opening chunks."""
        num_calls = len(self._markup.calls)
        chunks = self._read(event)
        if self._recorder is not None:
            calls = self._markup.calls
            if len(calls) > num_calls:
                self._recorder.add_call_ids(begun_calls(chunks))
            if self.finished:
                if event.finish_reason in ("stop", "length") or (calls and event.finish_reason is None):
                    self._recorder.keep(calls, cut=event.finish_reason == "length")
                self._recorder = None
        return chunks

    def _read(self, event: TokenEvent) -> list[Chunk]:
        chunks: list[Chunk] = []
        self.timings = event.timings
        if not self._started:
            self._started = True
            usage = recipe.PromptUsage(prompt_tokens=self._prompt_tokens, prompt_cache_hit_tokens=event.cached_tokens)
            chunks += self._processor.push(recipe.InferenceChunk.ready(prompt_usage=usage))
        for i, token_id in enumerate(event.token_ids):
            if self.finished:
                return chunks
            if self._recorder is not None:
                self._recorder.add_token(token_id)
            if self._vocabulary.is_hidden(token_id):
                # Counted in the usage, never shown. The parser may return an empty delta, which is not sent.
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
            if self.finished:  # by a stop string, or by the end of the tool calls
                break
            if self._recorder is not None:
                self._recorder.add_text(item.text)
            if isinstance(item, Text):
                chunks += self._processor.push(recipe.InferenceChunk.text(item.text, item.num_tokens))
            else:
                logprobs = None if item.logprobs is None else [item.logprobs]
                chunks += self._processor.push(recipe.InferenceChunk.tokens([item.token_id], logprobs))
        return chunks


def thinks(options: recipe.ParsingOptions) -> bool:
    """True if the answer begins with reasoning."""
    stage = options.thinking_initial_stage
    reasons = stage is not None and stage != recipe.ThinkingInitialStage.ContentContinuation
    return reasons and not options.starts_in_tool_calls


def _outside(options: recipe.ParsingOptions) -> recipe.ParsingOptions:
    """Options for a parser that sees the whole block of calls, even where the prompt has opened it."""
    return recipe.ParsingOptions(
        parse_tool_calls=options.parse_tool_calls,
        parse_json_output=options.parse_json_output,
        thinking_initial_stage=options.thinking_initial_stage,
        stop_sequences=options.stop_sequences,
        special_tokens=options.special_tokens,
    )


def _logprobs(event: TokenEvent, i: int) -> tuple[float, Alternatives] | None:
    return (event.logprobs[i], event.top_logprobs[i]) if event.logprobs else None
