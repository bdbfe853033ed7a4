"""Replicas that die and join while sessions go on: is anything lost, wrong, or computed again?

python bench/cluster.py --help
"""

import sys

from radixkv_bench.cluster.command import main

if __name__ == "__main__":
    sys.exit(main())
