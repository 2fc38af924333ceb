"""Outside data → examples: readers, splitting."""
