"""Structure: the form that a request wants of its answer, as the engine's constraint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepseek_recipe as recipe

from dsv4.tools import Tool, ToolChoice


@dataclass(frozen=True)
class Structure:
    """Demands of a request on the form of its answer, beside the conversation that deepseek-recipe makes of it.

    `tools`: with the schemas as the request has them (deepseek-recipe drops keywords of strict ones). `schema`: of the
    text, where deepseek-recipe does not read it. `arguments`: ids and arguments of all earlier calls in their order,
    where deepseek-recipe has rounded long integers in them.
    """

    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    schema: Mapping[str, Any] | None = None
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def forces_call(self) -> bool:
        return bool(self.tools) and self.tool_choice not in ("auto", "none")

    @property
    def restricts_calls(self) -> bool:
        """True if an answer with well-formed calls could still be wrong."""
        strict = any(tool.strict or tool.input_grammar is not None for tool in self.tools)
        return bool(self.tools) and (strict or self.tool_choice != "auto" or not self.parallel_tool_calls)

    def conversation(self, given: recipe.Conversation) -> recipe.Conversation:
        """The conversation with the schema, so that the prompt has it, and with all digits of earlier calls."""
        if self.schema is None and not self.arguments:
            return given
        schema = given.response_schema if self.schema is None else dict(self.schema)
        return recipe.Conversation(
            _with_arguments(given.messages, self.arguments),
            thinking_mode=given.thinking_mode,
            tools=given.tools,
            tool_choice=given.tool_choice,
            reasoning_effort=given.reasoning_effort,
            # With a schema or a regular expression the constructor wants the format "text".
            response_format="json_object" if given.response_format == "json_object" else "text",
            response_schema=schema,
            response_regex=given.response_regex,
        )

    def constraint(self, conversation: recipe.Conversation, in_block: bool) -> dict[str, Any]:
        """Fields of SamplingParams; none if any answer will do. `in_block`: the prompt has opened the block of calls.

        Calls are only constrained where the request asks for more than what every answer's parser sees to.
        """
        fields: dict[str, Any] = {}
        if conversation.response_format == "json_object":
            fields["json_object"] = True
        elif conversation.response_format == "json_schema":
            fields["json_schema"] = conversation.response_schema
        elif conversation.response_format == "regex":
            fields["regex"] = conversation.response_regex
        tools = _offered(self.tools, conversation.tools)
        if self.restricts_calls or (fields and tools):
            fields |= {
                "tools": tools,
                "tool_choice": self.tool_choice if tools else "none",
                "parallel_tool_calls": self.parallel_tool_calls,
                "tool_block_open": in_block,
            }
        return fields


def _offered(tools: Sequence[Tool], offered: Sequence[recipe.ToolDefinition]) -> tuple[Tool, ...]:
    """The tools that the prompt describes."""
    names = {tool.name for tool in offered}
    return tuple(tool for tool in tools if tool.name in names)


def _with_arguments(messages: Sequence[recipe.Message], arguments: Sequence[tuple[str, str]]) -> list[recipe.Message]:
    """The messages with these arguments of their calls; unchanged if the calls are others."""
    if [call.id for message in messages for call in message.tool_calls or ()] != [call_id for call_id, _ in arguments]:
        return list(messages)
    given = iter(arguments)
    changed: list[recipe.Message] = []
    for message in messages:
        if isinstance(message, recipe.AssistantMessage) and message.tool_calls:
            calls = [recipe.ToolCall(call.id, call.name, next(given)[1]) for call in message.tool_calls]
            message = recipe.AssistantMessage(message.content, message.reasoning_content, calls, message.prefix)
        changed.append(message)
    return changed
