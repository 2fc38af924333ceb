"""Everything of training that needs torch."""
