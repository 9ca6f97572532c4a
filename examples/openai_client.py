"""Client of `dsv4 serve` with the openai package, streamed."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
stream = client.chat.completions.create(
    model="dsv4-nano",
    messages=[{"role": "user", "content": "What is 12 + 30?"}],
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="")
print()
