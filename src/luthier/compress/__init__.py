"""A model → a smaller, faster one."""
