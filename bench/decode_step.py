"""A whole model's decode step against the time to read its weights and KV, and against Hugging Face's generate.

python bench/decode_step.py --help
"""

import sys

from radixkv_bench.decode.command import main

if __name__ == "__main__":
    sys.exit(main())
