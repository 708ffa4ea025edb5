"""Hardware and neighbours that are not there: GPUs, their driver, other ranks, values."""
