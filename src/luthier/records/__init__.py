"""The nouns of Luthier: frozen records without input or output."""
