"""The fault table: what happens to a training when things go wrong. `make faults`, or `python -m benchmarks.faults`."""
