"""What it costs a prefill to keep states of recurrent layers on its way.

python bench/states.py --help
"""

import sys

from radixkv_bench.states.command import main

if __name__ == "__main__":
    sys.exit(main())
