"""The radix tree's cost, and the estimate of hit rates at other cache sizes."""
