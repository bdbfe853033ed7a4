"""Anthropic's client against `radixkv serve demo`: a system prompt that is kept for five minutes, and a stream.

pip install anthropic; radixkv serve demo; python examples/serving_anthropic.py
"""

import sys

from anthropic import Anthropic

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = Anthropic(base_url=address, api_key="none")
SYSTEM = [
    {
        "type": "text",
        "text": "Before we proceed any further, hear me speak. " * 20,
        "cache_control": {"type": "ephemeral", "ttl": "5m"},
    }
]

for question in ("Who is the king?", "Where is the crown?"):  # the second finds the system prompt cached
    messages = [{"role": "user", "content": question}]
    message = client.messages.create(model="demo", max_tokens=24, system=SYSTEM, messages=messages)
    usage = message.usage
    print(f"{question!r}: {message.content[0].text!r}")
    print(f"  read from the cache {usage.cache_read_input_tokens}, written {usage.cache_creation_input_tokens} tokens")

print("a stream: ", end="")
with client.messages.stream(
    model="demo", max_tokens=32, messages=[{"role": "user", "content": "ROMEO, speak!"}]
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()
