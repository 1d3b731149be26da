"""How the threshold of each query is found. One module a method; each writes theta (B, H, N_q) float32."""
