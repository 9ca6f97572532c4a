"""outlines, whose types become response formats."""

import json
from typing import Literal

from configuration import model
from pydantic import BaseModel


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


def text():
    return model("Hello")


def structured():
    whole, streamed = model("A color", Color), "".join(model.stream("A color", Color))
    return [json.loads(whole), json.loads(streamed)]


def refused():
    try:
        model("Hi", model="none")
    except Exception as error:
        return str(error)
