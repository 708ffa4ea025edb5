"""What runs in a fork of the process that has imported vLLM: it builds a stage, loads it, and says what it saw."""
