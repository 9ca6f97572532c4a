"""Client of `dsv4 serve` with the anthropic package: thinking, then the answer."""

from anthropic import Anthropic

client = Anthropic(base_url="http://127.0.0.1:8000/anthropic", api_key="none")
message = client.messages.create(
    model="dsv4-nano",
    max_tokens=512,
    messages=[{"role": "user", "content": "What is 12 + 30?"}],
)
for block in message.content:
    print(block)
