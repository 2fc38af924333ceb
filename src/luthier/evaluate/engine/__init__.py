"""Everything of evaluation that needs torch."""
