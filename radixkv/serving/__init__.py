"""HTTP in front of an `AsyncEngine`: OpenAI's and Anthropic's interfaces, the cache's own, tenants and metrics.

Needs the packages of `pip install 'radixkv[serve]'`; `radixkv.serving.requirements` alone can be imported without them.
"""
