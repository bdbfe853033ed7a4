"""StreamingLLM: perplexity far beyond a model's context, and generation without end, in constant memory.

python bench/streaming.py --help
"""

import sys

from radixkv_bench.streaming.command import main

if __name__ == "__main__":
    sys.exit(main())
