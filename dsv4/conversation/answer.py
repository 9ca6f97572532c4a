"""Answer: turns the tokens of one turn into chunks of a wire format."""

from __future__ import annotations

from itertools import accumulate

import deepseek_recipe as recipe

from dsv4.conversation.call_ids import Chunk, begun_calls
from dsv4.conversation.tool_calls import CutCall
from dsv4.conversation.tool_markup import Text, Token, ToolMarkup
from dsv4.conversation.tool_tags import BLOCK
from dsv4.conversation.turn import Turn
from dsv4.conversation.turn_recorder import TurnRecorder
from dsv4.conversation.vocabulary import Vocabulary
from dsv4.engine.outputs import Alternatives, EndReason, FinishReason, Timings, TokenEvent
from dsv4.tokenizer.special import END_THINK

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
        self._markup = _markup(turn, vocabulary, generator)
        self._decoder = vocabulary.tokenizer.decode_stream()
        self._processor = recipe.StreamProcessor(generator, _outside(parsing), vocabulary.parser_tokenizer)
        self._started = False
        self._recorder = recorder
        self._num_calls = 0  # that the recorder has
        self._reasons = thinks(parsing)
        marks = vocabulary.marks
        self._ends_of_reasoning = {marks.thinking_ends}  # tokens
        if parsing.parse_tool_calls:
            self._ends_of_reasoning.add(marks.tag)
        self._spells_tags = parsing.parse_tool_calls and marks.tag is None
        self._in_spelled = False  # a block of calls, until the answer's end
        self._num_read = self._num_parsed = 0  # tokens; some are held back before they are parsed
        self.num_reasoning_tokens = 0  # sampled before the end of the reasoning
        self.timings: Timings | None = None  # of the latest event
        self._cut = False  # the limit of tokens has ended it

    @property
    def end_reason(self) -> EndReason | None:
        """What has ended the answer: the limit of tokens, or itself; None before."""
        return None if not self.finished else "length" if self._cut else "stop"

    @property
    def cut_call(self) -> bool:
        """True if the model has stopped in the answer's last call."""
        return self._markup.cut_call

    @property
    def finished(self) -> bool:
        """True if the answer is complete: a stop string or the end of a tool block may end it before the tokens end."""
        return self._processor.finished

    @property
    def num_tokens(self) -> int:
        """Tokens so far; at the end those of the usage, without what was held back behind a stop string."""
        return self._num_parsed if self.finished else self._num_read

    def push(self, event: TokenEvent) -> list[Chunk]:
        """Chunks that follow from the event's tokens; the first event adds the opening chunks."""
        chunks: list[Chunk] = []
        self.timings = event.timings
        if not self._started:
            self._started = True
            usage = recipe.PromptUsage(prompt_tokens=self._prompt_tokens, prompt_cache_hit_tokens=event.cached_tokens)
            chunks += self._processor.push(recipe.InferenceChunk.ready(prompt_usage=usage))
        for i, token_id in enumerate(event.token_ids):
            if self.finished or self._markup.complete:  # later tokens of the step are not the client's
                break
            chunks += self._read(token_id, _logprobs(event, i))
        if self._markup.complete:
            chunks += self._end("stop")
        elif event.finish_reason is not None and not self.finished:
            chunks += self._parse(self._markup.finish(event.finish_reason == "length"))
            chunks += self._end(event.finish_reason)
        if self.finished:
            self._recorder = None
        return chunks

    def _read(self, token_id: int, logprobs: tuple[float, Alternatives] | None) -> list[Chunk]:
        self._num_read += 1
        if self._recorder is not None:
            self._recorder.add_token(token_id)
        if not self._vocabulary.is_hidden(token_id):
            return self._parse(self._markup.push(Token(token_id, self._decoder.push(token_id), logprobs)))
        # Counted in the usage, never shown. The parser may return an empty delta, which is not sent.
        self._processor.push(recipe.InferenceChunk.text("", 1))
        self._num_parsed += 1
        return []

    def _parse(self, items: list[Token | Text]) -> list[Chunk]:
        chunks: list[Chunk] = []
        block = self._spelled_block(items)
        num_reasoning = self._num_reasoning(items, block)
        for place, item in enumerate(items):
            if self.finished:  # by a stop string
                break
            num_tokens = item.num_tokens if isinstance(item, Text) else 1
            self._num_parsed += num_tokens
            self.num_reasoning_tokens += num_tokens if place < num_reasoning else 0
            if self._recorder is not None:
                self._recorder.add_item(item)
            if isinstance(item, Text) or place >= block:
                chunks += self._processor.push(recipe.InferenceChunk.text(item.text, num_tokens))
            else:
                logprobs = None if item.logprobs is None else [item.logprobs]
                chunks += self._processor.push(recipe.InferenceChunk.tokens([item.token_id], logprobs))
        num_calls = len(self._markup.calls) + self._markup.cut_call
        if self._recorder is not None and num_calls > self._num_calls:
            self._num_calls = num_calls
            self._recorder.add_call_ids(begun_calls(chunks))
        return chunks

    def _num_reasoning(self, items: list[Token | Text], block: int) -> int:
        """Number of items before the end of the reasoning: the token that says so, or a tag of calls, as at `block`."""
        if not self._reasons:
            return 0
        for place, item in enumerate(items):
            if isinstance(item, Text):
                self._reasons = not (END_THINK in item.text or BLOCK in item.text)
            else:
                self._reasons = item.token_id not in self._ends_of_reasoning and place < block
            if not self._reasons:
                return place - (place > 0 and items[place - 1].text == "<")  # with which the tag begins
        return len(items)

    def _spelled_block(self, items: list[Token | Text]) -> int:
        """Place from which on the items are calls whose tags ordinary tokens spell; their number if there is none.

        deepseek-recipe reads such tags in text alone.
        """
        if not self._spells_tags:
            return len(items)
        start = 0 if self._in_spelled else "".join(item.text for item in items).find(BLOCK)
        if start < 0:
            return len(items)
        self._in_spelled = True
        return sum(end <= start for end in accumulate(len(item.text) for item in items))

    def _end(self, reason: FinishReason) -> list[Chunk]:
        """Ends the answer, unless a stop string has, with the last chunks; an ended turn is kept."""
        if self.finished:
            return []
        self._cut = cut = reason == "length"
        reasons = recipe.InferenceFinishReason
        chunks = list(self._processor.push(recipe.InferenceChunk.finish(reasons.Length if cut else reasons.Stop)))
        if not self.finished:
            chunks += self._processor.finish()
        if self._recorder is not None and reason != "abort":
            self._recorder.keep(self._markup, cut=cut)
        return chunks


def _markup(turn: Turn, vocabulary: Vocabulary, generator: Generator) -> ToolMarkup:
    """Reader of the markup in a turn's answer, for the clients of this generator's chunks."""
    parsing, params, marks = turn.parsing, turn.params, vocabulary.marks
    tools = turn.tools if parsing.parse_tool_calls else None
    has_form = tools is None and (params.json_object or params.json_schema is not None or params.regex is not None)
    cut_form = CutCall.told if isinstance(generator, recipe.MessagesChunkGenerator) else CutCall.unreadable
    known = None if marks.tag is None else marks  # None: a tokenizer without the mark
    return ToolMarkup(tools, parsing.starts_in_tool_calls, thinks(parsing), known, has_form, cut_form)


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
