"""The command line: parse, one workflow call, present."""
