"""ConversationModel: prepares prompts of conversations and parses the model's answers.

A form that the request wants of its answer (JSON, a tool call) is described in the prompt, enforced by a constraint of
the engine that begins after the reasoning, and parsed.
"""

from __future__ import annotations

import copy
from typing import cast

import deepseek_recipe as recipe

from dsv4.conversation.answer import Answer, Generator, thinks
from dsv4.conversation.plain_prompts import PlainPrompts
from dsv4.conversation.replay import Prompt, replayed
from dsv4.conversation.said_turns import SaidTurns
from dsv4.conversation.structure import Structure
from dsv4.conversation.tool_arguments import Schema
from dsv4.conversation.turn import Turn
from dsv4.conversation.turn_recorder import TurnRecorder
from dsv4.conversation.vocabulary import Vocabulary
from dsv4.engine.interface import TextModel
from dsv4.engine.sampling_params import SamplingParams
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.tokenizer.special import END_THINK


class ConversationModel:
    """Conversations on top of plain generation: requests to turns, tokens to answers.

    Turns that the model has said are remembered and replayed in later prompts of the same owner.
    """

    def __init__(self, llm: TextModel, said: SaidTurns | None = None) -> None:
        """`said`: the memory of turns (default: one of its own). ValueError for a model without a tokenizer."""
        self.said = said or SaidTurns()
        self._owner = ""
        self.vocabulary = Vocabulary.of(llm)
        assert llm.prompts is not None, "an LLM with a tokenizer has prompts"
        self.prompts: PromptEncoder = llm.prompts
        self.max_model_len = llm.max_model_len
        self.plain_prompts = PlainPrompts(self.prompts.tokenizer, llm.config.bos_token_id, llm.max_model_len)

    def of(self, owner: str) -> ConversationModel:
        """The same model, with the memory of this owner alone."""
        owned = copy.copy(self)
        owned._owner = owner
        return owned

    def prompt(self, conversation: recipe.Conversation) -> Prompt:
        """Renders a conversation, with what the owner's earlier turns were."""
        return replayed(self.prompts, conversation, lambda key: self.said.find(self._owner, key))

    def prepare(
        self,
        request: recipe.ConversationRequest,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        ignore_eos: bool = False,
        seed: int | None = None,
        structure: Structure | None = None,
    ) -> Turn:
        """Renders and tokenizes a request. Raises recipe.ConversionError if the prompt exceeds the context.

        `top_k`, `min_p`, `ignore_eos`: as in SamplingParams; the request does not carry them. `seed`: for a request
        without one. With ignore_eos no turn
        token ends the answer either. `structure`: the form of the answer as far as the request does not carry it. A
        text whose least possible number of tokens exceeds the context is refused before it is tokenized; the error
        names that lower bound.
        """
        structure = structure or Structure()
        conversation = structure.conversation(request.conversation)
        rendered, tokenizer = self.prompt(conversation), self.prompts.tokenizer
        least = rendered.min_tokens(tokenizer)
        if least > self.max_model_len:
            request.resolve_max_tokens(least, self.max_model_len)  # raises the ConversionError
        prompt = rendered.encode(tokenizer)
        options, parsing = request.inference_options, request.parsing_options
        constraint = structure.constraint(conversation, parsing.starts_in_tool_calls)
        if constraint and thinks(parsing):
            constraint["grammar_after"] = (tokenizer.special_id(END_THINK),)
        params = SamplingParams(
            max_tokens=self._max_tokens(request, len(prompt)),
            temperature=1.0 if options.temperature is None else options.temperature,
            top_p=1.0 if options.top_p is None else options.top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed if options.seed is None else options.seed,
            stop_token_ids=() if ignore_eos else tuple(sorted(self.vocabulary.stop_token_ids)),
            ignore_eos=ignore_eos,
            logprobs=(options.top_logprobs or 0) if options.logprobs else False,
            **constraint,
        )
        tools = {tool.name: _properties(tool.parameters) for tool in conversation.tools}
        return Turn(prompt, params, parsing, tools, rendered.history)

    def _max_tokens(self, request: recipe.ConversationRequest, num_prompt_tokens: int) -> int:
        """Token limit of the answer: the requested one, at most the room that the prompt leaves."""
        wanted, room = request.inference_options.max_tokens, self.max_model_len - num_prompt_tokens
        if wanted is None or room < 1:
            return request.resolve_max_tokens(num_prompt_tokens, self.max_model_len)
        return min(wanted, room)

    def answer(self, turn: Turn, generator: Generator) -> Answer:
        """Answer that reads the turn's tokens. `generator`: builds the chunks; deepseek-recipe consumes it."""
        recorder = TurnRecorder(self.said, self._owner, turn, self.vocabulary)
        return Answer(turn, generator, self.vocabulary, recorder)


def _properties(parameters: object) -> Schema:
    """Properties of a JSON schema; empty if it has none."""
    found: object = cast(Schema, parameters).get("properties") if isinstance(parameters, dict) else None
    return cast(Schema, found) if isinstance(found, dict) else {}
