"""A conversation, forked: the branches share every page up to the fork.

python examples/sessions.py
"""

import radixkv

engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=16384)
params = radixkv.SamplingParams(max_tokens=40, temperature=0.8, seed=1)

with engine.session(system="You are a citizen of Rome.") as chat:
    print("A:", chat.send("Who are you, and what do you want?", params).text)
    branch = chat.fork()
    for name, session, question in (("left", chat, "Where is Caesar?"), ("right", branch, "Who is your wife?")):
        reply = session.send(question, params)
        print(f"{name}: {reply.text}   [{reply.cached_tokens} of {reply.prompt_tokens} prompt tokens were cached]")
    print(chat.kv_usage())
