"""What an answer must look like, as a grammar that an engine decodes by."""
