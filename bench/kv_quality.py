"""What quantised KV costs in quality: perplexity, logits and greedy tokens, against KV in the model's own dtype.

python bench/kv_quality.py --help
"""

import sys

from radixkv_bench.quality.command import main

if __name__ == "__main__":
    sys.exit(main())
