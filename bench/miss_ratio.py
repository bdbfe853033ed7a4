"""How well the hit rates of caches of other sizes are estimated from live traffic, against replays of each size.

python bench/miss_ratio.py --help
"""

import sys

from radixkv_bench.tree.miss_ratio import main

if __name__ == "__main__":
    sys.exit(main())
