"""What the HTTP server costs and brings: against `transformers serve`, against the engine alone, and under load.

python bench/serving.py --help
"""

import sys

from radixkv_bench.serving.command import main

if __name__ == "__main__":
    sys.exit(main())
