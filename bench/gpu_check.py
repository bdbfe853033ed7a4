"""All that a machine with an NVIDIA GPU can show, in one call of less than nine minutes. Run by scripts/gpu_check.

python bench/gpu_check.py [FILE.json]
"""

import sys

from radixkv_bench.gpu.check import main

if __name__ == "__main__":
    sys.exit(main())
