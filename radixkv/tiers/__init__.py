"""Where KV is kept below the pool: stores of pages on disk, in host memory, or shared by replicas."""
