"""Running a lowered Program: the KV cache, calls, generation, artifacts, export."""
