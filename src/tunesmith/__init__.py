"""tunesmith: fine-tune a small open model on your examples, with proof that it beats prompting."""

__version__ = "0.1.0"
