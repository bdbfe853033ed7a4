"""Five ways to lay KV out in memory, over one workload: what each of them holds, wastes and copies, and what fits.

python bench/layouts.py --help
"""

import sys

from radixkv_bench.layouts.command import main

if __name__ == "__main__":
    sys.exit(main())
