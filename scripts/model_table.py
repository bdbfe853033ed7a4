#!/usr/bin/env python3
"""Try every family of transformers on the engine, and write docs/models.md.

python scripts/model_table.py [--json FILE.json] [--family llama …]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from radixkv_bench.models.command import main

if __name__ == "__main__":
    sys.exit(main())
