"""alpha-entmax attention: exact sparse attention weights, computed without storing the score matrix.

from adasplash_kernels import entmax_attention
out = entmax_attention(q, k, v, alpha=1.5, causal=True)
"""

from .attention import entmax_attention
from .rowwise import entmax
from .support import SupportMap, support_map

__all__ = ["SupportMap", "entmax", "entmax_attention", "support_map"]
__version__ = "0.1.0"
