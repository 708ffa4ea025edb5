"""What runs in a worker of a real vLLM, and nothing else: the load format, what it watches, and the fixes."""
