"""Paged attention against what the machine can do: each backend, plain and over shared prefixes, sizes swept.

python bench/attention.py --help
"""

import sys

from radixkv_bench.attention.command import main

if __name__ == "__main__":
    sys.exit(main())
