"""Adapters for other libraries. The package itself imports none of them, so each may need its library."""
