"""DSPy: its language model alone, and modules on it."""

from typing import Literal

import dspy
from configuration import lm


class Paint(dspy.Signature):
    """A color"""

    question: str = dspy.InputField()
    color: Literal["red", "blue"] = dspy.OutputField()


def chat():
    (answer,) = lm("Hello", cache=False)
    tokens = dict(lm.history[-1]["usage"])["total_tokens"]
    return {"text": answer["text"], "reasoning": answer["reasoning_content"], "tokens": tokens}


def turns():
    messages = [{"role": "user", "content": "Hello"}]
    (answer,) = lm(messages=messages, cache=False)
    messages += [{"role": "assistant", "content": answer["text"]}, {"role": "user", "content": "And you?"}]
    return lm(messages=messages, cache=False)[0]["text"]


def json_mode():
    """DSPy knows nothing of the model, so it asks for JSON in the prompt alone."""
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        return {"color": dspy.Predict(Paint)(question="A color as JSON").color}


def refused():
    try:
        lm.copy(model="openai/none")("Hi", cache=False)
    except Exception as error:
        return str(error)
