"""Training and evaluation of FlashInternImage classifiers."""
