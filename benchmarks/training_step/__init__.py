"""Time and memory of a training step, ours beside float and other libraries: `python -m benchmarks.training_step`."""
