"""Graders: pure scoring of one sample; whoever calls it brings the models and the sandbox."""
