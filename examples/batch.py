"""Many questions on one preamble in one call: the preamble is computed once.

python examples/batch.py
"""

import radixkv

PREAMBLE = "Before we proceed any further, hear me speak. " * 40
QUESTIONS = ("What is the city", "Who is the king", "Where is the crown", "Why do you weep")

engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=16384)
outputs = engine.generate([PREAMBLE + question for question in QUESTIONS], radixkv.SamplingParams(max_tokens=24))
for question, output in zip(QUESTIONS, outputs, strict=True):
    print(f"{question!r}: {output.text!r}   [{output.cached_tokens} of {output.prompt_tokens} tokens were cached]")
print(f"hit rate {engine.stats().hit_rate:.0%}")
