"""Week 1. Texts and tokens to learn from."""
