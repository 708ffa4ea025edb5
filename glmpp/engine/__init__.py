"""What runs inside a process that has vLLM. Of this only `contract` is imported where vLLM may be missing."""
