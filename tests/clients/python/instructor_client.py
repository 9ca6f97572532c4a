"""instructor."""

from typing import Literal

import instructor
from configuration import client
from pydantic import BaseModel

OPTIONS = {"model": "deepseek-flash", "messages": [{"role": "user", "content": "A color as JSON"}], "max_retries": 0}


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


def _using(mode):
    return instructor.from_openai(client.client, mode=mode)


def structured_tools():
    """Forced calls: the default mode, whole and in parts, and strict tools."""
    whole = client.create(response_model=Color, **OPTIONS)
    *_, streamed = client.create_partial(response_model=Color, **OPTIONS)
    strict = _using(instructor.Mode.TOOLS_STRICT).create(response_model=Color, **OPTIONS)
    return [found.model_dump() for found in (whole, streamed, strict)]


def structured():
    return [_using(instructor.Mode.JSON_SCHEMA).create(response_model=Color, **OPTIONS).model_dump()]


def json_mode():
    return _using(instructor.Mode.JSON).create(response_model=Color, **OPTIONS).model_dump()


def refused():
    try:
        client.create(response_model=Color, **OPTIONS | {"model": "none"})
    except Exception as error:
        return str(error)
