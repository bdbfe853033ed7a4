"""What drafts from the cache bring: tokens a step on a trace, the speed of models, and the cost of drafting.

python bench/speculation.py --help
"""

import sys

from radixkv_bench.speculation.command import main

if __name__ == "__main__":
    sys.exit(main())
