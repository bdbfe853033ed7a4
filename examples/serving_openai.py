"""OpenAI's client against `radixkv serve demo`: what was cached, a stream, and an answer of a given form.

pip install openai; radixkv serve demo; python examples/serving_openai.py
"""

import json
import sys

from openai import OpenAI

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{address}/v1", api_key="none")
SYSTEM = {"role": "system", "content": "Before we proceed any further, hear me speak. " * 20}

for question in ("Who is the king?", "Where is the crown?"):  # the second finds the system prompt cached
    messages = [SYSTEM, {"role": "user", "content": question}]
    answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=24)
    usage = answer.usage
    print(f"{question!r}: {answer.choices[0].message.content!r}")
    print(f"  {usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} tokens were cached")

print("a stream: ", end="")
for chunk in client.completions.create(model="demo", prompt="ROMEO:", max_tokens=32, stream=True):
    print(chunk.choices[0].text if chunk.choices else "", end="", flush=True)
print()

schema = {
    "type": "object",
    "properties": {"speaker": {"enum": ["ROMEO", "JULIET"]}, "lines": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["speaker", "lines"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model="demo",
    messages=[{"role": "user", "content": "Who speaks?"}],
    max_tokens=64,
    response_format={"type": "json_schema", "json_schema": {"name": "speech", "schema": schema}},
)
print(f"as JSON: {json.loads(answer.choices[0].message.content)}")
