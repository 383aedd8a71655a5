"""What optimizers do to training, one question each: `python -m benchmarks.experiments.NAME`."""
