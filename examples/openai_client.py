"""Client of `dsv4 serve` with the openai package, streamed.

Start the server first: `make serve`. DSV4_URL is the server's address if it has another. `make test` installs the
package, as does `.venv/bin/pip install openai`.
"""

import os
import sys

try:
    from openai import OpenAI
except ModuleNotFoundError:
    sys.exit("the openai package is not installed: .venv/bin/pip install openai")

url = os.environ.get("DSV4_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="none")
stream = client.chat.completions.create(
    model="dsv4-nano",
    messages=[{"role": "user", "content": "What is 12 + 30?"}],
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="")
print()
