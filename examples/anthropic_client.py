"""Client of `dsv4 serve` with the anthropic package: thinking, then the answer.

Start the server first: `make serve`. DSV4_URL is the server's address if it has another. `make test` installs the
package, as does `.venv/bin/pip install anthropic`.
"""

import os
import sys

try:
    from anthropic import Anthropic
except ModuleNotFoundError:
    sys.exit("the anthropic package is not installed: .venv/bin/pip install anthropic")

url = os.environ.get("DSV4_URL", "http://127.0.0.1:8000")
client = Anthropic(base_url=f"{url}/anthropic", api_key="none")
message = client.messages.create(
    model="dsv4-nano",
    max_tokens=512,
    messages=[{"role": "user", "content": "What is 12 + 30?"}],
)
for block in message.content:
    print(block)
