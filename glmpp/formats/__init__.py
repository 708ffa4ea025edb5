"""What lies on disk and on the Hub: safetensors headers and shards, indexes, configs, GLM-5's names."""
