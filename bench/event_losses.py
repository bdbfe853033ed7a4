"""Whether a consumer's index equals the caches, after losses and restarts on both sides.

python bench/event_losses.py --help
"""

import sys

from radixkv_bench.events.losses import main

if __name__ == "__main__":
    sys.exit(main())
