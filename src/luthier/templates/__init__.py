"""The renderer: examples → messages (handlebars) → tokens and loss mask (chat formats)."""
