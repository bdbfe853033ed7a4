"""How many lookups a second an index of replicas answers.

python bench/replica_index.py --help
"""

import sys

from radixkv_bench.events.index import main

if __name__ == "__main__":
    sys.exit(main())
