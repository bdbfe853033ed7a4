"""What a store on disk reads and writes, against one file of the same bytes.

python bench/tiers_store.py --help
"""

import sys

from radixkv_bench.tiers_store.command import main

if __name__ == "__main__":
    sys.exit(main())
