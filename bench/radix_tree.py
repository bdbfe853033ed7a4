"""What the radix tree costs: each operation as the tree grows, matches against memcpy, metadata, a trace.

python bench/radix_tree.py --help
"""

import sys

from radixkv_bench.tree.command import main

if __name__ == "__main__":
    sys.exit(main())
