"""Kernels measured side by side: time, memory and error of every attention system on the same inputs."""
