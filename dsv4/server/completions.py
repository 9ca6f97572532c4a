"""POST /completions: prompts without a conversation, continued, or filled in before a suffix.

Every completion of a request is a request to the engine of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import deepseek_recipe as recipe

from dsv4.conversation.model import ConversationModel
from dsv4.conversation.plain_prompts import PromptTooLongError
from dsv4.conversation.turn import Turn
from dsv4.engine.errors import too_long
from dsv4.engine.sampler import output_seed
from dsv4.engine.sampling_params import SamplingParams
from dsv4.server.completion_answer import CompletionReader, Echo, Tally, WholeCompletion, answer_head
from dsv4.server.completion_body import CompletionBody, Prompt, read_completion_body
from dsv4.server.errors import RequestError
from dsv4.server.events import Event
from dsv4.server.foreign_fields import read_max_tokens, refuse_foreign, refuse_thinking
from dsv4.server.isolation import requested_salt
from dsv4.server.model_names import check_name, without_context_suffix
from dsv4.server.paths import OPENAI_BASES, under
from dsv4.server.progress import Reports
from dsv4.server.pydantic_refusals import read_json_object
from dsv4.server.schemas import CompletionAnswer
from dsv4.server.template_options import template_options
from dsv4.server.wire_format import Chunk, WireFormat, WireRequest
from dsv4.server.wishes import Sampling, invalid, unavailable

DEFAULT_MAX_TOKENS = 4096  # the largest number that the hosted service allows here


class Completions(WireFormat):
    name = "completions"
    paths = under(OPENAI_BASES, "/completions")
    request_schema, answer_schema = CompletionBody, CompletionAnswer

    def read(self, body: bytes, options: recipe.ConversionOptions) -> CompletionRequest:
        request = read_json_object(body)
        refuse_foreign(request, self.name)
        wanted = template_options(request)
        refuse_thinking(request, wanted.thinking, wanted.effort)
        read_max_tokens(request, "max_tokens")
        sampling = Sampling.of(request)
        salt = requested_salt(request)
        checked = read_completion_body(request)
        model = without_context_suffix(checked.model)
        check_name(model, options)
        return CompletionRequest(model, bool(checked.stream), Reports(), checked, sampling, salt)

    def event(self, chunk: Chunk) -> Event:
        return Event(chunk.to_json())

    def last_words(self) -> bytes:
        return Event("[DONE]").encode()


COMPLETIONS = Completions()


@dataclass(frozen=True)
class CompletionRequest(WireRequest):
    body: CompletionBody
    sampling: Sampling
    salt: str | None

    @property
    def user(self) -> str | None:
        user = self.body.user_id or self.body.user
        return None if user is None else str(user)

    @property
    def cache_salt(self) -> str | None:
        return self.salt

    @property
    def answers_per_prompt(self) -> int:
        return self.body.num_candidates

    @property
    def prompt_only(self) -> bool:
        return self.body.max_tokens == 0  # with echo, which read_completion_body has checked

    def turn(self, model: ConversationModel) -> Turn:
        return self.turns(model)[0]

    def turns(self, model: ConversationModel) -> list[Turn]:
        """The candidates of each prompt, prompt by prompt."""
        turns: list[Turn] = []
        for place, prompt in enumerate(self.body.prompts):
            token_ids = self._encoded(model, prompt, place)
            turns += [Turn(token_ids, self._params(model, token_ids, i)) for i in range(self.body.num_candidates)]
        return turns

    def count_tokens(self, model: ConversationModel) -> int:
        return sum(len(self._encoded(model, prompt, i)) for i, prompt in enumerate(self.body.prompts))

    def reader(self, model: ConversationModel, turn: Turn, answer_id: str) -> CompletionReader:
        return self.readers(model, [turn], answer_id)[0]

    def readers(self, model: ConversationModel, turns: Sequence[Turn], answer_id: str) -> list[CompletionReader]:
        tally, head = Tally(len(turns)), answer_head(answer_id, self.model)
        options = self.body.stream_options
        readers: list[CompletionReader] = []
        for index, (turn, count) in enumerate(zip(turns, self.prompt_counts(turns), strict=True)):
            readers.append(
                CompletionReader(
                    head,
                    index,
                    model.vocabulary,
                    tally,
                    num_prompt_tokens=count,
                    wants_logprobs=self.body.logprobs is not None,
                    include_usage=options is not None and options.include_usage is True,
                    echo=self._echo(model, index // self.answers_per_prompt, turn),
                )
            )
        return readers

    def whole_answer(self, turn: Turn, answer_id: str) -> WholeCompletion:
        head = answer_head(answer_id, self.model)
        return WholeCompletion(head, self.body.num_candidates, self.body.num_outputs)

    def _encoded(self, model: ConversationModel, prompt: Prompt, place: int) -> list[int]:
        if self.body.suffix is not None and not model.plain_prompts.fills_in:
            raise unavailable("suffix", "this model's tokenizer has no fill-in-the-middle tokens")
        where = "prompt" if len(self.body.prompts) == 1 else f"prompt[{place}]"
        limit, size = model.max_model_len, model.vocabulary.num_ids
        # Ids beyond the context are not looked at: encode refuses them by their number.
        if not isinstance(prompt, str) and len(prompt) <= limit and not 0 <= min(prompt) <= max(prompt) < size:
            wrong = next(i for i, token in enumerate(prompt) if not 0 <= token < size)
            raise invalid(f"{where}[{wrong}]", prompt[wrong], f"token ids in [0, {size - 1}]")
        try:
            return model.plain_prompts.encode(prompt, self.body.suffix, self.body.begins)
        except PromptTooLongError as error:
            message = too_long(limit, error.num_tokens, self.body.max_tokens or 0)
            raise RequestError(400, message, param=where) from error

    def _params(self, model: ConversationModel, token_ids: list[int], candidate: int) -> SamplingParams:
        body, sampling = self.body, self.sampling
        room = max(1, model.max_model_len - len(token_ids))
        ranks = body.num_candidates > body.num_outputs
        stops = tuple(sorted(model.vocabulary.stop_token_ids))
        return SamplingParams(
            max_tokens=min(DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens), room),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=None if body.seed is None else output_seed(body.seed, candidate),
            stop=body.stops,
            stop_token_ids=() if body.ignore_eos else stops,
            ignore_eos=bool(body.ignore_eos),
            hidden_token_ids=stops if body.ignore_eos else (),
            logprobs=ranks if body.logprobs is None else body.logprobs,
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
            logit_bias=_bias(body.logit_bias, model.vocabulary.num_ids),
        )

    def _echo(self, model: ConversationModel, place: int, turn: Turn) -> Echo | None:
        if not self.body.echo:
            return None
        prompt = self.body.prompts[place]
        if isinstance(prompt, str):
            return Echo(prompt, turn.prompt_token_ids[self.body.begins :], self.prompt_only)
        known = [token for token in prompt if token < model.vocabulary.size]
        return Echo(model.prompts.tokenizer.decode(known), turn.prompt_token_ids, self.prompt_only)


def _bias(given: dict[str, float] | None, num_ids: int) -> dict[int, float] | None:
    """Bias by token id. RequestError for what is no token or out of range."""
    bias: dict[int, float] = {}
    most = len(str(num_ids))  # digits; Python does not read thousands of them
    for name, value in (given or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) <= most) or int(name) >= num_ids:
            raise invalid(f"logit_bias.{name[:20]}", value, f"token ids in [0, {num_ids - 1}]")
        if not -100.0 <= value <= 100.0:
            raise invalid(f"logit_bias.{name}", value, "[-100, 100]")
        bias[int(name)] = float(value)
    return bias or None
