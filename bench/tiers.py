"""What tiers below the pool bring, and what they cost: restarts, small pools, nothing to find, slow media.

python bench/tiers.py --help
"""

import sys

from radixkv_bench.tiers.command import main

if __name__ == "__main__":
    sys.exit(main())
