"""Episodes by the engine, many at once: a turn's tokens stay as they were sampled, and results go behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek_recipe import AssistantMessage, Conversation, Message, ToolCall, ToolDefinition, ToolMessage, UserMessage

from dsv4.data.stable_hash import stable_hash
from dsv4.engine import SamplingParams
from dsv4.engine.outputs import RequestOutput
from dsv4.post_training.efforts import window_of
from dsv4.post_training.episodes.environment import (
    Environment,
    EpisodeLimits,
    EpisodeProblem,
    LoggedEnvironment,
)
from dsv4.post_training.episodes.streams import EpisodeStreams
from dsv4.post_training.episodes.trajectory import Trajectory, TrajectoryFiles
from dsv4.post_training.problems import Explained, answer_of
from dsv4.post_training.rollouts import DrawnBy, Sampler, answer_text, choices_of, drawn_by, joined_runs
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.tokenizer.special import EOS

UNREADABLE = "The tool calls could not be read."
_ANY = ToolDefinition("tool", "", {"type": "object", "properties": {}})


@dataclass
class _Episode:
    """An episode in progress. What grows with its turns is in `streams`."""

    goal: int
    problem: EpisodeProblem
    environment: Environment
    seed: int
    most: int  # tokens that are sampled
    streams: EpisodeStreams
    end: int = 0  # of the last turn's tokens in the document
    calls: int = 0
    text: str = ""
    finished: bool = False
    error: str | None = None
    drawn_by: DrawnBy = ()

    @property
    def num_document(self) -> int:
        return self.streams.lengths["document"]

    @property
    def num_sampled(self) -> int:
        return self.streams.lengths["log_probabilities"]

    @property
    def turns(self) -> int:
        return self.streams.lengths["spans"]


def sample_episodes(
    llm: Sampler,
    problems: Sequence[tuple[int, EpisodeProblem]],
    group_size: int,
    params: SamplingParams,
    seed: int,
    limits: EpisodeLimits,
    files: TrajectoryFiles,
    logs: Path | None = None,
) -> list[Trajectory]:
    """`group_size` episodes of each (number, goal), in their order. The same seed gives the same tokens.

    `params.max_tokens` is of a turn; an effort's window is of the episode. A position has the choices of the turn that
    computed it first. Environments of `limits.at_once` episodes are open at a time. `logs`: folder of their logs, where
    episodes of an earlier process with the same seeds are gone on with. ValueError for a goal that does not fit the
    model's context.
    """
    temperature = 1.0 if params.logprobs_mode == "raw_logprobs" else params.temperature
    waiting = _begin(llm, problems, group_size, seed, limits, files, logs)
    order: list[tuple[int, int]] = []
    found: dict[tuple[int, int], Trajectory] = {}
    active: list[_Episode] = []
    try:
        while True:
            while len(active) < limits.at_once and (new := next(waiting, None)) is not None:
                order.append((new.goal, new.seed))
                active.append(new)
            if not active:
                return [found[key] for key in order]
            _turns(llm, active, params, limits)
            for episode in [episode for episode in active if _ended(llm, episode, limits)]:
                active.remove(episode)
                found[episode.goal, episode.seed] = _closed(episode, temperature)
    finally:
        for episode in active:
            episode.environment.close()


def _begin(
    llm: Sampler,
    problems: Sequence[tuple[int, EpisodeProblem]],
    group_size: int,
    seed: int,
    limits: EpisodeLimits,
    files: TrajectoryFiles,
    logs: Path | None,
) -> Iterator[_Episode]:
    for goal, problem in problems:
        assert llm.prompts is not None, "episodes are in text"
        tokens = llm.prompts.encode(problem.prompt())
        if len(tokens) >= llm.max_model_len:
            raise ValueError(
                f"{problem.key!r} has {len(tokens)} tokens; allowed: fewer than the context's {llm.max_model_len}"
            )
        for place in range(group_size):
            own = stable_hash("episode", seed, goal, place) >> 2
            most = window_of(problem, limits.tokens)
            environment = problem.environment()
            if logs is not None and isinstance(environment, LoggedEnvironment):
                environment.log_to(logs / f"{own:x}.jsonl")
            streams = files.new()
            streams.append("document", tokens)
            yield _Episode(goal, problem, environment, own, most, streams)


def _ended(llm: Sampler, episode: _Episode, limits: EpisodeLimits) -> bool:
    full = episode.num_document >= llm.max_model_len or episode.num_sampled >= episode.most
    return episode.finished or episode.error is not None or episode.turns >= limits.turns or full or _cut(episode)


def _cut(episode: _Episode) -> bool:
    """True if the last turn was cut off: nothing was appended behind its tokens."""
    return episode.end == episode.num_document


def _turns(llm: Sampler, active: Sequence[_Episode], params: SamplingParams, limits: EpisodeLimits) -> None:
    """One turn of each episode."""
    wanted = [
        replace(
            params, n=1, logprobs=True, seed=stable_hash("turn", episode.seed, episode.turns) >> 2,
            max_tokens=min(
                params.max_tokens or episode.most, episode.most - episode.num_sampled,
                llm.max_model_len - episode.num_document,
            ),
        )
        for episode in active
    ]  # fmt: skip
    outputs = llm.generate([episode.streams.read("document").tolist() for episode in active], wanted)
    for episode, output in zip(active, outputs, strict=True):
        _take_turn(llm, episode, output, limits)


def _take_turn(llm: Sampler, episode: _Episode, output: RequestOutput, limits: EpisodeLimits) -> None:
    """Append a turn's tokens as sampled; then, if it calls tools, their results and the beginning of the next turn."""
    from dsv4.data.tasks import parse_tool_calls  # needs the tasks' package

    streams, start = episode.streams, episode.num_document
    streams.append("document", output.token_ids)
    streams.append("log_probabilities", output.logprobs)
    episode.end = episode.num_document
    streams.append("spans", [(start, episode.end)])
    streams.append_masks(output.sampling_masks)
    if (choices := choices_of(output)) is not None:
        streams.append_choices(choices)
    episode.drawn_by = joined_runs((*episode.drawn_by, *drawn_by(output)))
    episode.text = answer_text(llm, output.token_ids)
    if output.finish_reason == "abort":
        episode.error = f"a turn failed: {output.stop_reason}"
    if output.finish_reason != "stop":
        return
    calls = parse_tool_calls(answer_of(episode.text, episode.problem.thinking) or "")
    if calls == []:
        episode.finished = True
        return
    try:
        results = None if calls is None else [_result(episode, call, limits) for call in calls[: limits.calls]]
    except Exception as error:  # an environment is the user's code: the run goes on without this episode
        episode.error = f"the environment of {episode.problem.domain} raised {type(error).__name__}: {error}"
        return
    if calls is not None and results is not None and len(calls) > limits.calls:
        results.append(f"{len(calls)} calls; only the first {limits.calls} were made")
    assert llm.prompts is not None
    streams.append("document", continuation(llm.prompts, results, episode.problem.thinking))


def _result(episode: _Episode, call: dict, limits: EpisodeLimits) -> str:
    episode.calls += 1
    said = episode.environment.call(call["name"], call["arguments"])
    text = said.encode(errors="backslashreplace").decode()  # half of a surrogate pair, of an argument, has no tokens
    return text if len(text) <= limits.result else f"{text[: limits.result]}... (cut)"


def continuation(prompts: PromptEncoder, results: Sequence[str] | None, thinking: bool) -> list[int]:
    """Tokens between two turns: tools' results, or without them a word on unreadable calls; the next turn's beginning.

    They are those of the whole conversation's prompt, and need nothing that came before.
    """
    calls = [ToolCall(str(place), "tool", "{}") for place in range(len(results or ()))]
    messages: list[Message] = [UserMessage("x"), AssistantMessage("", "" if thinking else None, calls or None)]
    if results:
        messages += [ToolMessage(text, call.id) for text, call in zip(results, calls, strict=True)]
    else:
        messages.append(UserMessage(UNREADABLE))
    rendered = prompts.render(Conversation(messages, thinking_mode=thinking, tools=[_ANY]))
    begin = next(stop for start, stop in reversed(rendered.special_ranges) if rendered.prompt[start:stop] == EOS)
    ranges = [(start - begin, stop - begin) for start, stop in rendered.special_ranges if start >= begin]
    return prompts.tokenizer.encode_rendered(rendered.prompt[begin:], ranges)


def _closed(episode: _Episode, temperature: float) -> Trajectory:
    """The episode as a sample, without what follows its last sampled token; its environment is closed."""
    outcome: Explained | None = None
    try:
        answer = answer_of(episode.text, episode.problem.thinking)
        if episode.finished and answer is not None:
            outcome = episode.environment.outcome(answer)
        if isinstance(episode.environment, LoggedEnvironment):
            episode.environment.finish()
    except Exception as error:  # the user's code, too
        episode.error = f"the environment of {episode.problem.domain} raised {type(error).__name__}: {error}"
    finally:
        episode.environment.close()
    return Trajectory(
        episode.goal, episode.end, episode.text, episode.finished, episode.calls, outcome, episode.error,
        episode.streams, episode.drawn_by, temperature,
    )  # fmt: skip
