"""Training conversations to token ids and a loss mask.

The ids are exactly those of inference: the prompt of `PromptEncoder.encode`, then the completion. The mask is 1 on the
model's own tokens (reasoning, answer, tool calls and the EOS after them), 0 on tokens of the template or another role.
Earlier assistant turns carry loss if the prompt shows them as they were generated: without thinking mode, or in
thinking mode with tools; elsewhere their thinking is dropped and they are only context.
"""

from collections.abc import Collection

from deepseek_recipe import AssistantMessage, Conversation

from dsv4.tokenizer.long_integers import Rendered
from dsv4.tokenizer.prompts import PromptEncoder, with_messages
from dsv4.tokenizer.special import EOS

FILLER = "."


def encode_training(
    prompts: PromptEncoder,
    conversation: Conversation,
    target: AssistantMessage,
    letterwise: bool = False,
    context: Collection[int] = (),
) -> tuple[list[int], list[int]]:
    """Encode a conversation and the assistant turn that answers it as (ids, mask); mask 1 marks tokens with loss.

    In thinking mode a turn without reasoning (None or "") has an empty think block. `letterwise`: the answer's
    characters are encoded one by one, so that the model learns to write it letter by letter. `context`: assistant turns
    of the conversation, counted from 0, that carry no loss. Raises ValueError if the conversation awaits no answer, or
    if the answer has reasoning and the conversation is not in thinking mode.
    """
    last = conversation.messages[-1] if conversation.messages else None
    if last is None or last.role == "assistant":
        found = "is empty" if last is None else "ends with an assistant turn"
        raise ValueError(f"the conversation {found}: it must await an answer to be trained on")
    if target.reasoning_content and not conversation.thinking_mode:
        raise ValueError("the answer has reasoning, but the conversation is without thinking: leave the reasoning out")
    prompt = prompts.render(conversation)
    written_as = _completion(prompts, conversation, target, prompt)
    if written_as is None:
        raise ValueError("the answer's rendering does not continue the prompt's: the last message must await an answer")
    completion, ranges = written_as
    ids, mask = _encode_prompt(prompts, conversation, prompt, context)
    if letterwise:
        if target.tool_calls:
            raise ValueError("letterwise: an answer with tool calls cannot be encoded letter by letter")
        head = len(completion) - len(target.content)
        written = prompts.tokenizer.encode_rendered(completion[:head], ranges)
        written += [i for c in target.content for i in prompts.tokenizer.encode(c)]
    else:
        written = prompts.tokenizer.encode_rendered(completion, ranges)
    written.append(prompts.tokenizer.eos_token_id)
    return ids + written, mask + [1] * len(written)


def _completion(
    prompts: PromptEncoder, conversation: Conversation, target: AssistantMessage, prompt: Rendered
) -> tuple[str, list[tuple[int, int]]] | None:
    """Model's text after `prompt`, without EOS, and its special ranges; None if it does not continue `prompt`."""
    # A prefix turn is rendered as the model would write it, thinking included, and left open. A prefix turn without
    # content counts as unfinished thinking, so empty content is rendered as a filler, which is then cut out.
    content = target.content or FILLER
    reasoning = target.reasoning_content if conversation.thinking_mode else None
    open_turn = AssistantMessage(content, reasoning, target.tool_calls, prefix=True)
    whole = prompts.render(with_messages(conversation, [*conversation.messages, open_turn]))
    if not whole.prompt.startswith(prompt.prompt):
        return None
    start = len(prompt.prompt)
    text = whole.prompt[start:]
    ranges = [(a - start, b - start) for a, b in whole.special_ranges if a >= start]
    if target.content:
        return text, ranges
    # The content starts after </think>, which the prompt already holds without thinking mode.
    cut = ranges[0][1] if conversation.thinking_mode else 0
    assert text[cut] == FILLER
    return text[:cut] + text[cut + 1 :], [(a - (a > cut), b - (b > cut)) for a, b in ranges]


def _encode_prompt(
    prompts: PromptEncoder, conversation: Conversation, prompt: Rendered, context: Collection[int]
) -> tuple[list[int], list[int]]:
    """Encode the prompt as (ids, mask), with loss on earlier assistant turns that it shows as generated."""
    pieces: list[tuple[int, int, int]] = []  # start, stop and mask
    messages, turns, reached = conversation.messages, 0, 0
    for i, message in enumerate(messages):
        if not isinstance(message, AssistantMessage):
            continue
        before = with_messages(conversation, messages[:i])
        asked = prompts.render(before)
        written = _completion(prompts, before, message, asked)
        if written is not None and prompt.prompt.startswith(asked.prompt + written[0] + EOS):
            start = len(asked.prompt)
            stop = start + len(written[0]) + len(EOS)
            pieces += [(reached, start, 0), (start, stop, int(turns not in context))]
            reached = stop
        turns += 1
    pieces.append((reached, len(prompt.prompt), 0))
    ids: list[int] = []
    mask: list[int] = []
    # Turns start after <think> or </think> and end with EOS, so no text that is tokenized together is split.
    for start, stop, learned in pieces:
        ranges = [(a - start, b - start) for a, b in prompt.special_ranges if start <= a and b <= stop]
        piece = prompts.tokenizer.encode_rendered(prompt.prompt[start:stop], ranges)
        ids += piece
        mask += [learned] * len(piece)
    return ids, mask
