"""Evaluation of text-to-image pipelines on sets of prompts: suites, their pictures, their tables."""
