"""Train and evaluate FlashInternImage classifiers."""
