"""Examples → a tuned model: a pure plan, and an engine (torch)."""
