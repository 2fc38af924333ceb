"""Everything of compression that needs torch or gguf."""
