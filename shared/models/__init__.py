"""Models: int64 [batch, time] -> logits [batch, time, vocab_size], with their settings under `config`."""
