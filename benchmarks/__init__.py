"""What is measured, each with its peers: `python -m benchmarks.NAME`. README.md has the results."""
