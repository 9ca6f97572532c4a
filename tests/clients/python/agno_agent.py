"""Agno's agents."""

from typing import Literal

from agno.agent import Agent
from agno.db.in_memory import InMemoryDb
from configuration import model
from pydantic import BaseModel


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


def _agent(**options):
    return Agent(model=model, telemetry=False, **options)


def _shown(run, text):
    return {"text": text, "reasoning": run.reasoning_content, "tokens": run.metrics.total_tokens}


def chat():
    run = _agent().run("Hello")
    return _shown(run, run.content)


def _streamed(agent, question):
    text = ""
    for event in agent.run(question, stream=True, yield_run_output=True):
        if type(event).__name__ == "RunContentEvent":
            text += event.content or ""
    return event, text


def stream():
    return _shown(*_streamed(_agent(), "Hello"))


def turns():
    agent = _agent(db=InMemoryDb(), add_history_to_context=True)
    agent.run("Hello", session_id="1")
    return agent.run("And you?", session_id="1").content


def tools():
    agent = _agent(tools=[weather], db=InMemoryDb(), add_history_to_context=True)
    return [agent.run(question, session_id="1").content for question in ("Weather in Oslo?", "And tomorrow?")]


def streamed_tools():
    return _streamed(_agent(tools=[weather]), "Weather in Oslo?")[1]


def structured():
    return [_agent(output_schema=Color, use_json_mode=False).run("A color").content.model_dump()]


def json_mode():
    return _agent(output_schema=Color, use_json_mode=True).run("A color").content.model_dump()
