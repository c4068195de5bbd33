"""Models. Each takes ids int64 [batch, time] and gives logits [batch, time, vocab_size], and knows its
`config`.
"""
