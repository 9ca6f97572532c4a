"""Continue prompts as plain text, several at a time, with log-probabilities."""

import dsv4

llm = dsv4.LLM()  # the embedded nano model; or dsv4.LLM("path/to/model")
params = dsv4.SamplingParams(max_tokens=16, temperature=0.0, logprobs=True)
for output in llm.generate(["1, 2, 3,", "def add(a, b):\n    return"], params):
    print(repr(output.text), output.finish_reason, f"{sum(output.logprobs):.2f}")
