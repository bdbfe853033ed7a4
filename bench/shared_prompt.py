"""What it brings to compute a shared prefix once: radixkv against no cache, and against Hugging Face's own ways.

python bench/shared_prompt.py --help
"""

import sys

from radixkv_bench.shared_prompt.command import main

if __name__ == "__main__":
    sys.exit(main())
