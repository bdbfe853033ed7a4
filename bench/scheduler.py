"""What choosing a step's tokens costs, with few and many requests running and waiting.

python bench/scheduler.py --help
"""

import sys

from radixkv_bench.scheduler.command import main

if __name__ == "__main__":
    sys.exit(main())
