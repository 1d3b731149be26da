"""GPT-2 trained from scratch with softmax and alpha-entmax attention (AdaSplash, table 4, figures 4 and 6)."""
