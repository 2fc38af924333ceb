"""Engines that run models on this machine; the only place of ``llm`` that imports heavy libraries."""
