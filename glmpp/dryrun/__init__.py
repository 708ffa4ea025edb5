"""What asks the installed vLLM, in processes of their own, and what it answered."""
