"""Which ways to deal a model out to GPUs load and fit."""
