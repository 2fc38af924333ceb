"""One way to ask any model: a local engine, an OpenAI-compatible endpoint, the scripted model of the tests."""
