"""What the notebooks show: figures, verdict lines, the exercise, measures of error, a forward pass."""
