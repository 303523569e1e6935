"""attending."""
