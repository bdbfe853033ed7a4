"""What publishing KV events costs an engine that decodes, with a consumer that reads and with one that does not.

python bench/kv_events.py --help
"""

import sys

from radixkv_bench.events.cost import main

if __name__ == "__main__":
    sys.exit(main())
