"""The parts of bench/gpu_check.py that no other command covers: the engine on a GPU, and shared prompts there.

python bench/gpu_parts.py engine|shared-prompt FILE.json
"""

import sys

from radixkv_bench.gpu.parts import main

if __name__ == "__main__":
    sys.exit(main())
