"""The HTTP door: parse, one workflow call, present."""
