"""Every architecture of a vLLM release, tried with tiny checkpoints: does it load at PP=2 and 3, and with the same bytes?"""
