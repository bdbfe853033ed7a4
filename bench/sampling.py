"""What it costs to change logits before a token is chosen, against the choice alone.

python bench/sampling.py --help
"""

import sys

from radixkv_bench.sampling.command import main

if __name__ == "__main__":
    sys.exit(main())
