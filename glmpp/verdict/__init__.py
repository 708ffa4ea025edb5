"""What asks the installed vLLM, in processes of its own, and what it answered."""
