"""CrewAI: its language model alone, and a crew of one agent."""

from typing import Literal

from configuration import model
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool
from pydantic import BaseModel


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


@tool("weather")
def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


def _user(text):
    return {"role": "user", "content": text}


def text():
    return model.call([_user("Hello")])


def turns():
    messages = [_user("Hello")]
    messages += [{"role": "assistant", "content": model.call(messages)}, _user("And you?")]
    return model.call(messages)


def runner():
    """A crew's agent calls its tool."""
    agent = Agent(role="Reporter", goal="Report", backstory="A reporter", llm=model, tools=[weather])
    task = Task(description="Weather in Oslo?", expected_output="A word", agent=agent)
    return Crew(agents=[agent], tasks=[task]).kickoff().raw


def structured():
    found = model.call([_user("A color")], response_model=Color)
    return [(found if isinstance(found, Color) else Color.model_validate_json(found)).model_dump()]


def refused():
    try:
        LLM("none", provider="openai", base_url=model.base_url, api_key="unused").call("Hi")
    except Exception as error:
        return str(error)
