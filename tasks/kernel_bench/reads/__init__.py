"""Rows of Q, K and V that attention loads from global memory, counted (program ``count_reads``)."""
