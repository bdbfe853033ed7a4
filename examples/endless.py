"""An output far beyond the window, in constant memory: attention sinks and a window (StreamingLLM).

python examples/endless.py
"""

import radixkv

engine = radixkv.Engine.from_pretrained("demo", sinks=4, window=252, kv_cache_tokens=512)
params = radixkv.SamplingParams(max_tokens=2_000, temperature=0.8, top_p=0.95, seed=0, ignore_eos=True)
for chunk in engine.stream("ROMEO:\n", params):
    print(chunk.text, end="", flush=True)

stats = engine.stats()
print(f"\n\n{stats.generated_tokens:,} tokens, {stats.pool_bytes / 1e6:.2f} MB of KV in all")
