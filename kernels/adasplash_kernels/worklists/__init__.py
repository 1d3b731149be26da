"""Which keys a block of queries has left to visit, and which queries a block of keys. One module a kind of list."""
