"""Run a compiled backbone through the API of transformers' backbones."""
