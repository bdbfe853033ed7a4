"""Tiers below the pool: what a store on disk reads and writes, against one file of the same bytes.

python bench/tiers.py --help
"""

import sys

from radixkv_bench.tiers.command import main

if __name__ == "__main__":
    sys.exit(main())
