"""Compare all algorithms: read finished runs, compute, draw, write. Imports no torch."""
